"""Every name a recipe may use: the code behind it, what it needs, its settings.

This module never imports torch; only `Entry.load()` crosses that line. Settings classes hold the only defaults: the
functions behind them take the same names as keyword-only parameters without defaults.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_cli.errors import RecipeError, did_you_mean

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """A block of a recipe: unknown keys refused, no silent conversion, the string under a field is its help."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Entry:
    """A name in the catalogue."""

    name: str
    path: str
    """`module:attribute` below rlhf_cli, imported on use."""
    help: str
    """One line."""

    def load(self) -> Any:
        """The object behind the name. May import torch."""
        module, attribute = self.path.split(":")
        return getattr(importlib.import_module(f"rlhf_cli.{module}"), attribute)


E = TypeVar("E", bound=Entry)
Data = Literal["demonstration", "comparison", "verdict", "task"]
Need = Literal["reference", "scores", "kl_point"]


@dataclass(frozen=True)
class Objective(Entry):
    """A training objective."""

    stage: str
    """The command it belongs to."""
    data: Data
    """The canonical example it is computed on."""
    needs: tuple[Need, ...]
    """`reference`: log-probs of a frozen model; `scores`: a score of each completion in the data; `kl_point`: KTO's
    estimate of the KL between policy and reference."""
    settings: type[Settings]


@dataclass(frozen=True)
class Estimator(Entry):
    """An advantage estimator. All share the signature of `objectives.advantage.gae`."""

    critic: bool
    """Whether it reads values."""
    settings: type[Settings]


@dataclass(frozen=True)
class Controller(Entry):
    """Adapts a KL coefficient."""

    settings: type[Settings]


@dataclass(frozen=True)
class Stage(Entry):
    """A command that trains."""

    recipe: str
    """Name of the recipe class in recipe/schema.py."""


# --- settings of the objectives --------------------------------------------------------------------------


class CrossEntropy(Settings):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over the vocabulary."""


class BradleyTerry(Settings):
    centring: NonNegative = 0.0
    """Weight of (chosen + rejected)^2, which keeps scores near zero; 0.01 is usual (arXiv:2312.09244)."""


class DPO(Settings):
    beta: Positive = 0.1
    """Strength of the pull towards the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels (conservative DPO)."""


class IPO(Settings):
    beta: Positive = 0.1
    """The paper's tau: the target margin is 1 / (2 beta)."""
    average: bool = True
    """Average each completion over its own length (the authors' correction); false sums, as the paper prints."""


class KTO(Settings):
    beta: Positive = 0.1
    """Strength of the pull towards the reference."""
    desirable_weight: Positive = 1.0
    """Weight of desirable rows; keep weight x count of the two kinds within 1:1 to 4:3."""
    undesirable_weight: Positive = 1.0
    """Weight of undesirable rows."""


class ODPO(Settings):
    beta: Positive = 0.1
    """Strength of the pull towards the reference."""
    alpha: NonNegative = 1.0
    """Weight of the offset; 0 is DPO."""
    offset: Literal["log", "identity", "log1p", "ratio"] = "log"
    """Offset from the scores: log(gap), gap, log(1 + gap) or log(chosen / rejected). For scores in [0, 1] prefer
    identity or log1p: log of a gap below 1 is negative."""


class ORPO(Settings):
    beta: Positive = 0.1
    """The paper's lambda: weight of the odds-ratio term."""


class SimPO(Settings):
    beta: Positive = 2.0
    """Scale of the average log-probabilities."""
    gamma: Finite | None = None
    """Target margin. Give this or gamma_beta_ratio, not both; neither means a ratio of 0.25."""
    gamma_beta_ratio: Finite | None = None
    """Target margin divided by beta."""
    sft_weight: NonNegative = 0.0
    """Weight of a negative log-likelihood of the chosen completions (token mean)."""

    @model_validator(mode="after")
    def _one_margin(self) -> SimPO:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("give gamma or gamma_beta_ratio, not both: gamma = beta x gamma_beta_ratio")
        return self


# --- settings of estimators and controllers --------------------------------------------------------------


class GAE(Settings):
    gamma: Share = 1.0
    """Discount per token."""
    lam: Share = 0.95
    """The paper's lambda: 0 trusts the critic, 1 the observed rewards."""


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


# --- the names -------------------------------------------------------------------------------------------

OBJECTIVES = {
    o.name: o
    for o in (
        Objective("cross_entropy", "objectives.likelihood:cross_entropy", "Next-token cross-entropy, token mean",
                  "sft", "demonstration", (), CrossEntropy),
        Objective("bradley_terry", "objectives.preference:bradley_terry", "Pairwise reward model, margin, centring",
                  "train-rm", "comparison", (), BradleyTerry),
        Objective("dpo", "objectives.preference:dpo", "Direct preference optimisation, with label smoothing",
                  "dpo", "comparison", ("reference",), DPO),
        Objective("ipo", "objectives.preference:ipo", "Identity preference optimisation: a squared margin",
                  "dpo", "comparison", ("reference",), IPO),
        Objective("kto", "objectives.preference:kto", "Kahneman-Tversky optimisation on single labelled completions",
                  "dpo", "verdict", ("reference", "kl_point"), KTO),
        Objective("odpo", "objectives.preference:odpo", "DPO with an offset from the score gap",
                  "dpo", "comparison", ("reference", "scores"), ODPO),
        Objective("orpo", "objectives.preference:orpo", "Odds-ratio preference optimisation, no reference",
                  "orpo", "comparison", (), ORPO),
        Objective("simpo", "objectives.preference:simpo", "Simple preference optimisation: average log-probs, margin",
                  "simpo", "comparison", (), SimPO),
    )
}  # fmt: skip

ESTIMATORS = {
    e.name: e for e in (Estimator("gae", "objectives.advantage:gae", "Generalised advantage estimation", True, GAE),)
}

CONTROLLERS = {
    c.name: c
    for c in (
        Controller("fixed", "objectives.kl:FixedKL", "A constant coefficient", FixedKL),
        Controller("proportional", "objectives.kl:ProportionalKL", "Ziegler's proportional controller", ProportionalKL),
        Controller("doubling", "objectives.kl:DoublingKL", "Doubles or halves around a target", DoublingKL),
    )
}

STAGES = {
    s.name: s
    for s in (
        Stage("sft", "stages.sft:run", "Supervised fine-tuning on demonstrations or plain text", "SFTRecipe"),
        Stage("train-rm", "stages.reward:run", "Reward model from preference pairs", "RewardRecipe"),
        Stage("ppo", "stages.ppo:run", "PPO against reward models and reward functions", "PPORecipe"),
        Stage("dpo", "stages.preference:run", "Preference tuning with a reference: dpo, ipo, kto, odpo", "DPORecipe"),
        Stage("orpo", "stages.preference:run", "Odds-ratio preference optimisation", "ORPORecipe"),
        Stage("simpo", "stages.preference:run", "Simple preference optimisation", "SimPORecipe"),
    )
}


def look_up(kind: str, table: Mapping[str, E], name: str) -> E:
    """The entry of that name, or a RecipeError with the closest known name."""
    if name not in table:
        raise RecipeError(
            f"no {kind} is called '{name}'", hint=did_you_mean(name, table) or f"known: {', '.join(table)}"
        )
    return table[name]


def objectives_of(stage: str) -> Iterable[Objective]:
    """The objectives that a command runs."""
    return (o for o in OBJECTIVES.values() if o.stage == stage)
