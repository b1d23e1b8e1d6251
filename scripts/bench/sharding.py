"""What a process holds when layers are shared out (distributed.shard: full), by the number of processes.

    python scripts/bench/sharding.py            a table for docs/BENCHMARKS.md

A random Llama of 205 million parameters in float32 is trained for one step on a few rows, whole and with an adapter, by
1, 2 and 4 processes of one machine. Each then says what it holds in main memory, beyond what it held before the model
was loaded. Beside it stands what its parameters, its part of them and of the optimiser, take by count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORLDS = (1, 2, 4)
SIZE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
KINDS = {"whole model (sft)": None, "LoRA (sft)": {"r": 16, "alpha": 32}}


def make_model(folder: Path) -> None:
    """Random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from world import TEMPLATE

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokens), num_attention_heads=16, num_key_value_heads=16,
                         max_position_embeddings=256, eos_token_id=2, bos_token_id=1, pad_token_id=0,
                         **SIZE)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(out: Path, lora: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "stage": "sft",
        "model": {"name_or_path": str(out / "model"), "dtype": "float32", "gradient_checkpointing": True},
        "lora": lora,
        "data": {"train": str(out / "rows.jsonl"), "max_length": 64},
        "training": {"learning_rate": 1e-4, "batch_size": 4, "max_steps": 1, "micro_batch_tokens": 64},
        "evaluation": {"every": None, "samples": 0},
        "checkpoint": {"every": None},
        "distributed": {"shard": "full"},
        "output_dir": str(out / "run"),
    }


def child(path: Path) -> None:
    """One process: the real command up to its first step; then what it holds, printed."""
    from rlhf_cli.cli.app import main
    from rlhf_cli.models import base, memory, sharding
    from rlhf_cli.train.engine import Engine

    load, before = base.AutoModelForCausalLM.from_pretrained, [0]

    def loading(*arguments: Any, **more: Any) -> Any:
        before[0] = memory.resident()
        return load(*arguments, **more)

    def after(engine: Engine, metrics: dict[str, float]) -> None:
        gc.collect()
        memory.give_back()
        learner = next(iter(engine.learners.values()))
        tensors = [sharding.held(p) for p in learner.role.base.model.parameters()]
        tensors += [t for state in learner.optimizer.state.values() for t in state.values()]
        counted = sum(t.numel() * t.element_size() for t in tensors)
        found = {"resident": memory.resident() - before[0], "counted": counted}
        print("FOUND " + json.dumps(found), flush=True)
        if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            from rlhf_cli.models import processes

            assert len(processes.gather(found, "measuring")) == world
        os._exit(0)

    base.AutoModelForCausalLM.from_pretrained = loading
    Engine.tick = after  # type: ignore[assignment,method-assign]
    sys.argv = ["rlhf", "sft", str(path), "--quiet"]
    main()


def measured(out: Path, lora: dict[str, Any] | None, world: int) -> list[dict[str, float]]:
    """What each of so many processes found."""
    path = out / "recipe.json"
    path.write_text(json.dumps(recipe(out, lora)), encoding="utf-8")
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RLHF_CACHE": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*start, str(ROOT / "scripts/bench/sharding.py"), "--child", str(path)],
                          env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    found = [json.loads(part.partition("\n")[0]) for part in done.stdout.split("FOUND ")[1:]]
    if len(found) != world:
        sys.exit(f"{world} processes: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        make_model(out / "model")
        rows = [{"prompt": "abc", "completion": f" def {i}"} for i in range(8)]
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print("| trained | processes | held by count, MiB | resident at rest, MiB (most of all) | of one process |")
        print("|---|---|---|---|---|")
        for name, lora in KINDS.items():
            alone = 0.0
            for world in WORLDS:
                found = measured(out, lora, world)
                counted, resident = (max(one[key] for one in found) / 2**20 for key in ("counted", "resident"))
                alone = alone or resident
                print(f"| {name} | {world} | {counted:,.0f} | {resident:,.0f} | {resident / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
