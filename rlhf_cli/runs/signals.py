"""SIGINT and SIGTERM: the first one is remembered, to be obeyed where work can be left; the second leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from rlhf_cli.errors import Interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """While it is entered, signals are caught."""

    def __init__(self, say: Callable[[str], None], doing: str) -> None:
        """doing: what is finished before a signal is obeyed, in words."""
        self.caught: int | None = None
        self._say, self._doing = say, doing
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._on_signal) for number in NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupted(self, done: str) -> Interrupted:
        """The error that ends the program; done: what was finished, in words."""
        assert self.caught is not None
        name = signal.Signals(self.caught).name
        return Interrupted(self.caught, f"{name}: stopped after {done}; the same command goes on from here")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            os._exit(128 + number)
        self.caught = number
        self._say(f"{signal.Signals(number).name}: finishing {self._doing}; once more to leave at once")
