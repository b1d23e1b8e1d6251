from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_cli.errors import ModelError
from rlhf_cli.runs import files
from rlhf_cli.train import checkpoint, states
from tests.runs.helpers import Screen, tree

SMALL = {"policy": {"w": torch.arange(6.0).reshape(2, 3)}}


def put(folder: Path, step: int, keep: int = 2, **state: Any) -> Path:
    return checkpoint.save(folder, f"step-{step:06d}", SMALL, {"step": step, **state}, keep)


def newest_step(folder: Path) -> tuple[int | None, list[str]]:
    screen = Screen()
    found = checkpoint.newest(folder, screen)  # type: ignore[arg-type]
    return (found.state["step"] if found else None), screen.warnings


def test_every_dtype_and_layout_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    group = {
        "float32": torch.randn(3, 5),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(7).half(),
        "float64": torch.randn(2).double(),
        "uint8": torch.randint(0, 256, (9,), dtype=torch.uint8),
        "int64": torch.tensor(2**62 + 1),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "view": shared[3:7],
        "tied": shared,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = checkpoint.save(tmp_path / "c", "step-000001", {"a": group, "b": {}}, {}, 1)
    loaded = checkpoint.read(path).tensors("a")
    assert loaded.keys() == group.keys()
    for name, tensor in group.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8))
    assert load_file(path / "a.safetensors")["view"].tolist() == [3.0, 4.0, 5.0, 6.0]
    assert checkpoint.read(path).tensors("b") == {}
    with pytest.raises(ModelError, match="no tensors called 'critic'"):
        checkpoint.read(path).tensors("critic")


def test_state_is_exact_and_strict(tmp_path: Path) -> None:
    state = {"i": 2**200 + 1, "f": [0.1 + 0.2, 5e-324, -0.0, float("inf")], "n": {"x": None, "y": True, "z": "\u00e9"}}
    read = checkpoint.read(checkpoint.save(tmp_path, "step-000001", {}, state, 1)).state
    assert read == state
    assert str(read["f"]) == str(state["f"])
    for value, word in [((1, 2), "tuple"), (np.float64(1), "float64"), (torch.ones(1), "Tensor"), ({1: 2}, "key 1")]:
        with pytest.raises(TypeError, match=word) as error:
            checkpoint.save(tmp_path, "step-000002", {}, {"deep": [value]}, 1)
        assert "state.deep[0]" in str(error.value)
    assert os.listdir(tmp_path) == ["step-000001"]


