"""Files that are whole or absent: writes that reach the disk before they get their name, folders swapped in one step.

Temporaries are hidden siblings called `.NAME.tmp-PID`; a crash may leave them behind, and whoever holds the lock of the
run may delete them. All files get the mode the umask gives.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from rlhf_cli.errors import ModelError, RecipeError

TEMPORARY = re.compile(r"\..+\.tmp-\d+")
_EXCHANGE = 2
_CWD = -100
FREE = "free some space"
"""What to do, at the start of a hint, where a disk is full."""
FULL = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = "choose another output_dir, where you may write"


def temporary(path: Path) -> Path:
    """The hidden sibling under which a path is prepared or removed."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def write_new(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file that does not exist yet, down to the disk.

    Returns:
        Its size in bytes and its SHA-256. Raises OSError, with the file's name in it.
    """
    size, total = 0, hashlib.sha256()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for part in parts:
                write_all(handle, part)
                total.update(part)
                size += len(part)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return size, total.hexdigest()


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write every byte, however few the system takes at once. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest[: 2**30]) :]


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file in one step: at every moment the old or the new content stands there whole. Raises OSError."""
    draft = temporary(path)
    draft.unlink(missing_ok=True)
    try:
        write_new(draft, [data])
        os.rename(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Bring every file below a folder, and all names, to the disk. Raises OSError."""
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(root))


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot. Raises OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_CWD, os.fsencode(one), _CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}:
        return False
    raise OSError(code, os.strerror(code), str(one))


def discard(path: Path) -> None:
    """Remove a file or folder so that its name is gone in one step. Raises OSError."""
    if TEMPORARY.fullmatch(path.name) is None:
        hidden = temporary(path)
        discard(hidden)
        os.rename(path, hidden)
        path = hidden
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(*folders: Path) -> None:
    """Delete what crashed writers left in folders. Only for the holder of the run's lock. Raises OSError."""
    for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
        if TEMPORARY.fullmatch(path.name):
            discard(path)


def writable(path: Path, where: str = "", hint: str = ELSEWHERE) -> None:
    """Check that a path can be created or written into, leaving no trace. where: who asks for it; empty: output_dir.
    Raises RecipeError."""
    place, where = path, where or f"output_dir {path}"
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place) and place == path:
        raise RecipeError("is a file", where, hint)
    if not os.path.isdir(place):
        raise RecipeError(f"cannot be created: {place} is not a folder", where, hint)
    reason = "" if os.access(place, os.W_OK | os.X_OK) else "permission denied or read-only"
    if reason := reason or _refused(place):
        raise RecipeError(f"cannot write into {place}: {reason}", where, hint)


def writable_file(path: Path, where: str, hint: str) -> None:
    """The same of a file, whose folder must be there. Raises RecipeError."""
    if path.is_dir():
        raise RecipeError("is a folder", where, hint)
    if not path.parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent}", where, hint)
    writable(path.parent, where, hint)


def _refused(place: Path) -> str:
    """Why the system refuses a nameless file there (a folder, where it has no such files); empty when it does not."""
    try:
        if hasattr(os, "O_TMPFILE"):
            os.close(os.open(place, os.O_TMPFILE | os.O_RDWR))
            return ""
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}:
            return os.strerror(error.errno or 0)
    try:
        tempfile.TemporaryDirectory(prefix=".rlhf-", dir=place).cleanup()
    except OSError as error:
        return "nothing can be created there" if error.errno == errno.ENOENT else os.strerror(error.errno or 0)
    return ""


def disk_error(error: OSError, doing: str, path: Path, hint: str) -> ModelError:
    """A failed disk operation in the user's words, with the name that a file was to get. Only a full disk is freed."""
    reason = error.strerror or str(error)
    place = "/".join(_asked(part) for part in str(error.filename or path).split("/"))
    if error.errno not in FULL:
        hint = hint.removeprefix(FREE).removeprefix(", then ")
    return ModelError(f"{doing}: {reason}", where=place, hint=hint)


def _asked(name: str) -> str:
    """The name for which a temporary stands."""
    return name[1 : name.rindex(".tmp-")] if TEMPORARY.fullmatch(name) else name


def remove_quietly(path: Path) -> None:
    """Remove on the way out of another error, which matters more than one met here."""
    with suppress(OSError):
        if path.exists():
            discard(path)
