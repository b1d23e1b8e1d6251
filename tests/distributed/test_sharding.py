"""distributed.shard: full, on two processes: the numbers, files and checkpoints of one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from torch import Tensor

from rlhf_cli.models import mesh
from rlhf_cli.runs import manifest
from rlhf_cli.train import checkpoint
from tests import several
from tests.conftest import Outcome, run_cli
from tests.stages import world as w

SMALL = {"learning_rate": 1e-3, "batch_size": 5, "max_steps": 4, "micro_batch_tokens": 64}
"""Steps of five short examples in several micro-batches: one process has more of them than the other."""
SHARD = {"distributed": {"shard": "full", "timeout": 60}}
FULL: dict[str, Any] = {"lora": None}
PPO = {
    "training": {"batch_size": 6, "max_steps": 2, "micro_batch_tokens": 64},
    "rollout": {"max_new_tokens": 6},
    "ppo": {"epochs": 1, "mini_batches": 1},
    "evaluation": {"samples": 0},
}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft-full": ("sft", "chat", FULL | {"model": {"gradient_checkpointing": True}, "checkpoint": {"every": 2}}),
    "sft-lora": ("sft", "chat", {"data": {"eval": None}, "evaluation": {"samples": 0}}),
    "dpo-lora": ("dpo", "pairs", {"objective": {"name": "dpo"}, "evaluation": {"every": 2}}),
    "dpo-full": ("dpo", "pairs", FULL | {"objective": {"name": "dpo"}, "model": {"gradient_checkpointing": True}}),
    "kto": ("dpo", "pairs", {"objective": {"name": "kto"}}),
    "rm": ("train-rm", "pairs", {}),
    "rm-full": ("train-rm", "pairs", FULL),
    "ppo": ("ppo", "prompts", PPO),
    "ppo-full": ("ppo", "prompts", FULL | PPO),
    "ppo-trunk": ("ppo", "prompts", PPO | {"critic": {"shared": True, "pretrain_steps": 1}}),
}
OFTEN = {"checkpoint": {"every": 1}}


Make = Callable[..., dict[str, Any]]


def rows_of(world: Path) -> Path:
    """A few rows of each kind."""
    for kind in ("chat", "pairs", "prompts"):
        for suffix, count in (("", 20), ("-eval", 3)):
            w.write_rows(world / f"{kind}{suffix}.jsonl", w.rows(kind, count, 1))
    return world


def maker(model: Path, factory: pytest.TempPathFactory, common: dict[str, dict[str, Any]]) -> Make:
    """`make(run, where, **more)`: the recipe of one of RUNS. common: what all of a run have besides."""
    world, out = rows_of(factory.mktemp("world")), factory.mktemp("runs")

    def recipe(run: str, where: str, **more: Any) -> dict[str, Any]:
        stage, kind, own = RUNS[run]
        made = w.recipe(stage, model, world, kind, out / f"{run}-{where}", lora=w.LORA, training=SMALL)
        if stage == "ppo":
            made["rewards"] = [{"run": str(out / "rm-one")}]
        return w.merged(made, own, common.get(run, {}), more)

    return recipe


@pytest.fixture(scope="module")
def make(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The recipes of RUNS."""
    return maker(tiny_model, tmp_path_factory, {})


def alone(content: dict[str, Any], *options: object) -> Outcome:
    """In this process."""
    path = w.save(content, Path(content["output_dir"]).with_suffix(".yaml"))
    with patch("rlhf_cli.stages.common.write_report", lambda path: path / "report.html"):
        return run_cli(content["stage"], path, *options)


def in_two(
    recipes: list[tuple[dict[str, Any], list[str]]],
    folder: Path,
    wrong: dict[str, Any] | None = None,
    before: list[list[object]] | None = None,
    short: dict[str, Any] | None = None,
) -> str:
    """In two processes, other lines before, one run after the other, a wrong one, and one in which memory runs out in
    the third step of one process. What they said; fails with it."""
    lines = before or []
    for content, options in recipes:
        path = w.save(content, Path(content["output_dir"]).with_suffix(".yaml"))
        lines.append([content["stage"], str(path), *options])
    expected = [0] * len(lines)
    for content, code in ((wrong, 2), (short, 4)):
        if content is not None:
            path = w.save(content, Path(content["output_dir"]).with_suffix(".yaml"))
            lines.append([content["stage"], str(path)])
            expected.append(code)
    kill = {"process": 1, "step": 2, "how": "memory", "command": len(lines) - 1}
    codes, said = several.launch(folder, lines, 2, None if short is None else kill)
    assert codes == expected, said[-3000:]
    return said


