"""What a PPO run logs: each name is in the table of docs/ppo-doctor.md, and the objective is a sum of parts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.stages import world as w
from tests.stages.conftest import train
from tests.stages.ppo_world import Toy, content, cost_of, true_reward

TABLE = Path(__file__).parents[2] / "docs" / "ppo-doctor.md"
PENALTY = {"missing_eos_penalty": 2.0, "kl": {"name": "fixed", "coef": 0.2}, "epochs": 1}
CUT = {"rollout": {"max_new_tokens": 4, "temperature": 2.0}, "training": {"max_steps": 2}}
"""Some completions are cut and some are not."""
KINDS: dict[str, dict[str, Any]] = {
    "gae": {"truncation": "penalty"},
    "lagrange": {"lagrange": {"init": 2.0}, "kl_in": "loss"},
    "remax": {"advantage": {"name": "remax"}, "target_kl": 0.02},
    "rloo": {"advantage": {"name": "rloo"}, "kl_in": "loss", "entropy_coef": 0.01, "penalty": {}},
}


def names() -> list[re.Pattern[str]]:
    """Of the table's first column; NAME stands for any."""
    part = TABLE.read_text(encoding="utf-8").split("## The figures")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    found = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(found) > 80
    return [re.compile(re.escape(name).replace("NAME", r"[^/]+")) for name in found]


@pytest.fixture(params=KINDS)
def logged(toy: Toy, world: Path, request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """The kind of run, and the rows of its metrics."""
    kind = request.param
    costs = [cost_of(world)] if kind == "lagrange" else []
    run = train(content(toy, world, PENALTY | KINDS[kind], rewards=[true_reward(world), *costs], **CUT))
    return kind, w.lines(run / "metrics.jsonl")


def test_every_name_is_explained_and_the_objective_adds_up(logged: tuple[str, list[dict[str, Any]]]) -> None:
    kind, rows = logged
    known = names()
    keys = {key for row in rows for key in row}
    assert sorted(key for key in keys if not any(name.fullmatch(key) for name in known)) == []
    assert ("cost/val/clipfrac" in keys, "val/clipfrac" in keys) == (kind == "lagrange", kind in ("gae", "lagrange"))
    assert [key for row in rows for key, x in row.items() if x == 0 and math.copysign(1.0, x) < 0] == []
    for row in rows[1:]:
        score, reward = row["objective/scores"], row["objective/rlhf_reward"]
        kl, cut = row["objective/non_score_reward"], row["objective/truncation_reward"]
        assert reward == pytest.approx(score + kl + cut, rel=1e-12)
        assert kl == pytest.approx(-0.2 * row["objective/kl"], rel=1e-6, abs=1e-9)
        assert 0 < row["completions/truncated"] < 1
        assert cut == pytest.approx(-2.0 * row["completions/truncated"], rel=1e-6)
        assert ("objective/lagrangian" in row) == (kind == "lagrange")
        if kind == "lagrange":
            times = row["lagrange/lambda"]
            wanted = (score + cut - times * row["cost/mean"]) / (1 + times) + kl
            assert row["objective/lagrangian"] == pytest.approx(wanted, rel=1e-5)
            assert row["cost/mean"] > 0
    assert rows[2]["objective/kl"] != 0.0  # the second rollout is another policy's


def test_a_corrected_recipe_takes_the_place_of_one_that_failed_at_once(toy: Toy, world: Path, tmp_path: Path) -> None:
    """No --resume never, no other directory."""
    broken = tmp_path / "broken.py"
    broken.write_text(
        "def broken(completions):\n    return [0.0] * len(completions) if len(completions) < 9 else None\n"
    )
    recipe = content(toy, world, PENALTY, data={"eval": None}, training={"max_steps": 1})
    run = train(recipe | {"rewards": [{"function": f"{broken}:broken"}]}, code=4)
    assert (run / "run.json").exists()
    train(recipe)
    assert (run / "DONE").exists()
    assert [row["step"] for row in w.lines(run / "metrics.jsonl")] == [1]
