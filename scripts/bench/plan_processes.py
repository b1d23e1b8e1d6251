"""`rlhf plan --world-size N` against the run itself: what a process holds at most, foretold and measured.

    python scripts/bench/plan_processes.py                 every row
    python scripts/bench/plan_processes.py nf4 hybrid      those whose name holds one of the words

Random Llamas of sharding.py: of 205 million parameters, filed in bfloat16 and trained in float32, in parts
(distributed.shard) by the processes of one machine, or of two that are started on it (hybrid); and of 26 million, with
rows of 4,096 tokens that several share (distributed.sequence_parallel). The runs are whole, with checkpoint, final
folder and report. Measured: the largest resident size that the system saw of any process. The environment goes to the
runs: MALLOC_MMAP_THRESHOLD_=4194304 before the command shows what is held without holes in the C library's heap.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from sharding import KINDS, LONG, LORA, ROOT, ROW, SIZE, make_model, recipe


class Row(NamedTuple):
    """What is planned and run."""

    kind: str
    shard: str
    world: int
    machines: int = 1
    shared: int = 1


ROWS = (
    *(Row(kind, "full", world) for kind in KINDS for world in (2, 4)),
    *(Row(kind, "hybrid", 4, machines=2) for kind in ("whole model", "LoRA")),
    *(Row("rows of 4,096 tokens, LoRA", "none", shared, shared=shared) for shared in (1, 2)),
)


def content(row: Row, out: Path) -> dict[str, Any]:
    """The recipe of a row."""
    long = row.shared > 1 or row.kind not in KINDS
    found = recipe(out / ("long" if long else "wide"), *((LORA, "none") if long else KINDS[row.kind]))
    found["distributed"] = {"shard": row.shard, "sequence_parallel": row.shared, "timeout": 120}
    found["training"]["max_steps"] = 2
    found["output_dir"] = str(out / "-".join(map(str, ("run", *row))).replace(" ", ""))
    if long:
        found["model"]["gradient_checkpointing"] = False
        found["data"]["max_length"] = ROW
        found["training"] |= {"batch_size": 1, "micro_batch_tokens": ROW}
    return found


def environment() -> dict[str, str]:
    """Of every command."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                         "RLHF_CACHE": "", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def foretold(row: Row, path: Path) -> dict[str, Any]:
    """What the plan says of memory."""
    line = [sys.executable, "-m", "rlhf_cli", "plan", str(path), "--json", "--no-time", "--world-size", str(row.world)]
    line += ["--processes-per-machine", str(row.world // row.machines)] if row.shard == "hybrid" else []
    done = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(line)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)["memory"]
    return found


def measured(row: Row, path: Path) -> float:
    """MiB of the largest process of the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for machine in range(row.machines):
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(row.world // row.machines),
                "--nnodes", str(row.machines), "--node-rank", str(machine), "--master-addr", "127.0.0.1",
                "--master-port", str(port), str(Path(__file__).resolve()), "--child", str(path)]  # fmt: skip
        said = path.with_suffix(f".said-{machine}").open("w+", encoding="utf-8")
        runs.append((subprocess.Popen(line, env=environment(), stdout=said, stderr=subprocess.STDOUT), said))
    found: list[float] = []
    for run, said in runs:
        code = run.wait()
        said.seek(0)
        text = said.read()
        found += [float(part.partition("\n")[0]) for part in text.split("FOUND ")[1:]]
        if code:
            sys.exit(f"{row}: exit {code}\n{text[-3000:]}")
    assert len(found) == row.world, found
    return max(found)


def child(path: Path) -> None:
    """One process: the command, and in the end what it held at most."""
    from rlhf_cli.cli.app import main as command

    atexit.register(lambda: print(f"FOUND {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}", flush=True))
    sys.argv = ["rlhf", "sft", str(path), "--quiet"]
    command()


def line(row: Row, out: Path) -> str:
    """A row of the table."""
    made = content(row, out)
    path = out / f"{Path(made['output_dir']).name}.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    plan = foretold(row, path)
    peak, idle, real = plan["peak"] / 2**20, plan["idle"] / 2**20, measured(row, path)
    moment = max(plan["moments"], key=lambda name: plan["moments"][name])
    off, above = 100 * (peak / real - 1), 100 * ((peak - idle) / (real - idle) - 1)
    how = f"sequence_parallel {row.shared}" if row.shared > 1 else row.shard
    among = f"{row.world} on {row.machines} machines" if row.machines > 1 else str(row.world)
    return (f"| {row.kind} | {how} | {among} | {idle:.0f} | {peak:.0f} | {real:.0f} | {off:+.1f} ({above:+.1f}) | "
            f"{moment} |")  # fmt: skip


def make_world(out: Path) -> None:
    """Both models, each with its rows."""
    for name, size, context in (("wide", SIZE, 256), ("long", LONG, 2 * ROW)):
        make_model(out / name / "model", size, context)
    rows = [{"prompt": "abc", "completion": f" def {i}"} for i in range(8)]
    (out / "wide" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = "".join(chr(97 + (7 * i + i // 26) % 26) for i in range(ROW - 64))
    (out / "long" / "rows.jsonl").write_text(json.dumps({"prompt": "abc", "completion": text}) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the arguments; make the models; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the names of rows; none: all")
    parser.add_argument("--out", type=Path, help="a folder for models, rows and runs; none: a temporary one")
    parser.add_argument("--repeats", type=int, default=1, help="not read: each is measured once")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        return child(asked.child)
    print(
        "| trained | distributed | processes | idle MiB | foretold MiB | measured MiB | off by % (above idle) | where |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        out = Path(folder)
        make_world(out)
        for row in ROWS:
            name = " ".join(map(str, row)) + f" {row.world} shared {row.shared}"
            if not asked.words or any(word in name for word in asked.words):
                print(line(row, out), flush=True)
    return None


if __name__ == "__main__":
    main()
