"""What a file is by the look of its first lines: for hints and the shell, before anything is read properly."""

from __future__ import annotations

import re
from pathlib import Path

_HEAD = 16384
"""Bytes that are looked at."""


def stage_of(path: Path) -> str | None:
    """The command that a YAML file is a recipe for; None for any other file."""
    return _line(path, "stage")


def run_of(path: Path) -> str | None:
    """The run directory that a recipe names; None for a file that is none."""
    return _line(path, "output_dir")


def _line(path: Path, key: str) -> str | None:
    if path.suffix not in (".yaml", ".yml") or path.name.startswith("."):
        return None
    try:
        with path.open("rb") as file:
            text = file.read(_HEAD).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    stage, found = (re.search(rf"^{k}:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE) for k in ("stage", key))
    return found[1] if stage and found else None
