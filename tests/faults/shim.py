"""Counts what a process does to one folder on disk, and at the n-th such operation kills it or fails the operation.

Lives in the process under test: renames, removals and opens are seen by an audit hook, writes and syncs through
wrappers in `os`. Standard library only, so that `sitecustomize` can arm it before anything else is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "FAULTS_SHIM"
PLACES = {"checkpoints": "save", "final": "export", "final-new": "export", "report.html": "report", "DONE": "done"}
LOGS = {"metrics.jsonl", "samples.jsonl", "doctor.jsonl", "run.log"}
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_AUDITED = {
    "os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir", "os.rmdir": "rmdir", "os.truncate": "truncate",
}  # fmt: skip
_WRAPPED = ("write", "pwrite", "fsync", "close", "ftruncate")


@dataclass(frozen=True)
class Fault:
    """At the n-th operation (from 1) of this kind: death before it, or, of a write, in its middle; or an error."""

    place: str = "save"
    """save, export, report, done, log or begin: which file of the run it touches; empty: any."""
    op: str = ""
    """Empty: any, or any of `ops`."""
    n: int = 1
    torn: bool = False
    """A write is done by half before the process dies."""
    errno: int = 0
    """Fail with this error instead; from then on every write of the process fails so."""
    ops: Sequence[str] = ()
    """Operations that count; empty: all."""


def newest(folder: str) -> int:
    """The step of the newest checkpoint in a folder that is whole by its manifest; -1: none."""
    found = -1
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        step = re.fullmatch(r"(?:\.(?=.*\.old-))?step-(\d+)(?:\.old-\d+)?", name)
        if step and _whole(os.path.join(folder, name)):
            found = max(found, int(step[1]))
    return found


def _whole(path: str) -> bool:
    try:
        with open(os.path.join(path, "manifest.json"), "rb") as file:
            said = json.loads(file.read())["files"]
    except OSError:
        return False
    if {*said, "manifest.json"} != set(os.listdir(path)):
        return False
    for name, entry in said.items():
        with open(os.path.join(path, name), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                return False
    return True


class Shim:
    """What is counted in this process. verify: look before every operation of a save which checkpoint is whole."""

    def __init__(self, root: str, trace: str, fault: Fault | None, verify: bool = False) -> None:
        self._verify = verify
        self._root = os.path.realpath(root)
        self._fault = fault
        self._count = 0
        self._failing = False
        self._busy = False
        self._write = os.write
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def start(self) -> None:
        """From now on."""
        for name in _WRAPPED:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        sys.addaudithook(self._audit)

    def _wrapped(self, name: str, original: Any) -> Any:
        def call(handle: int, *arguments: Any) -> Any:
            path = "" if self._busy else _opened(handle)
            if path:
                half = bytes(arguments[0])[: len(arguments[0]) // 2] if name == "write" else b""
                self._seen(name, path, (handle, half))
            return original(handle, *arguments)

        return call

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & _CHANGES:
                self._seen("open", os.fsdecode(path))
        elif event == "ctypes.dlsym" and arguments[1] == "renameat2":
            self._seen("exchange", os.path.join(self._root, "checkpoints"))
        elif event in _AUDITED:
            handle = arguments[-1] if isinstance(arguments[-1], int) and event != "os.truncate" else -1
            folder = _opened(handle) if handle >= 0 else ""
            if isinstance(arguments[0], str | bytes | os.PathLike):
                self._seen(_AUDITED[event], os.path.join(folder, os.fsdecode(arguments[0])))

    def _seen(self, op: str, path: str, write: tuple[int, bytes] | None = None) -> None:
        """An operation is about to happen."""
        place = self._place(path)
        if not place:
            return
        self._busy = True
        try:
            self._write(self._trace, f"{place} {op} {os.path.basename(path)}\n".encode())
            if self._verify and place == "save":
                whole = newest(os.path.join(self._root, "checkpoints"))
                self._write(self._trace, f"whole {whole} -\n".encode())
            fault = self._fault
            if fault is None:
                return
            if self._failing and op in {"write", "open", "mkdir"}:
                raise OSError(fault.errno, os.strerror(fault.errno), path)
            if fault.place not in ("", place) or fault.op not in ("", op) or (fault.ops and op not in fault.ops):
                return
            self._count += 1
            if self._count == fault.n:
                self._strike(fault, op, path, write)
        finally:
            self._busy = False

    def _strike(self, fault: Fault, op: str, path: str, write: tuple[int, bytes] | None) -> None:
        self._write(self._trace, b"struck\n")
        if fault.errno:
            self._failing = op != "close"
            if op != "close":
                raise OSError(fault.errno, os.strerror(fault.errno), path)
            return
        if fault.torn and op == "write" and write is not None:
            self._write(*write)
        os.kill(os.getpid(), signal.SIGKILL)

    def _place(self, path: str) -> str:
        """Which part of the run a path belongs to; empty: none."""
        full = os.path.abspath(path)
        if full != self._root and not full.startswith(self._root + os.sep):
            return ""
        first = os.path.relpath(full, self._root).split(os.sep)[0]
        name = first[1:].partition(".tmp-")[0] if first.startswith(".") else first
        return PLACES.get(name) or ("log" if name in LOGS else "begin")


def _opened(handle: int) -> str:
    """The path of an open file; empty when it has none."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return ""


def encode(root: str, trace: str, fault: Fault | None, verify: bool = False) -> str:
    """For `arm` in another process."""
    return json.dumps({"root": root, "trace": trace, "fault": asdict(fault) if fault else None, "verify": verify})


def arm(text: str) -> None:
    """Start counting in this process."""
    said = json.loads(text)
    Shim(said["root"], said["trace"], Fault(**said["fault"]) if said["fault"] else None, said["verify"]).start()
