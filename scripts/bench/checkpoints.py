"""What checkpoints cost: the same run with one every ten steps and with none.

    python scripts/bench/checkpoints.py                                 a model of 23M parameters, full and LoRA
    python scripts/bench/checkpoints.py --model models/tiny --repeats 5 one of yours

SFT of 100 steps on rows of about 200 words, each figure a fresh process with one thread; the two take turns; medians
are shown. Seconds by the clock, since a checkpoint waits for the disk: of the training loop, and inside it of saving
(tensors gathered and looked through, written, hashed, brought to the disk, renamed, older ones deleted).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from alone import command, leave, process
from world import make_world

JOBS = {"full": None, "LoRA": {"r": 16, "alpha": 32}}
STEPS, EVERY, BATCH, WORDS = 100, 10, 4, 200
SAID = ("once", "upon", "a", "time", "there", "was", "little", "girl", "named", "Lily", "who", "liked", "to", "play")


def write_text(folder: Path) -> Path:
    """Rows of text."""
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(SAID, k=WORDS))} for _ in range(BATCH * STEPS)]
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(model: Path, rows: Path, job: str, out: Path, every: int | None) -> dict[str, Any]:
    """Of a run."""
    return {
        "stage": "sft",
        "model": {"name_or_path": str(model), "dtype": "float32", "gradient_checkpointing": False},
        "lora": JOBS[job],
        "data": {"train": str(rows), "max_length": 256, "truncation": "right"},
        "training": {"learning_rate": 1e-4, "batch_size": BATCH, "max_steps": STEPS},
        "checkpoint": {"every": every, "keep": 2},
        "evaluation": {"samples": 0},
        "output_dir": str(out / "run"),
    }


def run(model: Path, rows: Path, job: str, out: Path, every: int | None) -> None:
    """The real command to the end of its loop, with a clock at its checkpoints."""
    from rlhf_cli.train.engine import Engine

    fit, save, spent, sizes = Engine.fit, Engine.save, [0.0], [0]

    def timed(engine: Engine) -> None:
        began = time.perf_counter()
        save(engine)
        spent[0] += time.perf_counter() - began
        newest = max(engine.run.checkpoints.iterdir())
        sizes[0] = sum(path.stat().st_size for path in newest.iterdir())

    def watched(engine: Engine, step: Any) -> None:
        began = time.perf_counter()
        fit(engine, step)
        leave(out, {"wall": time.perf_counter() - began, "saving": spent[0], "bytes": sizes[0]})

    Engine.save, Engine.fit = timed, watched  # type: ignore[method-assign, assignment]
    command(recipe(model, rows, job, out, every), out)


def study(job: str, model: Path, rows: Path, out: Path, repeats: int) -> None:
    """The line of a job."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for _ in range(repeats):
        for some, those in found.items():
            words = [job, "--model", str(model), "--rows", str(rows), "--one", str(EVERY if some else 0)]
            those.append(process(__file__, out, words))
    with_some, without = (statistics.median(one["wall"] for one in found[some]) for some in (True, False))
    shares = statistics.median(one["saving"] / one["wall"] for one in found[True])
    each = statistics.median(one["saving"] for one in found[True]) / (STEPS // EVERY)
    print(f"| {job} | {found[True][0]['bytes'] / 2**20:.1f} | {without:.2f} | {with_some:.2f} | {1000 * each:.1f} | "
          f"{100 * shares:.1f} |", flush=True)  # fmt: skip


def main() -> None:
    """Parse the arguments; study, or be one process of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; none: all")
    parser.add_argument("--model", type=Path, help="a folder; none: a model of 23M parameters, not trained")
    parser.add_argument("--out", type=Path, help="a folder for models and rows; none: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := sorted(set(asked.jobs) - set(JOBS)):
        parser.error(f"no job {unknown[0]}; there are {', '.join(JOBS)}")
    if asked.one is not None:
        run(asked.model, asked.rows, asked.jobs[0], asked.out, asked.one or None)
        return
    print("| what is trained | MiB of a checkpoint | s without | s with | ms each | share % |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        world = Path(folder)
        if asked.model is None:
            make_world(world, None, wide=False)
        rows = write_text(world)
        for job in asked.jobs or JOBS:
            study(job, (asked.model or world / "model").resolve(), rows, world, asked.repeats)


if __name__ == "__main__":
    main()
