"""Objectives of `sft` and `train-rm`: settings, with the only defaults, and one entry each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_cli.catalog.entries import NonNegative, Objective, Positive, Settings


class CrossEntropy(Settings):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over the vocabulary."""


class BradleyTerry(Settings):
    centring: NonNegative = 0.0
    """Weight of (chosen + rejected)^2, which keeps scores near zero; 0.01 is usual (arXiv:2312.09244)."""


class Centred(Settings):
    centring: NonNegative = 0.0
    """Weight of the squared mean score of a prompt's completions, which keeps scores near zero: 0.04 is to two
    completions what 0.01 is in bradley_terry, which takes the square of their sum."""


class Regression(Settings):
    loss: Literal["mse", "huber"] = "mse"
    """Squared error, or squared near the target and linear far from it."""
    delta: Positive = 1.0
    """Where huber turns linear; only read with `loss: huber`."""

    @model_validator(mode="after")
    def _settings_are_read(self) -> Regression:
        self.refuse_unread(("delta",), "loss", "huber")
        return self


class Cost(Settings):
    l2: NonNegative = 0.001
    """Weight of the mean squared cost."""


class StepLabels(Settings):
    classes: Literal["binary", "three"] = "binary"
    """right and wrong, or right, neutral and wrong."""
    neutral: Literal["right", "wrong", "ignored"] = "right"
    """What a neutral label counts as: in training with two classes, in the score of a step with three (Let's Verify:
    right)."""
    aggregation: Literal["product", "min", "mean", "last"] = "product"
    """How step probabilities make the score of a solution."""


class TwoToken(Settings):
    good: str = "+"
    """Token whose logit says that a step is right; one token of the vocabulary."""
    bad: str = "-"
    """Token whose logit says that a step is wrong; one token of the vocabulary."""
    aggregation: Literal["product", "min", "mean", "last"] = "min"
    """How step probabilities make the score of a solution."""


class Outcome(Settings):
    pass


_R, _K, _S = "objectives.reward", "objectives.ranking", "objectives.process"

ENTRIES: tuple[Objective, ...] = (
    Objective("cross_entropy", "objectives.likelihood:cross_entropy", "Next-token cross-entropy, token mean",
              "sft", "demonstration", (), CrossEntropy),
    Objective("bradley_terry", f"{_R}:bradley_terry", "Pairwise reward model: margin, soft labels, centring",
              "train-rm", "comparison", ("target",), BradleyTerry, "score"),
    Objective("k_wise", f"{_K}:k_wise", "All pairs of a prompt's ranked completions in one element",
              "train-rm", "ranking", (), Centred, "score"),
    Objective("choice", f"{_K}:choice", "Softmax over the completions of a prompt: which one was chosen",
              "train-rm", "ranking", ("best",), Centred, "score"),
    Objective("plackett_luce", f"{_K}:plackett_luce", "Likelihood of a whole ranking",
              "train-rm", "ranking", ("strict",), Centred, "score"),
    Objective("regression", f"{_R}:regression", "Regression on scores or on ratings from games",
              "train-rm", "rated", (), Regression, "score"),
    Objective("cost", f"{_R}:cost", "Cost model of Safe-RLHF: order by harm, sign by safety",
              "train-rm", "comparison", ("safety",), Cost, "score"),
    Objective("step_labels", f"{_S}:step_labels", "Process reward: class of each step at its last token",
              "train-rm", "steps", ("hard",), StepLabels, "tokens"),
    Objective("two_token", f"{_S}:two_token", "Process reward: two tokens of the vocabulary after each step",
              "train-rm", "steps", ("firm",), TwoToken, "language"),
    Objective("outcome", f"{_S}:outcome", "Outcome reward: right or wrong, predicted at every token",
              "train-rm", "verdict", (), Outcome, "tokens"),
)  # fmt: skip
