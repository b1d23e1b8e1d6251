"""What processes that train together send one another in a step, by formula. For `rlhf plan --world-size N`.

N processes, each telling of itself:

- gradients of what every process trains whole are added up once a step, in float32: 4 bytes a number are handed over,
  of which a ring sends 2 (N - 1) / N;
- of layers held in parts by P processes (`full`: P = N; `hybrid`: those of a machine) the matrices are gathered for
  each micro-batch's forward pass and again for its backward pass, and gradients of those that are trained are added up
  and dealt out after it, in float32: of each, (P - 1) / P is sent;
- with `hybrid` each of the C = N / P machines then adds up the gradients of its parts with the others, once a step, in
  float32: of a P-th of them, a ring sends 2 (C - 1) / C;
- where several share the tokens of each row, what stages/plan_rows.py says.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.stages.plan_rows import Rows

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
    parts: int
    """Processes that hold the parts of a layer among them; 1: every process holds all."""
    replicated: int
    """Numbers that are trained whole by every process."""
    spread: int
    """Numbers that are trained in parts, every part filled up to the largest."""
    matrices: int
    """Bytes of the layers' matrices as they are gathered, filled up alike; 0 where every process holds them whole."""
    micro_batches: float
    """Of an update, of the process that has most."""
    updates: float
    """Of a step."""
    rows: Rows | None = None
    """Where several processes share each row."""

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
        """Bytes of layers that it sends: `distributed/gathered_bytes`, of what is trained."""
        return self.updates * self.micro_batches * GATHERED * self.matrices * (self.parts - 1) / self.parts

    @property
    def scattered(self) -> float:
        """Bytes of gradients of parts that it sends: `distributed/scattered_bytes`."""
        return self.updates * self.micro_batches * GRADIENT * self.spread * (self.parts - 1) / self.parts

    @property
    def copies(self) -> int:
        """Machines that hold all layers each, of `hybrid`; else 1."""
        return self.world // self.parts if self.matrices else 1

    @property
    def copied(self) -> float:
        """Bytes of gradients of parts that it sends to other machines: `distributed/copied_bytes`."""
        own = self.updates * GRADIENT * self.spread / self.parts
        return 2 * own * (self.copies - 1) / self.copies

    @property
    def exchanged(self) -> float:
        """Bytes of tokens that it sends to those with which it shares rows: `distributed/exchanged_bytes`."""
        return 0.0 if self.rows is None else self.updates * self.rows.sent

    @property
    def sent(self) -> float:
        """Bytes that it sends in a step, training alone."""
        return self.ring + self.gathered + self.scattered + self.copied + self.exchanged
