"""How processes find a store of their own among what earlier attempts left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from rlhf_cli.errors import ModelError
from rlhf_cli.models.meeting import agree
from rlhf_cli.runs.place import Place, place


def meet(store: HashStore, ranks: range, world: int) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda r: agree(store, Place(r, world, r), 5), ranks))


def test_all_hear_the_same_name_and_each_attempt_another() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=5))
    names = [meet(store, range(3), 3), meet(store, range(2), 2), meet(store, range(3), 3)]
    assert all(len(set(attempt)) == 1 for attempt in names)
    assert len({attempt[0] for attempt in names}) == 3


def test_an_attempt_that_lost_a_process_does_not_mislead_the_next() -> None:
    store = HashStore()
    with pytest.raises(ModelError, match=r"of 3 processes 1 did not come: \[2\]"), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda r: agree(store, Place(r, 3, r), 0.5), range(2)))
    assert len(set(meet(store, range(3), 3))) == 1


def test_one_that_finds_nobody_says_so() -> None:
    with pytest.raises(ModelError, match="process 0 did not come"):
        agree(HashStore(), Place(1, 2, 1), 0.1)


def test_only_torchrun_makes_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert place() == Place()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert place() == Place(3, 8, 1, 4)
