"""One process per run directory. The lock belongs to the process: it is free as soon as the process is gone."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from rlhf_cli.errors import ModelError
from rlhf_cli.runs.files import disk_error

NAME = ".lock"
_held: set[int] = set()


def _let_go() -> None:
    """A forked child must not keep the lock of a parent that is gone."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def take(folder: Path) -> int:
    """Lock a folder; returns the handle that holds the lock. Raises ModelError naming the holder, or when the file
    system cannot lock."""
    path = folder / NAME
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise disk_error(error, "cannot create the lock", path, "choose another output_dir") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode(), 0)
                _held.add(handle)
                return handle
        except BlockingIOError:
            holder = os.pread(handle, 300, 0).decode(errors="replace").split()
            os.close(handle)
            raise ModelError(
                _taken(holder), where=str(folder), hint="one run per directory: wait, or stop it"
            ) from None
        except OSError as error:
            os.close(handle)
            raise disk_error(error, "cannot lock", path, "choose an output_dir on a local disk") from error
        os.close(handle)


def free(handle: int, folder: Path) -> None:
    """Give the lock back and take its file away."""
    with suppress(OSError):
        if _is(handle, folder / NAME):
            os.unlink(folder / NAME)
    if handle in _held:
        _held.remove(handle)
        os.close(handle)


def _is(handle: int, path: Path) -> bool:
    """Whether the handle is still the file of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _taken(holder: list[str]) -> str:
    if len(holder) != 2:
        return "another process is working in this run directory"
    return f"process {holder[0]} on {holder[1]} is working in this run directory"
