"""Who of several processes is said to be missing, and which of them says it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from rlhf_cli.models import absent
from rlhf_cli.runs.place import Place

pytestmark = pytest.mark.usefixtures("hasty")
WORLD = 4


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absent, "PATIENCE", 0.4)
    monkeypatch.setattr(absent, "POLL", 0.02)


class Gone(HashStore):
    """The store of a process that has ended."""

    def check(self, *_: object) -> bool:
        raise RuntimeError("Broken pipe")

    set = add = check


def groups(store: HashStore, beside: int = WORLD) -> list[absent.Group]:
    """Four processes, so many on each machine."""
    return [absent.Group(Place(rank, WORLD, rank % beside, beside), store, 60.0) for rank in range(WORLD)]


def lines(told: Sequence[int], dead: Sequence[int], waiting: Sequence[int] = ()) -> set[str]:
    """What those say who are neither dead nor still waiting for others, on two machines. Each has begun so many
    collectives, whose last one fails."""
    store = HashStore()
    with subprocess.Popen(["true"]) as gone:
        pass

    def fail(group: absent.Group) -> str:
        with pytest.raises(absent.Lost) as caught, absent.telling(group, f"work {group.told + 1}"):
            raise RuntimeError("Connection closed by peer")
        return str(caught.value)

    every = groups(store, beside=2)
    for rank, count in enumerate(told):
        store.set(f"pid/{rank}", str(gone.pid if rank in dead else os.getpid()))
        every[rank].told = count - 1
        store.set(f"at/{rank}", json.dumps([count, f"work {count}"]))
    living = [group for group in every if group.place.rank not in {*dead, *waiting}]
    with ThreadPoolExecutor(WORLD) as pool:
        return set(pool.map(fail, living))


def test_one_that_waits_for_one_that_has_met_the_error_is_not_named() -> None:
    """Of 0 and 3 nothing is heard, and the machine of 3 knows it no more."""
    for line in lines([5, 5, 5, 5], [3], waiting=[0]):
        assert line.startswith("process 3 (last seen: work 5) is gone")


def test_one_that_lives_and_says_nothing_is_named() -> None:
    for line in lines([5, 5, 5, 5], [], waiting=[1]):
        assert line.startswith("process 1 (last seen: work 5) is gone, or did not answer within 60 s")


@pytest.mark.parametrize(
    ("told", "dead", "named"),
    [
        ([5, 5, 4, 5], [2], "process 2 (last seen: work 4)"),
        ([5, 4, 4, 5], [2], "process 2 (last seen: work 4)"),  # 1 met the error of 2 before it came further
        ([5, 4, 5, 5], [2], "process 2 (last seen: work 5)"),
        ([5, 5, 4, 4], [2, 3], "process 2 (last seen: work 4), process 3 (last seen: work 4)"),
    ],
)
def test_the_dead_are_named_and_not_those_whom_they_failed(told: list[int], dead: list[int], named: str) -> None:
    found = lines(told, dead)
    at = {line.partition(" is gone")[0] for line in found}
    assert at == {named}
    assert all(line.endswith(f" ({absent.AGAIN})") for line in found)


def test_only_its_own_machine_knows_whether_a_process_lives() -> None:
    store = HashStore()
    with subprocess.Popen(["true"]) as gone:
        pass
    store.set("pid/2", str(gone.pid))
    every = groups(store, beside=2)
    assert [absent._dead(group, 2) for group in every] == [False, False, True, True]
    assert not absent._dead(every[3], 1), "has not said who it is"


def test_a_store_that_is_gone_says_that_process_0_is() -> None:
    words = "^process 0 or torchrun is gone, or did not answer within 60 s while sending "
    with pytest.raises(absent.Lost, match=words), absent.telling(groups(Gone())[1], "sending"):
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("living", [[0, 1, 2, 3], [1, 2, 3]])
def test_one_of_all_speaks_the_first_if_it_comes(living: list[int]) -> None:
    every = groups(HashStore())
    with ThreadPoolExecutor(WORLD) as pool:
        spoke = list(pool.map(absent.speaks, [every[rank] for rank in living]))
    assert spoke.count(True) == 1
    assert spoke[0] or 0 not in living


@pytest.mark.parametrize("failed", range(WORLD))
def test_the_one_that_failed_speaks_and_not_those_who_heard_of_it(failed: int) -> None:
    with ThreadPoolExecutor(WORLD) as pool:
        spoke = [
            pool.submit(absent.speaks, group, elsewhere=group.place.rank != failed) for group in groups(HashStore())
        ]
        assert [one.result() for one in spoke] == [rank == failed for rank in range(WORLD)]


def test_who_heard_of_one_that_is_silent_says_so() -> None:
    assert absent.speaks(groups(HashStore())[0], elsewhere=True)


def test_the_store_stays_until_all_have_looked_into_it() -> None:
    """It may end with process 0, and who finds none takes that one for lost."""
    store, ended = HashStore(), []

    class Ends(HashStore):
        def __getattribute__(self, name: str) -> Any:
            if ended and name in ("check", "add"):
                raise RuntimeError("Broken pipe")
            return getattr(store, name)

    def first(group: absent.Group) -> bool:
        spoke = absent.speaks(group)
        ended.append(True)
        return spoke

    def late(group: absent.Group) -> bool:
        time.sleep(0.2 * group.place.rank)
        return absent.speaks(group)

    every = groups(Ends())
    with ThreadPoolExecutor(WORLD) as pool:
        spoke = [pool.submit(late if group.place.rank else first, group) for group in every]
        assert [one.result() for one in spoke] == [True, False, False, False]


def test_without_a_store_one_of_each_machine_speaks() -> None:
    assert [absent.speaks(group) for group in groups(Gone(), beside=2)] == [False, True, True, False]
