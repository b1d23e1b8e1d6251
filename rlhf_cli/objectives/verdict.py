"""Preference objectives on single completions with a label. B examples, u = policy - reference; rewards are beta u."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.judged import Judged, full_precision


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

    Symbols: u: policy - reference; KL: max(0, mean log-ratio of completions of other prompts); w: weight of the label
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306) eq. 7-8
    Step 0: half the mean weight, 0.5 with both weights 1
    Traps: means of the two classes added; KL with a gradient or below 0; KL from the rows' own completions.
    """
    policy, reference, kl_point = full_precision(policy, reference, kl_point)
    u = policy - reference.detach()
    away = beta * (u - kl_point.detach())
    good = desirable_weight * torch.sigmoid(-away)
    bad = undesirable_weight * torch.sigmoid(away)
    return Judged(torch.where(desirable, good, bad), (beta * u)[:, None].detach())


def bco(
    policy: Tensor,  # (B,) summed log-probability of the completion
    reference: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    running: Tensor,  # (4,) mean reward of desirable and of undesirable rows, and their counts, over the steps before
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    shift: str,
) -> Judged:
    """-w log sigmoid(+-(beta u - d)), + for desirable and - for undesirable completions; the mean is over all rows.

    Symbols: u: policy - reference; d: shift, from the rewards of all steps before, 0 at first; w: weight of the label
    Source: Jung et al. 2024 (arXiv:2404.04656)
    Step 0: log 2 times the mean weight, 0.693147 with both weights 1
    Traps: means of the two classes added; a shift that takes gradients or that knows the step's own rewards.
    """
    policy, reference = full_precision(policy, reference)
    rewards = beta * (policy - reference.detach())
    away = rewards - reward_shift(running, shift)
    good = -desirable_weight * F.logsigmoid(away)
    bad = -undesirable_weight * F.logsigmoid(-away)
    return Judged(torch.where(desirable, good, bad), rewards[:, None].detach())


def reward_shift(running: Tensor, shift: str) -> Tensor:
    """What BCO subtracts from rewards, (4,) -> (): nothing, the mean of all, or the middle of two means.

    A class that has not been seen does not count; with none seen the shift is 0. No gradient.
    """
    (running,) = full_precision(running.detach())
    means, counts = running[:2], running[2:]
    weights = {"none": torch.zeros_like(counts), "mean": counts, "midpoint": counts.sign()}[shift]
    return (weights * means).sum() / weights.sum().clamp(min=1)
