"""Preference objectives on one logit: DPO and what bends its margin. All read a reference.

B examples, u = policy - reference of a summed log-probability, D = u_chosen - u_rejected, z = beta D. Rewards are
beta u unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.judged import Judged, Pair, full_precision, log_ratios, rewards_of


def dpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Judged:
    """-(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D).

    Symbols: eps: label_smoothing
    Source: Rafailov et al. 2023 (arXiv:2305.18290) eq. 7; eps: conservative DPO (Mitchell 2023)
    Step 0: log 2 = 0.693147
    Traps: beta outside the log-sigmoid; averaged log-probabilities; a reference that takes gradients. The loss sees
    only D, so it can fall while chosen completions lose likelihood.
    """
    chosen, rejected = log_ratios(policy, reference)
    loss = _logistic(beta * (chosen - rejected), label_smoothing)
    return Judged(loss, rewards_of(beta * chosen, beta * rejected))


def robust(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Judged:
    """(-(1 - eps) log sigmoid(beta D) + eps log sigmoid(-beta D)) / (1 - 2 eps).

    Symbols: eps: label_smoothing, the share of flipped labels
    Source: Chowdhury et al. 2024 (arXiv:2403.00409)
    Step 0: log 2 = 0.693147
    Traps: taken for conservative DPO (the sign of eps and the divisor differ). It has no lower bound and its gradient
    never vanishes.
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    loss = (-(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)) / (1 - 2 * label_smoothing)
    return Judged(loss, rewards_of(beta * chosen, beta * rejected))


def hinge(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """max(0, 1 - beta D).

    Symbols: 1 / beta: the margin, in nats, from which on nothing is asked
    Source: Liu et al. 2023, RSO (arXiv:2309.06657)
    Step 0: 1
    Traps: taken for SLiC-HF, which has no reference.
    """
    chosen, rejected = log_ratios(policy, reference)
    loss = F.relu(1 - beta * (chosen - rejected))
    return Judged(loss, rewards_of(beta * chosen, beta * rejected))


def ipo(policy: Pair, reference: Pair, *, beta: float, average: bool) -> Judged:
    """(h - 1 / (2 beta))^2 with h = u_chosen / |chosen| - u_rejected / |rejected|, or h = D without `average`.

    The paper prints sums; its authors average, so that the target does not depend on length.

    Symbols: beta: the paper's tau; |y|: scored tokens of a completion
    Source: Azar et al. 2023 (arXiv:2310.12036) eq. 17
    Step 0: 1 / (4 beta^2), 25 with beta 0.1
    Traps: one length for both completions; beta times h; a length that counts only the tokens whose log-probability
    changed, which is 0 at the start.
    """
    chosen, rejected = log_ratios(policy, reference)
    if average:
        h = chosen / policy.chosen_length.clamp(min=1) - rejected / policy.rejected_length.clamp(min=1)
    else:
        h = chosen - rejected
    return Judged((h - 1 / (2 * beta)).square(), rewards_of(beta * chosen, beta * rejected))


def score_offset(chosen: Tensor, rejected: Tensor, offset: str) -> Tensor:
    """ODPO's offset from the scores of chosen and rejected, two (B,) -> (B,); -inf for `log` of an empty gap.

    Raises ValueError when a rejected completion scores above the chosen one, or a ratio is asked of scores <= 0.
    """
    chosen, rejected = full_precision(chosen, rejected)
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
    """-log sigmoid(beta D - alpha f(scores)).

    With f = log an empty gap asks for nothing: loss and gradient are 0. A rejected completion that scores above the
    chosen one is refused.

    Symbols: f: offset, of s_chosen - s_rejected, or the logarithm of their ratio
    Source: Amini et al. 2024 (arXiv:2402.10571) eq. 6
    Step 0: the mean of -log sigmoid(-alpha f)
    Traps: the offset times beta; the offset added; log of a gap below 1 is negative and asks for less than DPO.
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    shift = alpha * score_offset(scores[:, 0], scores[:, 1], offset) if alpha > 0 else torch.zeros_like(z)
    free = torch.isneginf(shift)
    loss = -F.logsigmoid(z - torch.where(free, torch.zeros_like(shift), shift))
    return Judged(torch.where(free, torch.zeros_like(loss), loss), rewards_of(beta * chosen, beta * rejected))


def r_dpo(policy: Pair, reference: Pair, *, beta: float, alpha: float) -> Judged:
    """-log sigmoid(beta D + alpha (|chosen| - |rejected|)).

    The reward is r - alpha |y|: a longer chosen completion has its margin for free and is pushed less.

    Symbols: |y|: scored tokens of a completion
    Source: Park et al. 2024 (arXiv:2403.19159) eq. 9
    Step 0: the mean of -log sigmoid(alpha (|chosen| - |rejected|))
    Traps: a minus sign; alpha times beta; averaged log-probabilities.
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected) + alpha * (policy.chosen_length - policy.rejected_length)
    return Judged(-F.logsigmoid(z), rewards_of(beta * chosen, beta * rejected))


