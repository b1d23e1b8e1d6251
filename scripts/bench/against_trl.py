"""Training against TRL, side by side: CPU seconds, peak memory over the idle process, and the losses of every step.

    python -m venv .peer && .peer/bin/pip install -c constraints.txt torch==2.13.0 trl==1.16.0 peft bitsandbytes
    python scripts/bench/against_trl.py --peer .peer/bin/python --out /tmp/bench             every job
    python scripts/bench/against_trl.py --peer .peer/bin/python --out /tmp/bench --pairs pairs.json dpo-lora sft

Both train the same random model on the same rows (world.py) in the same order, in float32, batch of 4, one thread,
without gradient checkpointing. Ours is the real command with a probe around its loop; TRL has its fastest settings here
(no dropout, nothing saved; also with precomputed references, or packed, where it can: the faster of its ways counts).
A fresh process for each figure; the two take turns; medians are shown. `ppo` needs an older TRL (--ppo-peer): the last
with a PPO trainer is 1.12.

CPU seconds: of the training loop. Reference log-probabilities lie inside it, TRL's when it is `plain` and ours; where
TRL has precomputed them before its loop, ours are `remembered` from a run before, too. Peak: the largest resident
memory of the loop, and how much of it lies above that of the process just before the loop, model in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe import probe
from world import BATCH, STEPS, make_world

JOBS = {
    "sft": {}, "dpo": {}, "dpo-lora": {"lora": True}, "dpo-nf4": {"lora": True, "nf4": True}, "orpo": {}, "simpo": {},
    "kto": {}, "rm": {}, "rloo": {}, "ppo": {}, "dpo-150k": {"wide": True},
    "dpo-150k-lora": {"wide": True, "lora": True}, "orpo-150k": {"wide": True},
}  # fmt: skip
RATE = 1e-5
LINES = {
    "dpo": (("plain", ("plain",)), ("remembered", ("precomputed",))),
    "kto": (("plain", ("plain",)), ("remembered", ("precomputed",))),
    "sft": (("plain", ("plain", "packed")),),
}
"""A line of the table for each way of ours, against the faster of some ways of TRL's; by method."""
SAMPLED = ("rloo", "ppo")
"""Methods whose losses rest on samples."""


def method_of(job: str) -> str:
    return job.partition("-")[0]


def steps_of(job: str) -> int:
    return 3 if method_of(job) == "ppo" else STEPS[world_of(job)]


def world_of(job: str) -> str:
    return "wide" if "wide" in JOBS[job] else "narrow"


def data_of(job: str) -> str:
    """The file of the world that a job reads."""
    return {"kto": "verdicts", "sft": "demonstrations", "rloo": "prompts", "ppo": "prompts"}.get(
        method_of(job), "pairs"
    )


# --- ours ------------------------------------------------------------------------------------------------------------


def recipe(world: Path, job: str, out: Path) -> dict[str, Any]:
    """The recipe of a job."""
    method, settings = method_of(job), JOBS[job]
    sampling = {"max_new_tokens": 128, "max_batch": 64}
    online = {"truncation": "score", "kl": {"name": "fixed", "coef": 0.05}, "mini_batches": 1}
    own: dict[str, Any] = {
        "dpo": {"stage": "dpo", "objective": {"name": "dpo", "beta": 0.1}},
        "kto": {"stage": "dpo", "objective": {"name": "kto", "beta": 0.1}},
        "orpo": {"stage": "orpo", "objective": {"name": "orpo", "beta": 0.1}},
        "simpo": {"stage": "simpo", "objective": {"name": "simpo", "beta": 2.0, "gamma": 1.0}},
        "rm": {"stage": "train-rm"},
        "sft": {"stage": "sft"},
        "rloo": {
            "stage": "ppo", "rewards": [{"rule": {"name": "length", "limit": 1000}}],
            "rollout": sampling | {"completions_per_prompt": 4},
            "ppo": online | {"epochs": 1, "advantage": {"name": "rloo"}}, "doctor": {"enabled": False},
        },
        "ppo": {
            "stage": "ppo", "rewards": [{"run": str(world / "reward"), "normalize": False}], "rollout": sampling,
            "ppo": online | {"epochs": 4, "advantage": {"name": "gae", "gamma": 1.0, "lam": 0.95}},
            "critic": {"start": "reward"}, "doctor": {"enabled": False},
        },
    }[method]  # fmt: skip
    return own | {
        "model": {"name_or_path": str(world / "model"), "dtype": "float32", "gradient_checkpointing": False,
                  "quantization": "nf4" if "nf4" in settings else "none"},
        "lora": {"r": 16, "alpha": 32} if "lora" in settings else None,
        "data": {"train": str(world / f"{data_of(job)}.jsonl"), "max_length": 1152},
        "training": {"learning_rate": RATE, "batch_size": BATCH * (4 if method in SAMPLED else 1),
                     "max_steps": steps_of(job), "lr_scheduler": "constant"},
        "evaluation": {"every": None, "samples": 0},
        "checkpoint": {"every": None},
        "output_dir": str(out),
    }  # fmt: skip


