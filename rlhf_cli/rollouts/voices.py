"""Who answers the questions to a judge: its weights here, or a vLLM server that holds them.

A server is asked what it would write next, and tells the log-probabilities of the labels' first tokens, however
unlikely they are; where a label has several tokens, it is asked again behind each of them. So labels are read exactly,
and what a question is asked again comes from the server's prefix cache. Several processes deal the questions out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.data.shares import shares
from rlhf_cli.data.tokens import Sample, length
from rlhf_cli.models import processes
from rlhf_cli.models.base import Text
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.judge import JudgeSettings
from rlhf_cli.rollouts.rewards import Infer
from rlhf_cli.rollouts.server import Http, key_of
from rlhf_cli.rollouts.vllm import Server
from rlhf_cli.rollouts.vllm_answers import PATH, of_next

Voice = Callable[[Sequence[Sample]], list[Tensor]]
"""Log-probabilities of the answers' tokens (T,), answer after answer, of each question."""
FOLDER = "judge-adapter"


def own_voice(role: Role, infer: Infer) -> Voice:
    """Weights here."""
    return lambda questions: infer(role, questions, lambda batch: role.logp(batch, statistics="none").logp, "token")


@dataclass(frozen=True)
class ServedVoice:
    """Weights of a server."""

    server: Server
    at_once: int
    """Questions that it is asked at a time."""

    def __call__(self, questions: Sequence[Sample]) -> list[Tensor]:
        """Raises ModelError: no server, another answer than asked."""
        if processes.count() == 1:
            return self._said(questions)
        costs, families = [float(length(one)) for one in questions], range(len(questions))
        mine = shares(costs, families, processes.count())[processes.rank()]

        def work() -> list[Any]:
            said = self._said([questions[i] for i in mine])
            return [[i, part.tolist()] for i, part in zip(mine, said, strict=True)]

        every = [entry for told in processes.together(work, "asking the judge") for entry in told]
        found = {i: torch.tensor(numbers, dtype=torch.float64) for i, numbers in every}
        return [found[i] for i in range(len(questions))]

    def _said(self, questions: Sequence[Sample]) -> list[Tensor]:
        """By this process."""
        if not questions:
            return []
        with ThreadPoolExecutor(min(self.at_once, len(questions))) as pool:
            waiting = [pool.submit(self._answers, question) for question in questions]
            try:
                return [torch.tensor(one.result(), dtype=torch.float64) for one in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _answers(self, question: Sample) -> list[float]:
        answers = [answer.ids.tolist() for answer in question.completions]
        steps = [(tuple(ids[:n]), ids[n]) for ids in answers for n in range(len(ids))]
        found = {before: self._next([*question.prompt.tolist(), *before], [i for b, i in steps if b == before])
                 for before in dict.fromkeys(before for before, _ in steps)}  # fmt: skip
        return [found[before][token] for before, token in steps]

    def _next(self, ids: list[int], tokens: list[int]) -> dict[int, float]:
        """Log-probabilities of such tokens behind these ids."""
        wanted = sorted(set(tokens))
        said = self.server.http.post(PATH, _request(self.server.model, ids, wanted))
        return of_next(said, self.server.http, ids, wanted)


def served_voice(settings: JudgeSettings, text: Text, context: int, run: Path) -> ServedVoice:
    """The server of a recipe's judge, checked; of an adapter, the server is told where it lies. context: tokens of the
    longest question with its answer. Raises RecipeError: no key; ModelError: no such server."""
    assert settings.server is not None, "a rule of the recipe"
    key = key_of(settings.api_key_env, "judge.api_key_env")
    http = Http(settings.server.rstrip("/"), settings.server_timeout, key, "judge.server",
                f"start it: vllm serve {text.source}", "then the same command goes on after the last whole piece",
                )  # fmt: skip
    mark = f"rlhf-judge-{hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:8]}-"
    server = Server(http, run / FOLDER, mark, sleeps=False)
    server.check(text.source, context)
    server.model = server.base
    if text.path.kind == "adapter":
        assert text.path.weights is not None
        folder = text.path.weights.absolute()
        server.model = processes.first(lambda: server.lend(folder), "handing the judge's adapter to the server")
    return ServedVoice(server, settings.max_batch)


def _request(model: str, ids: list[int], tokens: list[int]) -> dict[str, Any]:
    """How probable each of some tokens is behind these; the one that is drawn is not looked at."""
    return {
        "model": model, "prompt": ids, "n": 1, "max_tokens": 1, "min_tokens": 0, "stream": False, "echo": False,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": len(tokens), "logprob_token_ids": tokens,
        "return_tokens_as_token_ids": True, "add_special_tokens": False, "return_token_ids": True,
    }  # fmt: skip
