"""How the processes of a run find a store of their own.

torchrun keeps one store for all its attempts, and what an attempt left there makes the next one wait for processes that
are gone. So the processes agree on a name that no attempt has had, and keep everything below it.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from rlhf_cli.errors import ModelError
from rlhf_cli.runs.place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

PAUSE = 0.02
"""Seconds between two looks."""


def agree(store: Store, place: Place, seconds: float) -> str:
    """The name of this attempt, the same on every process that takes part in it.

    Every process but the first leaves a word that was never used, and waits for an answer to it; the first one answers
    every word it finds, also old ones, until all have said that they heard. Raises ModelError when some do not come.
    """
    deadline = time.monotonic() + seconds
    return _invite(store, place, deadline) if place.first else _join(store, place, deadline)


def _invite(store: Store, place: Place, deadline: float) -> str:
    name = uuid.uuid4().hex
    missing = set(range(1, place.world))
    while missing:
        for other in sorted(missing):
            if store.check([f"word/{other}"]):
                store.set(f"answer/{store.get(f'word/{other}').decode()}", name)
            if store.check([f"heard/{name}/{other}"]):
                missing.discard(other)
        _wait(deadline, f"of {place.world} processes {len(missing)} did not come: {sorted(missing)[:8]}", missing)
    return name


def _join(store: Store, place: Place, deadline: float) -> str:
    word = uuid.uuid4().hex
    store.set(f"word/{place.rank}", word)
    while not store.check([f"answer/{word}"]):
        _wait(deadline, "process 0 did not come", {0})
    name = str(store.get(f"answer/{word}").decode())
    store.set(f"heard/{name}/{place.rank}", "")
    return name


def _wait(deadline: float, late: str, missing: set[int]) -> None:
    if missing and time.monotonic() > deadline:
        raise ModelError(late, "torchrun", "distributed.timeout says how long to wait")
    time.sleep(PAUSE)
