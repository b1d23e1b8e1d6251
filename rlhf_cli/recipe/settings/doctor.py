"""What watches a PPO run: wires, thresholds, and what they set off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_cli.catalog import AboveOne, Positive, Share
from rlhf_cli.recipe.settings.blocks import Checked, Count

READ_BY = {
    "kl": ("kl", "hacking"), "truncated": ("eos_rate",), "eos_drop": ("eos_rate",), "length_growth": ("length",),
    "length_shrink": ("length",), "patience": (),
}  # fmt: skip
"""The wires that read a threshold, where its name does not say it; patience is read by all."""

Action = Literal["ignore", "warn", "pause", "rollback"]


class WireSettings(Checked):
    kl: Action = "warn"
    """The KL to the reference is over its limit."""
    negative_kl: Action = "warn"
    """The KL stays below zero: what is scored is not what was sampled."""
    hacking: Action = "warn"
    """The score rises while the KL is over its limit."""
    eos_rate: Action = "warn"
    """Completions no longer end by themselves."""
    length: Action = "warn"
    """Completions have become many times longer or shorter than at the start."""
    repetition: Action = "warn"
    """Completions repeat themselves."""
    entropy: Action = "warn"
    """The policy has become almost deterministic."""
    explained_variance: Action = "warn"
    """The critic stays worse than a constant."""
    length_correlation: Action = "warn"
    """The score is little more than the length, and the length grows."""
    clip_fraction: Action = "warn"
    """Most tokens are clipped: updates are too large."""
    ratio: Action = "warn"
    """Probabilities of single tokens change by large factors within a rollout's updates."""
    contrast: Action = "warn"
    """Almost all prompts have completions of equal score: nothing to learn from."""
    unscorable: Action = "warn"
    """Many completions could not be scored."""


class ThresholdSettings(Checked):
    kl: Positive | None = None
    """Nats summed over a completion; null: 3 times the target of ppo.kl, 30 where it has none."""
    negative_kl: Positive = 0.05
    """The mean of `patience` negative KLs below minus this."""
    truncated: Share = 0.9
    """Share of completions cut by the length limit, `patience` steps in a row."""
    eos_drop: Share = 0.25
    """Share of the end-token rate of the start that must be left."""
    length_growth: AboveOne = 3.0
    """Mean length over that of the start."""
    length_shrink: Share = 0.25
    """Mean length over that of the start."""
    repetition: Share = 0.5
    """Share of 4-grams of tokens that stood in the same completion before, `patience` steps in a row."""
    entropy: Share = 0.1
    """Entropy over that of the start, `patience` steps in a row."""
    explained_variance: Annotated[float, Field(lt=1, allow_inf_nan=False)] = 0.0
    """Below it for twice `patience` steps."""
    length_correlation: Share = 0.9
    """Correlation of score and length over a rollout, `patience` steps in a row."""
    clip_fraction: Share = 0.5
    """Share of clipped tokens, `patience` steps in a row."""
    ratio: AboveOne = 10.0
    """Largest ratio of new to old probability of a token, or one over it; the mean ratio may be off by a tenth of
    it."""
    contrast: Share = 0.95
    """Share of prompts without contrast, `patience` steps in a row."""
    unscorable: Share = 0.2
    """Share of completions of a rollout without a score."""
    patience: Count = 5
    """Steps that a figure must stay bad, where one step says little; a finding is over when it stays away as long."""


class TripwireSettings(Checked):
    enabled: bool = True
    """Look at the figures of every rollout and say in words what is wrong."""
    wires: WireSettings = WireSettings()
    """What a finding does: ignore it, warn, pause (checkpoint, stop with exit code 5; the same command goes on), or
    roll back to the newest checkpoint written in good health, with smaller learning rates."""
    thresholds: ThresholdSettings = ThresholdSettings()
    """When a finding is one."""
    rollback_lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Each rollback multiplies all learning rates by this."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """The run stops with exit code 5 when one more would be needed."""

    def contradictions(self) -> Iterator[str]:
        back = ("rollback_lr_factor", "max_rollbacks")
        wires = self.wires.model_dump()
        if not self.enabled:
            for key in self.changed("wires", "thresholds", *back):
                yield f"doctor.{key} is only read with doctor.enabled: true"
            return
        for key in self.changed(*back) if "rollback" not in wires.values() else ():
            yield f"doctor.{key} is only read with a wire of doctor.wires on rollback"
        for key in self.thresholds.changed(*ThresholdSettings.model_fields):
            watching = READ_BY.get(key, (key,))
            if watching and all(wires[wire] == "ignore" for wire in watching):
                yield f"thresholds.{key} is only read by wires.{watching[0]}, which is set to ignore"
