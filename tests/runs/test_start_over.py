"""A directory whose run never came to the end of a step does not stand in the way of the corrected recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.runs.directory import Run
from tests.runs.helpers import make_recipe

LINEAGE: dict[str, Any] = {"role": "policy", "parents": []}
FAILED: dict[str, list[dict[str, Any]]] = {
    "before anything": [],
    "after the evaluation of step 0": [{"step": 0, "eval/loss": 1.0}],
    "in the first step": [{"step": 0, "eval/loss": 1.0}, {"step": 1, "loss": math.nan}],
}


def opened(root: Path, resume: str = "auto", **training: Any) -> Run:
    return Run.open(make_recipe(root, **training), "rlhf sft r.yaml", resume)


def failed(root: Path, rows: list[dict[str, Any]]) -> Path:
    """A run that wrote these rows and died."""
    with opened(root) as run:
        run.begin(LINEAGE)
        for row in rows:
            run.log(row)
        run.sample({"step": 0, "prompt": "p", "completion": "c"})
    return run.path


@pytest.mark.parametrize("name", FAILED)
def test_the_corrected_recipe_starts_over(tmp_path: Path, name: str) -> None:
    path = failed(tmp_path, FAILED[name])
    with opened(tmp_path, learning_rate=2e-3) as run:
        assert run.status == "fresh"
        run.begin(LINEAGE)
    head = json.loads((path / "run.json").read_text())
    assert head["recipe"]["training"]["learning_rate"] == 2e-3
    assert "learning_rate: 0.002" in (path / "recipe.yaml").read_text()
    assert not (path / "metrics.jsonl").exists()
    assert not (path / "samples.jsonl").exists()


@pytest.mark.parametrize("left", ["a step", "a checkpoint", "a rollback", "a model", "a damaged log"])
def test_a_run_that_trained_stays(tmp_path: Path, left: str) -> None:
    path = failed(tmp_path, [{"step": 1, "loss": 0.5}] if left == "a step" else [])
    for what, folder in (
        ("a checkpoint", "checkpoints/step-000000"),
        ("a rollback", "rollbacks"),
        ("a model", "final"),
    ):
        if left == what:
            (path / folder).mkdir(parents=True)
    if left == "a damaged log":
        (path / "metrics.jsonl").write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(RecipeError, match=r"training\.learning_rate: 0\.001 -> 0\.002"):
        opened(tmp_path, learning_rate=2e-3)
    assert (path / "samples.jsonl").exists()


def test_one_that_is_at_its_first_step_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as first:
        first.begin(LINEAGE)
        second = opened(tmp_path, learning_rate=2e-3)
        with second, pytest.raises(ModelError, match="is working in this run directory"):
            second.begin(LINEAGE)
        assert json.loads((first.path / "run.json").read_text())["recipe"]["training"]["learning_rate"] == 1e-3
