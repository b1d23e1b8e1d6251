"""Preference objectives without a reference. B examples, S a summed log-probability, m = S / |y| an average one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.judged import Judged, Pair, full_precision, rewards_of


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact in value and gradient over the whole range of floats.

    Two forms, each where it keeps its digits (Maechler 2012); the argument of the form that is not used is replaced
    before it is evaluated, so its gradient cannot be NaN.
    """
    near_zero = x > -math.log(2.0)
    near = torch.where(near_zero, x, torch.full_like(x, -0.1))
    far = torch.where(near_zero, torch.full_like(x, -1.0), x)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def sft(policy: Pair) -> Judged:
    """The mean of -log p over the tokens of the chosen completions of the step; a term of a mix.

    Its own part of the loss is 0: the likelihood has the step's tokens for a divisor, not its examples. Rewards are S.

    Symbols: p: probability of a token of a chosen completion
    Source: maximum likelihood; with dpo: Pang et al. 2024 (arXiv:2404.19733)
    Step 0: the chosen completions' own mean -log p, whatever the reference
    Traps: a mean over examples of sums, which weighs long completions most; likelihood of the prompt.
    """
    chosen, rejected = full_precision(policy.chosen, policy.rejected)
    return Judged(torch.zeros_like(chosen), rewards_of(chosen, rejected), likelihood=1.0)


def orpo(policy: Pair, *, beta: float, sft_scope: str) -> Judged:
    """-log p(chosen), token mean, - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = e^m / (1 - e^m).

    An m of 0 (a certain or an empty completion) is taken as -1e-7, so the odds stay finite. `sft_scope` leaves the odds
    as they are: it says which tokens the likelihood is taken over, which is up to the caller. Rewards are beta m.

    Symbols: beta: the paper's lambda; m: average log-probability of a completion
    Source: Hong et al. 2024 (arXiv:2403.07691) eq. 6-7
    Step 0: -log p(chosen) + the odds term, beta log 2 for equal m
    Traps: summed log-probabilities; log(1 - e^m) written log1p(-exp(m)), infinite near m = 0; beta log sigmoid added
    instead of subtracted; a reference mixed in.
    """
    average = torch.stack(policy.average())  # (2, B)
    average = average.clamp(max=-1e-7)
    odds = average - log1mexp(average)
    loss = -beta * F.logsigmoid(odds[0] - odds[1])
    return Judged(loss, rewards_of(beta * average[0], beta * average[1]), likelihood=1.0)


def simpo(
    policy: Pair,
    *,
    beta: float,
    gamma: float | None,
    gamma_beta_ratio: float | None,
    sft_weight: float,
    label_smoothing: float,
) -> Judged:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z) with z = beta (m_chosen - m_rejected) - gamma.

    gamma = beta gamma_beta_ratio when that is given; with neither, the ratio is 0.25; both are refused. Rewards are
    beta m.

    Symbols: m: average log-probability of a completion; eps: label_smoothing
    Source: Meng et al. 2024 (arXiv:2405.14734) eq. 6
    Step 0: no value of its own: -log sigmoid(-gamma) for equal m
    Traps: the ratio taken for gamma; gamma inside beta; a likelihood term that another library adds unasked.
    """
    if gamma is not None and gamma_beta_ratio is not None:
        raise ValueError("give gamma or gamma_beta_ratio, not both")
    if gamma is None:
        gamma = beta * (0.25 if gamma_beta_ratio is None else gamma_beta_ratio)
    chosen, rejected = policy.average()
    z = beta * (chosen - rejected) - gamma
    loss = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return Judged(loss, rewards_of(beta * chosen, beta * rejected), likelihood=sft_weight)


def alphapo(policy: Pair, *, beta: float, alpha: float, gamma_beta_ratio: float, sft_weight: float) -> Judged:
    """-log sigmoid(beta (r(m_chosen) - r(m_rejected) - ratio)) with r(m) = (1 - exp(-alpha m)) / alpha.

    alpha -> 0 gives r(m) = m, SimPO. Exponents are held within +-20. Rewards are beta r(m).

    Symbols: m: average log-probability of a completion; ratio: gamma_beta_ratio
    Source: Gupta et al. 2025 (arXiv:2501.03884)
    Step 0: no value of its own: -log sigmoid(-beta ratio) for equal m
    Traps: exp(alpha m), which bends the other way; summed log-probabilities; 0 / 0 at alpha = 0.
    """
    chosen, rejected = (_bent(m, alpha) for m in policy.average())
    loss = -F.logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))
    return Judged(loss, rewards_of(beta * chosen, beta * rejected), likelihood=sft_weight)


def _bent(m: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward of an average log-probability (B,)."""
    if alpha == 0:
        return m
    return -torch.expm1(torch.clamp(-alpha * m, -20.0, 20.0)) / alpha


def cpo(policy: Pair, *, beta: float, sft_weight: float) -> Judged:
    """-log sigmoid(beta (S_chosen - S_rejected)) + sft_weight x the token mean of -log p(chosen).

    Rewards are beta S.

    Symbols: S: summed log-probability of a completion
    Source: Xu et al. 2024 (arXiv:2401.08417)
    Step 0: no value of its own: log 2 + the likelihood for equal S
    Traps: averaged log-probabilities (that is SimPO without a margin); taken for Stable Alignment's contrast, which
    has the same initials.
    """
    chosen, rejected = full_precision(policy.chosen, policy.rejected)
    loss = -F.logsigmoid(beta * (chosen - rejected))
    return Judged(loss, rewards_of(beta * chosen, beta * rejected), likelihood=sft_weight)


def slic(policy: Pair, *, delta: float, sft_weight: float) -> Judged:
    """max(0, delta - S_chosen + S_rejected) - lambda S_chosen.

    The paper's likelihood is of a target answer, here the chosen one. Rewards are S.

    Symbols: S: summed log-probability of a completion; lambda: sft_weight
    Source: Zhao et al. 2023 (arXiv:2305.10425)
    Step 0: no value of its own: delta - lambda S for equal completions
    Traps: the likelihood as a matrix of tokens added to a vector of pairs; taken for hinge, which has a reference.
    """
    chosen, rejected = full_precision(policy.chosen, policy.rejected)
    loss = F.relu(delta - chosen + rejected) - sft_weight * chosen
    return Judged(loss, rewards_of(chosen, rejected))
