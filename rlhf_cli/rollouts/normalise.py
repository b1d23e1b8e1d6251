"""Scores on one scale: by stored or running statistics, then clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_cli.recipe.settings.rewards import RewardSettings


@dataclass
class Running:
    """Mean and standard deviation of all values seen so far. State that a checkpoint keeps.

    Batches are merged by the formula of Chan, Golub and LeVeque 1979; the deviation is the population's.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances to the mean."""

    def update(self, values: np.ndarray) -> None:
        """Take in a batch (n,) of values."""
        if not len(values):
            return
        count, mean = len(values), float(values.mean())
        gap, total = mean - self.mean, self.count + count
        self.squares += float(np.square(values - mean).sum()) + gap * gap * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def std(self) -> float:
        """1 as long as all values are equal, up to rounding: then there is no scale yet."""
        found = math.sqrt(self.squares / self.count) if self.count else 0.0
        return found if found > 1e-8 * max(1.0, abs(self.mean)) else 1.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


@dataclass(frozen=True)
class Scaling:
    """(score - mean) / std, then clipped to +-clip.

    The mean leaves at the last token; rewards inside a completion are divided only. So what a completion gets in all
    has the scale asked for wherever its rewards stand.
    """

    mean: float = 0.0
    std: float = 1.0
    running: Running | None = None
    """Instead of mean and std: statistics of what completions got in all so far."""
    shift: bool = False
    """Whether the running mean is subtracted too."""
    clip: float | None = None

    @property
    def still(self) -> Scaling:
        """The same without running statistics: a scale on which scores of different steps can be compared. A clip goes
        with them, since it counts in their units."""
        return self if self.running is None else Scaling()

    def __call__(
        self,
        sequence: np.ndarray,  # (N,)
        tokens: list[np.ndarray] | None,  # N, (L_n,)
        valid: np.ndarray,  # (N,) bool
        *,
        learn: bool,
    ) -> tuple[np.ndarray, list[np.ndarray] | None, dict[str, float]]:
        """Scaled scores, and figures on how; rows that are not valid stay 0. learn: the statistics take them in first.

        Figures: raw_mean, the mean before scaling (running statistics only), and clipped, completions that were.
        """
        mean, std, figures = self.mean, self.std, dict[str, float]()
        if self.running is not None:
            given = (sequence if tokens is None else sequence + np.array([row.sum() for row in tokens]))[valid]
            if learn:
                self.running.update(given)
            mean, std = self.running.mean if self.shift else 0.0, self.running.std
            if len(given):
                figures["raw_mean"] = float(given.mean())
        whole = np.where(valid, (sequence - mean) / std, 0.0)
        dense = None if tokens is None else [row / std for row in tokens]
        if self.clip is None:
            return whole, dense, figures
        over = np.abs(whole) > self.clip
        if dense is not None:
            over |= np.array([bool((np.abs(row) > self.clip).any()) for row in dense])
            dense = [np.clip(row, -self.clip, self.clip) for row in dense]
        return np.clip(whole, -self.clip, self.clip), dense, figures | {"clipped": float(over.sum())}


def scaling_of(settings: RewardSettings, mean: float = 0.0, std: float = 1.0) -> Scaling:
    """What a recipe asks for; mean and std: the stored statistics of a reward model."""
    running = Running() if settings.normalize == "running" else None
    return Scaling(mean, std, running, settings.shift, settings.clip)
