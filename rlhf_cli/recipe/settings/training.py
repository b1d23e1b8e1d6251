"""Optimisation, logging, checkpoints and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_cli.catalog import AboveOne, NonNegative, Positive, Settings, Share
from rlhf_cli.recipe.settings.blocks import Checked, Count

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd"]


class TrainingSettings(Checked):
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
    """Share of the steps over which the learning rate rises from zero. The first step is taken at zero, as with
    transformers' schedules: it changes no weight and fills the optimiser's averages."""
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
    max_loss_spike: AboveOne | None = None
    """Stop with exit code 5, before the step is applied, when the loss is more than so many times its running median;
    null: never."""
    max_grad_spike: AboveOne | None = None
    """The same for the norm of the gradient before clipping."""
    spike_window: Annotated[int, Field(ge=2)] = 32
    """Updates that the running medians are of; none trips before so many are known."""

    def contradictions(self) -> Iterator[str]:
        warmup = "warmup_ratio" if self.warmup_ratio > 0 else "warmup_steps"
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            yield "give warmup_ratio or warmup_steps, not both"
        if self.lr_scheduler == "constant" and (self.warmup_ratio or self.warmup_steps):
            yield f"{warmup} is not read with lr_scheduler constant: use constant_with_warmup"
        if self.max_steps is not None and (self.warmup_steps or 0) > self.max_steps:
            yield (
                f"warmup_steps = {self.warmup_steps} is more than max_steps = {self.max_steps}: the learning rate "
                f"would never be reached"
            )
        if self.max_loss_spike is None and self.max_grad_spike is None and [*self.changed("spike_window")]:
            yield "spike_window is only read with max_loss_spike or max_grad_spike"
        if not self.optimizer.removeprefix("paged_").startswith("adamw"):
            for key in self.changed("adam_beta1", "adam_beta2", "adam_epsilon"):
                yield f"{key} is not read by optimizer {self.optimizer}"


class LoggingSettings(Checked):
    every: Count = 10
    """Print and send to trackers every so many steps; metrics.jsonl has every step."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers, through their own libraries."""

    def contradictions(self) -> Iterator[str]:
        if len(set(self.report_to)) < len(self.report_to):
            yield "report_to names a tracker twice"


class CheckpointSettings(Settings):
    every: Count | None = 200
    """Steps between checkpoints; null: only at the end and when stopped."""
    keep: Count = 2
    """How many to keep."""


class EvaluationSettings(Checked):
    every: Count | None = 200
    """Steps between evaluations; null: only before the first and after the last step."""
    samples: Annotated[int, Field(ge=0)] = 4
    """How many held-out prompts to complete at each evaluation, for samples.jsonl and the report."""
    max_new_tokens: Count = 128
    """Length limit of those samples; ppo samples with rollout.max_new_tokens."""
