"""distributed.shard: full with model.quantization nf4, on two processes: the bytes, numbers and files of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import test_sharding as plain
from tests.distributed.test_sharding import alone, in_two, same_numbers, same_tensors
from tests.models.worlds import write_model
from tests.stages import world as w

NF4 = {"model": {"quantization": "nf4"}}
WIDE = {"hidden_size": 64, "intermediate_size": 144, "head_dim": 16}
"""Sizes that two do not divide, with and without biases."""
RUNS = {"sft-lora": {"checkpoint": {"every": 2}}, "dpo-lora": {}, "ppo": {}}


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`make(run, where, **more)`: the recipe of one of RUNS on four bits."""
    world = plain.rows_of(tmp_path_factory.mktemp("world"))
    said = "def lengths(completions, **more):\n    return [float(len(text)) for text in completions]\n"
    (world / "reward.py").write_text(said, encoding="utf-8")
    out = tmp_path_factory.mktemp("runs")

    def recipe(run: str, where: str, **more: Any) -> dict[str, Any]:
        stage, kind, own = plain.RUNS[run]
        made = w.recipe(stage, tiny_model, world, kind, out / f"{run}-{where}", lora=w.LORA, training=plain.SMALL)
        if stage == "ppo":
            made["rewards"] = [{"function": f"{world}/reward.py:lengths"}]
        return w.merged(made, own, NF4, RUNS.get(run, {}), more)

    return recipe


@pytest.fixture(scope="module")
def runs(make: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run in one process and, its codes shared out, in two; and two that change over in their middle."""
    for run in RUNS:
        outcome = alone(make(run, "one"))
        assert outcome.code == 0, outcome.err
    first = alone(make("sft-lora", "onetwo"), "--max-steps", 2)
    assert first.code == 0, first.err
    wide = write_model(tmp_path_factory.mktemp("wide") / "qwen2", "qwen2", **WIDE)
    said = in_two(
        [
            *((make(run, "two", **plain.SHARD), []) for run in RUNS),
            (make("sft-lora", "onetwo", **plain.SHARD), []),
            (make("sft-lora", "twoone", **plain.SHARD), ["--max-steps", "2"]),
            (make("sft-lora", "again", **plain.SHARD), ["--max-steps", "2"]),
            (make("sft-lora", "again", **plain.SHARD), []),
        ],
        tmp_path_factory.mktemp("lines"),
        make("sft-lora", "wrong", distributed={"shard": "hybrid", "timeout": 60}),
        [["-m", "tests.distributed.alike", wide]],
    )
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        "error: distributed.shard: hybrid copies layers between machines, and all 2 processes are on one (set full, "
        "which is the same there)"
    ]
    last = alone(make("sft-lora", "twoone"))
    assert last.code == 0, last.err
    out = Path(make("ppo", "one")["output_dir"]).parent
    (out / "alike.json").write_text(said.partition("FOUND ")[2].partition("\n")[0])
    return out


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_that_share_four_bits_out_equal_one(runs: Path, run: str) -> None:
    one, two = runs / f"{run}-one", runs / f"{run}-two"
    same_numbers(one, two)
    same_tensors(one / "final", two / "final")
    assert {p.name for p in (one / "final").iterdir()} == {p.name for p in (two / "final").iterdir()}
    lines = [(folder / "run.log").read_text() for folder in (one, two)]
    told = [next(line for line in text.splitlines() if "policy: " in line).partition("policy: ")[2] for text in lines]
    assert told[0] == told[1]
    assert " nf4, LoRA" in told[0]
    assert "sharded: each of 2 processes holds" in lines[1]


@pytest.mark.parametrize("change", ["onetwo", "twoone"])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, change: str) -> None:
    run = runs / f"sft-lora-{change}"
    assert "resumed from" in (run / "run.log").read_text()
    same_numbers(runs / "sft-lora-one", run)
    same_tensors(runs / "sft-lora-one" / "final", run / "final")
    same_tensors(runs / "sft-lora-one" / "checkpoints", run / "checkpoints")


def test_two_processes_go_on_to_the_same_bits(runs: Path) -> None:
    assert "resumed from" in (runs / "sft-lora-again" / "run.log").read_text()
    same_tensors(runs / "sft-lora-two" / "final", runs / "sft-lora-again" / "final", limit=0.0)


def test_codes_scales_and_answers_are_those_of_the_base_whole(runs: Path) -> None:
    told = json.loads((runs / "alike.json").read_text())
    for found in told["found"]:
        assert found["layers"] == 14
        assert found["equal"]
        assert found["same"]
        assert found["numbers"]
        assert found["share"] == pytest.approx(0.5, abs=0.01)
    assert told["int8"][0] == told["old"][0] == 4
    assert "quantised otherwise than in 4 bits" in told["int8"][1]
    assert told["old"][1].endswith(
        "/qwen2: weights in 4 bits are shared out from PyTorch 2.12 on, and this is 2.11.0+cu128 (install "
        "torch>=2.12, or use distributed.shard: none)"
    )
