"""Several processes, as torchrun starts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rlhf_cli.catalog import Positive, Settings
from rlhf_cli.recipe.settings.blocks import Count


class DistributedSettings(Settings):
    shard: Literal["none", "full", "hybrid"] = "none"
    """full: each process holds a share of the layers of every base, and of gradients and optimiser where they are
    trained (FSDP2), and gathers a layer when its turn comes; hybrid: the processes of each machine share the layers out
    among themselves, so that machines send one another gradients and no layers; none: every process holds all. Never
    changes the result."""
    cpu_offload: bool = False
    """With shard: each process keeps its share of the layers, of their gradients and of their optimiser in main memory;
    a layer is copied to the card when its turn comes, and the optimiser steps on the CPU. One card alone can do this
    too. Of no effect on a CPU. Never changes the result."""
    sequence_parallel: Count = 1
    """So many processes share every sequence: each computes a part of its tokens, so that sequences can be that much
    longer than one card could train (all-to-all around attention; arXiv:2309.14509). Never changes the result."""
    timeout: Positive = 1800.0
    """Seconds that one process waits for the others before it gives up and names who is missing."""

    def unshared(self) -> Iterator[str]:
        """What makes no sense where no layers are shared out."""
        if self.cpu_offload:
            yield "distributed.cpu_offload keeps shares of layers in main memory, and shard is none: set full or hybrid"
