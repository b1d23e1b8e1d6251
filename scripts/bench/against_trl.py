"""Training against TRL, side by side: CPU seconds, peak memory over the idle process, and the losses of every step.

    python -m venv .peer && .peer/bin/pip install -c constraints.txt torch==2.13.0 trl peft bitsandbytes
    python scripts/bench/against_trl.py --peer .peer/bin/python --out /tmp/bench             every job
    python scripts/bench/against_trl.py --peer .peer/bin/python --out /tmp/bench dpo-lora sft --repeats 3

Both train the same random Llama on the same made-up pairs (word-level tokens, 250 to 900 a sequence) in the same order,
in float32, batch of 4, one thread, without gradient checkpointing. Ours is the real command with a probe around its
loop; TRL has its fastest settings here (no dropout, nothing saved; also with precomputed references, or packed, where
it can: the faster of its ways counts). A fresh process for each figure; the two take turns; medians are shown.

CPU seconds: of the training loop, references included. Peak: the largest resident memory of the loop, and how much of
it lies above that of the process just before the loop, model in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probe import probe

JOBS = {
    "dpo": {}, "dpo-lora": {"lora": True}, "dpo-nf4": {"lora": True, "nf4": True}, "orpo": {}, "simpo": {}, "kto": {},
    "rm": {}, "sft": {}, "rloo": {}, "dpo-150k": {"wide": True}, "dpo-150k-lora": {"wide": True, "lora": True},
}  # fmt: skip
STEPS, BATCH, RATE = 6, 4, 1e-5
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant : ' }}{% endif %}"
)


# --- the world -------------------------------------------------------------------------------------------------------


def make_world(out: Path, *, wide: bool) -> None:
    """A random Llama, its tokenizer; pairs, verdicts, demonstrations and prompts, and the order ours takes them in."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words, size = 8000, (151_936 if wide else 16_384)
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", ":", "user", "assistant"])}
    vocabulary |= {f"w{i}": 7 + i for i in range(words)}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    shape = {"vocab_size": size, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1,
             "eos_token_id": 2, "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
    if wide:
        model = Qwen2ForCausalLM(Qwen2Config(hidden_size=256, intermediate_size=704, num_hidden_layers=4,
                                             tie_word_embeddings=True, **shape))  # fmt: skip
    else:
        model = LlamaForCausalLM(LlamaConfig(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, **shape))
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{int(words * rng.random() ** 3)}" for _ in range(rng.randint(low, high)))

    def asked() -> list[dict[str, str]]:
        return [{"role": "user", "content": text(100, 500)}]

    def answer() -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text(100, 400)}]

    n = STEPS * BATCH
    pairs = [{"prompt": asked(), "chosen": answer(), "rejected": answer()} for _ in range(n)]
    files = {
        "pairs": pairs,
        "verdicts": [
            {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, p in enumerate(pairs)
        ],
        "demonstrations": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs],
        "prompts": [{"prompt": p["prompt"]} for p in pairs],
    }
    import numpy as np

    from rlhf_cli.data.loader import Loader

    loader = Loader(np.zeros(n, dtype=np.int64), [1.0], BATCH, seed=42)
    (out / "order.json").write_text(json.dumps([int(i) for _ in range(STEPS) for i in loader.next()]), encoding="utf-8")
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def data_of(job: str) -> str:
    method = job.split("-", maxsplit=1)[0]
    return {"kto": "verdicts", "sft": "demonstrations", "rloo": "prompts"}.get(method, "pairs")


# --- ours ------------------------------------------------------------------------------------------------------------


