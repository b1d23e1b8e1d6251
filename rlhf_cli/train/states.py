"""What optimisers and random generators hold, as tensors and JSON, exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.errors import ModelError


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


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
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


def set_random_state(tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
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
