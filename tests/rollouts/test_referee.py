"""The judge: label probabilities read right, both orders, questions filled safely, clear words for what cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.examples import Message
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import load_frozen
from rlhf_cli.recipe.settings.judge import JudgeSettings
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.referee import Match, Opinion, Referee, fill, load_referee, spoken
from rlhf_cli.rollouts.voices import own_voice
from rlhf_cli.runs.display import Plain
from rlhf_cli.train.passes import Frozen

MATCH = Match((Message("user", "tell"),), "good", "bad", "here")


def settings(model: Path, **more: Any) -> JudgeSettings:
    return JudgeSettings(model=ModelSettings(name_or_path=str(model), dtype="float32"), **more)


def referee(model: Path, **more: Any) -> Referee:
    own = settings(model, **{"question": "{a} or {b}?", **more})
    return load_referee(own, load_text(own.model))


def test_the_probability_is_that_of_one_label_given_one_of_the_two(tiny_model: Path) -> None:
    """Against the model's own logits."""
    judge = referee(tiny_model, both_orders=False)
    role = load_frozen(judge.settings.model, judge.text)
    (opinion,) = judge([MATCH], own_voice(role, Frozen(Plain(quiet=True), 512).infer))
    text = "<s><|user|>good or bad?<|end|><|assistant|>"
    ids = judge.text.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = role.base.model(ids).logits[0, -1].double()
    a, b = (judge.text.tokenizer.convert_tokens_to_ids(label) for label in "AB")
    assert opinion.second is None
    assert opinion.probability == pytest.approx(float(torch.sigmoid(logits[a] - logits[b])), abs=1e-6)


def biased(first: float) -> Callable[..., list[Tensor]]:
    """A judge that says the first label with this probability, whatever is asked."""

    def infer(role: object, samples: Sequence[Sample], function: object, unit: str = "token") -> list[Tensor]:
        return [torch.tensor([math.log(first), math.log(1 - first)]) for _ in samples]

    return infer


def test_a_liking_for_a_place_cancels_out(tiny_model: Path) -> None:
    role: Any = None
    (opinion,) = referee(tiny_model)([MATCH], own_voice(role, biased(0.9)))
    assert (opinion.first, opinion.second) == (pytest.approx(0.9), pytest.approx(0.1))
    assert opinion.probability == pytest.approx(0.5)
    (opinion,) = referee(tiny_model, both_orders=False)([MATCH], own_voice(role, biased(0.9)))
    assert opinion.probability == pytest.approx(0.9)


def test_both_orders_are_asked(tiny_model: Path) -> None:
    judge = referee(tiny_model)
    first, second = (judge.text.tokenizer.decode(judge.question(MATCH, swapped=s).prompt) for s in (False, True))
    assert "good or bad?" in first
    assert "bad or good?" in second


def test_a_text_is_a_text_whatever_stands_in_it() -> None:
    places = {"{prompt}": "{a}", "{a}": "{b}", "{b}": "{principle}", "{principle}": "p"}
    assert fill("{prompt}|{a}|{b}|{other}", places) == "{a}|{b}|{principle}|{other}"
    assert fill("none", places) == "none"


def test_special_tokens_in_a_completion_are_text(tiny_model: Path) -> None:
    judge = referee(tiny_model)
    ids = judge.question(MATCH._replace(a="<|end|><|assistant|>A"), swapped=False).prompt.tolist()
    ends = judge.text.tokenizer.convert_tokens_to_ids("<|end|>")
    assert ids.count(ends) == 1


def test_a_conversation_as_text() -> None:
    assert spoken("plain") == "plain"
    assert spoken((Message("user", "hi"),)) == "hi"
    assert spoken((Message("system", "s"), Message("user", "hi"))) == "system: s\n\nuser: hi"


def test_principles_are_drawn_by_seed_and_number(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("# a constitution\nbe kind\n\nbe short\nbe true\n")
    judge = referee(tiny_model, principles=str(tmp_path / "c.txt"), question="{principle}: {a} or {b}?")
    assert judge.principles == ("be kind", "be short", "be true")
    drawn = [judge.principle(1, n) for n in range(60)]
    assert drawn == [judge.principle(1, n) for n in range(60)]
    assert drawn != [judge.principle(2, n) for n in range(60)]
    assert all(drawn.count(p) > 5 for p in judge.principles)


def test_a_match_has_a_probability_of_both_orders() -> None:
    assert Opinion(0.8, 0.4).probability == pytest.approx(0.6)
    assert Opinion(0.8, None).probability == 0.8


def test_wrong_judges_are_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot tell 'A' from 'AB' at their start"):
        referee(tiny_model, labels=["A", "AB"])
    with pytest.raises(RecipeError, match=r"cannot be read: No such file"):
        referee(tiny_model, principles=str(tmp_path / "none.txt"), question="{principle} {a} {b}")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(RecipeError, match="holds no principle"):
        referee(tiny_model, principles=str(tmp_path / "empty.txt"), question="{principle} {a} {b}")
    own = settings(tiny_model)
    text = load_text(own.model)
    text.template.__dict__["chat"] = None
    with pytest.raises(ModelError, match="the judge has no chat template"):
        load_referee(own, text)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"labels": ["A", "A"]}, "labels are the same"), ({"question": "{a}?"}, "question does not hold {b}"),
     ({"question": "{a}{b}{principle}"}, "give principles"),
     ({"question": "{a}{b}", "principles": "x"}, "principles are read by a question with {principle}")],
)  # fmt: skip
def test_contradictions_of_a_judge(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        settings(Path("m"), **more)
