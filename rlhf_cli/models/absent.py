"""Who of several processes is missing when a collective fails, by what each leaves in the store that all reach."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rlhf_cli.errors import ModelError
from rlhf_cli.runs.place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = 2.0
"""Seconds that processes leave to one another to tell of an error."""
POLL = 0.05
"""Seconds between two looks into the store."""
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


def join(group: Group) -> None:
    """Leave word of who this is."""
    group.store.set(f"pid/{group.place.rank}", str(os.getpid()))


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
        raise _lost(group, _missing(group, told=group.told), doing) from error


def silent(group: Group, doing: str) -> Lost:
    """The error of a collective that left no word in the store."""
    return _lost(group, _missing(group), doing)


def _missing(group: Group, told: int = 0) -> str:
    """Who is missing, in words. told: how far this process has come.

    Of those that have come less far, or of all where nobody has, who does not say within a little that it has met an
    error too: one that is gone fails the collectives of others, and some of these stop earlier than others. Of several
    whom their machine no longer knows, if there are such: others may still wait for one that waits here.
    """
    others = range(group.place.world)
    try:
        group.store.set(f"without/{group.place.rank}", "1")
        late = [other for other in others if _seen(group, other)[0] < told]
        quiet = _quiet(group, late or others) or _quiet(group, others)
        return ", ".join(_name(other, _seen(group, other)[1]) for other in quiet)
    except RuntimeError:
        return NO_STORE


def _quiet(group: Group, others: Sequence[int]) -> list[int]:
    """Those of some processes that do not say that they have met an error."""
    quiet, deadline = list(others), time.monotonic() + PATIENCE
    while quiet and time.monotonic() < deadline:
        time.sleep(POLL)
        quiet = [other for other in others if not group.store.check([f"without/{other}"])]
        for other in filter(partial(_dead, group), quiet):
            group.store.set(f"dead/{other}", "1")
    return [other for other in quiet if group.store.check([f"dead/{other}"])] or quiet


def _dead(group: Group, other: int) -> bool:
    """Whether a process was on this machine and is no more."""
    place, key = group.place, f"pid/{other}"
    if not 0 <= other - place.rank + place.local < place.beside or not group.store.check([key]):
        return False
    try:
        os.kill(int(group.store.get(key)), 0)
    except OSError:  # none of that number, or somebody else's
        return True
    return False


def speaks(group: Group, *, elsewhere: bool = False) -> bool:
    """Whether it is for this process to tell of its error, so that one line does: the first one for what all met, which
    is why the others wait for it a little. elsewhere: it only knows that another has failed, and waits longer still, so
    that the one that knows why tells it. Without a store to agree in (process 0 is gone): one of each machine, which
    is why process 0, whose end may be the store's, waits for the others in turn."""
    place, patience = group.place, 0.0 if group.place.first else PATIENCE
    deadline = time.monotonic() + (2 * PATIENCE if elsewhere else patience)
    try:
        while time.monotonic() < deadline and not group.store.check(["failed"]):
            time.sleep(POLL)
        speaker = bool(group.store.add("failed", 1) == 1)
        heard, leave = group.store.add("heard", 1), time.monotonic() + 2 * PATIENCE
        while place.first and heard < place.world and time.monotonic() < leave:
            time.sleep(POLL)
            heard = group.store.add("heard", 0)
    except RuntimeError:
        return place.local == (1 if place.rank == place.local else 0)
    return speaker


def of_others(error: RuntimeError) -> bool:
    """Whether a collective failed, by the words of gloo and NCCL."""
    from torch.distributed import DistError

    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out")
    return isinstance(error, DistError) or any(word in str(error).lower() for word in words)


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
