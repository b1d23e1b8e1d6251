"""The doctor of a PPO run: wires that warn, pause and roll back, also when the run is killed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.train import checkpoint, rollback, snapshot
from rlhf_cli.train.engine import Engine
from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.test_interrupted import assert_same

Wild = Callable[..., dict[str, Any]]
LIMIT = 3.0
"""Nats at which the KL wire trips."""


def recipe(world: Path, base: Path, folder: Path, action: str, name: str, **more: Any) -> dict[str, Any]:
    """A learning rate far too high, and what the KL wire does about it."""
    settings = {
        "lora": w.LORA, "rewards": [{"function": f"{world / 'reward.py'}:true_reward"}],
        "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2},
        "ppo": {"mini_batches": 2, "kl": {"name": "fixed", "coef": 0.0}, "advantage": {"name": "rloo"},
                "whiten_advantages": True},
        "training": {"learning_rate": 0.03, "max_steps": 8, "lr_scheduler": "linear"},
        "checkpoint": {"every": 1, "keep": 2}, "evaluation": {"samples": 1, "every": 3}, "logging": {"every": 1},
        "doctor": {"wires": {"kl": action, "ratio": "ignore"}, "thresholds": {"kl": LIMIT},
                   **({"rollback_lr_factor": 0.1} if action == "rollback" else {})},
    }  # fmt: skip
    content = w.recipe("ppo", base, world, "prompts", folder / name, **w.merged(settings, more))
    data = content["data"]
    data["train"], data["eval"] = ({"path": data[s], "limit": n} for s, n in (("train", 96), ("eval", 16)))
    return content


@pytest.fixture
def wild(world: Path, base: Path, tmp_path: Path) -> Wild:
    """`wild(action, name, **more)`: that recipe, its run in tmp_path/name."""
    return partial(recipe, world, base, tmp_path)


SLOWER = {"training": {"learning_rate": 0.008}}
"""The trouble then comes some steps after the start."""


@pytest.fixture(scope="module")
def whole(world: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a rollback that nothing disturbed."""
    return train(recipe(world, base, tmp_path_factory.mktemp("doctor"), "rollback", "whole", **SLOWER))


def begun(content: dict[str, Any]) -> Outcome:
    """What the command says of a recipe."""
    return quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))


