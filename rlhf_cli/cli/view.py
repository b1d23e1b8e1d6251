"""Progress on a terminal with rich: one bar with the numbers that matter. Elsewhere plain lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.runs.display import SHOWN, Display, Log, Plain, step_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_QUALITY = ("eval/rewards/accuracies", "rewards/accuracies", "objective/scores", "eval/loss")


def make_display(quiet: bool, verbose: bool) -> Display:
    """A bar when stderr is a terminal that can draw one, else plain lines."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return Plain(quiet, verbose)
    return View(verbose)


def headline(metrics: Mapping[str, float]) -> str:
    """Loss, one measure of quality and the speed, as far as the metrics have them."""
    quality = next((key for key in _QUALITY if key in metrics), "")
    wanted = ("loss", quality, "tokens_per_second")
    return "  ".join(f"{label} {form.format(float(metrics[key]))}" for key, label, form in SHOWN
                     if key in wanted and key in metrics)  # fmt: skip


class View:
    """Implements Display with a progress bar; notes and warnings stand above it."""

    def __init__(self, verbose: bool = False, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._verbose = verbose
        self._log = Log()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._last: dict[str, float] = {}

    def attach(self, path: Path) -> None:
        self._log.attach(path)

    def note(self, text: str) -> None:
        self._log.write(text)
        self._print(text)

    def warn(self, text: str) -> None:
        self._log.write(f"warning: {text}")
        self._print(f"warning: {text}", "yellow")

    def start(self, total_steps: int, first_step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        self.stop()
        self._total = total_steps
        numbers = TextColumn("{task.fields[numbers]}", markup=False)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), Left(), numbers)
        self._progress = Progress(*columns, console=self._console, redirect_stdout=False, redirect_stderr=False)
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, numbers="")
        self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float], show: bool) -> None:
        self._last |= metrics
        if self._progress is not None and self._task is not None:
            with suppress(OSError, ValueError):
                self._progress.update(self._task, completed=step, numbers=headline(self._last))
        if show or self._verbose:
            line = step_line(step, self._total, metrics)
            self._log.write(line)
            if self._verbose:
                self._print(line)

    def stop(self) -> None:
        if self._progress is not None:
            with suppress(OSError, ValueError):
                self._progress.stop()
        self._progress = None

    def _print(self, text: str, style: str | None = None) -> None:
        with suppress(OSError, ValueError):
            self._console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)
