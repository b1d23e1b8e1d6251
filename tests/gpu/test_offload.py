"""distributed.cpu_offload on a card: the losses of a run without it, and less memory. Skipped without one; with two
cards also for two processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.worlds import write_model
from tests.several import ROOT
from tests.stages import world as w

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 128}
"""Some 25 million numbers in layers, of which a step holds four copies."""
SMALL = {"learning_rate": 1e-4, "batch_size": 4, "max_steps": 4, "micro_batch_tokens": 64}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"lora": None},
    "full-bfloat16": {"lora": None, "model": {"dtype": "bfloat16"}},
    "lora": {"model": {"dtype": "bfloat16"}},
    "lora-nf4": {"model": {"dtype": "bfloat16", "quantization": "nf4"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for suffix, count in (("", 16), ("-eval", 3)):
        w.write_rows(folder / f"chat{suffix}.jsonl", w.rows("chat", count, 1))
    write_model(folder / "model", "llama", **WIDE)
    return folder


def trained(world: Path, name: str, own: dict[str, Any], processes: int, *options: str) -> list[dict[str, Any]]:
    """The metrics of its steps, by so many processes of their own, whose memory nobody else has used."""
    content = w.recipe("sft", world / "model", world, "chat", world / name, lora=w.LORA, training=SMALL,
                       evaluation={"samples": 2}, checkpoint={"every": 2})  # fmt: skip
    path = w.save(w.merged(content, own), world / f"{name}.yaml")
    line = [sys.executable, "-m", *(["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
                                    if processes > 1 else []), "rlhf_cli", "sft", str(path), *options]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = (world / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"]]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("run", RUNS)
def test_parts_in_main_memory_change_losses_by_nothing_and_free_the_card(world: Path, run: str, processes: int) -> None:
    if processes > torch.cuda.device_count():
        pytest.skip("needs two cards")
    shards = {"distributed": {"shard": "full"}}
    off = {"distributed": {"shard": "full", "cpu_offload": True}}
    here = trained(world, f"{run}-{processes}-here", RUNS[run] | shards, processes)
    away = trained(world, f"{run}-{processes}-away", RUNS[run] | off, processes)
    near = 1e-5 if run == "full" else 1e-3
    for row, other in zip(here, away, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=near, abs=near)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=10 * near, abs=near)
    assert "in main memory" in (world / f"{run}-{processes}-away" / "run.log").read_text()
    if run == "full":  # the memory of a step in which nothing was sampled
        most = [max(row["mem/peak_gib"] for row in rows[1:-1]) for rows in (here, away)]
        assert most[1] < most[0] / 2


def test_a_run_goes_on_with_it_and_without(world: Path) -> None:
    off = {"distributed": {"shard": "full", "cpu_offload": True}}
    whole = trained(world, "whole", RUNS["full"], 1)
    trained(world, "turns", RUNS["full"] | off, 1, "--max-steps", "2")
    turns = trained(world, "turns", RUNS["full"], 1)
    for row, other in zip(whole, turns, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5, abs=1e-5)
