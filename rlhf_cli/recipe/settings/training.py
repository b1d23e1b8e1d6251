"""Optimisation, logging, checkpoints and evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_cli.catalog import NonNegative, Positive, Settings, Share
from rlhf_cli.recipe.settings.blocks import Count

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd"]


class TrainingSettings(Settings):
    learning_rate: Positive
    """Peak learning rate."""
    batch_size: Count = 32
    """Examples (sequences, pairs, completions) in one optimiser step."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=8)] = "auto"
    """Tokens in memory at once; `auto`: as many as fit, measured before the first step. Never changes the result;
    halved by itself when memory runs out."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """packed: examples share rows and pairs share their prompt; padded: a row a sequence. Never changes the result."""
    num_epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: Count | None = None
    """Stop after so many steps, whatever num_epochs says."""
    lr_scheduler: Scheduler = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: Share = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps; instead of warmup_ratio."""
    optimizer: Optimizer = "adamw"
    """adamw, its 8-bit and paged forms (bitsandbytes), adafactor or sgd."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient to this norm; null: do not clip."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; never on biases and norms."""

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingSettings:
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        return self


class LoggingSettings(Settings):
    every: Count = 10
    """Print and send to trackers every so many steps; metrics.jsonl has every step."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers, through their own libraries."""


class CheckpointSettings(Settings):
    every: Count | None = 200
    """Steps between checkpoints; null: only at the end and when stopped."""
    keep: Count = 2
    """How many to keep."""


class EvaluationSettings(Settings):
    every: Count | None = 200
    """Steps between evaluations; null: only before the first and after the last step."""
    samples: Annotated[int, Field(ge=0)] = 4
    """How many held-out prompts to complete at each evaluation, for samples.jsonl and the report."""
    max_new_tokens: Count = 128
    """Length limit of those samples; ppo samples with rollout.max_new_tokens."""
