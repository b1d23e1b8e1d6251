"""Every disk operation of a part of a run fails once, in one run: at that moment the process forks, the child's n-th
operation fails and the child ends as it would have; the parent looks at what is left and tries the next one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.runs.files import disk_error, write_atomic
from rlhf_cli.runs.metrics import HINT
from tests.faults import judge, shim
from tests.stages import world as w

NOT_STRUCK, SWALLOWED = 77, 78
PARTS = ("begin", "log", "save", "finish")
MOST = 400
"""Operations of one part; more are a loop."""
FULL = ("open", "write", "fsync", "rename", "mkdir")
"""Operations that fail on a full disk."""
ALL = (*FULL, "unlink", "rmdir", "truncate", "ftruncate")


@dataclass(frozen=True)
class Row:
    """One operation that failed."""

    part: str
    """begin, log, save (the second one) or finish."""
    op: str
    file: str
    errno: int
    code: int
    said: list[str]
    """The lines of stderr from then on."""
    kept: bool
    """Whether all that stood there before stands there as it was."""
    newest: int
    """The newest whole checkpoint, -1: none; every checkpoint that has its name is whole."""
    before: int
    done: bool


class Each:
    """Tries every operation of some functions of a run: with a full disk, and when it is asked for all parts, with one
    that fails too. Lives in the process of the run."""

    def __init__(self, run: Path, out: Path, parts: Sequence[str]) -> None:
        self.run, self.out, self.parts, self.calls = run, out, parts, Counter[str]()

    def install(self) -> None:
        """From now on."""
        from rlhf_cli.runs.directory import Run
        from rlhf_cli.stages import common
        from rlhf_cli.train import snapshot

        Run.begin = self._around("begin", Run.begin)  # type: ignore[method-assign]
        Run.log = self._around("log", Run.log)  # type: ignore[method-assign]
        snapshot.save = self._around("save", snapshot.save)
        common.finish = self._around("finish", common.finish)
        common.write_report = _undrawn

    def _around(self, part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls[part] += 1
            if part in self.parts and self.calls[part] == (2 if part == "save" else 1):
                for code in (errno.ENOSPC, errno.EIO)[: 1 + (self.parts == list(PARTS))]:
                    self._all(part, code, lambda: original(*arguments, **named))
            return original(*arguments, **named)

        return call

    def _all(self, part: str, code: int, work: Callable[[], Any]) -> None:
        """Every operation that can fail with this error."""
        before, newest = _state(self.run), _newest(self.run)
        for n in range(1, MOST):
            status = self._child(shim.Fault("", "", n, errno=code, ops=FULL if code == errno.ENOSPC else ALL), work)
            after = _state(self.run)
            if status != NOT_STRUCK:
                self._note(part, code, status, after == before, newest)
            self._restore(after, before)
            if status == NOT_STRUCK:
                return
        raise AssertionError(f"{part} never ends")

    def _child(self, fault: shim.Fault, work: Callable[[], Any]) -> int:
        """The exit code of a child in which the fault happens; in the child, this does not return normally."""
        said, trace = self.out.with_name("child"), self.out.with_name("child-trace")
        said.write_bytes(b"")
        trace.write_bytes(b"")
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
        shim.arm(shim.encode(str(self.run), str(trace), fault))
        work()
        os._exit(SWALLOWED if "struck" in trace.read_text() else NOT_STRUCK)

    def _restore(self, after: dict[str, bytes], before: dict[str, bytes]) -> None:
        """All files as they were; those that the run holds open stay the same files."""
        if not before:
            shutil.rmtree(self.run, ignore_errors=True)
            return
        for name in after.keys() - before.keys():
            (self.run / name).unlink()
        for name, content in before.items():
            if after.get(name) != content:
                (self.run / name).parent.mkdir(parents=True, exist_ok=True)
                (self.run / name).write_bytes(content)
        for folder in sorted((p for p in self.run.rglob("*") if p.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()

    def _note(self, part: str, code: int, status: int, kept: bool, before: int) -> None:
        lines = self.out.with_name("child-trace").read_text().split("struck")[0].splitlines()
        _, op, file = lines[-1].split(" ", 2)
        said = self.out.with_name("child").read_text().splitlines()
        done = (self.run / "DONE").exists()
        row = Row(part, op, file, code, status, said, kept, _newest(self.run), before, done)
        with self.out.open("a") as out:
            out.write(json.dumps(asdict(row)) + "\n")


def _state(run: Path) -> dict[str, bytes]:
    """Everything there, but for the log of what was said."""
    return {k: v for k, v in w.contents(run).items() if k not in ("run.log", ".lock")} if run.exists() else {}


def _undrawn(run: Path) -> Path:
    """The report's file without its curves, which take longer than all else."""
    try:
        write_atomic(run / "report.html", b"")
    except OSError as error:
        raise disk_error(error, "cannot be written", run / "report.html", HINT) from error
    return run / "report.html"


def _newest(run: Path) -> int:
    return max(judge.whole_steps(run), default=-1) if run.exists() else -1


def read(out: Path) -> list[Row]:
    """What was tried."""
    return [Row(**json.loads(line)) for line in out.read_text().splitlines()]
