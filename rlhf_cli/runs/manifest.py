"""Which checkpoint folders are whole. Reads manifests only; knows nothing of tensors.

A checkpoint is a folder `step-NNNNNN` with `manifest.json`, which names every other file with its size and SHA-256.
While one is replaced where two names cannot be swapped, the old one is called `.step-NNNNNN.old-PID` for a moment.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rlhf_cli.recipe.model_path import sha256
from rlhf_cli.runs.files import discard, remove_temporaries, sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")
_ASIDE = re.compile(r"\.(step-\d+)\.old-\d+")


def step_of(name: str) -> int | None:
    """200 for `step-000200`; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def aside(path: Path) -> Path:
    """Where a checkpoint waits while its successor takes the name."""
    return path.with_name(f".{path.name}.old-{os.getpid()}")


def listed(folder: Path) -> list[Path]:
    """The checkpoint folders, whole or not, highest step first."""
    if not folder.is_dir():
        return []
    names = {path.name: path for path in folder.iterdir() if step_of(path.name) is not None and path.is_dir()}
    for path in sorted(folder.iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if match and path.is_dir():
            names.setdefault(match[1], path)
    return [names[name] for name in sorted(names, key=lambda n: step_of(n) or 0, reverse=True)]


def tidy(folder: Path) -> None:
    """Delete orphans and give a checkpoint that was set aside its name back. Only for the holder of the run's lock.

    Raises OSError.
    """
    remove_temporaries(folder)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if match and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])
            sync_folder(folder)
        elif match:
            discard(path)


def encode(name: str, files: dict[str, tuple[int, str]]) -> bytes:
    """The manifest of files given as name -> (size, SHA-256)."""
    entries = {key: {"size": size, "sha256": digest} for key, (size, digest) in sorted(files.items())}
    return _text({"format": FORMAT, "name": name, "files": entries}).encode()


def fault(path: Path, name: str = "", content: bool = True, known: Collection[str] = ()) -> str:
    """Why a checkpoint is not whole; empty when it is.

    Args:
        path: its folder.
        name: the name it must carry; default: that of the folder.
        content: also compare the SHA-256 of every file.
        known: files of which that has been done.
    """
    match = _ASIDE.fullmatch(path.name)
    name = name or (match[1] if match else path.name)
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if _text(manifest) != text:
            return f"{MANIFEST} is damaged"
        if manifest["format"] != FORMAT or manifest["name"] != name:
            return f"{MANIFEST} is of {manifest['name']}, format {manifest['format']}; wanted {name}, format {FORMAT}"
        return _compare(path, manifest["files"], manifest["files"].keys() - set(known) if content else ())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"


def _compare(path: Path, files: dict[str, Any], content: Collection[str]) -> str:
    """The first file that is not as the manifest says. content: those whose hashes are compared."""
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    if extra := sorted(present - files.keys()):
        return f"{extra[0]} is not in {MANIFEST}"
    if missing := sorted(files.keys() - present):
        return f"{missing[0]} is missing"
    for name, entry in files.items():
        found = (path / name).lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is not a plain file"
        if found.st_size != entry["size"]:
            return f"{name} has {found.st_size} bytes instead of {entry['size']}"
        if name in content and sha256(path / name) != entry["sha256"]:
            return f"{name} has another SHA-256 than {MANIFEST} says"
    return ""


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"
