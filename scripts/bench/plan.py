"""`rlhf plan` against the run itself: the peak of resident memory that was foretold, and the one that was measured.

    python scripts/bench/plan.py                  every recipe
    python scripts/bench/plan.py dpo-full ppo     those whose name holds one of the words

Recipes of all kinds on two models with random weights (world.py): a Llama of 23M parameters (6 layers, V = 16,384) and
a Qwen2 of 42M (4 layers, V = 151,936, tied). Plan and run are commands in processes of their own; the run is whole,
with its checkpoints, its final folder and its report. Peak: the largest resident size of the process that the system
saw. Idle: what the plan measured of a process before there is a model. Off by: foretold over measured, less one; in
brackets the same of what lies above idle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from world import make_world

LORA = {"r": 16, "alpha": 32}
KINDS: dict[str, dict[str, Any]] = {
    "sft-full": {"stage": "sft", "data": "demonstrations", "lora": None},
    "sft-lora": {"stage": "sft", "data": "demonstrations", "lora": LORA},
    "dpo-full": {"stage": "dpo", "data": "pairs", "lora": None, "objective": {"name": "dpo"}},
    "dpo-lora": {"stage": "dpo", "data": "pairs", "lora": LORA, "objective": {"name": "dpo"}},
    "dpo-nf4": {"stage": "dpo", "data": "pairs", "lora": LORA, "objective": {"name": "dpo"}, "quantization": "nf4"},
    "ppo-lora": {"stage": "ppo", "data": "prompts", "lora": LORA, "rollout": {"max_new_tokens": 64}},
}
FRESH: dict[str, tuple[str, dict[str, Any]]] = {
    "sft-lora-64": ("narrow", {"stage": "sft", "data": "demonstrations", "lora": {"r": 64, "alpha": 64},
                               "length": 1500, "training": {"batch_size": 8, "micro_batch_tokens": 3000}}),
    "orpo-full": ("narrow", {"stage": "orpo", "data": "pairs", "lora": None,
                             "training": {"batch_size": 2, "micro_batch_tokens": 5000}}),
    "train-rm-lora": ("wide", {"stage": "train-rm", "data": "pairs", "lora": {"r": 8, "alpha": 16},
                               "training": {"batch_size": 3, "micro_batch_tokens": 500}}),
    "dpo-lora-64": ("wide", {"stage": "dpo", "data": "pairs", "lora": {"r": 64, "alpha": 64},
                             "objective": {"name": "dpo"},
                             "training": {"batch_size": 6, "micro_batch_tokens": 6000}}),
}  # fmt: skip
"""Not used in making the estimate, with the model of each."""
MODELS = {"narrow": "Llama, 23M", "wide": "Qwen2, 42M, V = 151,936"}
STEPS = 2


def recipe(kind: str, world: Path, out: Path) -> dict[str, Any]:
    """Of a few steps."""
    given = dict(KINDS[kind] if kind in KINDS else FRESH[kind][1])
    model = {"name_or_path": str(world / "model"), "dtype": "float32",
             "quantization": given.pop("quantization", "none")}  # fmt: skip
    made = given | {
        "model": model,
        "data": {"train": str(world / f"{given['data']}.jsonl"), "max_length": given.pop("length", 2000)},
        "training": {"learning_rate": 1e-5, "batch_size": 4, "max_steps": STEPS} | given.pop("training", {}),
        "output_dir": str(out),
    }  # fmt: skip
    if made["stage"] == "ppo":
        made["rewards"] = [{"run": str(world / "reward"), "normalize": False}]
    return made


def peak(arguments: Sequence[str], folder: Path) -> tuple[str, float]:
    """Standard output of a command, and MiB of its process at most."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                                "RLHF_CACHE": ""}  # fmt: skip
    said, failed = folder / "stdout", folder / "stderr"
    with said.open("w") as out, failed.open("w") as error:
        process = subprocess.Popen([sys.executable, "-m", "rlhf_cli", *arguments], env=environment, stdout=out,
                                   stderr=error)  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"rlhf {' '.join(arguments)}: exit {process.returncode}\n{failed.read_text()[-2000:]}")
    return said.read_text(), used.ru_maxrss / 1024


def line(kind: str, which: str, world: Path, folder: Path) -> str:
    """A row of the table."""
    path = folder / f"{kind}-{which}.yaml"
    path.write_text(yaml.safe_dump(recipe(kind, world, folder / f"run-{kind}-{which}")), encoding="utf-8")
    found = json.loads(peak(["plan", str(path), "--json", "--no-time"], folder)[0])["memory"]
    measured = peak([recipe(kind, world, folder)["stage"], str(path)], folder)[1]
    foretold, idle = found["peak"] / 2**20, found["idle"] / 2**20
    moment = max(found["moments"], key=lambda name: found["moments"][name])
    off = 100 * (foretold / measured - 1)
    above = 100 * ((foretold - idle) / (measured - idle) - 1)
    words = kind.replace("-", ", ") + (" (new)" if kind in FRESH else "")
    return (f"| {words} | {MODELS[which]} | {idle:.0f} | {foretold:.0f} | {measured:.0f} | {off:+.1f} ({above:+.1f}) | "
            f"{moment} |")  # fmt: skip


def main() -> None:
    """Parse the arguments; make the worlds; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the names of recipes; none: all")
    parser.add_argument("--out", type=Path, help="a folder for models, rows and runs; none: a temporary one")
    parser.add_argument("--repeats", type=int, default=1, help="not read: each is measured once")
    asked = parser.parse_args()
    print("| recipe | model | idle MiB | foretold MiB | measured MiB | off by % (above idle) | where |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        for which in MODELS:
            world = Path(folder) / which
            world.mkdir()
            make_world(world, None, wide=which == "wide")
            for kind in (*KINDS, *(name for name, (model, _) in FRESH.items() if model == which)):
                if not asked.words or any(word in f"{kind}-{which}" for word in asked.words):
                    print(line(kind, which, world, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
