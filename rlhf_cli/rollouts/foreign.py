"""Code of users: its output kept from stdout, its faults named, its time bounded, its death rehearsed."""

from __future__ import annotations

import ctypes
import faulthandler
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar
from unittest.mock import patch

from rlhf_cli.errors import ModelError, Problem, RlhfError
from rlhf_cli.rollouts import user_code
from rlhf_cli.rollouts.limits import OutOfTime, limited

LONGEST = 300
"""Characters of an exception's text that are shown."""
REHEARSAL = 10.0
"""Seconds after which a rehearsal is broken off: it is the call itself that has the time limit."""
T = TypeVar("T")


def called(
    call: Callable[[], T], where: str, seconds: float, *, doing: str = "", kind: type[RlhfError] = ModelError
) -> T:
    """`call()`. What it raises becomes an error of that kind, with its line in the file of `where`; too much time is a
    ModelError. A real Ctrl-C stays one."""
    late = Problem(f"{doing}took longer than {seconds:g} s", where, "raise rewards.timeout")
    with _aside() as heard, _signals() as interrupted, patch("os._exit", _leave):
        try:
            return limited(seconds, call, lambda: f"{_text(heard)}error: {late}")
        except OutOfTime as error:
            raise ModelError(late) from error
        except BaseException as error:
            if interrupted and isinstance(error, KeyboardInterrupt):
                raise
            text, line = shown(error, LONGEST), _line_of(error, where.rpartition(":")[0])
            said = f"{type(error).__name__}: {text}" if text else type(error).__name__
            raise kind(f"{doing}raised {said}{line}", where) from error


def shown(value: object, most: int) -> str:
    """Its text on one line: cut, control characters escaped."""
    try:
        text = " ".join(str(value).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    cut = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


@contextmanager
def _aside() -> Iterator[IO[bytes]]:
    """What the body writes to stdout, also by file number or from other programs, goes to stderr in whole lines."""
    with tempfile.TemporaryFile() as heard, ExitStack() as stack:
        stack.callback(lambda: sys.stderr.write(_text(heard)))
        with suppress(OSError):
            stack.callback(_back, os.dup(1))
            _flush()
            os.dup2(heard.fileno(), 1)
        copy = io.FileIO(os.dup(heard.fileno()), "w")
        words = io.TextIOWrapper(copy, "utf-8", "backslashreplace", write_through=True)  # type: ignore[arg-type]
        stack.callback(_quietly, words.close)
        stack.enter_context(redirect_stdout(words))
        stack.callback(_flush)
        yield heard


def _text(heard: IO[bytes]) -> str:
    """All that was written to a file, ending in a line end unless there is nothing."""
    size = os.fstat(heard.fileno()).st_size
    text = os.pread(heard.fileno(), size, 0).decode(errors="backslashreplace")
    return f"{text}\n" if text and not text.endswith("\n") else text


def _back(handle: int) -> None:
    os.dup2(handle, 1)
    os.close(handle)


def _flush() -> None:
    """Python's stdout, and C's."""
    for file in (sys.stdout, sys.__stdout__):
        if file is not None:
            _quietly(file.flush)
    ctypes.CDLL(None).fflush(None)


def _quietly(act: Callable[[], None]) -> None:
    with suppress(OSError, ValueError):
        act()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came during the body. They do what they did, also where that is to leave at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    leave = os._exit
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler = before[signal.Signals(number)]
        assert callable(handler)
        with patch("os._exit", leave):
            handler(number, frame)

    ours = [number for number, handler in before.items() if callable(handler)]
    try:
        for number in ours:
            signal.signal(number, note)
        yield came
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _leave(code: int) -> None:
    raise SystemExit(code)


def _line_of(error: BaseException, file: str) -> str:
    """` (file:line)` of the innermost frame within the user's file."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(Path(file).name):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" ({file}:{line})" if line else ""


# --- what would kill the process ---------------------------------------------------------------------------------


def rehearse(file: Path, attribute: str, where: str, seconds: float, arguments: dict[str, Any]) -> None:
    """Import a file and call its function in a process of its own first. ModelError when a signal ends that process.

    A fresh process, not a fork: it shares no connection, no lock and no thread with this one, and finds its own import
    as this one will. A rehearsal that raises or takes long says nothing: the call itself does.
    """
    command = [sys.executable, "-P", "-X", "faulthandler", user_code.__file__]
    content = json.dumps([sys.path, str(file), attribute, arguments], default=str).encode()
    with tempfile.TemporaryFile() as heard:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=heard, stderr=heard, start_new_session=True)
        try:
            child.communicate(content, timeout=min(seconds, REHEARSAL))
        except subprocess.TimeoutExpired:
            return
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        words = _text(heard)
    if child.returncode < 0:
        line = re.search(rf'File "[^"]*{re.escape(file.name)}", line (\d+)', words)
        place = f" ({file}:{line[1]})" if line else ""
        act = "called" if user_code.IMPORTED.decode() in words else "imported"
        raise ModelError(f"died with {_signal_name(-child.returncode)} when it was {act}{place}", where,
                         "tried in a process of its own, nothing was trained")  # fmt: skip


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def trace_deaths() -> None:
    """From here on a crash in native code leaves the Python lines it came from on stderr."""
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2, all_threads=False)
