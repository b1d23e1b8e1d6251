"""Preference objectives that judge each completion's implicit reward, not only the margin. All read a reference.

B examples, u = policy - reference of a summed log-probability, D = u_chosen - u_rejected, z = beta D; rewards are
beta u.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.judged import Judged, Pair, log_ratios, rewards_of
from rlhf_cli.objectives.verdict import reward_shift


def exo(policy: Pair, reference: Pair, *, beta: float, label_smoothing: float) -> Judged:
    """sigmoid(z) (log sigmoid(z) - log(1 - eps)) + sigmoid(-z) (log sigmoid(-z) - log eps).

    The reverse KL from the policy's preference to the smoothed label; it is lowest, 0, where sigmoid(z) = 1 - eps.

    Symbols: z: beta D; eps: label_smoothing, never 0
    Source: Ji et al. 2024 (arXiv:2402.00856), for pairs
    Step 0: -log 2 - (log(1 - eps) + log eps) / 2 = 2.761230 with eps 0.001
    Traps: eps = 0, which is infinite; KL the other way round (that is conservative DPO); an unnormalised target.
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return Judged(right + wrong, rewards_of(beta * chosen, beta * rejected))


def nca(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """-log sigmoid(beta u_chosen) - log sigmoid(-beta u_chosen) / 2 - log sigmoid(-beta u_rejected) / 2.

    Chosen is raised until sigmoid(beta u_chosen) = 2/3, and rejected lowered, each in itself.

    Symbols: u: policy - reference
    Source: Chen et al. 2024 (arXiv:2402.05369), for pairs
    Step 0: 2 log 2 = 1.386294
    Traps: the second term left out, which makes it bco_pair; z in place of each u.
    """
    chosen, rejected = (beta * u for u in log_ratios(policy, reference))
    loss = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return Judged(loss, rewards_of(chosen, rejected))


def bco_pair(
    policy: Pair,
    reference: Pair,
    running: Tensor,  # (4,) mean reward of chosen and of rejected, and their counts, over the steps before
    *,
    beta: float,
    shift: str,
) -> Judged:
    """-log sigmoid(beta u_chosen - d) - log sigmoid(-(beta u_rejected - d)).

    Symbols: u: policy - reference; d: shift, of the rewards of all steps before, 0 at the first; no gradient
    Source: Jung et al. 2024 (arXiv:2404.04656) with pairs for the two classes
    Step 0: 2 log 2 = 1.386294
    Traps: DPO's loss under this name, as one library's documentation prints; a shift that takes gradients or that
    knows the step's own rewards.
    """
    chosen, rejected = (beta * u for u in log_ratios(policy, reference))
    d = reward_shift(running, shift)
    return Judged(-F.logsigmoid(chosen - d) - F.logsigmoid(d - rejected), rewards_of(chosen, rejected))


def sppo(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """(u_chosen - 1 / (2 beta))^2 + (u_rejected + 1 / (2 beta))^2.

    The win rate of chosen is taken as 1, of rejected as 0.

    Symbols: u: policy - reference; 1 / beta: the paper's eta
    Source: Wu et al. 2024 (arXiv:2405.00675)
    Step 0: 1 / (2 beta^2), 500000 with beta 0.001
    Traps: beta times u inside the squares; DPO's beta (0.1), which asks for 5 nats where the paper asks for 500.
    """
    chosen, rejected = log_ratios(policy, reference)
    target = 1 / (2 * beta)
    loss = (chosen - target).square() + (rejected + target).square()
    return Judged(loss, rewards_of(beta * chosen, beta * rejected))


def apo_zero(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """sigmoid(-beta u_chosen) + sigmoid(beta u_rejected).

    For chosen completions better than what the policy writes.

    Symbols: u: policy - reference
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266)
    Step 0: 1
    Traps: 1 - sigmoid(x), which has no digits left from x = 17 on; taken for apo_down.
    """
    chosen, rejected = (beta * u for u in log_ratios(policy, reference))
    return Judged(torch.sigmoid(-chosen) + torch.sigmoid(rejected), rewards_of(chosen, rejected))


def apo_down(policy: Pair, reference: Pair, *, beta: float) -> Judged:
    """sigmoid(beta u_chosen) + sigmoid(-beta D).

    For chosen completions worse than what the policy writes: both lose likelihood, rejected more.

    Symbols: u: policy - reference
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266)
    Step 0: 1
    Traps: chosen raised in the first term; taken for apo_zero. At the start chosen takes no gradient:
    both terms cancel.
    """
    chosen, rejected = (beta * u for u in log_ratios(policy, reference))
    return Judged(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), rewards_of(chosen, rejected))


def discopop(policy: Pair, reference: Pair, *, beta: float, temperature: float) -> Judged:
    """m exp(-z) - (1 - m) log sigmoid(z) with m = sigmoid(z / tau).

    The first product is one exponential, exp(log sigmoid(z / tau) - z), its exponent at most 20.

    Symbols: z: beta D; tau: temperature
    Source: Lu et al. 2024 (arXiv:2406.08414), log-ratio modulated
    Step 0: (1 + log 2) / 2 = 0.846574
    Traps: sigmoid(z / tau) * exp(-z), which is 0 x infinity for z < -88; the two shares swapped. The loss is not
    convex: with tau 0.05 its gradient at the start lowers the margin.
    """
    chosen, rejected = log_ratios(policy, reference)
    z = beta * (chosen - rejected)
    exponential = torch.exp((F.logsigmoid(z / temperature) - z).clamp(max=20.0))
    loss = exponential - torch.sigmoid(-z / temperature) * F.logsigmoid(z)
    return Judged(loss, rewards_of(beta * chosen, beta * rejected))
