"""Several command lines, one after the other, in the processes that torchrun has started: its start is what costs.

    torchrun --nproc-per-node 2 -m tests.several WORK.json

WORK.json: {"commands": [[argument, ...], ...], "kill": {"process": 1, "step": 4} or null, "values": {name: value}}.
(With "command": 3 it is killed in that one, counted from 0, else in the first that comes so far.)
A command ["-m", MODULE, argument, ...] calls the main of a module, which meets the others itself. Process 0 writes the
exit codes beside it, to WORK.codes. `kill`: that process dies at the end of that step, or of that piece of data, in the
first attempt only, or with "how": "memory" runs out of memory in the step after it, with "how": "disk" finds its disk
full from then on; `values`: constants of modules that are others here.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]


def launch(
    folder: Path,
    commands: list[list[object]],
    count: int,
    kill: dict[str, Any] | None = None,
    values: dict[str, int] | None = None,
) -> tuple[list[int], str]:
    """Run them by so many processes: the exit codes, and everything that was said."""
    work = folder / "work.json"
    told = {"commands": [[str(a) for a in line] for line in commands], "kill": kill, "values": values or {}}
    work.write_text(json.dumps(told))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    line += ["--max-restarts", "1"] if kill and "how" not in kill else []
    done = subprocess.run(
        [*line, "-m", "tests.several", str(work)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    said = done.stdout + done.stderr
    assert work.with_suffix(".codes").exists(), said[-3000:]
    return json.loads(work.with_suffix(".codes").read_text()), said


def main(work: Path) -> None:
    """What each process does."""
    import rlhf_cli.recipe.schema  # noqa: F401  early, as in conftest.py
    from rlhf_cli.cli.app import run_command_line
    from rlhf_cli.models import processes
    from rlhf_cli.stages import product
    from rlhf_cli.train import checkpoint, passes
    from rlhf_cli.train.engine import Engine

    told, codes = json.loads(work.read_text()), []
    tick, hear = Engine.tick, product._hear
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    def die(**moment: int) -> None:
        here = {"process": int(os.environ["RANK"]), **moment}
        here |= {"command": len(codes)} if told["kill"] and "command" in told["kill"] else {}
        if here == told["kill"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if here | {"how": "memory"} == told["kill"]:
            patch.object(passes, "collate", run_out).start()
        if here | {"how": "disk"} == told["kill"]:
            patch.object(checkpoint, "write_new", fill_up).start()

    def deadly(engine: Engine, metrics: dict[str, float]) -> None:
        tick(engine, metrics)
        die(step=engine.step)

    def deadly_too(signals: Any, doing: str) -> None:
        hear(signals, doing)
        die(piece=int(doing.rsplit(maxsplit=1)[-1]))

    with ExitStack() as stack:
        for name in ("common.write_report", "evaluated.write_evaluation"):
            stack.enter_context(patch(f"rlhf_cli.stages.{name}", lambda path: path / "report.html"))
        stack.enter_context(patch.object(Engine, "tick", deadly))
        stack.enter_context(patch.object(product, "_hear", deadly_too))
        for name, value in told["values"].items():
            stack.enter_context(patch(name, value))
        for line in told["commands"]:
            if line[0] == "-m":  # a module whose main meets the others itself
                importlib.import_module(line[1]).main(*line[2:])
                codes.append(0)
                continue
            codes.append(run_command_line(line))
            processes.stop()
    if os.environ["RANK"] == "0":
        work.with_suffix(".codes").write_text(json.dumps(codes))


def run_out(*_: object, **__: object) -> None:
    """As a card does that is full."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def fill_up(*_: object, **__: object) -> None:
    """As a disk does that is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def close(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-5) -> list[str]:
    """The metrics of a step that differ."""
    keys = {k for k in a.keys() | b.keys() if not k.startswith("distributed/")}
    return [k for k in sorted(keys) if abs(a.get(k, 1e9) - b.get(k, -1e9)) > tolerance * (1 + abs(a.get(k, 0)))]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
