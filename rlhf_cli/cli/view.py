"""A running stage on a terminal: where it is, how long it will take, what it does, the numbers that matter, memory.

Elsewhere plain lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.runs.display import PAUSES, Display, Log, Pace, Plain, headline, step_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text

_GAP = "   "
_BAR = range(8, 41)
"""Columns of the bar, at least and at most."""


def make_display(quiet: bool, verbose: bool, stage: str = "") -> Display:
    """Something that moves when stderr is a terminal that can draw it and a person may look, else plain lines."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("CI"):
        return Plain(quiet, verbose)
    return View(verbose, stage=stage)


class View:
    """Implements Display with a few lines at the bottom that are kept up to date; notes and warnings stand above."""

    def __init__(self, verbose: bool = False, console: Console | None = None, stage: str = "") -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._verbose, self._stage = verbose, stage
        self._log = Log()
        self._live: Live | None = None
        self._pace = Pace(0, 0, 0.0)
        self._began = 0.0
        self._last: dict[str, float] = {}
        self._phases: list[tuple[str, float]] = []
        self._done = 0.0

    def attach(self, path: Path) -> None:
        self._log.attach(path)

    def note(self, text: str) -> None:
        self._log.write(text)
        self._print(text)

    def warn(self, text: str) -> None:
        self._log.write(f"warning: {text}")
        self._print(f"warning: {text}", "yellow")

    def start(self, total_steps: int, first_step: int) -> None:
        from rich.live import Live

        self.stop()
        if first_step:
            self.note(f"going on after step {first_step} of {total_steps}")
        self._began = time.monotonic()
        self._pace = Pace(total_steps, first_step, self._began)
        self._live = Live(self, console=self._console, redirect_stdout=False, redirect_stderr=False)
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, float], show: bool) -> None:
        self._last |= metrics
        self._pace.reach(step, time.monotonic())
        if show or self._verbose:
            line = step_line(step, self._pace.total, metrics)
            self._log.write(line)
            if self._verbose:
                self._print(line)

    @contextmanager
    def phase(self, name: str, total: float = 0) -> Iterator[None]:
        """Phases may lie within one another; the innermost is the one whose examples are counted."""
        began, before = time.monotonic(), self._done
        self._phases.append((name, total))
        self._done = 0.0
        try:
            yield
        finally:
            self._phases.pop()
            self._done = before
            if name in PAUSES and not any(outer in PAUSES for outer, _ in self._phases):
                self._pace.pause(time.monotonic() - began)

    def advance(self, count: float) -> None:
        self._done += count

    def stop(self) -> None:
        if self._live is not None:
            with suppress(OSError, ValueError):
                self._live.stop()
        self._live = None

    # --- drawing -------------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Where the run is, then everything else in as many lines as the terminal needs for it."""
        width = options.max_width - 1
        yield self._progress(width)
        speed = self._last.get("tokens_per_second")
        numbers = headline(self._stage, self._last)
        pieces = [(text, "bold") for text in numbers]
        pieces += [] if speed is None else [(f"{_short(speed)} tokens/s", "green")]
        pieces += [(memory_words(), "magenta"), (self._doing(), "cyan")]
        yield from _flow([(text, style) for text, style in pieces if text], width)

    def _progress(self, width: int) -> Text:
        from rich.text import Text

        pace = self._pace
        share = min(1.0, pace.step / max(1, pace.total))
        left = pace.left()
        head = f"step {pace.step}/{pace.total} "
        tail = f" {share:4.0%}  {clock(time.monotonic() - self._began)}"
        tail += f"  {'-:--' if left is None else clock(left)} left"
        room = min(_BAR[-1], max(_BAR[0], width - len(head) - len(tail)))
        full = int(share * room)
        text = Text(head, no_wrap=True, overflow="ellipsis")
        text.append("━" * full, "blue").append("━" * (room - full), "bright_black")
        return text.append(tail)

    def _doing(self) -> str:
        """The phases under way, from the outermost, and how far the innermost is."""
        phases = list(self._phases)
        if not phases:
            return ""
        total, names = phases[-1][1], ": ".join(name for name, _ in phases)
        if total:
            return f"{names} {min(self._done, total):.0f}/{total:.0f}"
        return f"{names} {self._done:.0f}" if self._done else names

    def _print(self, text: str, style: str | None = None) -> None:
        with suppress(OSError, ValueError):
            self._console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """`0:54`, `12:03`, `3:20:00`, `2 d 04:10`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def memory_words() -> str:
    """Memory of the card, allocated and at its peak, where one is in use; else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return f"{_gib(now)} of card memory, peak {_gib(peak)}"
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return ""  # no Linux
    return f"{_gib(pages * os.sysconf('SC_PAGE_SIZE'))} memory"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:.0f}"


def _flow(pieces: list[tuple[str, str]], width: int) -> Iterator[Text]:
    """Pieces side by side, in a new line where the terminal ends."""
    from rich.text import Text

    line = Text(no_wrap=True, overflow="ellipsis")
    for text, style in pieces:
        if line.plain and len(line.plain) + len(_GAP) + len(text) > width:
            yield line
            line = Text(no_wrap=True, overflow="ellipsis")
        line.append(_GAP if line.plain else "").append(text, style)
    if line.plain:
        yield line
