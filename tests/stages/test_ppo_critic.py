"""Critics: where they start, one trunk with the policy, value pre-training."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.models.roles import Role, RoleError
from rlhf_cli.stages.ppo_losses import Lesson
from rlhf_cli.stages.ppo_update import Updates
from tests.models.worlds import kinds, lora_role, make_base
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.ppo_world import Toy, content, copied, cost_of, true_reward, watch
from tests.stages.test_interrupted import DROPOUT, OFTEN, assert_same, interrupted

GAE: dict[str, Any] = {"advantage": {"name": "gae"}}
LAG: dict[str, Any] = {**GAE, "lagrange": {"threshold": 0.1}}


def parameters(role: Role) -> dict[str, Tensor]:
    """Of a role, without the name of its adapter."""
    return copied({name.replace(f".{role.adapter}.", "."): p for name, p in role.parameters})


@pytest.mark.parametrize("start", ["auto", "reward", "policy", "zero"])
def test_where_a_critic_starts(toy: Toy, world: Path, rm: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    seen = watch(monkeypatch)
    more = {"rewards": [true_reward(world), {"run": str(rm), "weight": 0.5}], "critic": {"start": start}}
    first: list[dict[str, Tensor]] = []
    learn = Updates.learn

    def before(self: Updates, lesson: Lesson, seed: int) -> dict[str, float]:
        roles = seen[0].roles
        assert roles.critic is not None
        first.extend(parameters(role) for role in (roles.policy, roles.critic))
        return learn(self, lesson, seed)

    monkeypatch.setattr(Updates, "learn", before)
    run = train(content(toy, world, GAE, **more, training={"max_steps": 1}))
    policy, critic = first
    log = (run / "run.log").read_text()
    same = [name for name, tensor in policy.items() if torch.equal(tensor, critic[name])]
    if start in ("auto", "reward"):
        assert "critic: starts from rm" in log
        assert float(critic["head.weight"].abs().max()) > 0
        assert float(critic["head.bias"]) != 0  # the mean of the reward model's scores
    else:
        assert f"critic: starts from {'the policy' if start == 'policy' else 'a fresh adapter'}, zero head" in log
        assert float(critic["head.weight"].abs().max()) == float(critic["head.bias"]) == 0.0
        assert (len(same) == len(policy)) == (start == "policy")
        assert w.column(run, "val/mean") == [0.0]


# --- one trunk for both ----------------------------------------------------------------------------------


def test_one_forward_says_what_two_say() -> None:
    policy = lora_role(make_base(), "policy")
    with pytest.raises(RoleError, match="no value head"), policy.active():
        policy.logp_and_values(collate(kinds(1)["pairs"], packed=True), 1.0)
    policy.value_head = torch.nn.Linear(policy.base.model.config.hidden_size, 2)
    batch = collate(kinds(1)["pairs"], packed=True)
    with policy.active():
        said, values = policy.logp_and_values(batch, 0.7, around=True)
        assert torch.equal(said.logp, policy.logp(batch, 0.7).logp)
        hidden = policy.hidden(batch)
        wanted = torch.cat([policy.value_head(hidden[at]) for at in (batch.predictors, batch.targets)], dim=1)
        assert torch.equal(values, wanted)
        assert torch.equal(policy.logp_and_values(batch, 0.7)[1], wanted[:, :2])
    critic = lora_role(make_base(), "critic", head=True)
    with critic.active():
        around = critic.values_around(batch)
        assert torch.equal(around[:, 0], critic.values(batch))
        # what one token is followed by, the next is preceded by
        inner = batch.owners[1:] == batch.owners[:-1]
        torch.testing.assert_close(around[:-1, 1][inner], around[1:, 0][inner], rtol=0, atol=1e-5)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(around[:, 1], around[:, 0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("costs", [False, True])
def test_a_shared_trunk_runs_and_is_a_plain_policy(toy: Toy, world: Path, costs: bool) -> None:
    rewards = [true_reward(world), *([cost_of(world)] if costs else [])]
    run = train(content(toy, world, LAG if costs else GAE, rewards=rewards, critic={"shared": True, "coef": 0.5}))
    rows = w.metrics(run)[1:]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert "val/grad_norm" not in rows[0]  # one step for both
    assert "critic/learning_rate" not in rows[0]
    for row in rows:
        errors = row["loss/value"] + row.get("cost/loss/value", 0.0)
        assert row["loss"] == pytest.approx(row["loss/policy"] + 0.5 * errors, rel=1e-5)
    assert rows[0]["val/mean"] == 0.0  # a zero head
    assert rows[1]["val/mean"] != 0.0
    assert ("cost/val/mean" in rows[0]) == costs
    final = w.contents(run / "final")
    assert not any(b"value_head" in data for data in final.values())
    assert "critic: a zero head on the policy's own trunk" in (run / "run.log").read_text()


def test_a_shared_trunk_of_a_whole_model(toy: Toy, world: Path) -> None:
    run = train(content(toy, world, GAE, critic={"shared": True}, lora=None))
    assert w.column(run, "val/mean")[1] != 0.0
    assert (run / "final" / "model.safetensors").exists()


# --- pre-training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_the_policy_waits_for_its_critic(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """The values are fitted to the rewards to go, everything else stands still; then PPO goes on as from the start."""
    seen = watch(monkeypatch)
    pretrain, checked = Updates.pretrain, []

    def quiet(self: Updates, lesson: Lesson, seed: int) -> dict[str, float]:
        policy = seen[0].roles.policy
        before = copied(policy.tensors())
        found = pretrain(self, lesson, seed)
        moved = {name for name, tensor in policy.tensors().items() if not torch.equal(tensor, before[name])}
        assert moved == ({"value_head.weight", "value_head.bias"} if shared else set())
        rewards = torch.zeros_like(lesson.experience.logp)
        assert seen[0].newest is not None
        rewards[torch.arange(len(rewards)), lesson.experience.lengths - 1] = seen[0].newest.reward.scores
        to_go = rewards.flip(1).cumsum(1).flip(1)
        mask = lesson.experience.mask
        torch.testing.assert_close(lesson.targets[0].returns[mask], to_go[mask], rtol=0, atol=1e-5)
        checked.append(len(checked))
        return found

    monkeypatch.setattr(Updates, "pretrain", quiet)
    kl = {"name": "doubling", "coef": 0.2, "target_kl_per_sequence": 0.5}
    training = {"max_steps": 5, "lr_scheduler": "linear"}
    critic = {"pretrain_steps": 3, **({"shared": True} if shared else {"learning_rate": 1e-2})}
    more = {"critic": critic, "training": training}
    run = train(content(toy, world, GAE | {"kl": kl}, **more))
    rows = w.metrics(run)[1:]
    assert checked == [0, 1, 2]
    assert ["policy/approxkl" in row for row in rows] == [False, False, False, True, True]
    assert [row["objective/kl"] == 0.0 for row in rows] == [True, True, True, True, False]
    assert [row["kl_coef"] for row in rows] == [0.2, 0.2, 0.2, 0.2, 0.1]
    assert rows[3]["policy/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert [row["learning_rate"] for row in rows] == pytest.approx([5e-3] * 4 + [2.5e-3])  # over two steps
    if not shared:
        assert rows[4]["critic/learning_rate"] == pytest.approx(1e-2 / 5)
    assert "Warning" not in (run / "run.log").read_text()


@pytest.mark.parametrize("shared", [False, True])
def test_warm_up_comes_after_pre_training(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Of the policy; values learn at once. A trunk that stands still takes no gradient and gives no logits."""
    seen, pretrain, hidden = watch(monkeypatch), Updates.pretrain, Role.hidden
    heads, wanted, states = [], [], []

    def spied(self: Updates, lesson: Lesson, seed: int) -> dict[str, float]:
        def watched(role: Role, batch: Batch) -> Tensor:
            states.append(hidden(role, batch))
            return states[-1]

        def unwanted(*_: Any) -> None:
            wanted.append(1)

        with monkeypatch.context() as patch:
            patch.setattr(Role, "hidden", watched)
            if shared:
                patch.setattr(Role, "_logp", unwanted)
            found = pretrain(self, lesson, seed)
        heads.append(copied(dict((seen[0].roles.critic or seen[0].roles.policy).parameters)))
        return found

    monkeypatch.setattr(Updates, "pretrain", spied)
    critic = {"pretrain_steps": 2, "shared": shared}
    training = {"max_steps": 6, "lr_scheduler": "linear", "warmup_steps": 2}
    rows = w.metrics(train(content(toy, world, GAE, critic=critic, training=training)))[1:]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0, 0, 0, 2.5e-3, 5e-3, 2.5e-3])
    assert wanted == []
    assert {state.requires_grad for state in states} == {not shared}
    last = [next(tensor for name, tensor in head.items() if name.endswith("head.weight")) for head in heads]
    assert not torch.equal(last[0], last[1])
    assert rows[2]["val/mean"] != 0.0


