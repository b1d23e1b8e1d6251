"""Losses and gradient norms out of all proportion: tripwires that stop a run before the step is applied. No torch.

A number trips when it is more than k times the median of those of the last steps; where numbers have either sign, more
than the median and k - 1 times the median size above it, which for positive numbers is the same.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from rlhf_cli.recipe.settings.training import TrainingSettings


class Spikes:
    """What the last steps of each learner gave. Knows nothing until it has seen a whole window."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._window = settings.spike_window
        self._limits = {"loss": settings.max_loss_spike, "grad_norm": settings.max_grad_spike}
        self._seen: dict[str, deque[float]] = {}

    def judge(self, learner: str, name: str, value: float) -> str:
        """Remember a number of a step, unless it trips: then what to say of it."""
        limit = self._limits[name]
        if limit is None:
            return ""
        seen = self._seen.setdefault(f"{learner} {name}", deque(maxlen=self._window))
        if len(seen) == self._window:
            middle = median(seen)
            if value > middle + (limit - 1) * median(map(abs, seen)):
                return f", more than {limit:g} times its median over {self._window} steps ({middle:.4g})"
        seen.append(value)
        return ""

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {key: list(seen) for key, seen in self._seen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint; the window and the limits are those of the present recipe."""
        self._seen = {key: deque(values, maxlen=self._window) for key, values in state.items()}
