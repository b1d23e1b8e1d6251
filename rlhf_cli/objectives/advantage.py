"""Advantage estimators: one signature for all. B completions, T token slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """Advantages and the critic's targets."""

    advantages: Tensor  # (B, T), 0 where masked
    returns: Tensor  # (B, T), 0 where masked


def gae(
    rewards: Tensor,  # (B, T) reward of each token
    values: Tensor | None,  # (B, T) value of the state before each token
    mask: Tensor,  # (B, T) tokens that count
    group: Tensor | None,  # (B,) prompt of each completion; not used here
    *,
    gamma: float,
    lam: float,
) -> Estimate:
    """delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; returns A + V.

    Schulman et al. 2016 (arXiv:1506.02438) eq. 11-16. Each row ends at its own last token, after which value and
    advantage are 0. Masked slots inside a row are skipped: the result is as if those tokens were deleted.
    Raises ValueError without values.
    """
    if values is None:
        raise ValueError("gae needs a critic's values")
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    values = torch.where(mask, values, torch.zeros_like(values))
    next_value = values.new_zeros(len(values))  # (B,)
    carried = values.new_zeros(len(values))
    columns = []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        next_value = torch.where(here, values[:, t], next_value)
        columns.append(torch.where(here, carried, torch.zeros_like(carried)))
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(values)
    return Estimate(advantages, torch.where(mask, advantages + values, torch.zeros_like(values)))
