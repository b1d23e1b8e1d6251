"""A language model as judge: it is asked which of two completions is better, and its label probabilities are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.examples import Message, Prompt
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models.base import Text
from rlhf_cli.recipe.principles import read_principles
from rlhf_cli.recipe.settings.judge import JudgeSettings
from rlhf_cli.rollouts.voices import Voice


class Match(NamedTuple):
    """Two completions of a prompt."""

    prompt: Prompt
    a: str
    b: str
    where: str
    principle: str = ""


class Opinion(NamedTuple):
    """What the judge says of a match."""

    first: float
    """Probability that a is better, asked with a in the first place."""
    second: float | None
    """The same, asked with a in the second place; None when it was not asked."""
    mass: float = 1.0
    """Probability that it says one of the labels at all, the mean of both orders."""

    @property
    def probability(self) -> float:
        """That a is better: the mean of both orders."""
        return self.first if self.second is None else (self.first + self.second) / 2


@dataclass(frozen=True)
class Referee:
    """The judge without its weights."""

    settings: JudgeSettings
    text: Text
    labels: tuple[tuple[int, ...], tuple[int, ...]]
    """Tokens of the labels, as what the judge says first."""
    principles: tuple[str, ...] = ()

    def principle(self, seed: int, number: int) -> str:
        """The principle that a match goes by; empty without any."""
        return principle_of(self.principles, seed, number) if self.principles else ""

    def question(self, match: Match, *, swapped: bool) -> Sample:
        """The question about a match with both labels as its answers. Raises DataError when the template refuses it."""
        a, b = (match.b, match.a) if swapped else (match.a, match.b)
        filled = {"{prompt}": spoken(match.prompt), "{a}": a, "{b}": b, "{principle}": match.principle}
        asked = fill(self.settings.asked, filled)
        system = [] if self.settings.system is None else [Message("system", self.settings.system)]
        ids = self.text.template.prompt_ids((*system, Message("user", asked)), match.where)
        answers = tuple(
            Completion(np.array(label, dtype=np.int32), np.ones(len(label), dtype=bool)) for label in self.labels
        )
        return Sample(np.array(ids, dtype=np.int32), answers, {}, match.where)

    def __call__(self, matches: Sequence[Match], voice: Voice) -> list[Opinion]:
        """The opinion on each match. voice: who answers."""
        first = self._ask([self.question(match, swapped=False) for match in matches], voice)
        if not self.settings.both_orders:
            return [Opinion(p, None, mass) for p, mass in first]
        second = self._ask([self.question(match, swapped=True) for match in matches], voice)
        return [Opinion(p, 1 - q, (m + n) / 2) for (p, m), (q, n) in zip(first, second, strict=True)]

    def _ask(self, questions: Sequence[Sample], voice: Voice) -> list[tuple[float, float]]:
        """Probability of the first label given that one of the two is said, and that one of them is."""
        return [self._said(part) for part in voice(questions)]

    def _said(self, logp: Tensor) -> tuple[float, float]:
        one, other = (part.double().sum() for part in logp.split([len(label) for label in self.labels]))
        return float(torch.sigmoid(one - other)), float(one.exp() + other.exp())


def load_referee(settings: JudgeSettings, text: Text) -> Referee:
    """Everything but the weights. Raises RecipeError: no such file of principles, or none in it; ModelError: no chat
    template, labels that cannot be told apart."""
    principles: tuple[str, ...] = ()
    if settings.principles is not None:
        principles = read_principles(settings.principles, "judge.principles")
    if text.template.chat is None:
        raise ModelError("the judge has no chat template", settings.model.name_or_path,
                         "give judge.model.chat_template")  # fmt: skip
    asked = (Message("user", settings.asked),)
    first, second = (tuple(text.template.completion_ids(asked, label)[0][:-1]) for label in settings.labels)
    shorter = min(len(first), len(second))
    if not shorter or first[:shorter] == second[:shorter]:
        raise RecipeError(
            f"the judge's tokenizer cannot tell {settings.labels[0]!r} from {settings.labels[1]!r} at their start",
            "judge.labels", "take others",
        )  # fmt: skip
    return Referee(settings, text, (first, second), principles)


def principle_of(principles: Sequence[str], seed: int, number: int) -> str:
    """One of them, a function of seed and number."""
    return principles[int(np.random.Generator(np.random.Philox(key=[seed, number])).integers(len(principles)))]


def fill(question: str, texts: dict[str, str]) -> str:
    """The question with its places filled, all at once: what stands in a text is text."""
    out, rest = "", question
    while rest:
        at = {place: rest.find(place) for place in texts if place in rest}
        if not at:
            return out + rest
        place = min(at, key=lambda name: at[name])
        out, rest = out + rest[: at[place]] + texts[place], rest[at[place] + len(place) :]
    return out


def spoken(prompt: Prompt) -> str:
    """A prompt as text: what a single user asks, else every message with who says it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)
