"""Objectives of `dpo`, `orpo` and `simpo`: settings, with the only defaults, and one entry each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_cli.catalog.entries import Data, Finite, Need, NonNegative, Objective, Positive, Settings, Share

FlippedShare = Annotated[float, Field(ge=0, lt=0.5)]


class Beta(Settings):
    beta: Positive = 0.1
    """Strength of the pull towards the reference."""


class NoSettings(Settings):
    pass


class DPO(Beta):
    label_smoothing: FlippedShare = 0.0
    """Assumed share of flipped labels (conservative DPO)."""


class Robust(Beta):
    label_smoothing: FlippedShare = 0.1
    """Known share of flipped labels; 0 is DPO."""


class IPO(Settings):
    beta: Positive = 0.1
    """The paper's tau: the target margin is 1 / (2 beta)."""
    average: bool = True
    """Average each completion over its own length (the authors' correction); false sums, as the paper prints."""


class ODPO(Beta):
    alpha: NonNegative = 1.0
    """Weight of the offset; 0 is DPO."""
    offset: Literal["log", "identity", "log1p", "ratio"] = "log"
    """Offset from the scores: log(gap), gap, log(1 + gap) or log(chosen / rejected). For scores in [0, 1] prefer
    identity or log1p: log of a gap below 1 is negative."""


class RDPO(Beta):
    alpha: NonNegative = 0.05
    """Reward taken from each token of a completion; 0 is DPO."""


class SPIN(Beta):
    shape: Literal["logistic", "hinge"] = "logistic"
    """Loss of the margin."""


class EXO(Beta):
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    """Share of the target given to the rejected completion; never 0."""


class DiscoPOP(Beta):
    temperature: Positive = 0.05
    """The paper's tau: how sharply logistic and exponential loss are blended around a margin of 0."""


class DPOP(Settings):
    beta: Positive = 0.3
    """Strength of the pull towards the reference."""
    penalty: NonNegative = 50.0
    """The paper's lambda: weight of a chosen completion falling below its reference; 0 is DPO."""


class SigmoidNorm(Settings):
    beta: Positive = 5.0
    """Scale of the average log-ratios."""


class LDDPO(Beta):
    alpha: Share = 0.5
    """Weight of the tokens beyond the shorter completion's length; 1 is DPO, 0 cuts both to the same length."""
    on_reference: bool = True
    """Weight the reference's tokens too; false weights the policy's alone: the loss does not start at log 2 then."""


class WPO(Beta):
    label_smoothing: FlippedShare = 0.0
    """Assumed share of flipped labels."""
    clamp: bool = True
    """Keep the weight of a pair at 1 or below (the authors' code)."""


class FDPO(Beta):
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    """Divergence to the reference; reverse_kl is DPO."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Order of the alpha-divergence; only read with `divergence: alpha`."""

    @model_validator(mode="after")
    def _settings_are_read(self) -> FDPO:
        self.refuse_unread(("alpha",), "divergence", "alpha")
        return self


class SPPO(Settings):
    beta: Positive = 1e-3
    """Scale: log-ratios are pulled to +-1 / (2 beta)."""


class KTO(Beta):
    desirable_weight: Positive = 1.0
    """Weight of desirable rows; keep weight x count of the two kinds within 1:1 to 4:3."""
    undesirable_weight: Positive = 1.0
    """Weight of undesirable rows."""


class BCOPair(Beta):
    shift: Literal["none", "mean", "midpoint"] = "none"
    """Subtracted from the rewards: nothing, their running mean, or the middle of the running means of chosen and
    rejected."""


class BCO(KTO):
    shift: Literal["none", "mean", "midpoint"] = "mean"
    """Subtracted from the rewards: nothing, their running mean over all steps before, or the middle of the running
    means of desirable and undesirable rows (the paper)."""


