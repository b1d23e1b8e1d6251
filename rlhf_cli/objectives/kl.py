"""Estimates of KL divergences from samples, and the controllers of their coefficients.

Samples come from the first distribution of each KL. Where an estimate stands decides what its gradient is:

- in a reward, a constant, only k1 gives the gradient of the KL (k2 and k3 point elsewhere);
- in a loss, differentiated, k2 gives it, k1 gives zero in expectation, and k3 one that is biased. `k3_plus` has the
  value of k3 and the gradient of k2, and is what a loss that asks for k3 gets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logp: Tensor, other: Tensor) -> Tensor:
    """log p - log q on samples of p: unbiased for KL(p || q), signed. Any shape."""
    return logp - other


def k2(logp: Tensor, other: Tensor) -> Tensor:
    """(log p - log q)^2 / 2 on samples of p: biased as a value, its gradient is that of KL(p || q). Any shape."""
    return 0.5 * (logp - other).square()


def k3(logp: Tensor, other: Tensor) -> Tensor:
    """exp(-x) - 1 + x with x = log p - log q, on samples of p: unbiased for KL(p || q), never negative. Any shape."""
    x = torch.clamp(logp - other, -20.0, 20.0)
    return torch.expm1(-x) + x


def k3_plus(logp: Tensor, other: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2. Any shape."""
    gradient = k2(logp, other)
    return k3(logp, other).detach() + (gradient - gradient.detach())


class FixedKL:
    """coef, constant.

    Symbols: coef: what each nat of KL to the reference costs
    Source: InstructGPT, Ouyang et al. 2022 (arXiv:2203.02155) eq. 2
    Step 0: the KL is 0, whatever the coefficient
    Traps: a coefficient that also scales the score
    """

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

    KL in nats summed over a completion. Never less than half: with a horizon shorter than a fifth of n the formula
    would turn the penalty into a bonus.

    Symbols: n: episodes (completions) of the step
    Source: Ziegler et al. 2019 (arXiv:1909.08593) section 2.2 and their code
    Step 0: the KL is 0, so e = -0.2: the coefficient falls
    Traps: a mean per token against a target per completion; an error that is not clipped
    """

    def __init__(self, *, coef: float, target_kl_per_sequence: float, horizon: float) -> None:
        super().__init__(coef=coef)
        self.target = target_kl_per_sequence
        self.horizon = horizon

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """After a rollout of `episodes` completions with that mean KL."""
        error = _error(kl_per_sequence, self.target)
        self.coef *= max(1.0 + error * episodes / self.horizon, 0.5)


class DoublingKL(FixedKL):
    """KL >= 1.5 target: coef <- 2 coef; KL <= target / 1.5: coef <- coef / 2; within [1e-4, 1e3].

    KL in nats summed over a completion.

    Source: Schulman et al. 2017 (arXiv:1707.06347) section 4, there for the KL to the old policy
    Step 0: the KL is 0: the coefficient halves
    Traps: no bounds, so that the coefficient of a long run leaves the numbers
    """

    def __init__(self, *, coef: float, target_kl_per_sequence: float) -> None:
        super().__init__(coef=coef)
        self.target = target_kl_per_sequence

    def update(self, kl_per_sequence: float, episodes: int) -> None:
        """After a rollout of `episodes` completions with that mean KL."""
        self.coef = doubled(self.coef, kl_per_sequence, self.target)


class PolicyPenalty(FixedKL):
    """PPO-penalty's coefficient: `doubled` or `nudged` by the KL per token to the policy of the rollout."""

    def __init__(self, *, coef: float, target_kl: float, controller: str) -> None:
        super().__init__(coef=coef)
        self.target = target_kl
        self.rule = {"doubling": doubled, "proportional": nudged}[controller]

    def follow(self, kl_per_token: float) -> None:
        """After the updates of a rollout."""
        self.coef = self.rule(self.coef, kl_per_token, self.target)


def doubled(coef: float, kl: float, target: float) -> float:
    """KL >= 1.5 target doubles a coefficient, KL <= target / 1.5 halves it, within [1e-4, 1e3].

    Schulman et al. 2017 (arXiv:1707.06347) section 4.
    """
    if kl >= 1.5 * target:
        return min(coef * 2.0, 1e3)
    return max(coef / 2.0, 1e-4) if kl <= target / 1.5 else coef


def nudged(coef: float, kl: float, target: float) -> float:
    """coef (1 + 0.1 e), e = clip(KL / target - 1, -0.2, 0.2), within [1e-4, 1e3].

    Ziegler et al. 2019 (arXiv:1909.08593) section 2.2, with their K = 0.1.
    """
    return min(max(coef * (1.0 + 0.1 * _error(kl, target)), 1e-4), 1e3)


def _error(kl: float, target: float) -> float:
    """Relative distance of a KL from its target, within +-0.2."""
    return min(max(kl / target - 1.0, -0.2), 0.2)
