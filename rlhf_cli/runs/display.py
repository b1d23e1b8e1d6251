"""What a running stage shows, and its plain-lines form: on stderr and, once attached, in run.log. No torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("eval/loss", "eval loss", "{:.4f}"),
    ("learning_rate", "lr", "{:.1e}"),
    ("grad_norm", "grad norm", "{:.3f}"),
    ("rewards/accuracies", "accuracy", "{:.3f}"),
    ("eval/rewards/accuracies", "eval accuracy", "{:.3f}"),
    ("rewards/margins", "margin", "{:.3f}"),
    ("objective/scores", "score", "{:.3f}"),
    ("objective/kl", "kl", "{:.3f}"),
    ("eval/objective/scores", "eval score", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
)
"""Metric, its label, its format: what a line shows of a step, in this order. All metrics are in metrics.jsonl."""

MOST_WAITING = 1000


class Display(Protocol):
    """What a stage tells the user. Implementations never raise for a terminal that went away."""

    def note(self, text: str) -> None:
        """One line of information."""

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""

    def start(self, total_steps: int, first_step: int) -> None:
        """Training begins after `first_step` steps (0 unless resumed) of `total_steps`."""

    def step(self, step: int, metrics: Mapping[str, float], show: bool) -> None:
        """Step `step` (from 1) is done; `show` when it is one of those that logging.every selects."""

    def stop(self) -> None:
        """Training is over, in whatever way. May be called twice."""

    def attach(self, path: Path) -> None:
        """Copy every line with its time to that file from now on, those said so far first."""


class Log:
    """The copy of all lines with their time. Lines wait in memory until a file is attached."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._waiting: list[str] = []

    def attach(self, path: Path) -> None:
        """Append to that file from now on, what waits first."""
        self.path = path
        waiting, self._waiting = self._waiting, []
        self._append(waiting)

    def write(self, text: str) -> None:
        """One line; several with a time each when the text has line breaks."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = [f"{stamp} {line}\n" for line in text.splitlines()]
        if self.path is None:
            self._waiting = (self._waiting + lines)[-MOST_WAITING:]
        else:
            self._append(lines)

    def _append(self, lines: list[str]) -> None:
        """A log that cannot be written stops no training; metrics.jsonl is the record."""
        if self.path is not None and lines:
            with suppress(OSError), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(lines)


def step_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """`step 10/200  loss 0.6931  lr 1.0e-05 ...`, always in the order of SHOWN."""
    parts = [f"step {step}/{total}" if total else f"step {step}"]
    parts += [f"{label} {form.format(float(metrics[key]))}" for key, label, form in SHOWN if key in metrics]
    return "  ".join(parts)


class Plain:
    """One line for each note and each shown step: for logs, pipes and CI."""

    def __init__(self, quiet: bool = False, verbose: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._stream = stream
        self._total = 0
        self._log = Log()

    def attach(self, path: Path) -> None:
        self._log.attach(path)

    def note(self, text: str) -> None:
        self._log.write(text)
        if not self._quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        self._log.write(f"warning: {text}")
        self._print(f"warning: {text}")

    def start(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        if first_step:
            self.note(f"going on after step {first_step} of {total_steps}")

    def step(self, step: int, metrics: Mapping[str, float], show: bool) -> None:
        if not (show or self._verbose):
            return
        line = step_line(step, self._total, metrics)
        self._log.write(line)
        if not self._quiet:
            self._print(line)

    def stop(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):
            print(text, file=self._stream or sys.stderr, flush=True)
