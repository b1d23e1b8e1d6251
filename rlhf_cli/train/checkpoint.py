"""Checkpoints on disk: whole or absent, no pickle, every byte accounted for.

A checkpoint is a folder `step-NNNNNN` of safetensors files, `state.json` and `manifest.json` (runs/manifest.py). It is
written under a hidden name, brought to the disk, verified, and only then takes its name in one step. A group of tensors
is `GROUP.safetensors`; of tensors that several processes hold in parts, each writes its own into
`GROUP.1-of-2.safetensors`, rows after rows, and who reads them finds them whole.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.model_path import read_json, sha256
from rlhf_cli.runs import manifest
from rlhf_cli.runs.files import discard, disk_error, exchange, remove_quietly, sync_folder, temporary, write_new
from rlhf_cli.train.encode import encode_state, safetensors_parts, safetensors_size

if TYPE_CHECKING:
    from rlhf_cli.runs.display import Display

STATE = "state.json"
_PART = re.compile(r"(?P<group>[\w-]+)\.(\d+)-of-\d+\.safetensors")
_SLACK = 2**20
"""Bytes kept free beyond what is counted: manifest, folders, block rounding."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]
    """What was given to `save`, with every int and float exact."""

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a group. Raises ModelError when there is no such group."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            raise ModelError(f"holds no tensors called '{name}'", str(self.path), "it belongs to another kind of run")
        found = {int(m[2]): p for p in self.path.iterdir() if (m := _PART.fullmatch(p.name)) and m["group"] == name}
        return Stored([path, *(found[i] for i in sorted(found))])


class Stored(Mapping[str, Tensor]):
    """Tensors of files, whole and on the CPU: each is read when it is asked for, free of the file then."""

    def __init__(self, files: Sequence[Path]) -> None:
        """files: in the order of the rows, where several hold a tensor."""
        self._files: dict[str, list[Any]] = {}
        for file in (safe_open(path, framework="pt", device="cpu") for path in files):
            for key in file.keys():  # noqa: SIM118
                self._files.setdefault(key, []).append(file)

    def __getitem__(self, key: str) -> Tensor:
        read = [file.get_tensor(key) for file in self._files[key]]
        return read[0].clone() if len(read) == 1 else torch.cat(read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


Files = dict[str, tuple[int, str]]
"""Name -> size and SHA-256."""
Tensors = dict[str, dict[str, Tensor]]
"""Group -> name -> tensor."""


@dataclass(frozen=True)
class Parts:
    """What several processes have written of a checkpoint that is to come."""

    folder: Path
    """Its hidden name."""
    files: Files


def begin(folder: Path, name: str, size: int) -> Path:
    """The empty folder, under its hidden name, of a checkpoint with parts of so many bytes in all; the caller holds the
    run's lock, and is the one to `save` it. Raises ModelError when the disk is full or fails."""
    place = temporary(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.tidy(folder)
        _require_space(folder, size)
        place.mkdir()
    except OSError as error:
        raise disk_error(
            error, f"checkpoint {name} could not be saved", folder / name, _what_remains(folder)
        ) from error
    return place


def write_parts(place: Path, tensors: Tensors, number: int, count: int) -> Files:
    """Write part `number` (from 1) of `count` where `begin` said, and read it back. Raises ModelError."""
    files: Files = {}
    try:
        for group, members in tensors.items():
            path = place / f"{group}.{number}-of-{count}.safetensors"
            files[path.name] = write_new(path, safetensors_parts(members))
            if sha256(path) != files[path.name][1]:
                raise OSError(None, "what was written does not read back", str(path))
        return files
    except OSError as error:
        raise disk_error(
            error, "a part of a checkpoint could not be saved", place, _what_remains(place.parent)
        ) from error


def save(
    folder: Path,
    name: str,
    tensors: Tensors,
    state: dict[str, Any],
    keep: int,
    spare: int | None = None,
    parts: Parts | None = None,
) -> Path:
    """Write a checkpoint, then delete old ones.

    Args:
        folder: `checkpoints/` of the run, whose lock the caller holds.
        name: `step-000200`. One of that name is replaced; at every moment the old or the new one is whole.
        tensors: group -> name -> tensor, any device and layout; tensors that share memory are stored one by one.
        state: None, bool, int, float, str, lists and dicts of them.
        keep: how many checkpoints stay. Those of later steps go too: the run has left them behind.
        spare: an earlier step whose checkpoint stays as well.
        parts: what `begin` and `write_parts` made of it.

    Returns:
        Its folder. Raises TypeError for other types in `state`, ModelError when the disk is full or fails; the former
        checkpoints are then as they were.
    """
    assert manifest.step_of(name) is not None, name
    assert keep >= 1, keep
    assert all(re.fullmatch(r"[\w-]+", group) for group in tensors), list(tensors)
    target, draft = folder / name, temporary(folder / name)
    assert parts is None or parts.folder == draft
    try:
        try:
            text = encode_state(state)
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            if parts is None:
                manifest.tidy(folder)
            _require_space(folder, len(text) + sum(safetensors_size(group) for group in tensors.values()))
            _write(draft, name, tensors, text, parts)
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


def read(path: Path, *, content: bool = True) -> Checkpoint:
    """The checkpoint of that folder. content: also compare hashes. Raises ModelError when it is not whole."""
    if reason := manifest.fault(path, content=content):
        raise ModelError(f"the checkpoint is not whole: {reason}", str(path), "give another one")
    return Checkpoint(path, read_json(path / STATE))


def _write(draft: Path, name: str, tensors: Tensors, text: bytes, parts: Parts | None) -> None:
    """Write every file of a checkpoint, the manifest last, bring them to the disk and read them back."""
    draft.mkdir(exist_ok=parts is not None)
    files = {STATE: write_new(draft / STATE, [text])}
    for group, members in tensors.items():
        files[f"{group}.safetensors"] = write_new(draft / f"{group}.safetensors", safetensors_parts(members))
    known = {} if parts is None else parts.files
    files |= known
    write_new(draft / manifest.MANIFEST, [manifest.encode(name, files)])
    sync_folder(draft)
    if reason := manifest.fault(draft, name, known=known):
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
