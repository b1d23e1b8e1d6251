"""A run of several processes: they meet before anything is decided, and the first one decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_cli.models import processes, sharding
from rlhf_cli.recipe.work import Work
from rlhf_cli.runs.decide import Decision
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.follower import Follower
from rlhf_cli.runs.place import Place


def open_together(recipe: Work, command: str, resume: str, place: Place, seconds: float, *, shard: bool) -> Run:
    """Meet the other processes and open the run directory as `Run.open`: the first process for all.

    seconds: how long one waits for another; shard: whether each holds a share of the layers. Raises as `Run.open` and
    `processes.start` do.
    """
    processes.start(place, seconds)
    sharding.ask(shard)
    opened: list[Run] = []

    def decide() -> list[Any]:
        opened.append(Run.open(recipe, command, resume))
        run = opened[0]
        return [run.status, None if run.resume_from is None else str(run.resume_from)]

    status, path = processes.first(decide, "opening the run directory")
    if opened:
        return opened[0]
    return Follower(recipe, Decision(status, resume_from=None if path is None else Path(path)))
