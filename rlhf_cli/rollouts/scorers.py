"""Rewards by trained models: one score at the last token, or process reward models at the steps of a completion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch
from rlhf_cli.data.examples import Task
from rlhf_cli.data.segments import By, segments
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.process import aggregate, right
from rlhf_cli.rollouts.normalise import Running, Scaling
from rlhf_cli.rollouts.places import places, retokenise
from rlhf_cli.rollouts.rewards import Infer, Rollout, Scores, at_the_end


@dataclass(frozen=True)
class ModelReward:
    """A reward model as a frozen role: one score at the last token."""

    name: str
    weight: float
    role: Literal["reward", "cost"]
    scaling: Scaling
    model: Role
    template: Template | None
    """Of its own tokenizer when that differs from the policy's: then texts are tokenised anew."""

    @property
    def state(self) -> Running | None:
        """Running statistics, when it is normalised by them."""
        return self.scaling.running

    def __call__(self, rollout: Rollout, infer: Infer) -> Scores:
        """What the model says, before its statistics are applied."""
        samples = rollout.samples
        if self.template is not None:
            samples = [
                retokenise(self.template, task, text, finished=done)
                for task, text, done in zip(rollout.tasks, rollout.completions, rollout.finished, strict=True)
            ]
        parts = infer(self.model, samples, self.model.score, "sequence")
        sequence = np.array([float(p[0]) for p in parts], dtype=np.float64)
        return Scores(sequence, None, np.ones(len(sequence), dtype=bool))


@dataclass(frozen=True)
class Cut:
    """Where the steps of a completion end, as the data of a process reward model had it."""

    separator: str
    """Ends each step."""
    by: By | None = None
    """Segments instead of steps."""

    def ends(self, text: str) -> tuple[list[int], bool]:
        """Count of characters up to the end of each step, at least one; and whether the last one lacks its separator.

        A step has more than white space. White space after a segment is not part of it.
        """
        if self.by is not None:
            return [a + len(text[a:b].rstrip()) for a, b in segments(text, self.by)] or [0], False
        ends, last = [], 0
        for mark in re.finditer(re.escape(self.separator), text):
            if text[last : mark.start()].strip():
                ends.append(mark.end())
            last = mark.end()
        if text[last:].strip() or not ends:
            return [*ends, len(text)], not text.endswith(self.separator)
        return ends, False


class Asked(NamedTuple):
    """A completion as a process reward model reads it."""

    sample: Sample
    """Scored are the last tokens of the steps."""
    places: list[int]
    """Where each of these lies among the policy's tokens."""


@dataclass(frozen=True)
class ProcessReward:
    """A process reward model: what it says of each step, or of the completion in all."""

    name: str
    weight: float
    role: Literal["reward", "cost"]
    scaling: Scaling
    model: Role
    settings: dict[str, Any]
    """Of the objective it was trained with."""
    answers: tuple[int, ...]
    """Of a language model: the tokens that say right and wrong; none of a classifier."""
    cut: Cut
    policy: Template
    template: Template | None
    """Of its own tokenizer when that differs from the policy's."""
    place: Literal["end", "steps"]
    step_value: Literal["probability", "sign"]
    baseline: float

    @property
    def state(self) -> Running | None:
        """Running statistics, when it is normalised by them."""
        return self.scaling.running

    def __call__(self, rollout: Rollout, infer: Infer) -> Scores:
        """A reward at the last token of each step, or their aggregate at the end.

        A completion that this model's template leaves nothing of is not valid.
        """
        texts = zip(rollout.tasks, rollout.samples, rollout.completions, strict=True)
        asked = [self.asked(task, sample, text) for task, sample, text in texts]
        rows = [n for n, one in enumerate(asked) if one is not None]
        parts = infer(self.model, [one.sample for one in asked if one is not None], self.probability, "token")
        said = dict(zip(rows, parts, strict=True))
        if self.place == "end":
            return at_the_end(self._aggregated(said, len(asked)))
        tokens = [np.zeros(len(sample.completions[0].ids)) for sample in rollout.samples]
        for n, one in enumerate(asked):
            if one is not None:
                np.add.at(tokens[n], np.array(one.places), self._values(said[n]))
        valid = np.array([one is not None for one in asked])
        return Scores(np.zeros(len(asked)), tokens, valid)

    def asked(self, task: Task, sample: Sample, text: str) -> Asked | None:
        """A completion with the ends of its steps marked; None when no step has a token."""
        if self.template is None:
            return in_own_tokens(self.policy, self.cut, sample, text)
        return in_other_tokens(self.template, self.policy, self.cut, task, sample, text)

    def probability(self, batch: Batch) -> Tensor:
        """Probability that each step is right: (T,)."""
        if not self.answers:
            return right(self.model.classes(batch), neutral=self.settings["neutral"])
        good, bad = self.model.followed_by(batch, self.answers).unbind(1)
        return torch.sigmoid(good - bad)

    def _values(self, probability: Tensor) -> np.ndarray:
        p = probability.double().cpu().numpy()
        return np.where(p > 0.5, 1.0, -1.0) if self.step_value == "sign" else p - self.baseline

    def _aggregated(self, said: dict[int, Tensor], count: int) -> np.ndarray:
        """Scores of all completions (N,), NaN for those without steps."""
        if not said:
            return np.full(count, np.nan)
        owner = torch.cat([torch.full((len(p),), n) for n, p in said.items()])
        together = torch.cat([p.cpu() for p in said.values()])
        return aggregate(together, owner, count, self.settings["aggregation"]).double().numpy()


def in_own_tokens(template: Template, cut: Cut, sample: Sample, text: str) -> Asked:
    """The policy's tokens up to the end of the last step, and its separator when the policy wrote none: in training
    every label stood behind one."""
    ends, missing = cut.ends(text)
    at = sorted(set(places(template, sample, text, ends)))
    ids = sample.completions[0].ids[: at[-1] + 1]
    scored = np.zeros(len(ids), dtype=bool)
    scored[at] = True
    if missing:
        mark = np.array(template.encoder.literal(cut.separator, [*sample.prompt, *ids]), dtype=np.int32)
        scored[-1] = False
        ids, scored = np.concatenate([ids, mark]), np.append(scored, np.arange(len(mark)) == len(mark) - 1)
    return Asked(Sample(sample.prompt, (Completion(ids, scored),), {}, sample.where), at)


def in_other_tokens(own: Template, policy: Template, cut: Cut, task: Task, sample: Sample, text: str) -> Asked | None:
    """The text in another model's tokens, step by step as its data were; the steps mapped back by characters."""
    ends, missing = cut.ends(text)
    pieces = [text[start:end] for start, end in pairwise([0, *ends])]
    if missing:
        pieces[-1] += cut.separator
    ids, upto = own.pieces_ids(task.prompt, pieces, task.where)
    back = places(policy, sample, text, ends)
    steps = [(end, at) for (start, end), at in zip(pairwise([0, *upto]), back, strict=True) if end > start]
    if not steps:
        return None
    scored = np.zeros(steps[-1][0], dtype=bool)
    scored[[end - 1 for end, _ in steps]] = True
    prompt = np.array(own.prompt_ids(task.prompt, task.where), dtype=np.int32)
    completion = Completion(np.array(ids[: len(scored)], dtype=np.int32), scored)
    return Asked(Sample(prompt, (completion,), {}, sample.where), [at for _, at in steps])


def tokens_of(template: Template, words: Sequence[str]) -> tuple[int, ...]:
    """Ids of words that are one token each."""
    return tuple(template.encoder.inside(word)[0] for word in words)
