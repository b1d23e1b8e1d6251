"""What preference and reward objectives take and give. B examples, K completions of a prompt.

Objectives get sums over scored tokens and lengths, so one that averages divides for itself. Everything is computed in
float32 or better; the losses are means over the examples of the step, taken by the engine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Sums of log-probabilities over the scored tokens of two completions."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)
    chosen_length: Tensor  # (B,) scored tokens
    rejected_length: Tensor  # (B,)
    common: Tensor | None = None  # (B, 2) the sums over the first min(chosen_length, rejected_length) tokens only
    certainty: Tensor | None = None  # (B, 2) mean over the tokens of logp - log sum_v p_v^2, no gradient

    def average(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability a token of each completion, each over its own length: two (B,)."""
        chosen, rejected = full_precision(self.chosen, self.rejected)
        return chosen / self.chosen_length.clamp(min=1), rejected / self.rejected_length.clamp(min=1)


class Ranked(NamedTuple):
    """K completions of each prompt, padded. Slots that are not present may hold anything, NaN included."""

    values: Tensor  # (B, K) score, or sum of log-probabilities, of each completion
    length: Tensor  # (B, K) scored tokens
    gold: Tensor  # (B, K) how good it is known to be; higher is better, equal is a tie
    present: Tensor  # (B, K) bool


class Judged(NamedTuple):
    """What an objective says of B examples."""

    loss: Tensor  # (B,)
    rewards: Tensor
    """Implicit rewards or scores, without gradient: (B, 2) of chosen and rejected, (B, 1) of a single completion, or
    (B, K) of a ranking."""
    likelihood: float = 0.0
    """Weight of a negative log-likelihood of the chosen (or best) completions, a mean over their tokens in the step."""


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half-precision inputs in float32."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def log_ratios(policy: Pair, reference: Pair) -> tuple[Tensor, Tensor]:
    """u = policy - reference of chosen and rejected: two (B,). No gradient reaches the reference."""
    pc, pr, rc, rr = full_precision(policy.chosen, policy.rejected, reference.chosen, reference.rejected)
    return pc - rc.detach(), pr - rr.detach()


def rewards_of(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Two (B,) -> (B, 2), without gradient."""
    return torch.stack([chosen, rejected], dim=1).detach()
