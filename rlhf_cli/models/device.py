"""Where the computation runs, and in which dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_cli.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device() -> torch.device:
    """The first CUDA device when there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights and of the computation; `auto`: bfloat16 on a CUDA device that has it, else float32.

    Raises ModelError for a dtype the device cannot compute in.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ModelError("this GPU has no bfloat16", "model.dtype", "use float16 or auto")
    return DTYPES[name]


@dataclass(frozen=True)
class Tokens:
    """Tokens of a micro-batch: what is worth having on a kind of device."""

    least: int
    usual: int
    """Fewer make it slower; for so many it is worth while to recompute activations, not for more."""
    most: int
    """More make it no faster: on a CPU they fall out of its cache."""


def micro_batch_range(device: torch.device) -> Tokens:
    """What `micro_batch_tokens: auto` chooses from, by powers of two."""
    return Tokens(256, 8192, 32768) if device.type == "cuda" else Tokens(64, 1024, 1024)