def run_ours(world: Path, job: str, out: Path) -> dict[str, Any]:
    """The real command, with a probe around its loop."""
    import yaml

    from rlhf_cli.cli.app import main
    from rlhf_cli.train.engine import Engine

    found: dict[str, Any] = {}
    plain = Engine.fit

    def fit(self: Engine, step: Callable[[], dict[str, float]]) -> None:
        with probe(found):
            plain(self, step)

    Engine.fit = fit  # type: ignore[method-assign]
    made = recipe(world, job, out / "run")
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    sys.argv = ["rlhf", made["stage"], str(path)]
    try:
        main()
    except SystemExit as end:
        if end.code not in (0, None):
            raise
    with (out / "run" / "metrics.jsonl").open(encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    found["loss"] = [step["loss"] for step in steps if "loss" in step]
    return found


# --- the comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where and how often."""

    out: Path
    peers: dict[str, str]
    """Python with the peer, by method; "" for all others."""
    repeats: int

    def world(self, job: str) -> Path:
        """The folder of the models and rows of a job."""
        return self.out / world_of(job)

    def measured(self, job: str, side: str, way: str) -> dict[str, Any]:
        """One figure, from a process of its own."""
        folder = self.out / f"{job}-{side}-{way}"
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        folder.mkdir(parents=True)
        cache = self.out / "cache" if way == "remembered" else ""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                                    "TRL_EXPERIMENTAL_SILENCE": "1", "RLHF_CACHE": str(cache)}  # fmt: skip
        python = sys.executable if side == "ours" else self.peers.get(method_of(job), self.peers[""])
        command = [python, __file__, "--one", side, "--out", str(folder), "--world", str(self.world(job)), "--way", way]
        done = subprocess.run([*command, job], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{job}, {side}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        return found

    def compare(self, job: str) -> None:
        """Turns of all ways of both, and the lines of the table."""
        lines = LINES.get(method_of(job), (("plain", ("plain",)),))
        ours: dict[str, list[dict[str, Any]]] = {way: [] for way, _ in lines}
        theirs: dict[str, list[dict[str, Any]]] = {way: [] for _, ways in lines for way in ways}
        if "remembered" in ours:
            self.measured(job, "ours", "remembered")  # fills the cache
        for _ in range(self.repeats):
            for side, runs in (("ours", ours), ("peer", theirs)):
                for way, found in runs.items():
                    found.append(self.measured(job, side, way))
        for way, against in lines:
            print(_line(job, way, ours[way], {name: theirs[name] for name in against}), flush=True)


def _line(job: str, way: str, ours: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]) -> str:
    def middle(runs: list[dict[str, Any]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    fast = min(theirs, key=lambda name: middle(theirs[name], "cpu"))
    small = min(theirs, key=lambda name: middle(theirs[name], "peak"))
    each = [theirs[fast][i]["cpu"] / run["cpu"] for i, run in enumerate(ours)]
    above = [middle(runs, "peak") - middle(runs, "idle") for runs in (ours, theirs[small])]
    same = next(iter(theirs.values()))
    apart = max((abs(a - b) for a, b in zip(ours[0]["loss"], same[0]["loss"], strict=False)), default=0.0)
    losses = "sampled" if method_of(job) in SAMPLED else f"{apart:.1e}"
    return (
        f"| {job}, {way} | {middle(theirs[fast], 'cpu'):.1f} ({fast}) | {middle(ours, 'cpu'):.1f} | "
        f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f}) | "
        f"{middle(theirs[small], 'peak'):.0f} ({middle(theirs[small], 'idle'):.0f}) | "
        f"{middle(ours, 'peak'):.0f} ({middle(ours, 'idle'):.0f}) | 1/{above[1] / above[0]:.1f} | {losses} |"
    )


def main() -> None:
    """Parse the arguments; compare, or be one of the compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; none: all")
    parser.add_argument("--peer", help="a Python with TRL")
    parser.add_argument("--ppo-peer", help="a Python with TRL 1.12, for the job ppo")
    parser.add_argument("--pairs", type=Path, help="a file of preference pairs; none: made up")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    for hidden in ("--one", "--way"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    unknown = sorted(set(asked.jobs) - set(JOBS))
    if unknown:
        parser.error(f"no job {unknown[0]}; there are {', '.join(JOBS)}")
    if asked.one:
        job = asked.jobs[0]
        if asked.one == "ours":
            found = run_ours(asked.world, job, asked.out)
        else:
            from peer import run_peer

            found = run_peer(asked.world, job, asked.out, asked.way, steps_of(job))
        (asked.out / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return
    jobs = asked.jobs or [job for job in JOBS if asked.ppo_peer or job != "ppo"]
    if not asked.peer or ("ppo" in jobs and not asked.ppo_peer):
        parser.error("--peer is missing, a Python with TRL; and --ppo-peer for the job ppo")
    bench = Bench(asked.out, {"": asked.peer, "ppo": asked.ppo_peer}, asked.repeats)
    print("| work | TRL: CPU s | ours: CPU s | throughput | TRL: peak MiB (idle) | ours | over idle | losses |")
    print("|---|---|---|---|---|---|---|---|")
    for job in jobs:
        if not (bench.world(job) / "order.json").is_file():
            bench.world(job).mkdir(parents=True, exist_ok=True)
            make_world(bench.world(job), asked.pairs, wide=world_of(job) == "wide")
        bench.compare(job)


if __name__ == "__main__":
    main()
