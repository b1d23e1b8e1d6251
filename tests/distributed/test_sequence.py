"""distributed.sequence_parallel: rows whose tokens several processes share give the numbers of whole rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cli.errors import ModelError
from rlhf_cli.models import sequence
from rlhf_cli.models.roles import Role
from rlhf_cli.train.engine import Engine
from tests import several
from tests.conftest import run_cli
from tests.distributed.test_sharding import Make, alone, maker, same_numbers, same_tensors
from tests.models.worlds import make_base
from tests.stages import world as w

SHARED = {"distributed": {"sequence_parallel": 2, "timeout": 60}}
SHARDED = {"distributed": {"sequence_parallel": 2, "shard": "full", "timeout": 60}}
HALF = {"model": {"dtype": "bfloat16"}}
NF4 = {"model": {"quantization": "nf4"}}
QUIET: dict[str, Any] = {"data": {"eval": None}, "evaluation": {"every": None, "samples": 0}}
"""Nothing but training, of runs whose bytes are counted."""
COUNTED = ("sft-full", "dpo-lora", "rm")
CHOSEN = ("sft-full", "dpo-lora", "kto", "rm", "ppo-trunk")


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The recipes of RUNS."""
    return maker(tiny_model, tmp_path_factory, dict.fromkeys(COUNTED, QUIET))


@pytest.fixture(scope="module")
def runs(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in one process and in two that share each row; one that changes over each way; with layers in parts, plain
    and in 4 bits; in half precision."""
    for run in ("rm", *(name for name in CHOSEN if name != "rm")):
        outcome = alone(make(run, "one"))
        assert outcome.code == 0, outcome.err
    assert alone(make("dpo-lora", "half", **HALF)).code == 0
    assert alone(make("dpo-lora", "nf4", **NF4)).code == 0
    assert alone(make("sft-full", "onetwo"), "--max-steps", 2).code == 0
    work = [
        *((make(run, "two", **SHARED), []) for run in CHOSEN),
        (make("sft-full", "parts", **SHARDED), []),
        (make("dpo-lora", "nf4parts", **SHARDED, **NF4), []),
        (make("dpo-lora", "halftwo", **SHARED, **HALF), []),
        (make("sft-full", "halftwo", **SHARED, **HALF), []),
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


@pytest.mark.parametrize(
    ("run", "where", "more", "share"),
    [("sft-full", "two", {}, 1), ("sft-full", "halftwo", HALF, 1), ("rm", "two", {}, 1), ("dpo-lora", "two", {}, 1.5)],
)
def test_what_is_exchanged_is_the_formula(
    make: Make, runs: Path, tmp_path: Path, run: str, where: str, more: Any, share: float
) -> None:
    """Forward and backward, layers that are recomputed once more; of dpo the reference's forward too, in which one
    number is read of a token, as in the policy's."""
    path = w.save(make(run, where, **SHARED, **more), tmp_path / "r.yaml")
    told = json.loads(run_cli("plan", path, "--no-time", "--json", "--world-size", 2).out)["communication"]
    rows = [row["distributed/exchanged_bytes"] for row in w.metrics(runs / f"{run}-{where}") if row["step"]]
    terms, read = told["rows"], told["rows"]["read"]
    assert terms["again"] == (run == "sft-full")
    expected = share * (told["exchanged"] - read) + math.ceil(share) * read
    assert sum(rows) / len(rows) == pytest.approx(expected, rel=1e-9)


def test_a_plan_says_what_the_run_would_refuse(make: Make, tmp_path: Path) -> None:
    path = w.save(make("sft-lora", "planned", distributed={"sequence_parallel": 3}), tmp_path / "r.yaml")
    for world, code, words in ((2, 2, "and 2 is no multiple of that (give one, for instance --world-size 3)"),
                               (3, 4, "3 processes cannot share 4 attention heads evenly")):  # fmt: skip
        outcome = run_cli("plan", path, "--no-time", "--world-size", world)
        assert outcome.code == code
        (line,) = outcome.errors
        assert words in line


@pytest.mark.parametrize(("one", "parts"), [("sft-full-one", "sft-full-parts"), ("dpo-lora-nf4", "dpo-lora-nf4parts")])
def test_with_layers_held_in_parts(runs: Path, one: str, parts: str) -> None:
    same_numbers(runs / one, runs / parts)
    same_tensors(runs / one / "final", runs / parts / "final")


@pytest.mark.parametrize("change", ["onetwo", "twoone"])
def test_a_run_goes_on_with_and_without(runs: Path, change: str) -> None:
    assert "resumed from" in (runs / f"sft-full-{change}" / "run.log").read_text()
    same_numbers(runs / "sft-full-one", runs / f"sft-full-{change}")


def test_in_half_precision(runs: Path) -> None:
    one, two = (w.metrics(runs / f"dpo-lora-{name}") for name in ("half", "halftwo"))
    for row, twin in zip(one, two, strict=True):
        assert row["step"] == 0 or row["loss"] == pytest.approx(twin["loss"], abs=2e-2)


def refused(make: Make, run: str, **more: Any) -> str:
    outcome = alone(make(run, "refused", **w.merged(SHARED, more)))
    assert outcome.code == 2, outcome.err
    (line,) = outcome.errors
    return line


def test_what_cannot_be_shared_is_refused(make: Make) -> None:
    assert "2 processes are to share each sequence, and there is one" in refused(make, "sft-lora")
    for more in ({"training": {"layout": "padded"}}, {"model": {"attn_implementation": "sdpa"}}):
        assert "distributed.sequence_parallel needs attention by segments" in refused(make, "sft-lora", **more)


def test_a_learner_whose_rows_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a critic on a base of its own as well, each process would add the gradient of whole rows."""
    base = make_base("gemma2")
    engine = Engine.__new__(Engine)
    engine.recipe, engine.packed = SimpleNamespace(training=None), True  # type: ignore[assignment]
    monkeypatch.setattr(sequence, "size", lambda: 2)
    with pytest.raises(ModelError, match="Gemma2 cannot share sequences out to several processes"):
        engine.add(Role("critic", base, trained=True), 1e-3)
    monkeypatch.setattr(sequence, "size", lambda: 3)
    with pytest.raises(ModelError, match="3 processes cannot share 4 attention heads"):
        engine.add(Role("critic", make_base("llama"), trained=True), 1e-3)


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
