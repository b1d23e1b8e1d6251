"""Checkpoints whose tensors several processes hold in parts: begun by one, written by all, published by the first."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.models import mesh, processes
from rlhf_cli.runs import manifest
from rlhf_cli.train import checkpoint, snapshot
from tests.runs.helpers import Screen, tree

COUNT = 12
"""Processes: more than nine, so that 10 comes behind 9 and not behind 1."""
NAME = "step-000002"
WHOLE = {"policy": {"norm": torch.ones(3)}, "policy-optimizer": {"0.step": torch.tensor(2.0)}}
WEIGHT = torch.arange(22.0 * 4).view(22, 4)
"""Two rows for each of eleven; the twelfth has none."""
MOMENTS = torch.arange(5.0).view(5, 1).bfloat16()


def parts_of(number: int) -> checkpoint.Tensors:
    """What process `number`, from 1, holds."""

    def cut(full: Tensor) -> Tensor:
        parts = full.chunk(COUNT)
        return parts[number - 1] if number <= len(parts) else full[:0]

    return {"policy": {"weight": cut(WEIGHT)}, "policy-optimizer": {"1.exp_avg": cut(MOMENTS)}}


def written(folder: Path, place: Path) -> checkpoint.Parts:
    files: checkpoint.Files = {}
    for number in range(COUNT, 0, -1):
        files |= checkpoint.write_parts(place, parts_of(number), number, COUNT)
    return checkpoint.Parts(place, files)


def put(folder: Path, **state: Any) -> Path:
    parts = written(folder, checkpoint.begin(folder, NAME, 1))
    return checkpoint.save(folder, NAME, WHOLE, state, 2, parts=parts)


def test_what_is_read_is_whole_and_in_order(tmp_path: Path) -> None:
    path = put(tmp_path)
    assert os.listdir(tmp_path) == [NAME], "nothing stays of what it was made from"
    assert not manifest.fault(path)
    found = checkpoint.read(path).tensors("policy")
    assert set(found) == {"norm", "weight"}
    assert torch.equal(found["weight"], WEIGHT)
    assert torch.equal(found["norm"], torch.ones(3))
    states = checkpoint.read(path).tensors("policy-optimizer")
    assert set(states) == {"1.exp_avg", "0.step"}
    assert torch.equal(states["1.exp_avg"], MOMENTS)
    assert states["1.exp_avg"].dtype == torch.bfloat16


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    put(tmp_path, number=1)
    put(tmp_path, number=2)
    assert os.listdir(tmp_path) == [NAME]
    assert checkpoint.read(tmp_path / NAME).state == {"number": 2}


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_failure_of_the_first_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint.save(tmp_path, "step-000001", WHOLE, {}, 2)
    before = tree(tmp_path)
    parts = written(tmp_path, checkpoint.begin(tmp_path, NAME, 1))
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ModelError, match="step-000001; free some space"):
        checkpoint.save(tmp_path, NAME, WHOLE, {}, 2, parts=parts)
    monkeypatch.undo()
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith(".")} == before
    checkpoint.save(tmp_path, NAME, WHOLE, {}, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", NAME]


def test_a_part_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkpoint.begin(tmp_path, NAME, 1)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ModelError, match="a part of a checkpoint could not be saved: No space left") as caught:
        checkpoint.write_parts(place, parts_of(3), 3, COUNT)
    assert f"{NAME}/policy.3-of-12.safetensors" in str(caught.value)
    assert "there is no whole checkpoint yet; free some space" in str(caught.value)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_space_for_all_parts_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(0, 0, 2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"a checkpoint needs 2,048,576 bytes and 2,000,000 are free"):
        checkpoint.begin(tmp_path, NAME, 1_000_000)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / f".{NAME}.tmp-1"
    left.mkdir()
    (left / "policy.1-of-2.safetensors").write_bytes(b"x")
    assert checkpoint.newest(tmp_path, cast("Any", Screen())) is None
    put(tmp_path)
    assert os.listdir(tmp_path) == [NAME]


# --- by a process of several ------------------------------------------------------------------------------------------


def engine_of(folder: Path) -> Any:
    run = SimpleNamespace(checkpoints=folder, path=folder)
    return SimpleNamespace(run=run, step=2, learners={"policy": None}, display=Screen())


@pytest.mark.parametrize("group", ["policy", "policy-optimizer"])
def test_a_part_that_is_not_finite_is_not_saved(tmp_path: Path, group: str) -> None:
    own = {"policy": {"weight": torch.ones(2)}, "policy-optimizer": {"1.exp_avg": torch.ones(2)}}
    own[group] = {name: tensor.clone().fill_(torch.inf) for name, tensor in own[group].items()}
    with pytest.raises(DivergedError, match="holds NaN or infinite numbers after step 2"):
        snapshot._write_parts(engine_of(tmp_path), own, "saving step 2")
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_beside_a_whole_tensor_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = snapshot._Found({"policy": {"norm": torch.tensor([torch.nan])}}, {"policy": {"weight": torch.ones(2)}}, {})
    monkeypatch.setattr(snapshot, "_found", lambda engine: found)
    with pytest.raises(DivergedError, match="tensor norm of the policy holds NaN or infinite numbers after step 2"):
        snapshot.save(engine_of(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_failure_elsewhere_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(work: Callable[[], Any], doing: str) -> None:
        assert work()
        raise processes.Elsewhere(1, 4)

    monkeypatch.setattr(processes, "together", failing)
    with pytest.raises(processes.Elsewhere):
        snapshot._write_parts(engine_of(tmp_path), {"policy": {"weight": torch.ones(2)}}, "saving step 2")
    assert os.listdir(tmp_path) == []


def test_only_one_copy_of_the_layers_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines with two processes each, the first one writes; space is looked for for both of its parts."""
    sizes: list[int] = []
    begin = checkpoint.begin

    def sized(folder: Path, name: str, size: int) -> Path:
        sizes.append(size)
        return begin(folder, name, size)

    monkeypatch.setattr(checkpoint, "begin", sized)
    monkeypatch.setattr(mesh, "count", lambda: 2)
    own = {"policy": {"weight": torch.ones(1000)}}
    for rank, names in ((1, ["policy.2-of-2.safetensors"]), (2, [])):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts = snapshot._write_parts(engine_of(tmp_path), own, "saving step 2")
        assert sorted(parts.files) == sorted(os.listdir(parts.folder)) == names
        assert all(size == (parts.folder / name).stat().st_size for name, (size, _) in parts.files.items())
    assert min(sizes) > 8000