class RRHF(Settings):
    rank_weight: NonNegative = 1.0
    """Weight of the ranking term; the authors' code uses 100."""
    sft_reduction: Literal["token_mean", "sum"] = "token_mean"
    """Likelihood of the best completion: mean over the tokens of the step, or summed (the paper)."""


class StableAlignment(Settings):
    margin: NonNegative = 1.0
    """Margin at the largest gap of ratings."""
    rating_scale: Positive = 7.0
    """Size of the rating scale: gaps are divided by it."""
    ratio: NonNegative = 0.5
    """Weight of the contrast against likelihood."""
    reduction: Literal["mean", "max", "sum"] = "mean"
    """Over the other completions: hinge of their mean, hinge of the largest, or sum of hinges."""


class ORPO(Settings):
    beta: Positive = 0.1
    """The paper's lambda: weight of the odds-ratio term."""
    sft_scope: Literal["completion", "all"] = "completion"
    """Likelihood over the chosen completion, or over its prompt too (the authors' code)."""


class SimPO(Settings):
    beta: Positive = 2.0
    """Scale of the average log-probabilities."""
    gamma: Finite | None = None
    """Target margin. Give this or gamma_beta_ratio, not both; neither means a ratio of 0.25."""
    gamma_beta_ratio: Finite | None = None
    """Target margin divided by beta."""
    sft_weight: NonNegative = 0.0
    """Weight of a negative log-likelihood of the chosen completions (token mean)."""
    label_smoothing: FlippedShare = 0.0
    """Assumed share of flipped labels."""

    @model_validator(mode="after")
    def _one_margin(self) -> SimPO:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("give gamma or gamma_beta_ratio, not both: gamma = beta x gamma_beta_ratio")
        return self


class AlphaPO(Settings):
    beta: Positive = 2.5
    """Scale of the rewards."""
    alpha: Finite = 0.25
    """Shape of the reward (1 - e^(-alpha m)) / alpha of an average log-probability m; 0 is SimPO."""
    gamma_beta_ratio: NonNegative = 0.1
    """Target margin divided by beta."""
    sft_weight: NonNegative = 0.0
    """Weight of a negative log-likelihood of the chosen completions (token mean)."""


class CPO(Beta):
    sft_weight: NonNegative = 1.0
    """Weight of a negative log-likelihood of the chosen completions (token mean)."""


class SLiC(Settings):
    delta: Positive = 1.0
    """Margin between the summed log-probabilities."""
    sft_weight: NonNegative = 0.1
    """The paper's lambda: weight of the likelihood of the chosen completion, summed over its tokens."""


_PAIR: Data = "comparison"
_REF: tuple[Need, ...] = ("reference",)
_P, _I, _F = "objectives.preference", "objectives.implicit_reward", "objectives.reference_free"

