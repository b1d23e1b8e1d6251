"""What processes that train together send one another in a step, by formula. For `rlhf plan --world-size N`.

N processes, each telling of itself:

- gradients of what every process trains whole are added up once a step, in float32: 4 bytes a number are handed over,
  of which a ring sends 2 (N - 1) / N;
- with `distributed.shard: full` the matrices of the layers are gathered for each micro-batch's forward pass and again
  for its backward pass, and gradients of those that are trained are added up and dealt out after it, in float32: of
  each, (N - 1) / N is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.models import sizing
from rlhf_cli.models.base import Base

GRADIENT = 4
"""Bytes of a number of a gradient that is added up."""
GATHERED = 2
"""Times that a layer is gathered for a micro-batch: forward and backward."""
AT_ONCE = 2
"""Layers that are whole in memory: the one that computes, and the next."""


@dataclass(frozen=True)
class Traffic:
    """Terms of the formula; bytes of a step are those of its updates together."""

    world: int
    replicated: int
    """Numbers that are trained whole by every process."""
    spread: int
    """Numbers that are trained in parts."""
    matrices: int
    """Bytes of the layers' matrices as they are gathered; 0 where every process holds them whole."""
    micro_batches: float
    """Of an update, of the process that has most."""
    updates: float
    """Of a step."""

    @property
    def handed(self) -> int:
        """Bytes of gradients that a step hands to the reductions: `distributed/gradient_bytes`."""
        return round(self.updates * GRADIENT * self.replicated)

    @property
    def ring(self) -> float:
        """Bytes of them that this process sends."""
        return 2 * self.handed * (self.world - 1) / self.world

    @property
    def gathered(self) -> float:
        """Bytes of layers that it sends."""
        return self.updates * self.micro_batches * GATHERED * self.matrices * (self.world - 1) / self.world

    @property
    def scattered(self) -> float:
        """Bytes of gradients of parts that it sends."""
        return self.updates * self.micro_batches * GRADIENT * self.spread * (self.world - 1) / self.world

    @property
    def sent(self) -> float:
        """Bytes that it sends in a step, training alone."""
        return self.ring + self.gathered + self.scattered


def gathered_bytes(base: Base, layers: int | None = None) -> int:
    """Bytes of the matrices of all layers, whole and in the dtype of the computation; of so many of them."""
    matrices = sizing.layer_matrices(base).values()
    every = sum(p.numel() for p in matrices) * base.dtype.itemsize
    count = int(base.model.config.get_text_config().num_hidden_layers)
    return every if layers is None else every * min(layers, count) // max(count, 1)
