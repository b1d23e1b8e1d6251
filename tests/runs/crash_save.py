"""Saves checkpoints and dies at the n-th disk operation. Used by test_crash.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.train import checkpoint

CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "close")


def content(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"w": torch.full((50, 3), float(step))}, "moments": {"m": torch.arange(7) * step}}


def die_at(limit: int, fail: bool) -> None:
    """Patch the disk operations: at the `limit`-th one the process dies, or from then on every write fails.

    The second save replaces the first checkpoint, the third follows it and retires it.
    """
    count = [0]

    def wrap(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] >= limit and not fail:
                os._exit(9)
            if count[0] >= limit and fail and name in {"write", "fsync", "rename"}:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def main(folder: Path, mode: str, limit: int) -> None:
    if "plain" in mode:
        checkpoint.exchange = lambda one, other: False  # type: ignore[assignment]
    checkpoint.save(folder, "step-000001", content(1), {"step": 1}, keep=1)
    die_at(limit, "full" in mode)
    for step in (1, 2):
        checkpoint.save(folder, f"step-{step:06d}", content(step), {"step": step}, keep=1)
