"""Which of the processes of a run this one is, as torchrun says in the environment. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlhf_cli.errors import RecipeError

_ELASTIC = "TORCHELASTIC_RUN_ID"
"""Set by torchrun, and by nobody else: clusters set WORLD_SIZE and RANK for reasons of their own."""
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """One process among those of a run."""

    rank: int = 0
    world: int = 1
    """How many there are, on all machines."""
    local: int = 0
    """Which of those on this machine."""
    beside: int = 1
    """How many there are on this machine."""

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0


def place() -> Place:
    """This process's place; that of a single one without torchrun. Raises RecipeError for a place that cannot be."""
    if _ELASTIC not in os.environ:
        return Place()
    try:
        found = Place(*(int(os.environ[name]) for name in _NAMES))
    except (KeyError, ValueError) as error:
        raise RecipeError(f"torchrun left no usable place in the environment: {error}", ", ".join(_NAMES),
                          "start with torchrun --nproc-per-node N -m rlhf_cli ...") from error  # fmt: skip
    if not 0 <= found.rank < found.world:
        raise RecipeError(f"RANK is {found.rank} of WORLD_SIZE {found.world}", "environment")
    return found
