"""Who of several processes is missing when a collective fails, by what each leaves in the store that all reach."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli.errors import ModelError
from rlhf_cli.runs.place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = 2.0
"""Seconds that processes leave to one another to tell of an error."""
AGAIN = "the same command goes on from the newest whole checkpoint"
NO_STORE = "process 0 or torchrun"
"""Who is gone when the store is."""


@dataclass
class Group:
    """The processes that have met."""

    place: Place
    store: Store
    seconds: float
    """How long one waits for the others."""
    told: int = 0
    """Collectives so far."""
    alone: int = 0
    """Depth of `processes.alone`."""


class Lost(ModelError):
    """Another process is gone, or does not answer."""


@contextmanager
def telling(group: Group, doing: str) -> Iterator[None]:
    """A collective, told in the store before it begins. Raises Lost, which names who has come less far."""
    group.told += 1
    try:
        group.store.set(f"at/{group.place.rank}", json.dumps([group.told, doing]))
        yield
    except RuntimeError as error:
        late = _late(group)
        raise (_lost(group, late, doing) if late else silent(group, doing)) from error


def silent(group: Group, doing: str) -> Lost:
    """The error of a collective that left no word in the store. Who else is there meets the same one: whoever does not
    say so within a little is the missing one."""
    others = range(group.place.world)
    quiet, deadline = list(others), time.monotonic() + PATIENCE
    try:
        group.store.set(f"without/{group.place.rank}", "1")
        while quiet and time.monotonic() < deadline:
            time.sleep(0.05)
            quiet = [other for other in others if not group.store.check([f"without/{other}"])]
        names = ", ".join(_name(other, _seen(group, other)[1]) for other in quiet)
    except RuntimeError:
        names = NO_STORE
    return _lost(group, names, doing)


def of_others(error: RuntimeError) -> bool:
    """Whether a collective failed, by the words of gloo and NCCL."""
    from torch.distributed import DistError

    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out")
    return isinstance(error, DistError) or any(word in str(error).lower() for word in words)


def _late(group: Group) -> str:
    """Who has come less far than this process, in words."""
    try:
        seen = [(other, *_seen(group, other)) for other in range(group.place.world)]
    except RuntimeError:
        return NO_STORE
    return ", ".join(_name(other, doing) for other, told, doing in seen if told < group.told)


def _seen(group: Group, other: int) -> tuple[int, str]:
    """How far a process has come, by what it left in the store."""
    key = f"at/{other}"
    told, doing = json.loads(group.store.get(key)) if group.store.check([key]) else (0, "not begun")
    return told, doing


def _name(other: int, doing: str) -> str:
    return f"process {other} (last seen: {doing})"


def _lost(group: Group, names: str, doing: str) -> Lost:
    waited = f"is gone, or did not answer within {group.seconds:g} s"
    return Lost(f"{names or 'another process'} {waited} while {doing}", hint=AGAIN)
