"""Rollbacks and pauses of runs that carry more than weights: the multiplier of a cost, a reference that moves."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.models.build import move, weights_of
from rlhf_cli.stages import ppo_doctor
from rlhf_cli.train.checkpoint import Checkpoint
from rlhf_cli.train.engine import Engine
from tests.models.worlds import lora_role, make_base
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.ppo_world import Toy, content, copied, cost_of, true_reward, watch
from tests.stages.test_interrupted import assert_same, interrupted

LIMIT = 0.6
"""Nats at which the KL wire trips."""


def carrying(toy: Toy, world: Path, action: str, name: str, **more: Any) -> dict[str, Any]:
    """A rate far too high; a multiplier and a reference that have both moved when the KL wire trips."""
    ppo = {
        "advantage": {"name": "rloo"}, "kl": {"name": "fixed", "coef": 0.0},
        "lagrange": {"threshold": 0.05, "learning_rate": 0.5, "window": 48},
        "reference_update": {"every": 1, "alpha": 0.2},
    }  # fmt: skip
    settings = {
        "rewards": [true_reward(world), cost_of(world)],
        "training": {"max_steps": 6, "learning_rate": 0.012},
        "checkpoint": {"every": 1, "keep": 6}, "logging": {"every": 1}, "evaluation": {"samples": 1},
        "doctor": {"wires": {"kl": action, "ratio": "ignore"}, "thresholds": {"kl": LIMIT},
                   **({"rollback_lr_factor": 0.1} if action == "rollback" else {})},
    }  # fmt: skip
    return content(toy, world, ppo, name, **w.merged(settings, more))


def carried(engine: Engine) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The multiplier with its window, and the reference."""
    return json.loads(json.dumps(engine.kept["lagrange"].state_dict())), copied(engine.kept_tensors["reference"])


def test_a_rollback_takes_back_the_multiplier_and_the_reference(
    toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what the checkpoint has; the role that is asked for log-probabilities has it, not a copy. Stopped
    after the rollback, such a run goes on exactly."""
    seen, found, known = watch(monkeypatch), [], []
    roll_back = ppo_doctor.roll_back

    def spied(engine: Engine, saved: Checkpoint, *more: Any) -> None:
        known.append((saved.state["kept"]["lagrange"], saved.tensors("reference"), int(saved.state["step"])))
        found.append(carried(engine))
        roll_back(engine, saved, *more)
        found.append(carried(engine))

    monkeypatch.setattr(ppo_doctor, "roll_back", spied)
    whole = train(carrying(toy, world, "rollback", "whole"))
    assert len(known) == 1
    (state, tensors, step), (lost_state, lost), (back_state, back) = known[0], *found
    assert step >= 1
    assert state["steps"] == step
    assert back_state == state
    assert (lost_state["log"], lost_state["costs"]) != (state["log"], state["costs"])
    assert set(back) == set(tensors)
    assert [name for name in back if not torch.equal(back[name], tensors[name])] == []
    assert [name for name in back if torch.equal(back[name], lost[name])] == []
    own = seen[0].engine.kept_tensors["reference"]
    role = weights_of(seen[0].roles.reference)
    assert {n: t.data_ptr() for n, t in own.items()} == {n: t.data_ptr() for n, t in role.items()}
    assert_same(interrupted(carrying(toy, world, "rollback", "stopped"), 5, monkeypatch, signal.SIGTERM), whole)


def test_a_paused_run_goes_on_exactly(toy: Toy, world: Path) -> None:
    recipe = carrying(toy, world, "pause", "paused")
    run = Path(recipe["output_dir"])
    paused = quick("ppo", w.save(recipe, run.with_suffix(".yaml")))
    assert (paused.code, len(paused.errors)) == (5, 1), paused.err
    step = w.metrics(run)[-1]["step"]
    assert 1 < step < 6
    assert train(recipe) == run
    never = train(carrying(toy, world, "warn", "never"))
    assert w.metrics(run) == w.metrics(never)
    assert w.contents(run / "final") == w.contents(never / "final")
    last = "checkpoints/step-000006/reference.safetensors"
    assert (run / last).read_bytes() == (never / last).read_bytes()


# --- a mixture of factors ---------------------------------------------------------------------------------


def product(tensors: dict[str, Tensor], layer: str) -> Tensor:
    """B A of an adapted layer."""
    return tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_how_far_mixed_factors_are_from_a_mixed_product(alpha: float) -> None:
    """By -alpha (1 - alpha) (B_p - B_r) (A_p - A_r): of second order in what lies between the two, nothing for 1."""
    base = make_base()
    reference, policy = lora_role(base, "reference"), lora_role(base, "policy")
    generator = torch.Generator().manual_seed(5)
    for role in (reference, policy):
        for tensor in weights_of(role).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    old, new = copied(weights_of(reference)), weights_of(policy)
    move(reference, policy, alpha)
    layers = [name.removesuffix(".lora_A.weight") for name in old if name.endswith(".lora_A.weight")]
    assert layers
    for layer in layers:
        got = product(weights_of(reference), layer)
        wanted = (1 - alpha) * product(old, layer) + alpha * product(new, layer)
        a, b = (new[f"{layer}.{f}.weight"] - old[f"{layer}.{f}.weight"] for f in ("lora_A", "lora_B"))
        torch.testing.assert_close(got, wanted - alpha * (1 - alpha) * (b @ a), rtol=1e-4, atol=1e-4)
        assert (float((got - wanted).abs().max()) < 1e-4) == (alpha == 1.0)
