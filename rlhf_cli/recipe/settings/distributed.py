"""Several processes, as torchrun starts them."""

from __future__ import annotations

from typing import Literal

from rlhf_cli.catalog import Positive, Settings


class DistributedSettings(Settings):
    shard: Literal["none", "full"] = "none"
    """full: each process holds a share of the layers of every base, and of gradients and optimiser where they are
    trained (FSDP2), and gathers a layer when its turn comes; none: every process holds all. Never changes the
    result."""
    timeout: Positive = 1800.0
    """Seconds that one process waits for the others before it gives up and names who is missing."""
