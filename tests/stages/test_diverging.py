"""A number that is not finite stops the run before the step is applied and stands in the log as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stages import world as w
from tests.stages.conftest import quick

WILD = {
    "training": {"learning_rate": 1e15, "max_grad_norm": None, "max_steps": 8},
    "checkpoint": {"every": 1, "keep": 3},
    "data": {"eval": None},
    "evaluation": {"samples": 0},
}


@pytest.mark.parametrize(
    ("stage", "kind", "settings"),
    [
        ("sft", "chat", {"lora": None}),
        ("dpo", "pairs", {"objective": {"name": "ipo"}}),
        ("train-rm", "pairs", {"objective": {"centring": 0.1}}),
    ],
)
def test_a_wild_learning_rate(toy: Callable[..., dict[str, Any]], stage: str, kind: str, settings: Any) -> None:
    content = toy(stage, kind, **w.merged(WILD, settings))
    run = Path(content["output_dir"])
    recipe = w.save(content, run.with_suffix(".yaml"))
    outcome = quick(stage, recipe)
    assert (outcome.code, len(outcome.errors)) == (5, 1), outcome.err
    (line,) = outcome.errors
    assert str(run) in line
    assert "the step was not applied" in line
    assert f"{kind}.jsonl:" in line  # a row of the step

    rows = w.lines(run / "metrics.jsonl")
    last = rows[-1]
    name = next(key for key, value in last.items() if isinstance(value, str))
    assert last[name] in ("NaN", "Infinity", "-Infinity")
    assert f"{name} is " in line
    assert f"at step {last['step']}" in line
    assert all(isinstance(value, int | float) for row in rows[:-1] for value in row.values())
    kept = run / "checkpoints" / f"step-{last['step'] - 1:06d}"
    assert str(kept) in line
    assert json.loads((kept / "state.json").read_text())["step"] == last["step"] - 1
    assert not (run / "DONE").exists()
    assert not (run / "final").exists()


def test_a_wild_learning_rate_in_ppo(toy: Callable[..., dict[str, Any]], world: Path) -> None:
    settings = {"rewards": [{"function": f"{world / 'reward.py'}:true_reward"}], "rollout": {"max_new_tokens": 6},
                "ppo": {"mini_batches": 2}, "lora": None}  # fmt: skip
    content = toy("ppo", "prompts", **w.merged(WILD, settings))
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (5, 1), outcome.err
    assert "prompts.jsonl:" in outcome.errors[0]
    assert not (Path(content["output_dir"]) / "DONE").exists()
