"""Where the computation runs, and in which dtype."""

from __future__ import annotations

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


def default_micro_batch_tokens(device: torch.device) -> int:
    """Tokens in memory at once when the recipe says auto; halved on the way when memory runs out."""
    return 8192 if device.type == "cuda" else 1024
