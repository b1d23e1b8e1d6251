"""Checkpoints on disk: whole or absent, no pickle, every byte accounted for.

A checkpoint is a folder `step-NNNNNN` of safetensors files, `state.json` and `manifest.json` (runs/manifest.py). It is
written under a hidden name, brought to the disk, verified, and only then takes its name in one step.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.runs import manifest
from rlhf_cli.runs.files import discard, disk_error, exchange, remove_quietly, sync_folder, temporary, write_new
from rlhf_cli.train.encode import encode_state, safetensors_parts, safetensors_size

if TYPE_CHECKING:
    from rlhf_cli.runs.display import Display

STATE = "state.json"
_SLACK = 2**20
"""Bytes kept free beyond what is counted: manifest, folders, block rounding."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]
    """What was given to `save`, with every int and float exact."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a group, on the CPU, free of the file. Raises ModelError when there is no such group."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            raise ModelError(f"holds no tensors called '{name}'", str(self.path), "it belongs to another kind of run")
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def save(
    folder: Path,
    name: str,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write a checkpoint, then delete old ones.

    Args:
        folder: `checkpoints/` of the run, whose lock the caller holds.
        name: `step-000200`. One of that name is replaced; at every moment the old or the new one is whole.
        tensors: group -> name -> tensor, any device and layout; tensors that share memory are stored one by one.
        state: None, bool, int, float, str, lists and dicts of them.
        keep: how many checkpoints stay. Those of later steps go too: the run has left them behind.
        spare: an earlier step whose checkpoint stays as well.

    Returns:
        Its folder. Raises TypeError for other types in `state`, ModelError when the disk is full or fails; the former
        checkpoints are then as they were.
    """
    assert manifest.step_of(name) is not None, name
    assert keep >= 1, keep
    assert all(re.fullmatch(r"[\w-]+", group) for group in tensors), list(tensors)
    text = encode_state(state)
    target, draft = folder / name, temporary(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        manifest.tidy(folder)
        _require_space(folder, len(text) + sum(safetensors_size(group) for group in tensors.values()))
        try:
            _write(draft, name, tensors, text)
            if not target.exists():
                os.rename(draft, target)
        except BaseException:
            remove_quietly(draft)
            raise
        _publish(draft, target)
        retire(folder, target, keep, spare)
    except OSError as error:
        raise disk_error(error, f"checkpoint {name} could not be saved", target, _what_remains(folder)) from error
    return target


def newest(folder: Path, display: Display) -> Checkpoint | None:
    """The whole checkpoint of the highest step, None without one. Each that is not whole is named by `display.warn`."""
    for path in manifest.listed(folder):
        reason = manifest.fault(path)
        if not reason:
            return Checkpoint(path, read_json(path / STATE))
        display.warn(f"{path}: this checkpoint is not whole and was passed over: {reason}")
    return None


def read(path: Path) -> Checkpoint:
    """The checkpoint of that folder. Raises ModelError when it is not whole."""
    if reason := manifest.fault(path):
        raise ModelError(f"the checkpoint is not whole: {reason}", str(path), "give another one")
    return Checkpoint(path, read_json(path / STATE))


def _write(draft: Path, name: str, tensors: dict[str, dict[str, Tensor]], text: bytes) -> None:
    """Write every file of a checkpoint, the manifest last, bring them to the disk and read them back."""
    draft.mkdir()
    files = {STATE: write_new(draft / STATE, [text])}
    for group, members in tensors.items():
        files[f"{group}.safetensors"] = write_new(draft / f"{group}.safetensors", safetensors_parts(members))
    write_new(draft / manifest.MANIFEST, [manifest.encode(name, files)])
    sync_folder(draft)
    if reason := manifest.fault(draft, name):
        raise OSError(None, f"what was written does not read back: {reason}", str(draft))


def _publish(draft: Path, target: Path) -> None:
    """Bring the name of a checkpoint to the disk; first give it that, when another one has it."""
    folder = target.parent
    if not draft.exists():
        sync_folder(folder)
    elif exchange(draft, target):
        sync_folder(folder)
        discard(draft)
    else:
        old = manifest.aside(target)
        os.rename(target, old)
        os.rename(draft, target)
        sync_folder(folder)
        discard(old)


def retire(folder: Path, newest_one: Path, keep: int, spare: int | None) -> None:
    """Delete all but the newest `keep` and `spare`: later steps, those that are not whole, the oldest."""
    step = manifest.step_of(newest_one.name) or 0
    kept = 1
    for path in manifest.listed(folder):
        if path == newest_one or manifest.step_of(path.name) == spare:
            continue
        later = (manifest.step_of(path.name) or 0) > step
        if kept < keep and not later and not manifest.fault(path, content=False):
            kept += 1
        else:
            discard(path)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SLACK:
        raise ModelError(
            f"a checkpoint needs {needed + _SLACK:,} bytes and {free:,} are free", str(folder), _what_remains(folder)
        )


def _what_remains(folder: Path) -> str:
    """Hint after a failed save."""
    advice = "free some space, then run the same command again to resume"
    for path in manifest.listed(folder):
        if not manifest.fault(path):
            return f"the last whole checkpoint is {path}; {advice}"
    return f"there is no whole checkpoint yet; {advice}"


def save_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a torch or bitsandbytes optimiser.

    Returns:
        Tensors called `INDEX.KEY` (index of the parameter over all groups), in the dtype they are kept in and not
        copied, and JSON: the settings of the groups, shapes of the parameters, and the values that are not tensors.
        Raises TypeError for a state that is neither.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = _plain(value, f"{index}.{key}")
    groups = [
        {key: _plain(value, key) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    shapes = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    return tensors, {"groups": groups, "shapes": shapes, "values": values}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put what `save_optimizer` returned into an optimiser over the same parameters, in the same order.

    Raises ModelError when the parameters are not the same.
    """
    shapes = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    if shapes != state["shapes"]:
        raise ModelError(
            "the optimiser in the checkpoint belongs to other parameters than the model has",
            hint="resume with the model and the adapter settings the run started with",
        )
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in saved.items():
            group[key] = _restored(value, group.get(key))
    entries: dict[int, dict[str, Any]] = {int(index): dict(found) for index, found in state["values"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.state.clear()
    for place, parameter in _parameters(optimizer):
        if place in entries:
            _fill(optimizer, place, parameter, entries[place])


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The generators of Python, numpy, torch and every visible GPU."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937", name
    tensors = {"numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    state = {
        "python": [version, list(words), gauss],
        "numpy": [int(position), int(has_gauss), float(cached)],
    }
    return tensors, state


def set_random_state(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put back what `random_state` returned; generators of GPUs that are not there are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, Tensor]]:
    return enumerate(p for group in optimizer.param_groups for p in group["params"])


def _fill(optimizer: torch.optim.Optimizer, index: int, parameter: Tensor, entries: dict[str, Any]) -> None:
    """Write the state of one parameter. Past `load_state_dict`, which casts to the parameter's dtype."""
    state = optimizer.state[parameter]
    group, position = _place(optimizer, index)
    if getattr(optimizer, "is_paged", False):
        optimizer.init_state(optimizer.param_groups[group], parameter, group, position)  # type: ignore[attr-defined]
    for key, value in entries.items():
        if not isinstance(value, Tensor):
            state[key] = value
        elif getattr(state.get(key), "is_paged", False):
            state[key].copy_(value)
        else:
            state[key] = value.to(_device(optimizer.param_groups[group], key, parameter), copy=True)


def _place(optimizer: torch.optim.Optimizer, index: int) -> tuple[int, int]:
    """Group and position within it of the parameter with that index."""
    for number, group in enumerate(optimizer.param_groups):
        if index < len(group["params"]):
            return number, index
        index -= len(group["params"])
    raise IndexError(index)


def _device(group: dict[str, Any], key: str, parameter: Tensor) -> torch.device:
    """Step counters stay on the CPU unless the kernel reads them on the device, as torch itself has it."""
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return parameter.device


def _plain(value: Any, where: str) -> Any:
    """A setting as JSON: tuples become lists, tensors of one number that number."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(inner, where) for inner in value]
    if value is not None and type(value) not in {bool, int, float, str}:
        raise TypeError(f"optimiser state {where} is {type(value).__name__}, which a checkpoint cannot hold")
    return value


def _restored(saved: Any, present: Any) -> Any:
    """A setting in the type that the optimiser keeps it in."""
    if isinstance(present, Tensor):
        return torch.full_like(present, saved)
    return tuple(saved) if isinstance(present, tuple) else saved
