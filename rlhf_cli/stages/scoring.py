"""How each kind of reward model is computed: its loss on a micro-batch, what the loss is averaged over, its scores.

B examples, N completions, K completions of a ranking, T labelled places (steps or tokens), C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.catalog import Objective
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import RecipeError
from rlhf_cli.models.base import Text
from rlhf_cli.models.build import with_head
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.judged import Judged, Ranked
from rlhf_cli.objectives.process import CLASSES, aggregate, counted
from rlhf_cli.stages.facts import Figures, facts, ordered_pairs
from rlhf_cli.train.engine import Losses


@dataclass
class Scoring:
    """A reward model in training."""

    entry: Objective
    settings: dict[str, Any]
    role: Role
    labels: tuple[str, ...] = ()
    """Names of the classes of a token classifier; none for a model of one score."""
    tokens: tuple[int, ...] = ()
    """The two tokens of the vocabulary that a language model's own head answers with."""
    objective: Callable[..., Judged] = field(init=False)

    def __post_init__(self) -> None:
        self.objective = self.entry.load()

    def arguments(self, samples: Sequence[Sample]) -> tuple[Callable[[Batch, list[int]], Losses], dict[str, float]]:
        """(loss, counts) of `Engine.update` for the samples of a step."""
        if self.entry.data == "ranking":
            known = facts(samples)
            return (lambda batch, group: self._ranking(batch, known.take(group, batch.ids.device))), _examples(samples)
        if self.entry.data == "comparison":
            return self._comparison, _examples(samples)
        if self.entry.data == "rated":
            return self._rated, _examples(samples)
        if self.entry.data == "verdict":
            return self._outcome, {"token": float(sum(s.completions[0].scored.sum() for s in samples))}
        return self._steps, {"step": float(sum(self._kept(_step_labels(s)).sum() for s in samples))}

    @property
    def kept_as(self) -> str:
        """What later stages may take the trained model for."""
        if self.labels or self.tokens:
            return "process" if self.labels else "policy"
        return "cost" if "safety" in self.entry.needs else "reward"

    def scores(self, batch: Batch) -> Tensor:
        """One number for each completion: (N,); of steps their aggregated probability of being right."""
        if self.entry.data != "steps":
            return self.role.score(batch)
        judged = self._judged_steps(batch)
        return aggregate(judged.rewards[:, 0], batch.owners, batch.sequences, self.settings["aggregation"])

    # --- one number at the last token ----------------------------------------------------------------------------

    def _comparison(self, batch: Batch, group: list[int]) -> Losses:
        chosen, rejected = self.role.score(batch).view(-1, 2).unbind(1)  # (B,)
        numbers, safety = batch.numbers, "safety" in self.entry.needs
        if safety:
            safe = torch.stack([numbers["chosen_safe"], numbers["rejected_safe"]], dim=1) > 0.5
            judged = self.objective(chosen, rejected, safe, **self.settings)
        else:
            margin = numbers["margin"].float() if "margin" in numbers else torch.zeros_like(chosen)
            target = numbers["target"].float() if "target" in numbers else torch.ones_like(chosen)
            judged = self.objective(chosen, rejected, margin, target, **self.settings)
        (chosen, rejected), pairs = judged.rewards.unbind(1), float(len(chosen))
        gap = (rejected - chosen) if safety else (chosen - rejected)
        figures: Figures = {
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/margins": (gap.sum(), pairs),
            "rewards/accuracies": ((gap > 0).sum(), pairs),
        }
        if safety:
            right = (judged.rewards < 0) == safe
            figures["rewards/sign_accuracy"] = (right.sum(), 2 * pairs)
        return Losses({"example": judged.loss.sum()}, figures)

    def _ranking(self, batch: Batch, known: Any) -> Losses:
        scores = self.role.score(batch)
        laid = scores.new_zeros(known.present.shape)
        laid[known.present] = scores
        judged = self.objective(Ranked(laid, known.length, known.gold, known.present), **self.settings)
        right, pairs = ordered_pairs(judged.rewards, known)
        prompts = float(len(laid))
        top = judged.rewards.masked_fill(~known.present, float("-inf")).argmax(1)
        return Losses({"example": judged.loss.sum()}, {
            "rewards/accuracies": ((right / pairs.clamp(min=1)).sum(), prompts),
            "rewards/best": ((top == known.best).sum(), prompts),
            "rewards/mean": (judged.rewards.sum(), float(known.present.sum())),
        })  # fmt: skip

    def _rated(self, batch: Batch, group: list[int]) -> Losses:
        score = self.role.score(batch)
        target = batch.gold.to(score.dtype)
        judged = self.objective(score, target, **self.settings)
        error, rows = (score - target).detach(), float(len(score))
        return Losses({"example": judged.loss.sum()}, {
            "rewards/mean": (score.detach().sum(), rows),
            "error/squared": (error.square().sum(), rows),
            "error/absolute": (error.abs().sum(), rows),
        })  # fmt: skip

    # --- at steps and tokens -------------------------------------------------------------------------------------

    def _judged_steps(self, batch: Batch) -> Judged:
        labels = batch.labels.to(torch.float32)
        logits = self.role.followed_by(batch, self.tokens) if self.tokens else self.role.classes(batch)
        return self.objective(logits, labels, **self.settings)

    def _kept(self, labels: Tensor) -> Tensor:
        """Which labelled steps count: (T,) bool."""
        if self.tokens:
            return torch.ones_like(labels, dtype=torch.bool)
        return counted(labels, classes=self.settings["classes"], neutral=self.settings["neutral"])

    def _steps(self, batch: Batch, group: list[int]) -> Losses:
        judged, labels = self._judged_steps(batch), batch.labels
        right, said = labels > 0.5, judged.rewards[:, 0] > 0.5
        firm = self._kept(labels) & (labels != 0)
        sequences = aggregate(judged.rewards[:, 0], batch.owners, batch.sequences, self.settings["aggregation"])
        wrong = torch.zeros(batch.sequences, dtype=torch.bool, device=labels.device)
        wrong[batch.owners[firm & ~right]] = True
        return Losses({"step": judged.loss.sum()}, {
            "steps/accuracy": ((said == right)[firm].sum(), float(firm.sum())),
            "steps/right_found": (said[firm & right].sum(), float((firm & right).sum())),
            "steps/wrong_found": ((~said)[firm & ~right].sum(), float((firm & ~right).sum())),
            "solutions/accuracy": (((sequences > 0.5) == ~wrong).sum(), float(len(wrong))),
        })  # fmt: skip

    def _outcome(self, batch: Batch, group: list[int]) -> Losses:
        label = (batch.numbers["desirable"] > 0.5).float()  # (B,) = (N,)
        judged = self.objective(self.role.classes(batch)[:, 0], label[batch.owners], **self.settings)
        scores = aggregate(judged.rewards[:, 0], batch.owners, batch.sequences, "last")
        tokens, rows = float(len(judged.loss)), float(len(label))
        return Losses({"token": judged.loss.sum()}, {
            "tokens/accuracy": (((judged.rewards[:, 0] > 0.5) == (label[batch.owners] > 0.5)).sum(), tokens),
            "solutions/accuracy": (((scores > 0.5) == (label > 0.5)).sum(), rows),
            "solutions/score": (scores.sum(), rows),
        })  # fmt: skip


