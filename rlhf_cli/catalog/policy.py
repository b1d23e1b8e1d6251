"""Advantage estimators and KL controllers of `ppo`: settings, with the only defaults, and one entry each."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf_cli.catalog.entries import Controller, Estimator, NonNegative, Positive, Settings, Share


class GAE(Settings):
    gamma: Share = 1.0
    """Discount per token."""
    lam: Share = 0.95
    """The paper's lambda: 0 trusts the critic, 1 the observed rewards."""
    lam_critic: Share | None = None
    """Another lambda for the critic's targets (1 is usual); null: the same."""
    length_adaptive: Positive | None = None
    """Instead of `lam`, 1 - 1 / (alpha L) for a completion of L tokens, never below 0; alpha 0.05 in the paper; null:
    off."""


class Reinforce(Settings):
    gamma: Share = 1.0
    """Discount per token; only read with `credit: to_go`."""
    credit: Literal["to_go", "full"] = "to_go"
    """Each token gets the rewards from it on, or those of the whole completion."""
    baseline: Literal["none", "batch"] = "batch"
    """Subtracted: nothing, or the mean over the completions of the rollout of what is credited to their first token."""

    @model_validator(mode="after")
    def _settings_are_read(self) -> Reinforce:
        self.refuse_unread(("gamma",), "credit", "to_go")
        return self


class ReinforcePlusPlus(Settings):
    gamma: Share = 1.0
    """Discount per token."""


class RLOO(Settings):
    pass


class GRPO(Settings):
    epsilon: Positive = 1e-4
    """Added to the standard deviation of a group."""


class DrGRPO(Settings):
    pass


class ReMax(Settings):
    gamma: Share = 1.0
    """Discount per token."""


class FixedKL(Settings):
    coef: NonNegative = 0.05
    """Coefficient, constant."""


class ProportionalKL(Settings):
    coef: NonNegative = 0.15
    """Coefficient at the start."""
    target_kl_per_sequence: Positive = 6.0
    """Wanted KL, in nats, summed over a completion."""
    horizon: Positive = 10000.0
    """Episodes over which an error of 10 % changes the coefficient by about 10 % (errors count up to 20 %)."""


class DoublingKL(Settings):
    coef: Positive = 0.1
    """Coefficient at the start."""
    target_kl_per_sequence: Positive = 6.0
    """Wanted KL, in nats, summed over a completion. At 1.5 times it the coefficient doubles, at 1/1.5 it halves."""


_A, _K = "objectives.advantage", "objectives.kl"

ESTIMATORS: tuple[Estimator, ...] = (
    Estimator("gae", f"{_A}:gae", "Generalised advantage estimation", True, 1, False, True, GAE),
    Estimator("reinforce", f"{_A}:reinforce", "Rewards of a completion, whole or to go; by default reinforce_pp",
              False, 1, False, True, Reinforce),
    Estimator("reinforce_pp", f"{_A}:reinforce_pp", "REINFORCE++: rewards to go, whitened over the rollout",
              False, 1, False, False, ReinforcePlusPlus),
    Estimator("rloo", f"{_A}:rloo", "Against the mean of the prompt's other completions",
              False, 2, False, False, RLOO),
    Estimator("grpo", f"{_A}:grpo", "Against mean and deviation of the prompt's completions",
              False, 2, False, False, GRPO),
    Estimator("dr_grpo", f"{_A}:dr_grpo", "Against the mean of the prompt's completions",
              False, 2, False, False, DrGRPO),
    Estimator("remax", f"{_A}:remax", "Against the greedy completion of the prompt",
              False, 1, True, False, ReMax),
)  # fmt: skip

CONTROLLERS: tuple[Controller, ...] = (
    Controller("fixed", f"{_K}:FixedKL", "A constant coefficient", FixedKL),
    Controller("proportional", f"{_K}:ProportionalKL", "Ziegler's proportional controller", ProportionalKL),
    Controller("doubling", f"{_K}:DoublingKL", "Doubles or halves around a target", DoublingKL),
)
