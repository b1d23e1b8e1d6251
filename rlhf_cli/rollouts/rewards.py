"""What a completion is worth: the interface of every kind of reward, and their weighted sum by role."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.rollouts.normalise import Running, Scaling

STATISTICS = "reward.json"
"""In a reward model's folder: {"mean", "std"} of its scores on held-out completions."""


@dataclass(frozen=True)
class Rollout:
    """N sampled completions, as rewards see them."""

    tasks: Sequence[Task]  # N
    completions: Sequence[str]  # N texts without special tokens
    samples: Sequence[Sample]  # N, each one prompt with one completion, in the policy's tokens
    finished: Sequence[bool] = ()  # N, whether a stop token ended it


Infer = Callable[..., list[Tensor]]
"""`Engine.infer`: (role, samples, function of a batch, "token" | "sequence") -> a tensor for each sample."""


@dataclass(frozen=True)
class Scores:
    """What one reward, or a sum of them, says of a rollout. Where a completion is not valid, its numbers are 0."""

    sequence: np.ndarray  # (N,) float64, at the last token
    tokens: list[np.ndarray] | None  # N, (L_n,) float64, at single tokens
    valid: np.ndarray  # (N,) bool, False: could not be scored
    log: Mapping[str, float] = field(default_factory=dict)
    """Further figures for the metrics, by their names below the reward's."""

    @property
    def totals(self) -> np.ndarray:
        """All that a completion gets: (N,)."""
        if self.tokens is None:
            return self.sequence
        return self.sequence + np.array([row.sum() for row in self.tokens])


def at_the_end(sequence: np.ndarray) -> Scores:
    """Scores (N,) at the last tokens, NaN where a completion could not be scored."""
    valid = ~np.isnan(sequence)
    return Scores(np.where(valid, sequence, 0.0), None, valid)


class Reward(Protocol):
    """A source of scores."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def role(self) -> Literal["reward", "cost"]: ...
    @property
    def scaling(self) -> Scaling: ...
    @property
    def state(self) -> Running | None:
        """What a checkpoint keeps of it."""

    def __call__(self, rollout: Rollout, infer: Infer) -> Scores:
        """Scores before they are scaled and weighted."""


@dataclass(frozen=True)
class Totals:
    """Weighted sums over the rewards of each role."""

    reward: Scores
    cost: Scores | None
    """None without a reward of that role."""
    metrics: dict[str, float]
    parts: Mapping[str, Scores] = field(default_factory=dict)
    """What each reward said, scaled and not weighted, by its name."""


def total(rewards: Sequence[Reward], rollout: Rollout, infer: Infer, *, learn: bool, moving: bool = True) -> Totals:
    """All rewards, each scaled and weighted. A completion that one of them could not score is not valid in any sum.

    learn: running statistics also take in this rollout. moving: whether they apply; without them scores stay as they
    are where a recipe asks for such statistics. Raises ModelError as the rewards do, and when no completion
    could be scored; DivergedError for a score that is not finite.
    """
    metrics: dict[str, float] = {}
    parts = [
        _scaled(reward, reward.scaling if moving else reward.scaling.still, rollout, infer, learn, metrics)
        for reward in rewards
    ]
    valid = np.logical_and.reduce([part.valid for part in parts])
    if not valid.any():
        none = [reward.name for reward, part in zip(rewards, parts, strict=True) if not part.valid.all()]
        raise ModelError(f"none of the {len(valid)} completions of a rollout could be scored by all rewards",
                         f"reward {', '.join(none)}", "it gave None or NaN for each of them")  # fmt: skip
    sums = {
        role: _sum([(r.weight, p) for r, p in zip(rewards, parts, strict=True) if r.role == role], valid)
        for role in ("reward", "cost")
    }
    assert sums["reward"] is not None
    return Totals(sums["reward"], sums["cost"], metrics, {r.name: part for r, part in zip(rewards, parts, strict=True)})


def _scaled(
    reward: Reward, scaling: Scaling, rollout: Rollout, infer: Infer, learn: bool, metrics: dict[str, float]
) -> Scores:
    raw = reward(rollout, infer)
    odd = np.flatnonzero(~np.isfinite(raw.totals))
    if len(odd):
        raise DivergedError(f"the score of {rollout.tasks[odd[0]].where} is {raw.totals[odd[0]]}",
                            f"reward {reward.name}",
                            "nothing was learned from it; look at the reward model and that row")  # fmt: skip
    sequence, tokens, more = scaling(raw.sequence, raw.tokens, raw.valid, learn=learn)
    scores = Scores(sequence, tokens, raw.valid)
    known = scores.totals[scores.valid]
    figures = {"invalid": float((~scores.valid).sum()), **raw.log, **more}
    if len(known):
        figures = {"mean": float(known.mean()), "std": float(known.std()), **figures}
    metrics |= {f"rewards/{reward.name}/{key}": value for key, value in figures.items()}
    return scores


def _sum(parts: Sequence[tuple[float, Scores]], valid: np.ndarray) -> Scores | None:
    """The weighted sum of some scores, 0 where they are not valid."""
    if not parts:
        return None
    sequence = np.zeros(len(valid))
    tokens: list[np.ndarray] | None = None
    for weight, part in parts:
        sequence += weight * part.sequence
        if part.tokens is not None:
            tokens = tokens or [np.zeros(len(row)) for row in part.tokens]
            tokens = [known + weight * row for known, row in zip(tokens, part.tokens, strict=True)]
    if tokens is not None:
        tokens = [row if ok else np.zeros(len(row)) for row, ok in zip(tokens, valid, strict=True)]
    return Scores(np.where(valid, sequence, 0.0), tokens, valid)
