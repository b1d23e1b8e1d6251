"""Running means that an objective subtracts: state that a checkpoint keeps."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningRewards:
    """Means of the implicit rewards of chosen (desirable) and rejected (undesirable) completions over all steps so far.

    Jung et al. 2024 (arXiv:2404.04656) section 4: the reward shift. It is moved after a step, never within one, so
    neither micro-batches nor their order change it.
    """

    def __init__(self) -> None:
        self.sums = [0.0, 0.0]
        self.counts = [0.0, 0.0]

    def tensor(self) -> Tensor:
        """(4,): both means (0 where nothing was seen), both counts."""
        means = [s / c if c else 0.0 for s, c in zip(self.sums, self.counts, strict=True)]
        return torch.tensor([*means, *self.counts], dtype=torch.float64)

    def update(self, chosen: float, chosen_count: float, rejected: float, rejected_count: float) -> None:
        """After a step: the means of its rewards and how many there were."""
        new = ((chosen, chosen_count), (rejected, rejected_count))
        for i, (mean, count) in enumerate(new):
            self.sums[i] += mean * count
            self.counts[i] += count

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        return {"sums": list(self.sums), "counts": list(self.counts)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from a checkpoint."""
        self.sums, self.counts = list(state["sums"]), list(state["counts"])
