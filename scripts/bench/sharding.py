"""What processes hold when layers are shared out (distributed.shard: full), by their number.

    python scripts/bench/sharding.py            a table for docs/BENCHMARKS.md
    python scripts/bench/sharding.py --rows     the same of processes that share a row (distributed.sequence_parallel)

A random Llama of 205 million parameters, filed in bfloat16, is trained in float32 for a step on a few rows, whole, with
an adapter, and with one on four bits, by 1, 2 and 4 processes of one machine. Each then says what it holds in main
memory, beyond what it held before the model was loaded. Beside it stands what its parameters, its part of them and of
the optimiser, take by count. And what all of them together hold at most while they load, beyond what they held before
(a page that several have mapped counts once), one after the other as they do, and all at once.

--rows: a random Llama of 26 million parameters, with an adapter, is trained for a step on one row of 4,096 tokens, no
layer recomputed, by 1, 2 and 4 processes that share it. Each says how much it held at most beyond what it held before
the model was loaded, what that step took, and what it sent.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORLDS = (1, 2, 4)
SIZE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
LONG: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
ROW = 4096
"""Tokens of the row that is shared."""
LORA = {"r": 16, "alpha": 32}
KINDS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "whole model": (None, "none"), "LoRA": (LORA, "none"), "LoRA on nf4": (LORA, "nf4")
}  # fmt: skip


LOOK = 0.02
"""Seconds between two looks at what processes hold while they load."""


def make_model(folder: Path, size: dict[str, Any], context: int = 256) -> None:
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
                         max_position_embeddings=context, eos_token_id=2, bos_token_id=1, pad_token_id=0,
                         **size)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(out: Path, lora: dict[str, Any] | None, quantization: str) -> dict[str, Any]:
    return {
        "stage": "sft",
        "model": {
            "name_or_path": str(out / "model"),
            "dtype": "float32",
            "gradient_checkpointing": True,
            "quantization": quantization,
        },
        "lora": lora,
        "data": {"train": str(out / "rows.jsonl"), "max_length": 64},
        "training": {"learning_rate": 1e-4, "batch_size": 4, "max_steps": 1, "micro_batch_tokens": 64},
        "evaluation": {"every": None, "samples": 0},
        "checkpoint": {"every": None},
        "distributed": {"shard": "full"},
        "output_dir": str(out / "run"),
    }


def of_one_row(out: Path, world: int) -> dict[str, Any]:
    """The recipe of a step on a row that so many processes share."""
    found = recipe(out, LORA, "none")
    found["model"]["gradient_checkpointing"] = False
    found["data"]["max_length"] = ROW
    found["training"] |= {"batch_size": 1, "micro_batch_tokens": ROW}
    found["distributed"] = {"sequence_parallel": world}
    return found


def held(process: int | str) -> int:
    """Bytes of main memory of a process; pages that others have mapped too by their share. 0: it is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def child(path: Path, *, at_once: bool) -> None:
    """One process: the real command up to its first step; then what it holds, printed."""
    from rlhf_cli.cli.app import main
    from rlhf_cli.models import build, memory, mesh, processes, sharding, traffic
    from rlhf_cli.train.engine import Engine

    load, before = build.load_base, [0, 0]

    def loading(*arguments: Any, **more: Any) -> Any:
        before[:] = [memory.resident(), held("self")]
        path.with_name(f"loads-{os.getpid()}").touch()
        model = load(*arguments, **more)
        path.with_name(f"loads-{os.getpid()}").unlink()
        return model

    def after(engine: Engine, metrics: dict[str, float]) -> None:
        gc.collect()
        memory.give_back()
        learner = next(iter(engine.learners.values()))
        tensors = [sharding.held(p) for p in learner.role.base.model.parameters()]
        tensors += [t for state in learner.optimizer.state.values() for t in state.values()]
        counted = sum(t.numel() * t.element_size() for t in tensors)
        found = {"resident": memory.resident() - before[0], "counted": counted, "before": before[1],
                 "most": memory.most() - before[0], "seconds": time.monotonic() - engine._clock,
                 "sent": traffic.take().get("distributed/exchanged_bytes", 0.0)}  # fmt: skip
        print("FOUND " + json.dumps(found), flush=True)
        if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            assert len(processes.gather(found, "measuring")) == world
        os._exit(0)

    build.load_base = loading
    if at_once:
        mesh.in_turn = processes.together  # type: ignore[assignment]
    Engine.tick = after  # type: ignore[assignment,method-assign]
    sys.argv = ["rlhf", "sft", str(path), "--quiet"]
    main()


def measured(
    out: Path, content: dict[str, Any], world: int, *, at_once: bool = False
) -> tuple[list[dict[str, float]], float]:
    """What each of so many processes found, and what they held together at most while they loaded."""
    path = out / "recipe.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RLHF_CACHE": "", "CUDA_VISIBLE_DEVICES": ""}
    line = [*start, str(ROOT / "scripts/bench/sharding.py"), "--child", str(path), *["--at-once"] * at_once]
    said, most, known = out / "said", 0, set[str]()
    with said.open("w", encoding="utf-8") as file:
        run = subprocess.Popen(line, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while run.poll() is None:
            loading = [path.name.partition("-")[2] for path in out.glob("loads-*")]
            known |= set(loading)
            most = max(most, sum(map(held, known))) if loading else most
            time.sleep(LOOK)
    text = said.read_text(encoding="utf-8")
    found = [json.loads(part.partition("\n")[0]) for part in text.split("FOUND ")[1:]]
    if len(found) != world:
        sys.exit(f"{world} processes: exit {run.returncode}\n{text[-4000:]}")
    return found, most - sum(one["before"] for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--rows", action="store_true", help="of processes that share a row")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at-once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, at_once=options.at_once)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        (tell_rows if options.rows else tell_parts)(out)
    return None


def tell_rows(out: Path) -> None:
    make_model(out / "model", LONG, 2 * ROW)
    text = "".join(chr(97 + (7 * i + i // 26) % 26) for i in range(ROW - 64))
    (out / "rows.jsonl").write_text(json.dumps({"prompt": "abc", "completion": text}) + "\n", encoding="utf-8")
    print(
        "| processes that share a row | most held, MiB (of the largest) | of one process | sent, MiB | s of the step |"
    )
    print("|---|---|---|---|---|")
    alone = 0.0
    for world in WORLDS:
        found, _ = measured(out, of_one_row(out, world), world)
        most, sent, seconds = (max(one[key] for one in found) for key in ("most", "sent", "seconds"))
        alone = alone or most
        print(
            f"| {world} | {most / 2**20:,.0f} | {most / alone:.2f} | {sent / 2**20:,.0f} | {seconds:.0f} |", flush=True
        )


def tell_parts(out: Path) -> None:
    make_model(out / "model", SIZE)
    rows = [{"prompt": "abc", "completion": f" def {i}"} for i in range(8)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print("| trained | processes | held by count, MiB | resident at rest, MiB (most of all) | of one process "
          "| all while they load, MiB | the same, all at once |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for name, kind in KINDS.items():
        alone, content = 0.0, recipe(out, *kind)
        for world in WORLDS:
            found, most = measured(out, content, world)
            other = measured(out, content, world, at_once=True)[1] if world > 1 else most
            counted, resident = (max(one[key] for one in found) / 2**20 for key in ("counted", "resident"))
            alone = alone or resident
            print(f"| {name} | {world} | {counted:,.0f} | {resident:,.0f} | {resident / alone:.2f} "
                  f"| {most / 2**20:,.0f} | {other / 2**20:,.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
