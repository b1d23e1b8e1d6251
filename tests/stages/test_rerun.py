"""The same command again, another recipe, --resume never, --dry-run, more steps, a directory in use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.runs import lock
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]
SHORT = {"training": {"max_steps": 2}, "data": {"eval": None}}


@pytest.fixture
def finished(toy: Toy) -> tuple[dict[str, Any], Path]:
    """A finished dpo run and its recipe."""
    content = toy("dpo", "pairs", "run", **SHORT, objective={"name": "dpo"})
    return content, train(content)


def test_the_same_recipe_again_is_up_to_date(finished: tuple[dict[str, Any], Path]) -> None:
    _, run = finished
    before = w.stamps(run)
    for options in ([], ["--set", "logging.every=3"], ["--set", "training.layout=padded"]):
        outcome = quick("dpo", run.with_suffix(".yaml"), *options)
        assert (outcome.code, outcome.err.splitlines()) == (0, [f"{run}: up to date"])
    assert w.stamps(run) == before
    resolved = quick("dpo", run / "recipe.yaml")
    assert (resolved.code, resolved.err.splitlines()) == (0, [f"{run}: up to date"])


def test_another_recipe_is_refused_by_its_keys(finished: tuple[dict[str, Any], Path]) -> None:
    _, run = finished
    before = w.stamps(run)
    outcome = quick("dpo", run.with_suffix(".yaml"), "objective.beta=0.2", "--seed", 9)
    assert outcome.code == 2
    assert sorted(line.split("differs from the run there: ")[1].split(" (")[0] for line in outcome.errors) == [
        "objective.beta: 0.1 -> 0.2", "seed: 3 -> 9"
    ]  # fmt: skip
    assert all("--resume never" in line for line in outcome.errors)
    assert w.stamps(run) == before


def test_changed_data_are_refused_by_name(toy: Toy, world: Path, tmp_path: Path) -> None:
    content = toy("dpo", "pairs", "run", **SHORT, objective={"name": "dpo"})
    data = Path(shutil.copy(world / "pairs.jsonl", tmp_path / "mine.jsonl"))
    content["data"]["train"] = str(data)
    run = train(content)
    w.write_rows(data, w.rows("pairs", 50, 9))
    outcome = quick("dpo", run.with_suffix(".yaml"))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert f"{data} has changed" in outcome.errors[0]


def test_resume_never_archives_and_keeps_everything(finished: tuple[dict[str, Any], Path]) -> None:
    content, run = finished
    before = w.contents(run)
    content["objective"]["beta"] = 0.3
    train(content, "--resume", "never")
    (archived,) = [p for p in run.parent.iterdir() if p.is_dir() and p != run]
    assert archived.name.startswith("run.")
    assert w.contents(archived) == before
    assert "0.3" in (run / "recipe.yaml").read_text()
    assert w.metrics(run)[-1]["step"] == 2


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "orpo", "simpo", "ppo"])
def test_a_dry_run_writes_nothing(toy: Toy, world: Path, tmp_path: Path, stage: str) -> None:
    kind = {"sft": "chat", "ppo": "prompts"}.get(stage, "pairs")
    more: dict[str, Any] = {"objective": {"name": "dpo"}} if stage == "dpo" else {}
    if stage == "ppo":
        more = {"rewards": [{"function": f"{world / 'reward.py'}:true_reward"}], "rollout": {"max_new_tokens": 6}}
    recipe = w.save(toy(stage, kind, "run", **more), tmp_path / "r.yaml")
    outcome = quick(stage, recipe, "--dry-run")
    assert outcome.code == 0
    assert "dry run: 96" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_quiet_shows_warnings_only(toy: Toy, world: Path, tmp_path: Path) -> None:
    content = toy("dpo", "pairs", "run", objective={"name": "dpo"}, training={"max_steps": 1})
    outcome = quick("dpo", w.save(content, tmp_path / "r.yaml"), "--quiet")
    (line,) = outcome.err.splitlines()
    assert (outcome.code, outcome.out) == (0, "")
    assert line.startswith("warning: eval prompts that are also train prompts")
    assert "step 1/1" in (tmp_path / "run" / "run.log").read_text()


def test_more_steps_go_on_and_fewer_are_up_to_date(toy: Toy) -> None:
    content = toy("dpo", "pairs", "run", **SHORT, objective={"name": "dpo"})
    run = train(content)
    words = "up to date: it has 2 steps, and training.max_steps asks for 1"
    fewer = quick("dpo", run.with_suffix(".yaml"), "--max-steps", 1)
    assert (fewer.code, fewer.err) == (0, f"{run}: {words}\n")
    assert quick("check", run.with_suffix(".yaml"), "--set", "training.max_steps=1").err.rstrip().endswith(f"; {words}")
    train(content, "--max-steps", 4)
    whole = train(toy("dpo", "pairs", "whole", **w.merged(SHORT, {"training": {"max_steps": 4}}),
                      objective={"name": "dpo"}))  # fmt: skip
    assert w.metrics(run) == w.metrics(whole)
    assert w.contents(run / "final") == w.contents(whole / "final")


def test_going_on_from_a_named_checkpoint(toy: Toy) -> None:
    every = {"checkpoint": {"every": 1, "keep": 9}, "training": {"max_steps": 4}}
    content = toy("dpo", "pairs", "run", **w.merged(SHORT, every), objective={"name": "dpo"})
    run = train(content)
    before = w.metrics(run), w.contents(run / "final")
    train(content, "--resume", run / "checkpoints" / "step-000002")
    assert (w.metrics(run), w.contents(run / "final")) == before
    outcome = quick("dpo", run.with_suffix(".yaml"), "--resume", run / "checkpoints" / "step-000009")
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "no such checkpoint" in outcome.errors[0]


def test_a_second_process_is_kept_out(finished: tuple[dict[str, Any], Path]) -> None:
    _, run = finished
    before = w.contents(run)
    handle = lock.take(run)
    try:
        outcome = quick("dpo", run.with_suffix(".yaml"), "--max-steps", 4)
    finally:
        lock.free(handle, run)
    assert (outcome.code, len(outcome.errors)) == (4, 1)
    assert "is working in this run directory" in outcome.errors[0]
    assert w.contents(run) == before


def test_a_run_that_becomes_longer_says_what_its_learning_rate_does(toy: Toy) -> None:
    for scheduler, told in (("cosine", True), ("constant", False)):
        content = toy("sft", "chat", scheduler, training={"lr_scheduler": scheduler, "max_steps": 1})
        out = train(content)
        content["training"]["max_steps"] = 2
        said = quick("sft", w.save(content, out.with_suffix(".yaml"))).err
        assert ("goes on as in a run of 2 steps; so far it was that of 1" in said) == told, said