def spin(policy: Pair, reference: Pair, *, beta: float, shape: str) -> Judged:
    """l(beta D) with l(z) = -log sigmoid(z), or max(0, 1 - z) with `shape: hinge`.

    Chosen is the human answer, rejected the previous model's own, and the reference is that previous model.

    Symbols: beta: the paper's lambda; l: shape
    Source: Chen et al. 2024 (arXiv:2401.01335)
    Step 0: log 2 = 0.693147, hinge: 1
    Traps: the reference of the first round kept in later ones; training on after the loss stays at its step-0 value,
    where the policy cannot be told from its opponent.
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    loss = F.relu(1 - z) if shape == "hinge" else -F.logsigmoid(z)
    return Judged(loss, rewards_of(beta * chosen, beta * rejected))


def dpop(policy: Pair, reference: Pair, *, beta: float, penalty: float) -> Judged:
    """-log sigmoid(beta (D - lambda max(0, -u_chosen))).

    Symbols: lambda: penalty
    Source: Pal et al. 2024 (arXiv:2402.13228) eq. 3
    Step 0: log 2 = 0.693147
    Traps: the penalty outside beta; the penalty on a rejected completion; its sign, which then rewards losing the
    chosen completion.
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected - penalty * F.relu(-chosen))
    return Judged(-F.logsigmoid(z), rewards_of(beta * chosen, beta * rejected))


def sigmoid_norm(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """-log sigmoid(beta (u_chosen / |chosen| - u_rejected / |rejected|)).

    Rewards are beta u / |y|.

    Symbols: |y|: scored tokens of a completion
    Source: Lambert et al. 2024, Tulu 3 (arXiv:2411.15124)
    Step 0: log 2 = 0.693147
    Traps: beta of the size that sums want (0.1): an average needs about 5; one length for both completions.
    """
    chosen, rejected = log_ratios(policy, reference)
    chosen = beta * (chosen / policy.chosen_length.clamp(min=1))
    rejected = beta * (rejected / policy.rejected_length.clamp(min=1))
    return Judged(-F.logsigmoid(chosen - rejected), rewards_of(chosen, rejected))


def wpo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float, clamp: bool) -> Judged:
    """w (-(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D)) with w = exp(c_chosen + c_rejected), no gradient.

    Pairs that the policy would write itself count most. With `clamp`, w is at most 1.

    Symbols: c: mean over a completion's tokens of log p - log sum_v p_v^2; eps: label_smoothing
    Source: Zhou et al. 2024 (arXiv:2406.11827); clamp: the authors' code
    Step 0: the mean of w log 2, at most 0.693147 with `clamp`
    Traps: a gradient through w; sums for means in c; p alone, without the correction by sum_v p_v^2.
    """
    assert policy.certainty is not None
    chosen, rejected = log_ratios(policy, reference)
    (certainty,) = full_precision(policy.certainty.detach())
    exponent = certainty.sum(dim=1)
    weight = torch.exp(exponent.clamp(max=0) if clamp else exponent)
    loss = weight * _logistic(beta * (chosen - rejected), label_smoothing)
    return Judged(loss, rewards_of(beta * chosen, beta * rejected))