def recipe(world: Path, job: str, out: Path) -> dict[str, Any]:
    """The recipe of a job."""
    method, settings = job.split("-", maxsplit=1)[0], JOBS[job]
    own: dict[str, Any] = {
        "dpo": {"stage": "dpo", "objective": {"name": "dpo", "beta": 0.1}},
        "kto": {"stage": "dpo", "objective": {"name": "kto", "beta": 0.1}},
        "orpo": {"stage": "orpo", "objective": {"name": "orpo", "beta": 0.1}},
        "simpo": {"stage": "simpo", "objective": {"name": "simpo", "beta": 2.0, "gamma": 1.0}},
        "rm": {"stage": "train-rm"},
        "sft": {"stage": "sft"},
        "rloo": {
            "stage": "ppo", "rewards": [{"rule": {"name": "length", "limit": 1000}}],
            "rollout": {"max_new_tokens": 128, "completions_per_prompt": 4, "max_batch": 64},
            "ppo": {"epochs": 1, "mini_batches": 1, "advantage": {"name": "rloo"}, "truncation": "score",
                    "kl": {"name": "fixed", "coef": 0.05}},
            "doctor": {"enabled": False},
        },
    }[method]  # fmt: skip
    return own | {
        "model": {"name_or_path": str(world / "model"), "dtype": "float32", "gradient_checkpointing": False,
                  "quantization": "nf4" if "nf4" in settings else "none"},
        "lora": {"r": 16, "alpha": 32} if "lora" in settings else None,
        "data": {"train": str(world / f"{data_of(job)}.jsonl"), "max_length": 1024},
        "training": {"learning_rate": RATE, "batch_size": BATCH * (4 if method == "rloo" else 1), "max_steps": STEPS,
                     "lr_scheduler": "constant"},
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
        found["loss"] = [json.loads(line)["loss"] for line in file]
    return found


# --- the comparison --------------------------------------------------------------------------------------------------

WAYS = {"dpo": ("plain", "precomputed"), "kto": ("plain", "precomputed"), "sft": ("plain", "packed")}


def measured(python: str, side: str, world: Path, job: str, out: Path, way: str, threads: int) -> dict[str, Any]:
    """One figure, from a process of its own."""
    folder = out / f"{job}-{side}-{way}"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
                                "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [python, __file__, "--one", side, "--world", str(world), "--out", str(folder), "--way", way, job]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job}, {side}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found | {"whole": time.perf_counter() - began}


def compare(job: str, world: Path, out: Path, peer: str, repeats: int) -> None:
    """Turns of both, and a line of the table."""
    method, settings = job.split("-", maxsplit=1)[0], JOBS[job]
    ways = ("plain",) if "wide" in settings and method != "dpo" else WAYS.get(method, ("plain",))
    ours, theirs = [], {way: [] for way in ways}  # type: ignore[var-annotated]
    for _ in range(repeats):
        ours.append(measured(sys.executable, "ours", world, job, out, "plain", 1))
        for way in ways:
            theirs[way].append(measured(peer, "peer", world, job, out, way, 1))

    def middle(runs: list[dict[str, Any]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    best = min(ways, key=lambda way: middle(theirs[way], "cpu"))
    least = min(ways, key=lambda way: middle(theirs[way], "peak"))
    above = [middle(runs, "peak") - middle(runs, "idle") for runs in (ours, theirs[least])]
    apart = max((abs(a - b) for a, b in zip(ours[0]["loss"], theirs["plain"][0]["loss"], strict=True)), default=0.0)
    print(
        f"| {job} | {middle(theirs[best], 'cpu'):.1f} ({best}) | {middle(ours, 'cpu'):.1f} | "
        f"{middle(theirs[best], 'cpu') / middle(ours, 'cpu'):.2f}x | "
        f"{middle(theirs[least], 'peak'):.0f} ({middle(theirs[least], 'idle'):.0f}) | "
        f"{middle(ours, 'peak'):.0f} ({middle(ours, 'idle'):.0f}) | 1/{above[1] / above[0]:.1f} | {apart:.1e} |",
        flush=True,
    )


def main() -> None:
    """Parse the arguments; compare, or be one of the compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; none: all")
    parser.add_argument("--peer", help="a Python with TRL")
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

            found = run_peer(asked.world, job, asked.out, asked.way)
        (asked.out / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return
    if not asked.peer:
        parser.error("--peer is missing: a Python with TRL")
    print("| work | TRL: CPU s | ours: CPU s | throughput | TRL: peak MiB (idle) | ours | over idle | losses |")
    print("|---|---|---|---|---|---|---|---|")
    for job in asked.jobs or JOBS:
        wide = "wide" in JOBS[job]
        world = asked.out / ("wide" if wide else "narrow")
        if not (world / "model").is_dir():
            world.mkdir(parents=True, exist_ok=True)
            make_world(world, wide=wide)
        compare(job, world, asked.out, asked.peer, asked.repeats)


if __name__ == "__main__":
    main()
