"""Four processes on two machines. distributed.shard: hybrid: the numbers, files and checkpoints of one process; what is
sent; where it is refused. Rows whose tokens two or all four of them share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.models import mesh
from tests.conftest import run_cli
from tests.distributed import machines
from tests.distributed import test_sharding as plain
from tests.distributed.test_sharding import alone, same_numbers, same_tensors
from tests.stages import world as w

HYBRID = {"distributed": {"shard": "hybrid", "timeout": 60}}
SHARED = {"distributed": {"shard": "hybrid", "sequence_parallel": 2, "timeout": 60}}
FULL: dict[str, Any] = {"lora": None}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft-full": (
        "sft",
        "chat",
        FULL
        | {"checkpoint": {"every": 2}, "data": {"eval": None}, "evaluation": {"samples": 0}}
        | {"training": {"batch_size": 9, "micro_batch_tokens": 24}},  # three micro-batches here, two there
    ),
    "dpo-nf4": ("dpo", "pairs", {"objective": {"name": "dpo"}, "model": {"quantization": "nf4"}}),
}


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    world, out = plain.rows_of(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("runs")

    def recipe(run: str, where: str, **more: Any) -> dict[str, Any]:
        stage, kind, own = RUNS[run]
        made = w.recipe(stage, tiny_model, world, kind, out / f"{run}-{where}", lora=w.LORA, training=plain.SMALL)
        return w.merged(made, own, more)

    return recipe


def line(content: dict[str, Any], *options: object) -> list[object]:
    path = w.save(content, Path(content["output_dir"]).with_suffix(".yaml"))
    return [content["stage"], path, *options]


@pytest.fixture(scope="module")
def runs(make: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    for run in RUNS:
        outcome = alone(make(run, "one"))
        assert outcome.code == 0, outcome.err
    first = alone(make("sft-full", "onefour"), "--max-steps", 2)
    assert first.code == 0, first.err
    lines: list[list[object]] = [["-m", "tests.distributed.sequences"]]
    lines += [line(make(run, "four", **HYBRID)) for run in RUNS]
    lines += [
        line(make("sft-full", "onefour", **HYBRID)),
        line(make("sft-full", "rows", **SHARED)),
        line(make("sft-full", "fourone", **HYBRID), "--max-steps", 2),
        line(make("sft-full", "again", **HYBRID), "--max-steps", 2),
        line(make("sft-full", "again", **HYBRID)),
    ]
    codes, said = machines.launch(tmp_path_factory.mktemp("lines"), lines, (2, 2))
    assert codes == [0] * len(lines), said[-3000:]
    last = alone(make("sft-full", "fourone"))
    assert last.code == 0, last.err
    out = Path(make("sft-full", "one")["output_dir"]).parent
    (out / "sequences.json").write_text(said.partition("FOUND ")[2].partition("\n")[0])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_machines_equal_one_process(runs: Path, run: str) -> None:
    one, four = runs / f"{run}-one", runs / f"{run}-four"
    same_numbers(one, four)
    same_tensors(one / "final", four / "final")
    assert "each of 4 processes (2 of a machine share its layers out) holds" in (four / "run.log").read_text()


@pytest.mark.slow
def test_processes_of_a_machine_share_rows_too(runs: Path) -> None:
    same_numbers(runs / "sft-full-one", runs / "sft-full-rows")
    same_tensors(runs / "sft-full-one" / "final", runs / "sft-full-rows" / "final")
    assert all(row["distributed/exchanged_bytes"] > 0 for row in w.metrics(runs / "sft-full-rows") if row["step"])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["onefour", "fourone"])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, change: str) -> None:
    assert "resumed from" in (runs / f"sft-full-{change}" / "run.log").read_text()
    same_numbers(runs / "sft-full-one", runs / f"sft-full-{change}")
    same_tensors(runs / "sft-full-one" / "final", runs / f"sft-full-{change}" / "final")


@pytest.mark.slow
def test_four_processes_go_on_to_the_same_bits(runs: Path) -> None:
    assert "resumed from" in (runs / "sft-full-again" / "run.log").read_text()
    for where in ("final", "checkpoints/step-000004"):
        same_tensors(runs / "sft-full-four" / where, runs / "sft-full-again" / where, limit=0.0)


@pytest.mark.slow
def test_what_is_sent_is_the_formula(make: Callable[..., dict[str, Any]], runs: Path, tmp_path: Path) -> None:
    path = w.save(make("sft-full", "four", **HYBRID), tmp_path / "r.yaml")
    options = ("--no-time", "--json", "--world-size", 4, "--processes-per-machine", 2)
    told = json.loads(run_cli("plan", path, *options).out)["communication"]
    assert told["micro_batches"] > 1
    assert told["copied"] == 4 * told["spread"] / 2, "once a step, however many micro-batches"
    rows = [row for row in w.lines(runs / "sft-full-four" / "metrics.jsonl") if row["step"]]
    for name, key in (("gathered", "gathered"), ("scattered", "scattered"), ("copied", "copied"),
                      ("gradient", "handed")):  # fmt: skip
        assert sum(row[f"distributed/{name}_bytes"] for row in rows) == pytest.approx(len(rows) * told[key], rel=1e-9)
        assert told[key] > 0


@pytest.mark.slow
def test_every_way_of_reading_a_row_that_is_shared(runs: Path) -> None:
    """Log-probabilities with each statistic, values, scores: by two and by four processes, values and gradients."""
    told = json.loads((runs / "sequences.json").read_text())
    assert "3 processes are to share each sequence, and there are 4 processes" in told["refused"]
    for size in ("2", "4"):
        assert told[f"by {size}"]
        for name, gaps in told[f"by {size}"].items():
            assert max(gaps.values()) < 1e-5, (size, name, gaps)
        assert told[f"traffic {size}"]["told"] == told[f"traffic {size}"]["formula"]


def agreed(*sizes: int) -> int:
    """Of machines with so many processes each."""
    return mesh._agreed([[place, size] for size in sizes for place in range(size)], hybrid=True)


def test_it_is_refused_where_it_could_do_nothing() -> None:
    assert agreed(2, 2) == 2
    assert agreed(8, 8, 8) == 8
    for sizes, words in (((4,), "all 4 processes are on one"), ((1, 1), "one process on each"),
                         ((2, 3), "there are 2 and 3"), ((3, 2, 3), "there are 2 and 3")):  # fmt: skip
        with pytest.raises(RecipeError, match=words) as caught:
            agreed(*sizes)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.exit_code == 2
