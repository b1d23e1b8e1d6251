"""Estimates of KL divergences from samples, and the controllers of their coefficients.

Samples come from the first distribution of each KL. Only k1 belongs in a reward and never in a loss (its gradient there
is zero in expectation); k3 belongs in a loss or a log.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logp: Tensor, other: Tensor) -> Tensor:
    """log p - log q on samples of p: unbiased for KL(p || q), signed. Any shape."""
    return logp - other


def k3(logp: Tensor, other: Tensor) -> Tensor:
    """exp(-x) - 1 + x with x = log p - log q, on samples of p: unbiased for KL(p || q), never negative. Any shape."""
    x = torch.clamp(logp - other, -20.0, 20.0)
    return torch.expm1(-x) + x


class FixedKL:
    """A constant coefficient: InstructGPT, Ouyang et al. 2022 (arXiv:2203.02155) eq. 2."""

    def __init__(self, *, coef: float) -> None:
        self.coef = coef

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.coef = state["coef"]


class ProportionalKL(FixedKL):
    """coef <- coef (1 + e n / horizon), e = clip(KL / target - 1, -0.2, 0.2).

    Ziegler et al. 2019 (arXiv:1909.08593) section 2.2; KL in nats summed over a completion, n episodes in the step.
    Never less than half: with a horizon shorter than a fifth of n the formula would turn the penalty into a bonus.
    """

    def __init__(self, *, coef: float, target_kl_per_sequence: float, horizon: float) -> None:
        super().__init__(coef=coef)
        self.target = target_kl_per_sequence
        self.horizon = horizon

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """After a rollout of `episodes` completions with that mean KL."""
        error = min(max(kl_per_sequence / self.target - 1.0, -0.2), 0.2)
        self.coef *= max(1.0 + error * episodes / self.horizon, 0.5)


def doubled(coef: float, kl: float, target: float) -> float:
    """KL >= 1.5 target doubles a coefficient, KL <= target / 1.5 halves it, within [1e-4, 1e3].

    Schulman et al. 2017 (arXiv:1707.06347) section 4.
    """
    if kl >= 1.5 * target:
        return min(coef * 2.0, 1e3)
    return max(coef / 2.0, 1e-4) if kl <= target / 1.5 else coef


class DoublingKL(FixedKL):
    """The rule of `doubled` (Schulman et al. 2017, arXiv:1707.06347) on the KL in nats summed over a completion."""

    def __init__(self, *, coef: float, target_kl_per_sequence: float) -> None:
        super().__init__(coef=coef)
        self.target = target_kl_per_sequence

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """After a rollout of `episodes` completions with that mean KL."""
        self.coef = doubled(self.coef, kl_per_sequence, self.target)


class PolicyPenalty(FixedKL):
    """PPO-penalty's coefficient: the rule of `doubled` on the KL per token to the policy of the rollout."""

    def __init__(self, *, coef: float, target_kl: float) -> None:
        super().__init__(coef=coef)
        self.target = target_kl

    def follow(self, kl_per_token: float) -> None:
        """After the updates of a rollout."""
        self.coef = doubled(self.coef, kl_per_token, self.target)