def test_keep_and_abandoned_later_steps(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["step-000002", "step-000003"]
    (tmp_path / "step-000003" / "state.json").write_text("{}")
    assert newest_step(tmp_path)[0] == 2
    put(tmp_path, 2, again=1)
    assert sorted(os.listdir(tmp_path)) == ["step-000002"]
    assert checkpoint.read(tmp_path / "step-000002").state == {"step": 2, "again": 1}


def test_retention_counts_whole_ones_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step, keep=3)
    (tmp_path / "step-000003" / "manifest.json").unlink()
    put(tmp_path, 4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-000002", "step-000004"]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped byte": (lambda p: flip(p / "policy.safetensors", -1), "policy.safetensors has another SHA-256"),
    "flipped state": (lambda p: flip(p / "state.json", 3), "state.json has another SHA-256"),
    "cut file": (lambda p: os.truncate(p / "policy.safetensors", 30), "policy.safetensors has 30 bytes instead of"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (lambda p: os.truncate(p / "manifest.json", 40), "manifest.json is damaged"),
    "extra file": (lambda p: (p / "x.bin").write_text("x"), "x.bin is not in manifest.json"),
    "missing file": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "folder for a file": (
        lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir()),
        "state.json is not a plain file",
    ),
    "renamed": (lambda p: p.rename(p.with_name("step-000007")), "manifest.json is of step-000002"),
    "empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_passed_over_and_named(tmp_path: Path, kind: str) -> None:
    put(tmp_path, 1)
    hurt, reason = DAMAGE[kind]
    hurt(put(tmp_path, 2))  # type: ignore[no-untyped-call]
    step, warnings = newest_step(tmp_path)
    assert step == 1
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert "step-00000" in warnings[0]


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = put(tmp_path, 1) / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (1, 4, 32, 128):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(bytes(changed))
            assert newest_step(tmp_path)[0] is None, (place, bit)


def test_all_broken_or_none(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "absent") == (None, [])
    (put(tmp_path, 1) / "state.json").unlink()
    step, warnings = newest_step(tmp_path)
    assert step is None
    assert len(warnings) == 1
    with pytest.raises(ModelError, match="not whole"):
        checkpoint.read(tmp_path / "step-000001")


def test_orphans_are_ignored_then_deleted(tmp_path: Path) -> None:
    put(tmp_path, 1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".step-000005.tmp-1")
    assert newest_step(tmp_path) == (1, [])
    put(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    put(tmp_path, 1)
    before = tree(tmp_path)

    def fail(*args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ModelError) as error:
        put(tmp_path, 2)
    monkeypatch.undo()
    text = str(error.value)
    assert os.strerror(code) in text
    assert "step-000001; free some space" in text
    assert error.value.exit_code == 4
    assert tree(tmp_path) == before


def test_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    before = tree(tmp_path)
    usage = namedtuple("usage", "total used free")(0, 0, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match=r"needs 1,\d{3},\d{3} bytes and 1,000,000 are free .*step-000001"):
        put(tmp_path, 2)
    assert tree(tmp_path) == before


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = put(tmp_path / "c", 1)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_without_exchange_a_set_aside_checkpoint_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.old-77")
    assert newest_step(tmp_path) == (1, [])
    monkeypatch.setattr(checkpoint, "exchange", lambda one, other: False)
    put(tmp_path, 1, again=True)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert checkpoint.read(tmp_path / "step-000001").state["again"] is True


def test_exchange_swaps(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    if files.exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "b" / "x").exists()
        assert not (tmp_path / "a" / "x").exists()
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "a", tmp_path / "missing")


# --- optimisers ------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(80, 64).to(dtype)), nn.Parameter(torch.randn(10).to(dtype))]


def steps(optimizer: torch.optim.Optimizer, values: list[nn.Parameter], seed: int, count: int) -> None:
    torch.manual_seed(seed)
    for _ in range(count):
        for value in values:
            value.grad = torch.randn_like(value)
        optimizer.step()


def bnb(name: str) -> Any:
    return getattr(pytest.importorskip("bitsandbytes").optim, name)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW([{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:]}], lr=1e-2),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw_8bit": lambda p: bnb("AdamW8bit")(p, lr=1e-2),
    "paged_adamw_8bit": lambda p: bnb("PagedAdamW8bit")(p, lr=1e-2),
    "paged_adamw": lambda p: bnb("PagedAdamW")(p, lr=1e-2),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    optimizer = OPTIMIZERS[name](ours)
    steps(optimizer, ours, 1, 3)
    optimizer.param_groups[0]["lr"] = 0.003
    optimizer.param_groups[0]["initial_lr"] = 0.01
    tensors, state = states.save_optimizer(optimizer)
    path = checkpoint.save(tmp_path, "step-000003", {"optimizer": tensors}, {"optimizer": state}, 1)
    kept = {key: value.clone() for key, value in tensors.items()}
    copies = [nn.Parameter(value.detach().clone()) for value in ours]
    steps(optimizer, ours, 2, 3)

    fresh = OPTIMIZERS[name](copies)
    saved = checkpoint.read(path)
    states.load_optimizer(fresh, saved.tensors("optimizer"), saved.state["optimizer"])
    again, again_state = states.save_optimizer(fresh)
    assert again_state == state
    assert again.keys() == kept.keys()
    for key, value in kept.items():
        assert again[key].dtype == value.dtype, key
        assert torch.equal(again[key], value), key
    steps(fresh, copies, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, copies, strict=True))
    assert type(fresh.param_groups[0].get("betas")) is type(optimizer.param_groups[0].get("betas"))


def test_float32_moments_of_bfloat16_weights_are_not_cast() -> None:
    values = parameters(torch.bfloat16)
    optimizer = torch.optim.AdamW(values, lr=1e-2)
    steps(optimizer, values, 1, 1)
    moment: Tensor = torch.full((80, 64), 1.0000001)
    optimizer.state[values[0]]["exp_avg"] = moment
    fresh = torch.optim.AdamW(parameters(torch.bfloat16), lr=1e-2)
    states.load_optimizer(fresh, *states.save_optimizer(optimizer))
    loaded = fresh.state[fresh.param_groups[0]["params"][0]]["exp_avg"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, moment)
    assert loaded.data_ptr() != moment.data_ptr()


def test_other_parameters_are_refused() -> None:
    optimizer = torch.optim.SGD(parameters(torch.float32), lr=1e-2)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1e-2)
    with pytest.raises(ModelError, match="other parameters"):
        states.load_optimizer(other, *states.save_optimizer(optimizer))


def test_generators(tmp_path: Path) -> None:
    random.seed(3)
    random.gauss(0, 1)
    np.random.seed(4)
    np.random.standard_normal()
    torch.manual_seed(5)
    tensors, state = states.random_state()
    path = checkpoint.save(tmp_path, "step-000001", {"random": tensors}, {"random": state}, 1)
    wanted = (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.randn(4).tolist())
    saved = checkpoint.read(path)
    states.set_random_state(saved.tensors("random"), saved.state["random"])
    found = (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.randn(4).tolist())
    assert found == wanted
    assert json.dumps(saved.state["random"])
