"""Metrics to tensorboard, wandb and trackio, through their own libraries.

Steps go back when a run is resumed or rolled back, and each library is told so in its way: tensorboard hides what was
taken back; wandb, whose own counter only grows, draws over a figure `step`; trackio takes any step. The last two show
what was taken back beside what came after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_cli.errors import Problem, RecipeError

Log = Callable[[int, dict[str, float]], None]
PROJECT = "rlhf"


@dataclass(frozen=True)
class Trackers:
    """Open trackers."""

    logs: tuple[Log, ...] = ()
    closes: tuple[Callable[[], None], ...] = ()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the numbers of a step."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        for log in self.logs:
            log(step, numbers)

    def close(self) -> None:
        """Send what is still waiting."""
        for close in self.closes:
            close()


def require(names: Sequence[str]) -> None:
    """Raise a RecipeError naming the extra of every tracker whose library is not installed. Imports nothing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise RecipeError(
            Problem(f"{name} is not installed", "logging.report_to", f"pip install 'rlhf-cli[{name}]'")
            for name in missing
        )


def open_trackers(names: Sequence[str], run_path: Path, config: dict[str, Any]) -> Trackers:
    """Open the trackers a recipe names.

    Args:
        names: tensorboard, wandb or trackio.
        run_path: the run directory; its name is the name of the run.
        config: the resolved recipe, shown beside the curves.

    Raises RecipeError when a library is missing, or cannot work as it is set up (no key, no network).
    """
    require(names)
    opened = []
    for name in names:
        try:
            opened.append(_OPEN[name](run_path, config))
        except Exception as error:  # a library of others may raise anything
            words = str(error).strip().splitlines()
            raise RecipeError(f"{name} cannot be opened: {words[0] if words else type(error).__name__}",
                              "logging.report_to", "set it up, or leave it out") from error  # fmt: skip
    return Trackers(tuple(log for log, _ in opened), tuple(close for _, close in opened))


def _tensorboard(run_path: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    folder, opened, newest = str(run_path / "tensorboard"), list[SummaryWriter](), 0

    def close() -> None:
        while opened:
            opened.pop().close()

    def log(step: int, metrics: dict[str, float]) -> None:
        nonlocal newest
        if not opened or step <= newest:
            close()
            opened.append(SummaryWriter(folder, purge_step=step))
        newest = step
        for name, value in metrics.items():
            opened[0].add_scalar(name, value, step)

    return log, close


def _wandb(run_path: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import wandb

    run = wandb.init(project=PROJECT, name=run_path.name, dir=str(run_path), config=config)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return lambda step, metrics: run.log({**metrics, "step": step}), run.finish


def _trackio(run_path: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    import trackio

    def finish() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    with redirect_stdout(sys.stderr):  # its greetings; what we print there is data
        trackio.init(project=PROJECT, name=run_path.name, config=config)
    return lambda step, metrics: trackio.log(metrics, step=step), finish


_OPEN: dict[str, Callable[[Path, dict[str, Any]], tuple[Log, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
