"""The order of the data: a function of seed and epoch alone, with a cursor that a checkpoint stores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class Loader:
    """Deals example indices, `batch_size` at a time. The last batch of an epoch may be smaller; nothing is dropped."""

    def __init__(self, source: np.ndarray, weights: Sequence[float], batch_size: int, seed: int) -> None:
        """source (n,): the source of each example; weights: how often an epoch passes over each source."""
        self.source = source
        self.weights = list(weights)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.index = 0
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Example indices of one epoch, in order."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        chosen = []
        for number, weight in enumerate(self.weights):
            members = np.flatnonzero(self.source == number)
            wanted = max(1, round(weight * len(members))) if len(members) else 0
            whole, part = divmod(wanted, max(1, len(members)))
            chosen += [members] * whole + [random.permutation(members)[:part]]
        pool = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
        return random.permutation(pool)

    @property
    def epoch_size(self) -> int:
        """Examples in one epoch; one that is dealt twice counts twice."""
        return len(self._order)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        return math.ceil(self.epoch_size / self.batch_size)

    @property
    def position(self) -> float:
        """Epochs passed, a fraction included."""
        return self.epoch + self.index / max(1, len(self._order))

    def next(self) -> np.ndarray:
        """Indices of the next batch (b,); a new epoch starts when the old one is through."""
        if self.index >= len(self._order):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffled(self.epoch)
        batch = self._order[self.index : self.index + self.batch_size]
        self.index += len(batch)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The cursor."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a cursor."""
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._shuffled(self.epoch)
