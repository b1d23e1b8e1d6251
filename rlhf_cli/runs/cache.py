"""What runs share: arrays, filed by the content they were made from. Safetensors files, never pickle.

An entry is whole or absent, and is never changed in place: a draft of its own name is brought to the disk and takes the
place in one step, so runs that write the same entry at once do not harm each other. Reading checks everything; a
damaged file counts as absent, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.recipe.model_path import canonical
from rlhf_cli.runs.files import sync_folder, write_new

FORGOTTEN = 90 * 86400
"""Seconds after which an entry that nobody read is deleted."""
ABANDONED = 86400
"""Seconds after which a draft belongs to a writer that died."""
LONGEST_HEADER = 2**20
COMPUTING = ("data", "models", "objectives", "stages", "train")
_NAMES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}
_CODES = {np.dtype(code): name for name, code in _NAMES.items()}

Layout = Mapping[str, tuple[str, tuple[int | None, ...]]]
"""By name: the dtype, and the shape, None where any length will do."""


class Damaged(Exception):
    """Why an entry cannot be used."""


@dataclass(frozen=True)
class Entry:
    """What was found."""

    arrays: dict[str, np.ndarray]
    """Read-only and mapped from the file."""
    notes: dict[str, str]


@dataclass(frozen=True)
class Store:
    """The cache folder."""

    folder: Path
    warn: Callable[[str], None]

    def path(self, kind: str, key: str) -> Path:
        """The file of an entry."""
        return self.folder / kind / f"{key}.safetensors"

    def read(self, kind: str, key: str, layout: Layout, *, quietly: bool = False) -> Entry | None:
        """An entry whose arrays have this layout, finite throughout; None when there is none or it is damaged.
        quietly: it does not count as read, so nothing is written."""
        path = self.path(kind, key)
        try:
            entry = _checked(path, key, layout)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.warn(f"{path}: the cache cannot be read: {error.strerror or error}; the run goes on without it")
            return None
        except Damaged as reason:
            self.warn(f"{path}: damaged cache file ({reason}): ignored, and made anew")
            return None
        if not quietly:
            self.touch(kind, key)
        return entry

    def touch(self, kind: str, key: str) -> None:
        """Say of an entry that it was read, so that it stays."""
        with suppress(OSError):
            os.utime(self.path(kind, key))

    def write(self, kind: str, key: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
        """Put an entry in its place; a disk that refuses is a warning."""
        path = self.path(kind, key)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_new(draft, _parts(key, arrays, notes))
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
            sync_folder(path.parent)
            _sweep(path.parent)
        except OSError as error:
            self.warn(f"{path}: the cache cannot be written: {error.strerror or error}; the run goes on without it")


def open_store(warn: Callable[[str], None]) -> Store | None:
    """The cache in RLHF_CACHE, else below XDG_CACHE_HOME, else in ~/.cache/rlhf; None when RLHF_CACHE is empty."""
    own, shared = os.environ.get("RLHF_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own is not None:
        return Store(Path(own).expanduser(), warn) if own else None
    return Store(Path(shared or "~/.cache").expanduser() / "rlhf", warn)


def key_of(*packages: str, **parts: Any) -> str:
    """The name of what is made from these parts, plain JSON values, by the code of these packages (none named: of all
    that compute): 64 hex digits."""
    return hashlib.sha256(canonical({"code": code_digest(packages or COMPUTING), **parts})).hexdigest()


@cache
def code_digest(packages: tuple[str, ...] = COMPUTING) -> str:
    """SHA-256 of the source of what computes: other code may give other numbers."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()


# --- the file --------------------------------------------------------------------------------------------


def _parts(key: str, arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece, its arrays in the order of their names, the widest items first."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    table: dict[str, Any] = {}
    place = 0
    for name in sorted(plain, key=lambda n: (-plain[n].itemsize, n)):
        array = plain[name]
        end = place + array.nbytes
        table[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [place, end]}
        place = end
    data = [_bytes(plain[name]) for name in table]
    about = {**notes, "key": key}
    about["digest"] = _digest(table, about, data)
    header = json.dumps({"__metadata__": about, **table}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    yield from data


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _digest(table: Mapping[str, Any], about: Mapping[str, str], data: list[memoryview]) -> str:
    total = hashlib.sha256(canonical([table, about]))
    for part in data:
        total.update(part)
    return total.hexdigest()


def _checked(path: Path, key: str, layout: Layout) -> Entry:
    """The entry of a file. Raises Damaged and OSError."""
    size = path.stat().st_size
    if size < 8:
        raise Damaged("cut")
    whole = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(whole[:8].tobytes(), "little")
    if length > min(LONGEST_HEADER, size - 8):
        raise Damaged("cut")
    try:
        header = json.loads(whole[8 : 8 + length].tobytes())
        about = {str(k): str(v) for k, v in header.pop("__metadata__").items()}
        places = {name: tuple(one["data_offsets"]) for name, one in header.items()}
        kinds = {name: (one["dtype"], tuple(one["shape"])) for name, one in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("its header cannot be read") from None
    digest, data = about.pop("digest", ""), whole[8 + length :]
    if about.get("key") != key or digest != _digest(header, about, [_bytes(data)]):
        raise Damaged("its content is not what was written")
    if set(kinds) != set(layout) or not all(_fits(kinds[name], layout[name]) for name in layout):
        raise Damaged("it holds arrays of another shape or dtype")
    try:
        arrays = {name: data[slice(*places[name])].view(_NAMES[k]).reshape(shape) for name, (k, shape) in kinds.items()}
    except ValueError:
        raise Damaged("its arrays do not lie where it says") from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
            raise Damaged(f"{name} holds numbers that are not finite")
    return Entry(arrays, {k: v for k, v in about.items() if k != "key"})


def _fits(kind: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int | None, ...]]) -> bool:
    """Whether a dtype and shape are those of a layout."""
    (dtype, shape), (asked, lengths) = kind, wanted
    return (
        dtype == asked
        and len(shape) == len(lengths)
        and all(w in (None, n) for n, w in zip(shape, lengths, strict=True))
    )


def _sweep(folder: Path) -> None:
    """Delete entries that nobody read for long, and drafts that nobody will finish."""
    now = time.time()
    for path in folder.iterdir():
        with suppress(OSError):
            if now - path.stat().st_mtime > (ABANDONED if path.name.startswith(".") else FORGOTTEN):
                path.unlink()
