"""From the command to the end of the first step, `rlhf` against a minimal TRL script; and commands that train nothing.

    python scripts/bench/startup.py --peer .peer/bin/python --out /tmp/startup             every job
    python scripts/bench/startup.py --peer .peer/bin/python --out /tmp/startup dpo sft --repeats 5

The same untrained Llama of two layers and the same 8 short rows, so that imports, loading and checks are what is seen.
Each figure is a fresh process with one thread; the two take turns; medians are shown. CPU: seconds of the process until
its first optimiser step is done. Wall: from the start of the process until then. Idle: resident MiB right before the
training loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

JOBS = ("dpo", "dpo-lora", "sft")
LIGHT = {"--help": ["--help"], "check": ["check", "{recipe}"], "a wrong recipe": ["dpo", "{recipe}", "lr=1"]}
BORN = "STARTUP_BORN"
"""When the process was started, in seconds since the epoch."""
ROWS = 8
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def make_world(world: Path) -> None:
    """Model, tokenizer and rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", ":", "user", "assistant", *(f"w{i}" for i in range(250))]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(world / "model")
    tokenizer.save_pretrained(world / "model")

    def turn(role: str, first: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(f"w{i}" for i in range(first, first + 12))}]

    pairs = [
        {"prompt": turn("user", i), "chosen": turn("assistant", 2 * i), "rejected": turn("assistant", 3 * i + 1)}
        for i in range(ROWS)
    ]
    files = {"dpo": pairs, "sft": [{"messages": p["prompt"] + p["chosen"]} for p in pairs]}
    for name, rows in files.items():
        (world / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def resident() -> float:
    """MiB in memory now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def leave(out: Path, idle: float) -> NoReturn:
    """Write what it took to come this far, and go."""
    found = {"cpu": time.process_time(), "wall": time.time() - float(os.environ[BORN]), "idle": idle}
    (out / "found.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


def write_recipe(world: Path, job: str, out: Path) -> Path:
    """The recipe of a job."""
    import yaml

    method = job.removesuffix("-lora")
    made = {
        "stage": method,
        "model": {"name_or_path": str(world / "model"), "dtype": "float32", "gradient_checkpointing": False},
        "lora": {"r": 8, "alpha": 16} if job.endswith("-lora") else None,
        "data": {"train": str(world / f"{method}.jsonl"), "max_length": 128},
        "training": {"learning_rate": 1e-5, "batch_size": ROWS, "max_steps": 2},
        "evaluation": {"samples": 0},
        "output_dir": str(out / "run"),
    } | ({"objective": {"name": "dpo"}} if method == "dpo" else {})
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    return path


def run_ours(job: str, out: Path) -> None:
    """The real command, with an eye on its loop once the command itself has imported it."""
    from rlhf_cli.catalog.entries import Entry
    from rlhf_cli.cli.app import main

    plain = Entry.load

    def load(entry: Entry) -> Any:
        function = plain(entry)
        from rlhf_cli.train.engine import Engine

        fit = Engine.fit

        def watched(engine: Engine, step: Any) -> None:
            idle = resident()

            def first() -> dict[str, float]:
                step()
                leave(out, idle)

            fit(engine, first)

        Engine.fit, Entry.load = watched, plain  # type: ignore[method-assign, assignment]
        return function

    Entry.load = load  # type: ignore[method-assign, assignment]
    sys.argv = ["rlhf", job.removesuffix("-lora"), str(out / "recipe.yaml")]
    main()


def run_peer(world: Path, job: str, out: Path) -> None:
    """What TRL's documentation begins with."""
    from datasets import Dataset
    from transformers import TrainerCallback

    idle = 0.0

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            nonlocal idle
            idle = resident()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            leave(out, idle)

    method = job.removesuffix("-lora")
    rows = [json.loads(line) for line in (world / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()]
    more: dict[str, Any] = {}
    if job.endswith("-lora"):
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    if method == "dpo":
        from trl import DPOConfig as Configuration
        from trl import DPOTrainer as Trainer
    else:
        from trl import SFTConfig as Configuration
        from trl import SFTTrainer as Trainer
    arguments = Configuration(
        output_dir=str(out / "run"), per_device_train_batch_size=ROWS, learning_rate=1e-5, max_steps=2, max_length=128,
        report_to="none", save_strategy="no", gradient_checkpointing=False, bf16=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(
        model=str(world / "model"), args=arguments, train_dataset=Dataset.from_list(rows), callbacks=[Watch()], **more
    ).train()


def measured(python: str, side: str, world: Path, job: str, out: Path) -> dict[str, float]:
    """One figure, from a process of its own."""
    folder = out / f"{job}-{side}"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    write_recipe(world, job, folder)
    command = [python, __file__, "--one", side, "--world", str(world), "--out", str(folder), job]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if not (folder / "found.json").is_file():
        sys.exit(f"{job}, {side}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


def environment() -> dict[str, str]:
    """Of a measured process."""
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", BORN: str(time.time())}
    return os.environ | fixed


def compare(job: str, world: Path, out: Path, peer: str, repeats: int) -> None:
    """Turns of both, and a line of the table."""
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(measured(sys.executable, "ours", world, job, out))
        theirs.append(measured(peer, "peer", world, job, out))
    cells = []
    for key, form in (("cpu", "{:.1f}"), ("wall", "{:.1f}"), ("idle", "{:.0f}")):
        own, other = (statistics.median(run[key] for run in runs) for runs in (ours, theirs))
        cells += [form.format(own), form.format(other), f"{own / other:.2f}"]
    print(
        f"| `rlhf {job.removesuffix('-lora')}`{', LoRA' if '-lora' in job else ''} | {' | '.join(cells)} |", flush=True
    )


def light(world: Path, out: Path, repeats: int) -> None:
    """Commands that train nothing."""
    folder = out / "light"
    folder.mkdir(exist_ok=True)
    recipe = str(write_recipe(world, "dpo", folder))
    for name, words in LIGHT.items():
        command = [sys.executable, "-m", "rlhf_cli", *(word.format(recipe=recipe) for word in words)]
        cpu, wall = [], []
        for _ in range(repeats):
            before, began = os.times(), time.perf_counter()
            subprocess.run(command, env=environment(), capture_output=True, check=False)
            after = os.times()
            wall.append(time.perf_counter() - began)
            cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
        print(f"| {name} | {statistics.median(cpu):.2f} | {statistics.median(wall):.2f} |", flush=True)


def main() -> None:
    """Parse the arguments; compare, or be one of the compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; none: all")
    parser.add_argument("--peer", help="a Python with TRL; none: only the commands that train nothing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := sorted(set(asked.jobs) - set(JOBS)):
        parser.error(f"no job {unknown[0]}; there are {', '.join(JOBS)}")
    if asked.one == "ours":
        run_ours(asked.jobs[0], asked.out)
    elif asked.one == "peer":
        run_peer(asked.world, asked.jobs[0], asked.out)
    else:
        world = asked.out / "world"
        if not (world / "model").is_dir():
            world.mkdir(parents=True, exist_ok=True)
            make_world(world)
        if asked.peer:
            print("| work | CPU s: ours | TRL | ratio | wall s: ours | TRL | ratio | idle MiB: ours | TRL | ratio |")
            print("|---|---|---|---|---|---|---|---|---|---|")
            for job in asked.jobs or JOBS:
                compare(job, world, asked.out, asked.peer, asked.repeats)
        print("\n| command | CPU s | wall s |\n|---|---|---|")
        light(world, asked.out, asked.repeats)


if __name__ == "__main__":
    main()
