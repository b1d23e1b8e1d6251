"""What PPO minimises on some completions of a rollout. N completions, T token slots; flat tensors are (tokens,)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.kl import k2, k3, k3_plus
from rlhf_cli.objectives.policy import (
    clipped_policy,
    clipped_value,
    ratio,
    sequence_log_ratio,
    total,
    total_of_means,
)
from rlhf_cli.recipe.schema import PPOSettings
from rlhf_cli.rollouts.experience import Experience
from rlhf_cli.train.engine import Loss, Losses

AGGREGATES = {"token": total, "sequence": total_of_means, "constant": total}
"""How a micro-batch is summed; `counts` says what the engine divides by."""
IN_LOSS = {None: k2, "k2": k2, "k3": k3_plus}
"""The estimates of the KL to the reference that a loss may hold."""


@dataclass(frozen=True)
class Lesson:
    """What a rollout teaches."""

    experience: Experience
    advantages: Tensor  # (N, T)
    returns: Tensor  # (N, T)
    temperature: float

    def flat(self, x: Tensor, rows: np.ndarray, device: torch.device) -> Tensor:
        """x (N, T) -> the tokens of these completions, in the order of a micro-batch's scored tokens."""
        return x[rows][self.experience.mask[rows]].to(device)


@dataclass(frozen=True)
class Coefficients:
    """Of the terms whose weight adapts."""

    kl: float
    """Of the KL to the reference."""
    penalty: float | None
    """Of the KL to the rollout's policy; None: no such term."""


def counts(lesson: Lesson, chunk: np.ndarray, max_new_tokens: int) -> dict[str, float]:
    """What the losses of an update on the completions `chunk` (n,) are divided by, for each way to aggregate."""
    n = float(len(chunk))
    return {
        "token": float(lesson.experience.mask[chunk].sum()), "sequence": n, "constant": n * max_new_tokens
    }  # fmt: skip


def policy_loss(
    policy: Role, settings: PPOSettings, lesson: Lesson, chunk: np.ndarray, coefficients: Coefficients
) -> Loss:
    """The clipped surrogate less the entropy bonus, plus the KLs that stand in the loss."""
    aggregate, device = AGGREGATES[settings.aggregate], policy.base.device
    drift_of = IN_LOSS[settings.kl_estimator] if settings.kl_in == "loss" else None

    def loss(batch: Batch, group: list[int]) -> Losses:
        rows, owners, count = chunk[group], batch.owners, batch.sequences
        of, old = policy.logp(batch, lesson.temperature), lesson.flat(lesson.experience.logp, rows, device)
        new, base = of.logp, old
        if settings.ratio == "sequence":
            new, base = sequence_log_ratio(of.logp, old, owners, count), torch.zeros_like(old)
        surrogate, clipped = clipped_policy(
            new, base, lesson.flat(lesson.advantages, rows, device),
            clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip,
        )  # fmt: skip
        moved = k3(old, of.logp)  # KL(rollout policy || policy)
        whole, n = aggregate(surrogate, owners, count), float(len(old))
        metrics = {
            "policy/approxkl": (moved.detach().sum(), n),
            "policy/clipfrac": (clipped.sum(), n),
            "policy/entropy": (of.entropy.detach().sum(), n),
            "val/ratio": (ratio(new.detach(), base).sum(), n),
        }
        if settings.entropy_coef:
            whole = whole - settings.entropy_coef * aggregate(of.entropy, owners, count)
        if coefficients.penalty is not None:
            whole = whole + coefficients.penalty * aggregate(moved, owners, count)
        if drift_of is not None:
            drift = drift_of(of.logp, lesson.flat(lesson.experience.reference_logp, rows, device))
            whole = whole + coefficients.kl * aggregate(drift, owners, count)
            metrics["loss/kl"] = (drift.detach().sum(), n)
        return Losses({settings.aggregate: whole}, metrics)

    return loss


def value_loss(critic: Role, old_values: Tensor, settings: PPOSettings, lesson: Lesson, chunk: np.ndarray) -> Loss:
    """The clipped error of the values; old_values (N, T) are those of the rollout."""
    device = critic.base.device

    def loss(batch: Batch, group: list[int]) -> Losses:
        values, rows = critic.values(batch), chunk[group]
        error, clipped = clipped_value(
            values, lesson.flat(old_values, rows, device), lesson.flat(lesson.returns, rows, device),
            value_clip=settings.value_clip,
        )  # fmt: skip
        return Losses({"token": error.sum()}, {"val/clipfrac": (clipped.sum(), float(len(values)))})

    return loss
