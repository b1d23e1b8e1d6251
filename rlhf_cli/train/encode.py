"""What a checkpoint's files hold: tensors as safetensors, state as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def safetensors_parts(members: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece, so that one tensor at a time is copied to the CPU."""
    order = sorted(members, key=lambda key: (-members[key].element_size(), key))
    header: dict[str, Any] = {}
    place = 0
    for key in order:
        end = place + members[key].nbytes
        header[key] = {
            "dtype": _DTYPES[members[key].dtype], "shape": list(members[key].shape), "data_offsets": [place, end]
        }  # fmt: skip
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in order:
        flat = members[key].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def safetensors_size(members: dict[str, Tensor]) -> int:
    """Bytes of a safetensors file, rounded up."""
    return 16 + sum(tensor.nbytes + len(key) + 128 for key, tensor in members.items())


def encode_state(state: dict[str, Any]) -> bytes:
    """The state as JSON that reads back equal. Raises TypeError naming the entry that would not."""
    _check(state, "state")
    return json.dumps(state, indent=1).encode()


def _check(value: Any, where: str) -> None:
    """Raise a TypeError naming the entry that JSON would not give back as it was."""
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: key {key!r} is {type(key).__name__}, not str")
            _check(inner, f"{where}.{key}")
    elif type(value) is list:
        for index, inner in enumerate(value):
            _check(inner, f"{where}[{index}]")
    elif value is not None and type(value) not in {bool, int, float, str}:
        raise TypeError(f"{where} is {type(value).__name__}: a checkpoint's state holds only plain JSON values")
