"""What a running stage shows, and its plain-lines form: on stderr and, once attached, in run.log. No torch."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
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

_LABELS = {name: (label, form) for name, label, form in SHOWN} | {
    "completions/mean_length": ("length", "{:.0f}"),
    "rewards/best": ("best first", "{:.3f}"),
    "steps/accuracy": ("accuracy", "{:.3f}"),
    "solutions/accuracy": ("solutions", "{:.3f}"),
    "error/absolute": ("error", "{:.3f}"),
}
_PAIRS = ("rewards/accuracies", "rewards/margins", "loss")
HEADLINES: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "eval/loss", "grad_norm"),
    "train-rm": ("rewards/accuracies", "rewards/margins", "rewards/best", "steps/accuracy", "solutions/accuracy",
                 "error/absolute", "loss"),
    "dpo": _PAIRS,
    "orpo": _PAIRS,
    "simpo": _PAIRS,
    "ppo": ("objective/scores", "objective/kl", "completions/mean_length"),
}  # fmt: skip
"""By command: the metrics that a terminal shows, the first three of them that the run has."""
PAUSES = ("evaluation", "checkpoint")
"""Phases that are not part of a step."""
_RECENT = 20
"""Steps whose time tells that of the next ones."""

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

    def phase(self, name: str, total: float = 0) -> AbstractContextManager[None]:
        """What is done inside, of `total` examples where that is known."""

    def advance(self, count: float) -> None:
        """So many more examples of the phase under way are done."""

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


def headline(stage: str, metrics: Mapping[str, float]) -> list[str]:
    """The three numbers that matter for a command, as far as they are known; of one that is not listed, those that a
    line would show first."""
    wanted = HEADLINES.get(stage) or tuple(name for name, _, _ in SHOWN if name != "tokens_per_second")
    known = [name for name in wanted if name in metrics][:3]
    return [f"{_LABELS[name][0]} {_LABELS[name][1].format(float(metrics[name]))}" for name in known]


class Pace:
    """How long a run will still take: by its recent steps, and by how much it has paused for each step so far. Only
    what this process has seen counts, so a resumed run is judged by its own steps."""

    def __init__(self, total: int, step: int, now: float) -> None:
        self.total, self.step, self._first = total, step, step
        self._last, self._paused, self._pauses = now, 0.0, 0.0
        self._steps = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def pause(self, seconds: float) -> None:
        """So long no step was made, in the time since the last one."""
        self._paused += seconds

    def reach(self, step: int, now: float) -> None:
        """A step is done. Steps that went back (a rollback) start the count anew."""
        if step <= self.step:
            self._first = self.step = step - 1
            self._pauses = 0.0
        self._steps += 1
        if self._steps == 2:
            self._recent.clear()
        self._recent.append(max(0.0, now - self._last - self._paused) / max(1, step - self.step))
        self._pauses += self._paused if self.step > self._first else 0.0  # nor does what comes before the first step
        self._paused, self._last, self.step = 0.0, now, step

    def left(self) -> float | None:
        """Seconds; None before the first step. The first one, which warms up, counts only while it is alone."""
        if not self._recent:
            return None
        each = sum(self._recent) / len(self._recent) + self._pauses / max(1, self.step - self._first - 1)
        return each * max(0, self.total - self.step)


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

    def phase(self, name: str, total: float = 0) -> AbstractContextManager[None]:
        """Lines tell of steps only."""
        return nullcontext()

    def advance(self, count: float) -> None:
        """Lines tell of steps only."""

    def stop(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):
            print(text, file=self._stream or sys.stderr, flush=True)