@pytest.fixture(scope="module")
def runs(make: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run in one process and, its layers shared out, in two; and two that change over in their middle."""
    for run in RUNS:
        outcome = alone(make(run, "one"))
        assert outcome.code == 0, outcome.err
    first = alone(make("sft-full", "onetwo"), "--max-steps", 2)
    assert first.code == 0, first.err
    said = in_two(
        [
            *((make(run, "two", **SHARD), []) for run in RUNS),
            (make("sft-full", "onetwo", **SHARD), []),
            (make("sft-full", "twoone", **SHARD), ["--max-steps", "2"]),
        ],
        tmp_path_factory.mktemp("lines"),
        short=make("sft-full", "short", **SHARD, **OFTEN),
    )
    last = alone(make("sft-full", "twoone"))
    assert last.code == 0, last.err
    out = Path(make("kto", "one")["output_dir"]).parent
    (out / "errors").write_text("".join(f"{line}\n" for line in said.splitlines() if line.startswith("error: ")))
    return out


def same_numbers(one: Path, other: Path) -> None:
    """Losses, gradient norms and evaluations to 1e-5."""
    mine, theirs = w.metrics(one), w.metrics(other)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for row, twin in zip(mine, theirs, strict=True):
        watched = {"loss", "grad_norm", "eval/loss", "objective/scores", "loss/value"} & set(row) & set(twin)
        assert "loss" in watched or row["step"] == 0 or "objective/scores" in watched
        for name in watched:
            assert row[name] == pytest.approx(twin[name], abs=1e-5, rel=1e-5), (one, name)
        assert row.get("num_tokens") == twin.get("num_tokens")


def same_tensors(one: Path, other: Path, limit: float = 2e-5) -> None:
    """All tensors below a folder, by name, shape and dtype, and to a limit."""
    files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors") if p.name != "random.safetensors")
    assert files
    assert files == sorted(p.relative_to(other) for p in other.rglob("*.safetensors") if p.name != "random.safetensors")
    for file in files:
        same_values(load_file(one / file), load_file(other / file), str(file), limit)


def same_values(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str, limit: float = 2e-5) -> None:
    """Tensors by name, shape and dtype, and to a limit."""
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    for name, tensor in mine.items():
        assert (tensor.double() - theirs[name].double()).abs().max() <= limit, (where, name)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_that_share_the_layers_out_equal_one(runs: Path, run: str) -> None:
    one, two = runs / f"{run}-one", runs / f"{run}-two"
    same_numbers(one, two)
    same_tensors(one / "final", two / "final")
    names = [{p.name for p in (folder / "final").iterdir()} for folder in (one, two)]
    assert names[0] == names[1]
    told = (two / "run.log").read_text()
    if run == "sft-lora":  # its adapter is no part of the base
        trained, everything = re.findall(r"LoRA: ([\d,]+) of ([\d,]+) parameters", told)[0]
        whole = int(everything.replace(",", "")) - int(trained.replace(",", ""))
        assert f" of {whole:,} parameters of the base" in told
    assert "sharded: each of 2 processes holds" in told


@pytest.mark.parametrize(("run", "forwards"), [("sft-lora", 2), ("dpo-lora", 3)])
def test_what_is_sent_is_the_formula(
    make: Callable[..., dict[str, Any]], runs: Path, tmp_path: Path, run: str, forwards: int
) -> None:
    """Gathered for a forward and a backward pass; of dpo, also for a forward of the reference."""
    path = w.save(make(run, "two", **SHARD), tmp_path / "r.yaml")
    told = json.loads(run_cli("plan", path, "--no-time", "--json", "--world-size", 2).out)["communication"]
    rows = [row for row in w.lines(runs / f"{run}-two" / "metrics.jsonl") if row["step"] and "eval/loss" not in row]
    assert rows
    gathered = [row["distributed/gathered_bytes"] / (told["matrices"] / 2) for row in rows]
    if len(rows) == SMALL["max_steps"]:
        assert sum(gathered) == pytest.approx(told["micro_batches"] * forwards * len(rows), rel=1e-9)
    assert all(count % forwards == 0 for count in gathered), "whole passes over the layers, by turns"
    assert told["gathered"] == pytest.approx(told["micro_batches"] * 2 * told["matrices"] / 2, rel=1e-9)
    assert [row["distributed/gradient_bytes"] for row in rows] == [told["handed"]] * len(rows)


def test_nothing_is_counted_where_fsdp_cannot_be_asked() -> None:
    """As before PyTorch 2.9: a part without the methods for it is left alone."""

    mesh.counted(object())


def test_each_process_writes_its_parts_of_a_checkpoint(runs: Path) -> None:
    """Whoever reads it finds them whole; a damaged part is a damaged checkpoint."""
    for step in ("step-000002", "step-000004"):
        one, two = (runs / f"sft-full-{name}" / "checkpoints" / step for name in ("one", "two"))
        for group in ("policy", "policy-optimizer"):
            mine, theirs = (checkpoint.read(path).tensors(group) for path in (one, two))
            same_values(mine, theirs, group)
            parts = [load_file(two / f"{group}.{n}-of-2.safetensors") for n in (1, 2)]
            rest = load_file(two / f"{group}.safetensors")
            assert parts[0].keys() == parts[1].keys()
            assert not rest.keys() & parts[0].keys()
            assert {k: len(t) for k, t in parts[0].items()} == {k: -(-len(theirs[k]) // 2) for k in parts[0]}
            assert sum(t.numel() for t in parts[0].values()) > 0.1 * sum(t.numel() for t in theirs.values())
    broken = runs / "broken" / "step-000004"
    shutil.copytree(two, broken)
    (broken / "policy.2-of-2.safetensors").unlink()
    assert manifest.fault(broken) == "policy.2-of-2.safetensors is missing"


@pytest.mark.parametrize("change", ["onetwo", "twoone"])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, change: str) -> None:
    run = runs / f"sft-full-{change}"
    assert "resumed from" in (run / "run.log").read_text()
    same_numbers(runs / "sft-full-one", run)
    same_tensors(runs / "sft-full-one" / "final", run / "final")


def test_memory_that_runs_out_on_one_process_is_one_line_and_the_run_goes_on(make: Make, runs: Path) -> None:
    (line,) = (runs / "errors").read_text().splitlines()
    assert line.startswith("error: process 1: training.micro_batch_tokens: out of memory while computing step 3, and ")
    assert line.endswith("(lower it, or set model.gradient_checkpointing: true)")
    run = runs / "sft-full-short"
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-000002"
    assert alone(make("sft-full", "short", **OFTEN)).code == 0  # by one process, which goes on where two have stopped
    same_numbers(runs / "sft-full-one", run)
    same_tensors(runs / "sft-full-one" / "final", run / "final")


def test_one_process_has_nothing_to_share_out(make: Callable[..., dict[str, Any]]) -> None:
    outcome = alone(make("sft-lora", "single", **SHARD, training={"max_steps": 1}))
    assert outcome.code == 0
    assert "a single process has nothing to share out" in outcome.err + outcome.out


@pytest.mark.parametrize(
    ("run", "more", "says"),
    [
        ("sft-lora", {"model": {"quantization": "int8"}}, "cannot share out model.quantization int8: use nf4"),
        ("sft-full", {"training": {"optimizer": "adafactor"}}, "training.optimizer adafactor while lora is null"),
        ("sft-full", {"model": {"dtype": "float16"}}, "model.dtype float16 while lora is null: use bfloat16"),
        ("sft-lora", {"lora": {"use_dora": True}}, "lora.use_dora, which reads whole weights: use_dora: false"),
        ("ppo", {"rollout": {"engine": "continuous"}}, "rollout.engine continuous: use own or generate"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    make: Callable[..., dict[str, Any]], run: str, more: dict[str, Any], says: str
) -> None:
    outcome = alone(w.merged(make(run, "refused"), SHARD, more), "--dry-run")
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "distributed.shard full" in line
    assert says in line
