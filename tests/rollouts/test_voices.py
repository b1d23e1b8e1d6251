"""A judge by a server: what it is asked about labels of several tokens, and how long its questions may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from rlhf_cli.data.tokens import Completion, Sample, length
from rlhf_cli.errors import ModelError
from rlhf_cli.models.base import load_text
from rlhf_cli.recipe.settings.judge import JudgeSettings
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.voices import ServedVoice, served_voice
from tests.rollouts.stand_in import StandIn

PROMPT = [1, 40, 41]
ANSWERS = ([7, 5, 6], [7, 5, 9], [8], [7])
"""Labels that begin alike, and one that is the beginning of others."""


def question(answers: Sequence[Sequence[int]] = ANSWERS, prompt: Sequence[int] = PROMPT) -> Sample:
    made = [Completion(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in answers]
    return Sample(np.array(prompt, np.int32), tuple(made), {}, "a question")


class Telling:
    """A server that makes a number of what stands before a token, and of the token."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def number(self, before: Sequence[int], token: int) -> float:
        return -float(sum(i * t for i, t in enumerate([*before, token], 1))) / 100

    def post(self, path: str, body: dict[str, Any]) -> Any:
        self.asked.append((*body["prompt"], -1, *body["logprob_token_ids"]))
        top = {f"token_id:{t}": self.number(body["prompt"], t) for t in [90, *body["logprob_token_ids"]]}
        return {"choices": [{"logprobs": {"top_logprobs": [top]}, "prompt_token_ids": body["prompt"]}]}


def test_every_token_of_a_label_is_read_behind_those_before_it() -> None:
    telling = Telling()
    voice = ServedVoice(cast("Any", SimpleNamespace(http=telling, model="judge")), 2)
    (found,) = voice([question()])
    wanted = [telling.number([*PROMPT, *ids[:n]], ids[n]) for ids in ANSWERS for n in range(len(ids))]
    assert found.tolist() == pytest.approx(wanted, abs=0)
    asked = [(*PROMPT, -1, 7, 8), (*PROMPT, 7, -1, 5), (*PROMPT, 7, 5, -1, 6, 9)]
    assert telling.asked == asked, "what labels have in common once"


def test_questions_stay_in_order() -> None:
    telling = Telling()
    voice = ServedVoice(cast("Any", SimpleNamespace(http=telling, model="judge")), 3)
    asked = [question([[token]]) for token in range(10, 30)]
    found = torch.cat(voice(asked)).tolist()
    assert found == [telling.number(PROMPT, token) for token in range(10, 30)]
    assert voice([]) == []


@pytest.mark.parametrize("more", [0, 1])
def test_a_server_takes_as_many_tokens_as_the_longest_question(stand_in: StandIn, tmp_path: Path, more: int) -> None:
    """With its answer, whose last token is not sent but drawn: exactly so many are enough."""
    model = ModelSettings(name_or_path=stand_in.root)
    judge = JudgeSettings(model=model, question="{a} or {b}?", engine="vllm", server=stand_in.address)
    text = load_text(model)
    longest = question([[7, 5]], [40] * (stand_in.context + more - 2))
    if more:
        with pytest.raises(ModelError, match=f"takes sequences of {stand_in.context} tokens .* has {length(longest)}"):
            served_voice(judge, text, length(longest), tmp_path)
        return
    (numbers,) = served_voice(judge, text, length(longest), tmp_path)([longest])
    assert len(numbers) == 2