def _examples(samples: Sequence[Sample]) -> dict[str, float]:
    return {"example": float(len(samples))}


def _step_labels(sample: Sample) -> Tensor:
    labels = sample.completions[0].labels
    assert labels is not None
    return torch.from_numpy(labels)


def answers(entry: Objective, settings: dict[str, Any], text: Text) -> tuple[int, ...]:
    """The two tokens a language model answers with. Raises RecipeError when one is not a single token."""
    if entry.head != "language":
        return ()
    found = []
    for key in ("good", "bad"):
        ids = text.template.encoder.inside(settings[key])
        if len(ids) != 1:
            raise RecipeError(
                f"'{settings[key]}' is {len(ids)} tokens of this vocabulary, not one", f"objective.{key}",
                "choose a word the tokenizer keeps whole",
            )  # fmt: skip
        found.append(int(ids[0]))
    if found[0] == found[1]:
        raise RecipeError("good and bad are the same token", "objective.bad")
    return tuple(found)


def open_scoring(entry: Objective, settings: dict[str, Any], policy: Role, tokens: tuple[int, ...]) -> Scoring:
    """The policy's weights as a reward model of this kind, untrained."""
    if entry.head == "language":
        return Scoring(entry, settings, policy, tokens=tokens)
    labels = labels_of(settings)
    return Scoring(entry, settings, with_head(policy, "reward", len(labels) or 1), labels)


def labels_of(settings: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes that a token classifier tells apart; none for a model of one score."""
    return CLASSES[settings["classes"]] if "classes" in settings else ()