def test_a_warning_is_said_once_and_changes_nothing(wild: Wild) -> None:
    warned = begun(wild("warn", "warned"))
    assert warned.code == 0, warned.err
    said = [line for line in warned.err.splitlines() if "over its limit" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: health: the KL to the reference is ")
    run, off = Path(wild("warn", "warned")["output_dir"]), train(wild("warn", "off") | {"doctor": {"enabled": False}})
    assert "kl 0.000" in warned.err.split(said[0])[0]  # it came with the first KL over the limit
    assert w.metrics(run) == w.metrics(off)
    assert w.contents(run / "final") == w.contents(off / "final")
    found = w.lines(run / "doctor.jsonl")
    assert (found[0]["wires"], found[0]["step"], found[0]["kind"]) == (["kl"], 2, "finding")
    assert not (off / "doctor.jsonl").exists()
    assert not (run / "postmortem.html").exists()


def test_a_pause_keeps_everything_and_the_same_command_goes_on(wild: Wild) -> None:
    content = wild("pause", "paused", checkpoint={"every": None})
    run, paused = Path(content["output_dir"]), begun(content)
    assert (paused.code, len(paused.errors)) == (5, 1), paused.err
    (line,) = paused.errors
    assert "paused by the doctor after step 2" in line
    assert f"post-mortem: {run / 'postmortem.html'}" in line
    kept = run / "checkpoints" / "step-000002"
    assert str(kept) in line
    checkpoint.read(kept)  # whole
    assert w.metrics(run)[-1]["step"] == 2
    assert not (run / "DONE").exists()
    page = (run / "postmortem.html").read_text()
    for words in ("Step 2: paused", "over its limit of 3", "training.learning_rate", "0.03", "Texts at the event"):
        assert words in page, words
    again = begun(content)
    assert again.code == 0, again.err
    assert "going on after step 2" in again.err
    never = train(wild("warn", "whole", checkpoint={"every": None}))
    assert w.metrics(run) == w.metrics(never)


def test_a_rollback_goes_on_in_good_health(wild: Wild) -> None:
    content = wild("rollback", "back")
    run, outcome = Path(content["output_dir"]), begun(content)
    assert outcome.code == 0, outcome.err
    (event,) = [e for e in w.lines(run / "doctor.jsonl") if e["kind"] == "rollback"]
    assert (event["step"], event["to"], event["lr_scale"]) == (2, 0, 0.1)
    kls = w.column(run, "objective/kl")
    assert len(kls) == 8
    assert max(kls) < LIMIT
    assert w.column(run, "objective/scores")[-1] > w.column(run, "objective/scores")[0]
    wanted = [0.003 * (8 - n) / 8 for n in range(8)]
    assert w.column(run, "learning_rate") == pytest.approx(wanted)
    assert [row["step"] for row in w.metrics(run)] == list(range(9))
    lost = w.lines(run / "rollbacks" / "01" / "metrics.jsonl")
    assert [row["step"] for row in lost] == [0, 1, 2]
    assert lost[-1]["objective/kl"] > LIMIT
    assert "rollback 1 of 3: from step 2" in outcome.err
    page = (run / "postmortem.html").read_text()
    for words in ("Step 2: rolled back to step 0", "after the rollback", "Texts in good health"):
        assert words in page, words


def test_no_rollback_is_left(wild: Wild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.stages.ppo_doctor.write_postmortem", lambda path: path / "postmortem.html")
    content = wild("rollback", "out", doctor={"rollback_lr_factor": 1.0, "max_rollbacks": 2})
    run = Path(content["output_dir"])
    first = begun(content)
    assert (first.code, len(first.errors)) == (5, 1), first.err
    assert "stopped by the doctor at step 2 after 2 rollbacks" in first.errors[0]
    assert str(run / "checkpoints" / "step-000000") in first.errors[0]
    lines = w.metrics(run)
    assert lines[-1]["objective/kl"] > LIMIT
    again = begun(content)
    assert (again.code, again.errors) == (5, first.errors)
    assert w.metrics(run) == lines


MOMENTS = {
    "before anything": (rollback, "_set_aside"),
    "before the checkpoint": (snapshot, "scale_rates"),
    "while it is written": (checkpoint, "_publish"),
    "before later ones are deleted": (checkpoint, "retire"),
    "before the files are cut": (rollback, "Lines"),
    "before it goes on": (Engine, "set_out"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_a_rollback(wild: Wild, whole: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """There are checkpoints between the one gone back to and the trouble."""
    content = wild("rollback", "killed", **SLOWER)
    run, (place, name) = Path(content["output_dir"]), MOMENTS[moment]
    event = next(e for e in w.lines(whole / "doctor.jsonl") if e["kind"] == "rollback")
    assert event["step"] > event["to"] + 1 > 1
    back = rollback.roll_back

    def killed(*arguments: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(place, name, dies)
            back(*arguments)

    def dies(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the power is gone")

    monkeypatch.setattr("rlhf_cli.stages.ppo_doctor.write_postmortem", lambda path: path)
    with monkeypatch.context() as patched:
        patched.setattr("rlhf_cli.stages.ppo_doctor.roll_back", killed)
        outcome = begun(content)
    assert outcome.code == 1
    assert "the power is gone" in outcome.errors[0]
    train(content)
    assert_same(run, whole)
    assert (run / "doctor.jsonl").read_bytes() == (whole / "doctor.jsonl").read_bytes()
    lost = sorted(p.name for p in (whole / "rollbacks").iterdir())
    assert sorted(p.name for p in (run / "rollbacks").iterdir()) == lost
    for folder in lost:
        assert w.metrics(run / "rollbacks" / folder) == w.metrics(whole / "rollbacks" / folder)


def test_a_number_that_is_not_finite_gets_its_page(wild: Wild) -> None:
    wild_rate = {"learning_rate": 1e15, "max_grad_norm": None}
    content = wild("warn", "nan", training=wild_rate, lora=None)
    run, outcome = Path(content["output_dir"]), begun(content)
    assert (outcome.code, len(outcome.errors)) == (5, 1), outcome.err
    assert f"post-mortem: {run / 'postmortem.html'}" in outcome.errors[0]
    (event,) = [e for e in w.lines(run / "doctor.jsonl") if e["kind"] == "diverged"]
    assert event["step"] == w.metrics(run)[-1]["step"]
    page = (run / "postmortem.html").read_text()
    assert f"Step {event['step']}: training diverged" in page
    assert "1000000000000000.0" in page
