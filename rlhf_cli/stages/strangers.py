"""Completions under the prompts of other rows, by which KTO estimates how far the policy has moved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from rlhf_cli.data.tokens import Sample

NOBODY = -1


class Strangers:
    """Each row's prompt with the completion of the next row of its split that has another prompt.

    Which one that is depends on the split alone, not on the step, so what the reference says of it can be remembered.
    """

    def __init__(self, samples: Sequence[Sample], max_length: int) -> None:
        self.samples, self.max_length = samples, max_length

    @cached_property
    def partner(self) -> np.ndarray:
        """The row whose completion each row gets, NOBODY where all have the same prompt: (n,) int64."""
        known: dict[bytes, int] = {}
        keys = [known.setdefault(sample.prompt.tobytes(), len(known)) for sample in self.samples]
        count, out, after = len(keys), np.full(len(keys), NOBODY), NOBODY
        for i in range(2 * count - 1, -1, -1):  # around twice: the last rows look at the first ones
            row, following = i % count, (i + 1) % count
            after = following if keys[row] != keys[following] else after
            out[row] = after
        return out

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, list[Sample]]:
        """Which of some rows have one (bool, as long as rows), and these; of a prompt that is too long its end."""
        partner = self.partner[rows]
        return partner != NOBODY, [self._set(i, j) for i, j in zip(rows, partner, strict=True) if j != NOBODY]

    def _set(self, row: int, partner: int) -> Sample:
        own, other = self.samples[int(row)], self.samples[int(partner)]
        room = self.max_length - len(other.completions[0].ids)
        return Sample(own.prompt[-room:], other.completions, {}, own.where)
