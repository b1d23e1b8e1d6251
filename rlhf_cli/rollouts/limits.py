"""A bound on how long foreign code may take."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TypeVar

from rlhf_cli.errors import ModelError

AGAIN = 0.25
"""Seconds between the alarms once time is up."""
GRACE = 5.0
"""Seconds from the first alarm until the process ends."""
_exit = os._exit  # what foreign code may call by that name is another thing
T = TypeVar("T")


class OutOfTime(BaseException):
    """The time limit was reached. Not an Exception: a function that catches those is stopped all the same."""


def limited(seconds: float, call: Callable[[], T], last_words: Callable[[], str]) -> T:
    """`call()`; OutOfTime when it takes longer, again and again until it ends.

    Code that swallows the alarms, or stays outside Python, has GRACE seconds to end. Then the process does:
    `last_words()` on stderr, exit code of a ModelError. Code that stays outside and lets no other thread run ends the
    process after twice that time with its traceback, exit code 1. Works where signals do: in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    over, most = threading.Event(), min(seconds, threading.TIMEOUT_MAX / 2e3)
    before = signal.signal(signal.SIGALRM, _ring)

    def stop() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        over.set()
        signal.signal(signal.SIGALRM, before)

    try:
        try:
            threading.Thread(target=_end, args=(over, most + GRACE, last_words), daemon=True).start()
            faulthandler.dump_traceback_later(most + 2 * GRACE, exit=True, file=2)
            signal.setitimer(signal.ITIMER_REAL, most, AGAIN)
            return call()
        finally:
            stop()
    except OutOfTime:
        stop()  # the alarm may have rung in the midst of the first one
        raise


def _ring(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def _end(over: threading.Event, seconds: float, last_words: Callable[[], str]) -> None:
    """End the process, unless it is `over` before. Locks of files go with it, and checkpoints are whole always."""
    if over.wait(seconds):
        return
    with suppress(OSError):
        show_cursor = "\n\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{show_cursor}{last_words()}\n".encode(errors="backslashreplace"))
    _exit(ModelError.exit_code)
