"""What PPO minimises on some completions of a rollout. N completions, T token slots; flat tensors are (tokens,)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.kl import k2, k3, k3_plus
from rlhf_cli.objectives.logprob import Statistics, TokenLogp
from rlhf_cli.objectives.policy import (
    clipped_policy,
    clipped_value,
    ratio,
    sequence_log_ratio,
    total,
    total_of_means,
)
from rlhf_cli.recipe.settings.ppo import CriticSettings, PPOSettings
from rlhf_cli.rollouts.experience import Experience
from rlhf_cli.train.engine import Loss, Losses

AGGREGATES = {"token": total, "sequence": total_of_means, "constant": total}
"""How a micro-batch is summed; `counts` says what the engine divides by."""
IN_LOSS = {None: k2, "k2": k2, "k3": k3_plus}
"""The estimates of the KL to the reference that a loss may hold."""
VALUE_METRICS = (("loss/value", "val/clipfrac"), ("cost/loss/value", "cost/val/clipfrac"))
"""Names of the error and of the clipped share, for the critic of the reward and that of the cost."""


@dataclass(frozen=True)
class Target:
    """What a critic learns."""

    old: Tensor  # (N, T) its values at the rollout
    returns: Tensor  # (N, T)


@dataclass(frozen=True)
class Lesson:
    """What a rollout teaches."""

    experience: Experience
    advantages: Tensor  # (N, T)
    temperature: float
    targets: tuple[Target, ...] = ()
    """For the critic of the reward, then that of the cost; none without critics."""
    weights: Tensor | None = None  # (N, T) of each token, for what another program sampled; None: all the same

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

    def loss(batch: Batch, group: list[int]) -> Losses:
        said = policy.logp(batch, lesson.temperature, statistics=_entropy(settings))
        return policy_terms(said, batch, settings, lesson, chunk[group], coefficients)

    return loss


def _entropy(settings: PPOSettings) -> Statistics:
    """The entropy, with gradient where it earns a bonus."""
    return "bonus" if settings.entropy_coef else "entropy"


def value_loss(critic: Role, target: Target, value_clip: float | None, lesson: Lesson, chunk: np.ndarray) -> Loss:
    """The clipped error of the values of a critic of its own."""

    def loss(batch: Batch, group: list[int]) -> Losses:
        return value_terms(critic.values(batch)[:, None], (target,), value_clip, lesson, chunk[group])

    return loss


def joint_loss(
    policy: Role, settings: PPOSettings, critic: CriticSettings, lesson: Lesson, chunk: np.ndarray,
    coefficients: Coefficients,
) -> Loss:  # fmt: skip
    """Both from one forward of one trunk, the value losses weighted by `coef`."""

    def loss(batch: Batch, group: list[int]) -> Losses:
        said, values = policy.logp_and_values(
            batch, lesson.temperature, statistics=_entropy(settings), detach=critic.detach
        )
        own = policy_terms(said, batch, settings, lesson, chunk[group], coefficients)
        errors = value_terms(values, lesson.targets, settings.value_clip, lesson, chunk[group])
        parts = {unit: [x] for unit, x in own.sums.items()}
        parts.setdefault("token", []).append(critic.coef * errors.sums["token"])
        sums = {unit: torch.stack(xs).sum() for unit, xs in parts.items()}
        return Losses(sums, {**own.metrics, **errors.metrics}, own.peaks)

    return loss


def head_loss(policy: Role, lesson: Lesson, chunk: np.ndarray) -> Loss:
    """The plain error of the values on the policy's trunk, which stands still: the value head alone learns."""

    def loss(batch: Batch, group: list[int]) -> Losses:
        return value_terms(policy.values_of_still_trunk(batch), lesson.targets, None, lesson, chunk[group])

    return loss


