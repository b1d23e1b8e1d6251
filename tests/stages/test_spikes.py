"""Numbers out of all proportion stop a run that asked for it, before the step; what is not finite is never saved."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.recipe.settings.training import TrainingSettings
from rlhf_cli.train import passes
from rlhf_cli.train.spikes import Spikes
from tests.stages import world as w
from tests.stages.conftest import quick
from tests.stages.test_interrupted import stop_at

Toy = Callable[..., dict[str, Any]]
OFTEN = {"checkpoint": {"every": 1, "keep": 3}, "data": {"eval": None}, "evaluation": {"samples": 1}}
WILD = {"learning_rate": 0.05, "max_grad_norm": None, "max_steps": 12, "spike_window": 3}
DPO = {"objective": {"name": "dpo"}}


def spikes(**settings: Any) -> Spikes:
    return Spikes(TrainingSettings(learning_rate=1e-3, **settings))


@pytest.mark.parametrize(
    ("seen", "limit", "fits", "trips"),
    [
        ([1.0, 2.0, 9.0], 3.0, 6.0, 6.001),  # 3 x 2
        ([-1.0, -2.0, -9.0], 3.0, 2.0, 2.001),  # -2 + 2 x 2
        ([-1.0, 0.0, 1.0], 2.0, 1.0, 1.001),  # 0 + 1 x 1
    ],
)
def test_the_rule(seen: list[float], limit: float, fits: float, trips: float) -> None:
    for value, said in ((fits, ""), (trips, f", more than {limit:g} times its median over 3 steps")):
        wire = spikes(max_loss_spike=limit, spike_window=3)
        assert [wire.judge("policy", "loss", x) for x in (1e9, *seen[:2])] == ["", "", ""]  # the window is not full yet
        wire.load_state_dict({"policy loss": [1e9, *seen]})  # and holds three
        assert wire.judge("policy", "loss", value).startswith(said)
        assert bool(said) == bool(wire.judge("policy", "loss", value) if said else "")
        assert wire.judge("critic", "loss", 1e30) == "", "learners do not mix"
        assert wire.judge("policy", "grad_norm", 1e30) == "", "it is off"


def test_off_by_default() -> None:
    wire = spikes()
    assert [wire.judge("policy", name, x) for name in ("loss", "grad_norm") for x in [1.0] * 40 + [1e30]] == [""] * 82
    assert wire.state_dict() == {}


NONSENSE = {
    "max_loss_spike": (0.5, 1, -3, "much", ".inf", ".nan"),
    "max_grad_spike": (1.0, 0, ".inf"),
    "spike_window": (1, 0, 2.5),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NONSENSE.items() for value in values])
def test_nonsense_is_refused(toy: Toy, key: str, value: Any) -> None:
    training = {"max_loss_spike": 3.0, key: float(value[1:]) if str(value).startswith(".") else value}
    content = toy("sft", "chat", training=training)
    outcome = quick("sft", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert f" training.{key}: " in outcome.errors[0]


def test_a_window_that_nothing_reads(toy: Toy) -> None:
    content = toy("sft", "chat", training={"spike_window": 5})
    outcome = quick("sft", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert "spike_window is only read with max_loss_spike or max_grad_spike" in outcome.errors[0]


def ppo(world: Path) -> dict[str, Any]:
    reward = {"function": f"{world / 'reward.py'}:true_reward"}
    return {"rewards": [reward], "rollout": {"max_new_tokens": 6}, "ppo": {"mini_batches": 2}}


STAGES = {
    "sft": ("sft", "chat", {"max_loss_spike": 1.02}),
    "dpo": ("dpo", "pairs", {"max_grad_spike": 1.1}),
    "ppo": ("ppo", "prompts", {"max_grad_spike": 1.1}),  # 8 updates a step
}


@pytest.mark.parametrize("name", STAGES)
def test_a_spike_stops_the_run(toy: Toy, world: Path, name: str) -> None:
    stage, kind, limit = STAGES[name]
    window = 9 if name == "ppo" else 3
    more = {"dpo": DPO, "ppo": ppo(world)}.get(stage, {})
    content = toy(stage, kind, **w.merged(OFTEN, {"training": WILD | limit | {"spike_window": window}}, more))
    run = Path(content["output_dir"])
    outcome = quick(stage, w.save(content, run.with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (5, 1), outcome.err
    (line,) = outcome.errors
    ((key, times),) = limit.items()
    number = "loss" if key == "max_loss_spike" else "grad_norm"
    assert f": {number} is " in line
    assert f", more than {times:g} times its median over {window} steps (" in line
    assert "the step was not applied; rows: " in line
    assert f"{kind}.jsonl:" in line
    last = w.lines(run / "metrics.jsonl")[-1]
    assert f"at step {last['step']}; " in line
    assert f"{number} is {last[number]}, " in line  # as it was
    kept = run / "checkpoints" / f"step-{last['step'] - 1:06d}"
    assert f"last whole checkpoint: {kept}" in line
    assert json.loads((kept / "state.json").read_text())["spikes"]
    assert not (run / "DONE").exists()
    assert not (run / "final").exists()


def test_a_stopped_run_trips_at_the_same_step(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The medians are in the checkpoint: the same line, though the window reaches back over the stop."""
    said = []
    for name in ("whole", "stopped"):
        content = toy("sft", "chat", name, **w.merged(OFTEN, {"training": WILD | {"max_loss_spike": 1.02}}))
        recipe = w.save(content, Path(content["output_dir"]).with_suffix(".yaml"))
        if name == "stopped":
            with monkeypatch.context() as patched:
                stop_at(2, signal.SIGTERM, patched)
                assert quick("sft", recipe).code == 143
        outcome = quick("sft", recipe)
        assert outcome.code == 5, outcome.err
        said.append(outcome.errors[0].replace(content["output_dir"], "RUN"))
    assert said[0] == said[1]
    recipe.write_text(recipe.read_text().replace("max_loss_spike: 1.02", "max_loss_spike: 1.0e+9"))
    outcome = quick("sft", recipe)
    assert outcome.code == 0, "a limit may be raised when the stopped run goes on"
    assert "resumed from" in outcome.err


def test_what_is_not_finite_is_not_saved(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step makes weights infinite after its finite loss: no checkpoint, no final/, the one before it named."""
    content = toy("sft", "chat", **w.merged(OFTEN, {"training": {"max_steps": 1}, "lora": None}))
    run = Path(content["output_dir"])
    apply = passes.apply

    def applied(engine: Any, learner: Any, samples: Any) -> float:
        norm = apply(engine, learner, samples)
        next(p for _, p in learner.role.parameters).data.view(-1)[0] = math.inf
        return norm

    monkeypatch.setattr(passes, "apply", applied)
    outcome = quick("sft", w.save(content, run.with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (5, 1), outcome.err
    assert "of the policy holds NaN or infinite numbers after step 1" in outcome.errors[0]
    assert "last whole checkpoint: none; lower the learning rate" in outcome.errors[0]
    assert not (run / "final").exists()
    assert not any((run / "checkpoints").glob("*") if (run / "checkpoints").exists() else ())
