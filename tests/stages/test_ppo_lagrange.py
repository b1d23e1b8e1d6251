"""PPO-Lag: a cost is held below its threshold while the reward rises."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.objectives.masked import masked_mean
from rlhf_cli.stages.ppo import PPO
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.ppo_world import Toy, content, cost_of, true_reward, watch
from tests.stages.test_interrupted import DROPOUT, OFTEN, assert_same, interrupted

GAE: dict[str, Any] = {"advantage": {"name": "gae"}}
RLOO: dict[str, Any] = {"advantage": {"name": "rloo"}, "whiten_advantages": False}


def priced(world: Path, **more: Any) -> dict[str, Any]:
    """Praise less blame, and a price on one of the words of praise."""
    return {"rewards": [true_reward(world), cost_of(world)], **more}


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_the_cost_falls_below_its_threshold_and_the_reward_rises(toy: Toy, world: Path, estimator: str) -> None:
    """Two of four words that pay also cost. Without a threshold they are said more and more; with one, the others are
    said in their place, the multiplier rises while it costs too much and comes down afterwards."""
    ppo = (GAE if estimator == "gae" else RLOO) | {"kl": {"name": "fixed", "coef": 0.02}, "epochs": 2}
    training = {"max_steps": 22, "learning_rate": 1e-2}
    lagrange = {"threshold": 0.06, "learning_rate": 2.0, "max": 20.0, "window": 64}
    run = train(content(toy, world, ppo | {"lagrange": lagrange}, **priced(world, training=training)))
    costs, scores, multiplier = (w.column(run, n) for n in ("cost/mean", "objective/scores", "lagrange/lambda"))
    print(estimator, [round(c, 3) for c in costs], [round(s, 2) for s in scores], [round(x, 2) for x in multiplier])
    assert sum(costs[:3]) / 3 > 0.1
    assert sum(costs[-6:]) / 6 < 0.06
    assert sum(scores[-6:]) / 6 > sum(scores[:3]) / 3 + 0.3
    assert multiplier[2] > 1.0
    windows = w.column(run, "cost/window_mean")
    for before, after, mean in zip(multiplier, multiplier[1:], windows[1:], strict=False):
        assert after == pytest.approx(min(before * math.exp(2.0 * before * (mean - 0.06)), 20.0), rel=1e-9)
    assert multiplier[-1] < max(multiplier)


def test_without_a_threshold_the_words_are_said(toy: Toy, world: Path) -> None:
    """That the test above is not won by chance: a multiplier of nearly nothing holds nothing down."""
    training = {"max_steps": 12, "learning_rate": 1e-2}
    lagrange = {"init": 1e-6, "learning_rate": 1e-6, "threshold": 0.06}
    ppo = RLOO | {"kl": {"name": "fixed", "coef": 0.02}, "epochs": 2, "lagrange": lagrange}
    costs = w.column(train(content(toy, world, ppo, **priced(world, training=training))), "cost/mean")
    assert sum(costs[-4:]) / 4 > 0.15


@pytest.mark.parametrize("multiplier", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("estimator", ["gae", "rloo", "remax", "dr_grpo", "reinforce"])
def test_the_kl_weighs_the_same_whatever_the_multiplier(
    toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, multiplier: float
) -> None:
    """With reward and cost of nothing, the mixed advantages are those of the KL alone."""
    seen = watch(monkeypatch)
    lagrange = {"init": multiplier, "learning_rate": 1e-9, "threshold": 0.0}
    ppo = {"advantage": {"name": estimator}, "whiten_advantages": False, "kl": {"name": "fixed", "coef": 0.3},
           "missing_eos_penalty": 0.0, "lagrange": lagrange}  # fmt: skip
    train(content(toy, world, ppo, **priced(world, training={"max_steps": 2})))
    (ppo_state,) = seen
    rolled = ppo_state.newest
    assert rolled is not None
    assert rolled.cost is not None
    nothing = {"raw": torch.zeros_like(rolled.reward.raw), "last": torch.zeros_like(rolled.reward.raw)}
    if rolled.reward.values is not None:  # critics that know nothing
        nothing["values"] = torch.zeros_like(rolled.reward.values)
    if rolled.reward.greedy is not None:
        nothing["greedy"] = torch.zeros_like(rolled.reward.greedy)
    still = vars(rolled.reward) | nothing
    alike = type(rolled)(rolled.experience, type(rolled.reward)(**still), type(rolled.reward)(**still), {})
    mixed = ppo_state.lesson(alike, warming=False)[0].advantages
    plain = ppo_state.estimate(rolled.experience, alike.reward, 0.3, False).advantages
    torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-6)
    assert float(masked_mean(plain.abs(), rolled.experience.mask)) > 1e-4


def test_the_streams_do_not_mix_before_the_advantages(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each critic learns the returns of its own stream; the cost's carry the KL with the other sign."""
    seen = watch(monkeypatch)
    ppo = GAE | {"lagrange": {}, "kl": {"name": "fixed", "coef": 0.1}, "missing_eos_penalty": 0.0}
    ppo["advantage"] = {"name": "gae", "lam": 1.0}
    train(content(toy, world, ppo, **priced(world, training={"max_steps": 2})))
    state: PPO = seen[0]
    rolled = state.newest
    assert rolled is not None
    assert rolled.cost is not None
    lesson, _ = state.lesson(rolled, warming=False)
    kl = torch.where(lesson.experience.mask, lesson.experience.logp - lesson.experience.reference_logp, 0.0).sum(1)
    assert float(kl.abs().max()) > 0
    for target, score, sign in zip(lesson.targets, (rolled.reward.raw, rolled.cost.raw), (-1, 1), strict=True):
        torch.testing.assert_close(target.returns[:, 0], score + sign * 0.1 * kl, rtol=0, atol=1e-4)
    assert [r.name for r in state.updates.critics] == ["critic", "cost-critic"]


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_a_stopped_run_goes_on_exactly(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    lagrange = {"threshold": 0.1, "learning_rate": 0.5, "window": 50, "delay_steps": 1}
    ppo = {"advantage": {"name": estimator}, "lagrange": lagrange}
    settings = w.merged(OFTEN, DROPOUT, priced(world, training={"max_steps": 5, "lr_scheduler": "linear"}))
    run = interrupted(content(toy, world, ppo, "stopped", **settings), 2, monkeypatch, signal.SIGTERM)
    whole = train(content(toy, world, ppo, "whole", **settings))
    assert_same(run, whole)
    multiplier = w.column(whole, "lagrange/lambda")
    assert multiplier[0] == 1.0
    assert len(set(multiplier)) == 5
    kept = json.loads((whole / "checkpoints" / "step-000005" / "state.json").read_text())["kept"]["lagrange"]
    assert (len(kept["costs"]), kept["steps"]) == (50, 5)
    assert ("cost/loss/value" in w.metrics(whole)[1]) == (estimator == "gae")
    assert "eval/cost/mean" in w.metrics(whole)[0]


WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a cost without a multiplier": ({}, ["reward", "cost"], "ppo.lagrange: {}"),
    "a multiplier without a cost": ({"lagrange": {}}, ["reward"], "give one of the rewards role: cost"),
    "nothing but costs": ({"lagrange": {}}, ["cost"], "at least one must be a reward"),
    "a start beyond the ceiling": ({"lagrange": {"init": 6.0}}, ["reward", "cost"], "init 6 lies above max 5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(toy: Toy, world: Path, tmp_path: Path, name: str) -> None:
    ppo, kinds, words = WRONG[name]
    rewards = [{"reward": true_reward(world), "cost": cost_of(world)}[kind] for kind in kinds]
    outcome = quick("ppo", w.save(content(toy, world, ppo, rewards=rewards), tmp_path / "recipe.yaml"))
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert words in outcome.errors[0]