ENTRIES: tuple[Objective, ...] = (
    Objective("dpo", f"{_P}:dpo", "Direct preference optimisation, with label smoothing", "dpo", _PAIR, _REF, DPO),
    Objective("robust", f"{_P}:robust", "DPO made unbiased for a known share of flipped labels",
              "dpo", _PAIR, _REF, Robust),
    Objective("hinge", f"{_P}:hinge", "A hinge on DPO's margin (RSO)", "dpo", _PAIR, _REF, Beta),
    Objective("ipo", f"{_P}:ipo", "Identity preference optimisation: a squared margin", "dpo", _PAIR, _REF, IPO),
    Objective("odpo", f"{_P}:odpo", "DPO with an offset from the score gap",
              "dpo", _PAIR, ("reference", "scores"), ODPO),
    Objective("r_dpo", f"{_P}:r_dpo", "DPO that takes a reward from every token: shorter completions",
              "dpo", _PAIR, _REF, RDPO),
    Objective("spin", f"{_P}:spin", "Self-play: data against the previous model's own completions",
              "dpo", _PAIR, _REF, SPIN),
    Objective("dpop", f"{_P}:dpop", "DPO with a penalty on losing likelihood of the chosen completion",
              "dpo", _PAIR, _REF, DPOP),
    Objective("sigmoid_norm", f"{_P}:sigmoid_norm", "DPO on log-ratios averaged over each completion",
              "dpo", _PAIR, _REF, SigmoidNorm),
    Objective("ld_dpo", f"{_P}:ld_dpo", "DPO that weighs down the tokens only the longer completion has",
              "dpo", _PAIR, ("reference", "common"), LDDPO),
    Objective("wpo", f"{_P}:wpo", "DPO weighted by how likely the policy itself is to write the pair",
              "dpo", _PAIR, ("reference", "certainty"), WPO),
    Objective("f_dpo", f"{_P}:f_dpo", "DPO under another divergence to the reference", "dpo", _PAIR, _REF, FDPO),
    Objective("aot", f"{_P}:aot", "DPO between the sorted margins of policy and reference in a step",
              "dpo", _PAIR, ("reference", "whole_step"), Beta),
    Objective("aot_unpaired", f"{_P}:aot_unpaired", "DPO between sorted log-ratios of chosen and rejected in a step",
              "dpo", _PAIR, ("reference", "whole_step"), Beta),
    Objective("exo", f"{_I}:exo", "Reverse KL between the policy's preferences and smoothed labels",
              "dpo", _PAIR, _REF, EXO),
    Objective("nca", f"{_I}:nca", "Noise-contrastive: raises chosen in itself, not only against rejected",
              "dpo", _PAIR, _REF, Beta),
    Objective("bco_pair", f"{_I}:bco_pair", "Binary classifier of chosen and rejected rewards",
              "dpo", _PAIR, ("reference", "running"), BCOPair),
    Objective("sppo", f"{_I}:sppo", "Self-play on win rates: squared distance to +-1 / (2 beta)",
              "dpo", _PAIR, _REF, SPPO),
    Objective("apo_zero", f"{_I}:apo_zero", "Anchored: chosen up, rejected down", "dpo", _PAIR, _REF, Beta),
    Objective("apo_down", f"{_I}:apo_down", "Anchored: both down, rejected further", "dpo", _PAIR, _REF, Beta),
    Objective("discopop", f"{_I}:discopop", "A blend of logistic and exponential loss found by search",
              "dpo", _PAIR, _REF, DiscoPOP),
    Objective("kto", "objectives.verdict:kto", "Kahneman-Tversky optimisation on single labelled completions",
              "dpo", "verdict", ("reference", "kl_point"), KTO),
    Objective("bco", "objectives.verdict:bco", "Binary classifier of single labelled completions",
              "dpo", "verdict", ("reference", "running"), BCO),
    Objective("sft", f"{_F}:sft", "Likelihood of the chosen completions: a term of a mix",
              "dpo", _PAIR, (), NoSettings),
    Objective("rrhf", "objectives.ranking:rrhf", "Ranked completions: hinge on average log-probs, and likelihood",
              "dpo", "ranking", (), RRHF),
    Objective("stable_alignment", "objectives.ranking:stable_alignment",
              "Rated completions: likelihood of the best, margins by rating",
              "dpo", "ranking", ("grades",), StableAlignment),
    Objective("orpo", f"{_F}:orpo", "Odds-ratio preference optimisation, no reference", "orpo", _PAIR, (), ORPO),
    Objective("simpo", f"{_F}:simpo", "Simple preference optimisation: average log-probs, margin",
              "simpo", _PAIR, (), SimPO),
    Objective("alphapo", f"{_F}:alphapo", "SimPO with a bent reward", "simpo", _PAIR, (), AlphaPO),
    Objective("cpo", f"{_F}:cpo", "DPO without a reference, with likelihood of chosen", "simpo", _PAIR, (), CPO),
    Objective("slic", f"{_F}:slic", "Sequence likelihood calibration: a hinge without a reference",
              "simpo", _PAIR, (), SLiC),
)  # fmt: skip
