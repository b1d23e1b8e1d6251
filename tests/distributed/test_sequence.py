"""distributed.sequence_parallel: rows whose tokens several processes share give the numbers of whole rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import several
from tests.distributed.test_sharding import RUNS, alone, rows_of, same_numbers, same_tensors
from tests.stages import world as w

SMALL = {"learning_rate": 1e-3, "batch_size": 5, "max_steps": 4, "micro_batch_tokens": 64}
SHARED = {"distributed": {"sequence_parallel": 2, "timeout": 60}}
SHARDED = {"distributed": {"sequence_parallel": 2, "shard": "full", "timeout": 60}}
HALF = {"model": {"dtype": "bfloat16"}}
CHOSEN = ("sft-full", "dpo-lora", "kto", "rm", "ppo-trunk")


def test_every_way_of_reading_a_row(tmp_path: Path) -> None:
    """Log-probabilities with each statistic, values, scores: by two and by four processes, values and gradients."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    line += ["-m", "tests.distributed.sequences"]
    done = subprocess.run(line, cwd=several.ROOT, capture_output=True, text=True, timeout=240, check=False)
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-3000:]]
    told = json.loads(found.removeprefix("FOUND "))
    assert "3 processes are to share each sequence, and there are 4 processes" in told["refused"]
    for size in ("2", "4"):
        assert told[f"by {size}"]
        for name, gaps in told[f"by {size}"].items():
            assert max(gaps.values()) < 1e-5, (size, name, gaps)
        assert told[f"traffic {size}"]["told"] == told[f"traffic {size}"]["formula"]


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`make(run, where, **more)`: the recipe of one of RUNS."""
    world = rows_of(tmp_path_factory.mktemp("world"))
    out = tmp_path_factory.mktemp("runs")

    def recipe(run: str, where: str, **more: Any) -> dict[str, Any]:
        stage, kind, own = RUNS[run]
        made = w.recipe(stage, tiny_model, world, kind, out / f"{run}-{where}", lora=w.LORA, training=SMALL)
        if stage == "ppo":
            made["rewards"] = [{"run": str(out / "rm-one")}]
        return w.merged(made, own, more)

    return recipe


@pytest.fixture(scope="module")
def runs(make: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in one process and in two that share each row; one that changes over each way; with layers in parts; in half
    precision."""
    for run in ("rm", *(name for name in CHOSEN if name != "rm")):
        outcome = alone(make(run, "one"))
        assert outcome.code == 0, outcome.err
    assert alone(make("dpo-lora", "half", **HALF)).code == 0
    assert alone(make("sft-full", "onetwo"), "--max-steps", 2).code == 0
    work = [
        *((make(run, "two", **SHARED), []) for run in CHOSEN),
        (make("sft-full", "parts", **SHARDED), []),
        (make("dpo-lora", "halftwo", **SHARED, **HALF), []),
        (make("sft-full", "onetwo", **SHARED), []),
        (make("sft-full", "twoone", **SHARED), ["--max-steps", "2"]),
    ]
    paths = [(made, w.save(made, Path(made["output_dir"]).with_suffix(".yaml")), options) for made, options in work]
    lines: list[list[object]] = [[made["stage"], path, *options] for made, path, options in paths]
    codes, said = several.launch(tmp_path_factory.mktemp("lines"), lines, 2)
    assert codes == [0] * len(lines), said[-3000:]
    assert alone(make("sft-full", "twoone")).code == 0
    return Path(make("kto", "one")["output_dir"]).parent


@pytest.mark.parametrize("run", CHOSEN)
def test_two_processes_that_share_each_row_equal_one(runs: Path, run: str) -> None:
    one, two = runs / f"{run}-one", runs / f"{run}-two"
    same_numbers(one, two)
    same_tensors(one / "final", two / "final")
    assert all(row["distributed/exchanged_bytes"] > 0 for row in w.metrics(two) if row["step"])


def test_with_layers_held_in_parts(runs: Path) -> None:
    same_numbers(runs / "sft-full-one", runs / "sft-full-parts")
    same_tensors(runs / "sft-full-one" / "final", runs / "sft-full-parts" / "final")


@pytest.mark.parametrize("change", ["onetwo", "twoone"])
def test_a_run_goes_on_with_and_without(runs: Path, change: str) -> None:
    assert "resumed from" in (runs / f"sft-full-{change}" / "run.log").read_text()
    same_numbers(runs / "sft-full-one", runs / f"sft-full-{change}")


def test_in_half_precision(runs: Path) -> None:
    one, two = (w.metrics(runs / f"dpo-lora-{name}") for name in ("half", "halftwo"))
    for row, twin in zip(one, two, strict=True):
        assert row["step"] == 0 or row["loss"] == pytest.approx(twin["loss"], abs=2e-2)


def refused(make: Callable[..., dict[str, Any]], run: str, **more: Any) -> str:
    outcome = alone(make(run, "refused", **w.merged(SHARED, more)))
    assert outcome.code == 2, outcome.err
    (line,) = outcome.errors
    return line


def test_what_cannot_be_shared_is_refused(make: Callable[..., dict[str, Any]]) -> None:
    assert "2 processes are to share each sequence, and there is one" in refused(make, "sft-lora")
    for more in ({"training": {"layout": "padded"}}, {"model": {"attn_implementation": "sdpa"}}):
        assert "distributed.sequence_parallel needs attention by segments" in refused(make, "sft-lora", **more)


def test_the_parts_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli.models import processes, sequence

    monkeypatch.setattr(sequence, "_size", 4)
    monkeypatch.setattr(processes, "count", lambda: 8)
    for length in (0, 1, 3, 4, 10, 17):
        covered: list[int] = []
        for rank in range(4, 8):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            assert sequence.group() == 1
            covered += range(length)[sequence.own(length)]
        assert covered == list(range(length))
        assert max(sequence.parts(length)) - min(sequence.parts(length)) <= 1