@pytest.mark.parametrize("shared", [False, True])
def test_pre_training_explains_the_returns(toy: Toy, world: Path, shared: bool) -> None:
    critic = {"pretrain_steps": 11, **({"shared": True} if shared else {"learning_rate": 5e-3})}
    ppo = GAE | {"epochs": 6, "missing_eos_penalty": 0.0}
    run = train(content(toy, world, ppo, critic=critic, training={"max_steps": 12, "learning_rate": 2e-2}))
    explained = w.column(run, "val/explained_variance")
    assert explained[0] == pytest.approx(0.0, abs=1e-3)
    assert explained[-1] > (0.05 if shared else 0.2)


def test_a_run_of_pre_training_alone_is_refused(toy: Toy, world: Path, tmp_path: Path) -> None:
    outcome = quick("ppo", w.save(content(toy, world, GAE, critic={"pretrain_steps": 3}), tmp_path / "r.yaml"))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "critic.pretrain_steps = 3 would be all of training.max_steps = 3" in outcome.errors[0]
    assert not (tmp_path / "run").exists()


STOPPED: dict[str, tuple[int, dict[str, Any]]] = {
    "shared trunk with a cost": (3, {"critic": {"shared": True}}),
    "in pre-training": (2, {"critic": {"pretrain_steps": 3}}),
    "after pre-training": (4, {"critic": {"pretrain_steps": 3}}),
    "in pre-training of a shared trunk": (1, {"critic": {"pretrain_steps": 2, "shared": True}}),
    "after pre-training of a shared trunk": (3, {"critic": {"pretrain_steps": 2, "shared": True}}),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_goes_on_exactly(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    step, more = STOPPED[name]
    rewards = [true_reward(world), cost_of(world)]
    usual = {"rewards": rewards, "training": {"max_steps": 5, "lr_scheduler": "linear", "warmup_steps": 1}}
    settings = w.merged(OFTEN, DROPOUT, usual, more)
    run = interrupted(content(toy, world, LAG, "stopped", **settings), step, monkeypatch, signal.SIGTERM)
    assert_same(run, train(content(toy, world, LAG, "whole", **settings)))


# --- what is refused -------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "shared without a critic": ({"advantage": {"name": "rloo"}}, {"shared": True}, "ppo.advantage rloo has none"),
    "pre-training without a critic": (
        {"advantage": {"name": "reinforce"}}, {"pretrain_steps": 1}, "ppo.advantage reinforce has none"),
    "a start for a shared trunk": (GAE, {"shared": True, "start": "reward"}, "start is only read with shared: false"),
    "a rate for a shared trunk": (
        GAE, {"shared": True, "learning_rate": 1e-3}, "learning_rate is only read with shared: false"),
    "a coefficient without a shared trunk": (GAE, {"coef": 0.2}, "coef is only read with shared: true"),
    "detach without a shared trunk": (GAE, {"detach": True}, "detach is only read with shared: true"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(toy: Toy, world: Path, tmp_path: Path, name: str) -> None:
    ppo, critic, words = WRONG[name]
    outcome = quick("ppo", w.save(content(toy, world, ppo, critic=critic), tmp_path / "recipe.yaml"))
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert words in outcome.errors[0]