def policy_terms(
    of: TokenLogp, batch: Batch, settings: PPOSettings, lesson: Lesson, rows: np.ndarray, coefficients: Coefficients
) -> Losses:
    """Of the policy, on the completions `rows` that make the batch. What `loss/` names is divided as the loss is."""
    aggregate, device = AGGREGATES[settings.aggregate], of.logp.device
    owners, count, old = batch.owners, batch.sequences, lesson.flat(lesson.experience.logp, rows, device)
    new, base = of.logp, old
    if settings.ratio == "sequence":
        new, base = sequence_log_ratio(of.logp, old, owners, count), torch.zeros_like(old)
    advantages = lesson.flat(lesson.advantages, rows, device)
    surrogate, clipped = clipped_policy(
        new, base, advantages,
        clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip,
    )  # fmt: skip
    if lesson.weights is not None:
        surrogate = surrogate * lesson.flat(lesson.weights, rows, device)
    moved = k3(old, of.logp)  # KL(rollout policy || policy)
    whole, n = aggregate(surrogate, owners, count), float(len(old))
    ratios = ratio(new.detach(), base)
    metrics: dict[str, tuple[Tensor, float | str]] = {
        "loss/policy": (whole.detach(), settings.aggregate),
        "policy/approxkl": (moved.detach().sum(), n),
        "policy/entropy": (of.entropy.detach().sum(), n),
        "val/ratio": (ratios.sum(), n),
    }
    metrics |= {name: (x.sum(), n) for name, x in clip_shares(clipped, ratios, advantages, settings.dual_clip).items()}
    for name, coef, term in further_terms(of, moved, settings, lesson, rows, coefficients):
        value = aggregate(term, owners, count)
        whole = whole + coef * value
        metrics[f"loss/{name}"] = (value.detach(), settings.aggregate)
    return Losses({settings.aggregate: whole}, metrics, {"policy/ratio_max": ratios.max()})


def further_terms(
    of: TokenLogp, moved: Tensor, settings: PPOSettings, lesson: Lesson, rows: np.ndarray, coefficients: Coefficients
) -> Iterator[tuple[str, float, Tensor]]:
    """What else stands in the policy's loss: name, coefficient, value at each token. moved (tokens,): the KL from the
    rollout's policy."""
    if settings.entropy_coef:
        yield "entropy", -settings.entropy_coef, of.entropy
    if coefficients.penalty is not None:
        yield "penalty", coefficients.penalty, moved
    if settings.kl_in == "loss":
        reference = lesson.flat(lesson.experience.reference_logp, rows, of.logp.device)
        yield "kl", coefficients.kl, IN_LOSS[settings.kl_estimator](of.logp, reference)


def clip_shares(clipped: Tensor, ratios: Tensor, advantages: Tensor, dual_clip: float | None) -> dict[str, Tensor]:
    """Which tokens (tokens,) bool are clipped: all, at the upper end, at the lower end, and by the dual clip."""
    good = advantages > 0
    shares = {"": clipped, "_high": clipped & good, "_low": clipped & ~good}
    shares["_dual"] = torch.zeros_like(clipped) if dual_clip is None else (advantages < 0) & (ratios > dual_clip)
    return {f"policy/clipfrac{which}": share for which, share in shares.items()}


def value_terms(
    values: Tensor, targets: Sequence[Target], value_clip: float | None, lesson: Lesson, rows: np.ndarray
) -> Losses:
    """Of values (tokens, K) for K targets: reward, cost."""
    device, errors = values.device, []
    metrics: dict[str, tuple[Tensor, float | str]] = {}
    for k, (target, names) in enumerate(zip(targets, VALUE_METRICS, strict=False)):
        error, clipped = clipped_value(
            values[:, k], lesson.flat(target.old, rows, device), lesson.flat(target.returns, rows, device),
            value_clip=value_clip,
        )  # fmt: skip
        errors.append(error.sum())
        n = float(len(error))
        metrics |= {names[0]: (error.detach().sum(), n), names[1]: (clipped.sum(), n)}
    return Losses({"token": torch.stack(errors).sum()}, metrics)
