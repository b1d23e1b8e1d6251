"""A run of several processes: they meet before anything is decided, and the first one decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_cli.models import mesh, processes, sequence, sharding
from rlhf_cli.models.base import Base
from rlhf_cli.recipe.settings.distributed import DistributedSettings
from rlhf_cli.recipe.work import Work
from rlhf_cli.runs.decide import Decision
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.follower import Follower
from rlhf_cli.runs.place import Place

ALONE = "distributed.shard {}: a single process has nothing to share out"
NO_CARD = "distributed.cpu_offload: this run computes on the CPU, in whose memory everything is already"


def tell_shares(asked: DistributedSettings, base: Base, display: Display) -> None:
    """How many processes there are, and how much of a base each holds where the recipe has it held in parts."""
    if processes.count() > 1:
        shared = f", {sequence.size()} of them share each sequence" if sequence.size() > 1 else ""
        display.note(f"{processes.count()} processes{shared}")
    if asked.shard != "none":
        display.note(sharding.words(base) if base.shards else ALONE.format(asked.shard))
    if asked.cpu_offload and not mesh.offloads():
        display.note(NO_CARD)


def open_together(recipe: Work, command: str, resume: str, place: Place, asked: DistributedSettings) -> Run:
    """Meet the other processes and open the run directory as `Run.open`: the first process for all.

    asked: how long one waits for another, who holds which share of the layers, and who shares sequences. Raises as
    `Run.open`, `processes.start`, `mesh.ask` and `sequence.ask` do.
    """
    processes.start(place, asked.timeout)
    mesh.ask(asked.shard, offload=asked.cpu_offload)
    sequence.ask(asked.sequence_parallel)
    opened: list[Run] = []

    def decide() -> list[Any]:
        opened.append(Run.open(recipe, command, resume))
        run = opened[0]
        return [run.status, None if run.resume_from is None else str(run.resume_from)]

    status, path = processes.first(decide, "opening the run directory")
    if opened:
        return opened[0]
    return Follower(recipe, Decision(status, resume_from=None if path is None else Path(path)))


def leave() -> None:
    """What was opened together is done."""
    processes.stop()
    mesh.leave()