def ld_dpo(policy: Pair, reference: Pair, *, beta: float, alpha: float, on_reference: bool) -> Judged:
    """-log sigmoid(beta (v_chosen - v_rejected)) with v = c + alpha (S - c) of the policy - the same of the reference.

    The tokens that only the longer completion has count alpha times. Rewards are beta v.

    Symbols: S: summed log-probability; c: its part over the first min(|chosen|, |rejected|) tokens
    Source: Liu et al. 2024 (arXiv:2409.06411)
    Step 0: log 2 = 0.693147 with `on_reference`; otherwise no value of its own
    Traps: the reference left whole without saying so; a cut by position in the padded row, prompt included.
    """
    assert policy.common is not None
    assert reference.common is not None
    ours = _weighed(policy.chosen, policy.rejected, policy.common, alpha)
    theirs = _weighed(reference.chosen, reference.rejected, reference.common, alpha if on_reference else 1.0)
    rewards = beta * (ours - theirs.detach())  # (B, 2)
    return Judged(-F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards.detach())


def _weighed(chosen: Tensor, rejected: Tensor, common: Tensor, alpha: float) -> Tensor:
    """Sums of log-probabilities with the tokens beyond the common length counted alpha times, (B, 2)."""
    whole, first = full_precision(torch.stack([chosen, rejected], dim=1), common)
    return first + alpha * (whole - first)


def f_dpo(policy: Pair, reference: Pair, *, beta: float, divergence: str, alpha: float) -> Judged:
    """-log sigmoid(beta (g(u_chosen) - g(u_rejected))).

    g(u) is f'(e^u) up to a constant: reverse_kl u, forward_kl -exp(-u), js log sigmoid(u), alpha
    (exp((alpha - 1) u) - 1) / (alpha - 1). Exponents are held within +-20, beyond which a completion takes no gradient.

    Symbols: f: divergence; alpha: 1 - alpha of the paper; towards 1 it is reverse_kl, towards 0 forward_kl
    Source: Wang et al. 2023 (arXiv:2309.16240)
    Step 0: log 2 = 0.693147
    Traps: exponents without bounds; g of D instead of each u; the sign of forward_kl.
    """
    chosen, rejected = log_ratios(policy, reference)
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "reverse_kl": lambda u: u,
        "forward_kl": lambda u: -torch.exp(torch.clamp(-u, -20.0, 20.0)),
        "js": F.logsigmoid,
        "alpha": lambda u: torch.expm1(torch.clamp((alpha - 1) * u, -20.0, 20.0)) / (alpha - 1),
    }
    g = shapes[divergence]
    return Judged(-F.logsigmoid(beta * (g(chosen) - g(rejected))), rewards_of(beta * chosen, beta * rejected))


def aot(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """The mean over k of -log sigmoid(beta (a_(k) - b_(k))), x_(k) the k-th smallest of the step's pairs.

    A pair's loss is that of the rank of its own a.

    Symbols: a: chosen - rejected under the policy; b: the same under the reference
    Source: Melnyk et al. 2024 (arXiv:2406.05882), paired
    Step 0: log 2 = 0.693147
    Traps: sorted within a micro-batch; a sorted and b left in the order of the data; only one of both descending.
    """
    chosen, rejected = log_ratios(policy, reference)
    pc, pr, rc, rr = full_precision(policy.chosen, policy.rejected, reference.chosen, reference.rejected)
    return Judged(_sorted_logistic(pc - pr, (rc - rr).detach(), beta), rewards_of(beta * chosen, beta * rejected))


def aot_unpaired(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """The mean over k of -log sigmoid(beta (u_chosen_(k) - u_rejected_(k))), x_(k) the k-th smallest of the step.

    A pair's loss is that of the rank of its chosen completion; the rejected one may come from another pair.

    Symbols: x_(k): order statistics of the step
    Source: Melnyk et al. 2024 (arXiv:2406.05882), unpaired
    Step 0: log 2 = 0.693147
    Traps: sorted within a micro-batch; only one of both descending.
    """
    chosen, rejected = log_ratios(policy, reference)
    return Judged(_sorted_logistic(chosen, rejected, beta), rewards_of(beta * chosen, beta * rejected))


def _sorted_logistic(high: Tensor, low: Tensor, beta: float) -> Tensor:
    """Logistic loss (B,) between the k-th smallest of both (B,), at the row that holds the k-th of `high`."""
    ascending = torch.sort(high)
    loss = -F.logsigmoid(beta * (ascending.values - torch.sort(low).values))
    return loss[torch.argsort(ascending.indices)]


def _logistic(z: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of a margin z (B,) when a share of the labels counts as flipped."""
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
