"""Preference objectives: pure functions of summed log-probabilities, a loss for each example.

B examples. `Pair` holds the sums over the scored tokens of the chosen and the rejected completion and their lengths, so
an objective that averages divides for itself. With u = policy - reference, D = u_chosen - u_rejected.
Everything is computed in float32 or better; the losses are means over the examples of the step, taken by the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pair(NamedTuple):
    """Sums of log-probabilities over the scored tokens of two completions."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)
    chosen_length: Tensor  # (B,) scored tokens
    rejected_length: Tensor  # (B,)

    def average(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability a token of each completion, each over its own length: two (B,)."""
        chosen, rejected = _float(self.chosen, self.rejected)
        return chosen / self.chosen_length.clamp(min=1), rejected / self.rejected_length.clamp(min=1)


class Judged(NamedTuple):
    """What an objective says of B examples."""

    loss: Tensor  # (B,)
    rewards: Tensor  # (B, 2) implicit rewards of chosen and rejected, or (B, 1) of a single completion; no gradient
    likelihood: float = 0.0
    """Weight of a negative log-likelihood of the chosen completions, a mean over their tokens in the step."""


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half-precision inputs in float32."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def _log_ratios(policy: Pair, reference: Pair) -> tuple[Tensor, Tensor]:
    """u of chosen and rejected: two (B,). No gradient reaches the reference."""
    pc, pr, rc, rr = _float(policy.chosen, policy.rejected, reference.chosen, reference.rejected)
    return pc - rc.detach(), pr - rr.detach()


def _rewards(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.stack([chosen, rejected], dim=1).detach()  # (B, 2)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact in value and gradient over the whole range of floats.

    Two forms, each where it keeps its digits (Maechler 2012); the argument of the form that is not used is replaced
    before it is evaluated, so its gradient cannot be NaN.
    """
    near_zero = x > -math.log(2.0)
    near = torch.where(near_zero, x, torch.full_like(x, -0.1))
    far = torch.where(near_zero, torch.full_like(x, -1.0), x)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def bradley_terry(
    chosen: Tensor,  # (B,) score
    rejected: Tensor,  # (B,) score
    margin: Tensor,  # (B,) how much better chosen is known to be
    *,
    centring: float,
) -> Judged:
    """-log sigmoid(chosen - rejected - margin) + centring (chosen + rejected)^2.

    Ziegler et al. 2019 (arXiv:1909.08593) eq. 1 for two; margin: Llama 2 (arXiv:2307.09288) eq. 2; centring:
    Eisenstein et al. 2023 (arXiv:2312.09244) eq. 2. Equal scores: log 2.
    """
    chosen, rejected = _float(chosen, rejected)
    loss = -F.logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()
    return Judged(loss, _rewards(chosen, rejected))


def dpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Judged:
    """-(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D).

    Rafailov et al. 2023 (arXiv:2305.18290) eq. 7; eps: conservative DPO (Mitchell 2023). Policy = reference: log 2.
    """
    chosen, rejected = _log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return Judged(loss, _rewards(beta * chosen, beta * rejected))


def ipo(policy: Pair, reference: Pair, *, beta: float, average: bool) -> Judged:
    """(h - 1 / (2 beta))^2 with h = D, each log-ratio divided by its own length when `average`.

    Azar et al. 2023 (arXiv:2310.12036) eq. 17, beta for the paper's tau; the paper prints sums, its authors average.
    Policy = reference: 1 / (4 beta^2).
    """
    chosen, rejected = _log_ratios(policy, reference)
    if average:
        h = chosen / policy.chosen_length.clamp(min=1) - rejected / policy.rejected_length.clamp(min=1)
    else:
        h = chosen - rejected
    return Judged((h - 1 / (2 * beta)).square(), _rewards(beta * chosen, beta * rejected))


def kto(
    policy: Tensor,  # (B,) summed log-probability of the completion
    reference: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    kl_point: Tensor,  # () or (B,) estimate of KL(policy || reference), >= 0, no gradient
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Judged:
    """w (1 - sigmoid(+-beta (u - KL))), + for desirable and - for undesirable completions; the mean is over all rows.

    Ethayarajh et al. 2024 (arXiv:2402.01306) eq. 7-8. Policy = reference: half the mean weight.
    """
    policy, reference = _float(policy, reference)
    u = policy - reference.detach()
    away = beta * (u - kl_point.detach())
    good = desirable_weight * torch.sigmoid(-away)
    bad = undesirable_weight * torch.sigmoid(away)
    return Judged(torch.where(desirable, good, bad), (beta * u)[:, None].detach())


def score_offset(chosen: Tensor, rejected: Tensor, offset: str) -> Tensor:
    """ODPO's offset from the scores of chosen and rejected, two (B,) -> (B,); -inf for `log` of an empty gap.

    Raises ValueError when a rejected completion scores above the chosen one, or a ratio is asked of scores <= 0.
    """
    chosen, rejected = _float(chosen, rejected)
    gap = chosen - rejected
    if bool((gap < 0).any()):
        raise ValueError("a rejected completion scores above the chosen one")
    if offset == "ratio":
        if bool((rejected <= 0).any()):
            raise ValueError("offset: ratio needs positive scores")
        return torch.log(chosen) - torch.log(rejected)
    shapes: dict[str, Callable[[Tensor], Tensor]] = {"log": torch.log, "log1p": torch.log1p, "identity": torch.clone}
    return shapes[offset](gap)


def odpo(
    policy: Pair,
    reference: Pair,
    scores: Tensor,  # (B, 2) scores of chosen and rejected
    *,
    beta: float,
    alpha: float,
    offset: str,
) -> Judged:
    """-log sigmoid(beta D - alpha f(scores)); the offset is not scaled by beta.

    Amini et al. 2024 (arXiv:2402.10571) eq. 6. With f = log an empty gap asks for nothing: loss and gradient are 0.
    """
    chosen, rejected = _log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    shift = alpha * score_offset(scores[:, 0], scores[:, 1], offset) if alpha > 0 else torch.zeros_like(z)
    free = torch.isneginf(shift)
    loss = -F.logsigmoid(z - torch.where(free, torch.zeros_like(shift), shift))
    return Judged(torch.where(free, torch.zeros_like(loss), loss), _rewards(beta * chosen, beta * rejected))


def orpo(policy: Pair, *, beta: float) -> Judged:
    """NLL(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds from average log-probabilities.

    Hong et al. 2024 (arXiv:2403.07691) eq. 6-7, beta for the paper's lambda; the likelihood is over the completion.
    An average log-probability of 0 (a certain or an empty completion) is taken as -1e-7, so the odds stay finite.
    """
    average = torch.stack(policy.average())  # (2, B)
    average = average.clamp(max=-1e-7)
    odds = average - log1mexp(average)
    loss = -beta * F.logsigmoid(odds[0] - odds[1])
    return Judged(loss, _rewards(beta * average[0], beta * average[1]), likelihood=1.0)


def simpo(
    policy: Pair, *, beta: float, gamma: float | None, gamma_beta_ratio: float | None, sft_weight: float
) -> Judged:
    """-log sigmoid(beta (m_chosen - m_rejected) - gamma), m the average log-probability; no reference.

    Meng et al. 2024 (arXiv:2405.14734) eq. 6. gamma = beta x gamma_beta_ratio when that is given; with neither, the
    ratio is 0.25. Raises ValueError when both are given.
    """
    if gamma is not None and gamma_beta_ratio is not None:
        raise ValueError("give gamma or gamma_beta_ratio, not both")
    if gamma is None:
        gamma = beta * (0.25 if gamma_beta_ratio is None else gamma_beta_ratio)
    chosen, rejected = policy.average()
    loss = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    return Judged(loss, _rewards(beta * chosen, beta * rejected), likelihood=sft_weight)
