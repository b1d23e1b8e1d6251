"""A reference that follows the policy."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.stages.ppo_losses import Lesson
from rlhf_cli.stages.ppo_update import Updates
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.ppo_world import Toy, content, copied, watch
from tests.stages.test_interrupted import DROPOUT, OFTEN, assert_same, interrupted

RLOO: dict[str, Any] = {"advantage": {"name": "rloo"}, "whiten_advantages": False}


@pytest.mark.parametrize("kind", ["fresh adapter", "adapter", "full"])
def test_the_reference_moves_by_its_rule(
    toy: Toy, world: Path, sft_lora: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Every second rollout, after its updates: reference <- 0.7 reference + 0.3 policy, tensor by tensor."""
    from rlhf_cli.models.build import weights_of

    seen = watch(monkeypatch)
    history: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    learn = Updates.learn

    def learned(self: Updates, lesson: Lesson, seed: int) -> dict[str, float]:
        found = learn(self, lesson, seed)
        roles = seen[0].roles
        history.append((copied(weights_of(roles.reference)), copied(weights_of(roles.policy))))
        return found

    monkeypatch.setattr(Updates, "learn", learned)
    more: dict[str, Any] = {"training": {"max_steps": 5}}
    more |= (
        {"lora": None} if kind == "full" else {"model": {"name_or_path": str(sft_lora)}} if kind == "adapter" else {}
    )
    run = train(content(toy, world, RLOO | {"reference_update": {"every": 2, "alpha": 0.3}}, **more))
    log = (run / "run.log").read_text()
    assert "moved towards the policy by 0.3 every 2 rollouts" in log
    assert "with adapters off" not in log
    for n in range(1, 5):
        (reference, _), (before, policy) = history[n], history[n - 1]
        moved = [name for name in reference if not torch.equal(reference[name], before[name])]
        assert bool(moved) == (n % 2 == 0)
        for name, tensor in reference.items():
            wanted = 0.7 * before[name] + 0.3 * policy[name] if n % 2 == 0 else before[name]
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-8, msg=name)
    assert w.column(run, "objective/kl")[0] == 0.0


@pytest.mark.parametrize("full", [False, True])
def test_alpha_1_makes_it_the_policy(toy: Toy, world: Path, full: bool) -> None:
    """Then the KL of every rollout is 0, which it is not when the reference stays."""
    more = {"lora": None} if full else {}
    kls = []
    for name, moving in (("moves", {"reference_update": {"every": 1, "alpha": 1.0}}), ("stays", {})):
        kls.append(w.column(train(content(toy, world, RLOO | moving, name, **more)), "objective/kl"))
    assert [abs(kl) < 1e-5 for kl in kls[0]] == [True] * 3
    assert [abs(kl) < 1e-5 for kl in kls[1]] == [True, False, False]


@pytest.mark.parametrize("full", [False, True])
def test_a_stopped_run_goes_on_exactly(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    ppo = RLOO | {"reference_update": {"every": 2}, "kl": {"name": "fixed", "coef": 0.5}}
    settings = w.merged(OFTEN, {} if full else DROPOUT, {"training": {"max_steps": 5}}, {"lora": None} if full else {})
    run = interrupted(content(toy, world, ppo, "stopped", **settings), 3, monkeypatch, signal.SIGTERM)
    whole = train(content(toy, world, ppo, "whole", **settings))
    assert_same(run, whole)
    assert (whole / "checkpoints" / "step-000005" / "reference.safetensors").exists()


def test_what_does_not_fit_is_refused(toy: Toy, world: Path, tmp_path: Path) -> None:
    for moving, words in (({"every": 0}, "every"), ({"every": 1, "alpha": 0.0}, "alpha"), ({}, "every")):
        ppo = RLOO | {"reference_update": moving}
        outcome = quick("ppo", w.save(content(toy, world, ppo), tmp_path / "recipe.yaml"))
        assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
        assert words in outcome.errors[0]
