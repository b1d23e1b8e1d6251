"""Back to an earlier checkpoint in a run that goes on.

The checkpoint is written once more with what the run has learned of the rollback (smaller learning rates, the doctor's
memory); that it takes its name is the one moment at which the rollback has happened. Before it, a run that is killed
resumes from a later checkpoint, meets the same trouble and comes here again; after it, it resumes from the new one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.models import processes
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.runs import manifest
from rlhf_cli.runs.files import disk_error, write_atomic
from rlhf_cli.runs.metrics import HINT, Lines, plain
from rlhf_cli.train import checkpoint, snapshot
from rlhf_cli.train.engine import Engine


def newest_where(
    folder: Path, good: Callable[[dict[str, Any]], bool], content: bool = True
) -> checkpoint.Checkpoint | None:
    """The whole checkpoint of the highest step whose state is good; None without one. content: also compare the SHA-256
    of every file."""
    for path in manifest.listed(folder):
        if not manifest.fault(path, content=content):
            with suppress(ModelError):  # damaged in a way that only its content shows
                saved = checkpoint.Checkpoint(path, read_json(path / checkpoint.STATE))
                if good(saved.state):
                    return saved
    return None


def roll_back(
    engine: Engine,
    saved: checkpoint.Checkpoint,
    row: dict[str, Any],
    lost: Path,
    carry: Callable[[], float],
) -> None:
    """Put a checkpoint into the running engine and go on from there.

    row: the metrics of the step that is given up with those before it, back to the checkpoint; their lines go to the
    folder `lost`. carry: called once the checkpoint is loaded, to keep what must not be forgotten; returns the factor
    of all learning rates. Raises ModelError when the disk refuses.
    """
    sizes = saved.state["sizes"]
    processes.first(lambda: _set_aside(engine.run.path, sizes, row, lost), "setting aside what is rolled back")
    processes.together(lambda: snapshot.load(engine, saved), "going back")  # before its files are replaced
    snapshot.scale_rates(engine, carry())
    engine.spare = None

    snapshot.save(engine, sizes)

    def settle() -> None:
        for name, size in sizes.items():
            Lines(engine.run.path / name).cut(size)

    processes.first(settle, "rolling back")
    engine.set_out()


def _set_aside(run: Path, sizes: dict[str, int], row: dict[str, Any], lost: Path) -> None:
    """Copy what follows `sizes` in the metric files, and the last row."""
    try:
        lost.mkdir(parents=True, exist_ok=True)
        for name, size in sizes.items():
            rest = (run / name).read_bytes()[size:] if (run / name).exists() else b""
            if name == "metrics.jsonl":
                rest += (json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
            write_atomic(lost / name, rest)
    except OSError as error:
        raise disk_error(error, "cannot be written", lost, HINT) from error
