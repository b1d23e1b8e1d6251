"""Roles of a PPO run: who learns, who stays as it was, and that sharing a base changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.ppo import PPOSettings
from rlhf_cli.recipe.settings.training import TrainingSettings
from rlhf_cli.rollouts.experience import pad
from rlhf_cli.stages import ppo_memory
from rlhf_cli.stages.ppo_losses import Coefficients, Lesson, Target, counts, policy_loss, value_loss
from rlhf_cli.stages.ppo_memory import memory_lines
from rlhf_cli.train.engine import Engine
from rlhf_cli.train.optim import make_optimizer, state_bytes
from tests.models.worlds import lora_role, make_base, tokens
from tests.rollouts.test_experience import experience
from tests.stages import world as w
from tests.stages.conftest import train
from tests.stages.ppo_world import Toy, content, copied, everything, true_reward, watch
from tests.stages.test_ppo_losses import make_engine

GAE: dict[str, Any] = {"advantage": {"name": "gae"}}


def of_models(rm: Path) -> list[dict[str, Any]]:
    """A reward model, and another one as cost."""
    return [{"run": str(rm)}, {"run": str(rm), "name": "price", "role": "cost", "weight": 0.5}]


@pytest.mark.parametrize("kind", ["lora", "nf4", "shared", "full"])
def test_only_policy_and_critics_change(
    toy: Toy, world: Path, sft_lora: Path, rm: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Base, reference, reward and cost are bitwise as they were; every trained tensor has moved."""
    seen = watch(monkeypatch)
    known: list[dict[str, Tensor]] = []
    fit = Engine.fit

    def started(self: Engine, step: Any) -> None:
        known.append(copied(everything(seen[0].roles.everyone())))
        fit(self, step)

    monkeypatch.setattr(Engine, "fit", started)
    more: dict[str, Any] = {"rewards": of_models(rm), "model": {"name_or_path": str(sft_lora)}}
    more |= {"critic": {"shared": True}} if kind == "shared" else {}
    more["training"] = {"max_steps": 2}
    if kind == "full":
        more |= {"lora": None, "rewards": [true_reward(world)], "model": {}}
    if kind == "nf4":
        more["model"]["quantization"] = "nf4"
    ppo = GAE if kind == "full" else GAE | {"lagrange": {"threshold": -1.0}}
    train(content(toy, world, ppo, **more))
    roles, before, now = seen[0].roles, known[0], everything(seen[0].roles.everyone())
    assert [r.name for r in roles.everyone()] == {
        "full": ["policy", "reference", "critic"],
        "shared": ["policy", "reference", "reward-0", "reward-1"],
    }.get(kind, ["policy", "reference", "critic", "cost-critic", "reward-0", "reward-1"])
    learners = [role for role, _ in roles.learners(seen[0].recipe)]
    trained = {id(p): f"{role.name} {name}" for role in learners for name, p in role.parameters}
    moved = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    assert {name for name, tensor in now.items() if id(tensor) in trained} == moved
    assert len(moved) == len(trained)


@pytest.mark.parametrize("shared", [False, True])
def test_checkpointing_changes_nothing(toy: Toy, world: Path, rm: Path, shared: bool) -> None:
    found = []
    for on in (False, True):
        more = {"model": {"gradient_checkpointing": on}, "critic": {"shared": shared}, "training": {"max_steps": 2}}
        rewards = [{"run": str(rm)}]
        found.append(train(content(toy, world, GAE, f"run-{on}", rewards=rewards, **more)))
    assert w.metrics(found[0]) == w.metrics(found[1])
    assert w.contents(found[0] / "final") == w.contents(found[1] / "final")


def lessons(samples: list[Sample], lengths: list[int]) -> Lesson:
    """Something to learn."""
    made, generator = experience(lengths, 3), torch.Generator().manual_seed(8)
    old, goals, advantages = (pad([torch.randn(n, generator=generator) for n in lengths])[0] for _ in range(3))
    return Lesson(made, advantages, 1.0, (Target(old, goals),))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_base_learns_as_two(tmp_path: Path, checkpointing: bool) -> None:
    """Steps of policy and critic in turn, on one base and on two: the same numbers, exactly."""
    random, lengths = np.random.default_rng(2), [5, 2, 7, 3]
    samples = [
        Sample(tokens(random, 4), (Completion(tokens(random, n), np.ones(n, bool)),), {}, str(n)) for n in lengths
    ]
    lesson, chunk = lessons(samples, lengths), np.arange(4)
    found: list[dict[str, Tensor]] = []
    for number, bases in enumerate(([make_base()] * 2, [make_base(), make_base()])):
        policy = lora_role(bases[0], "policy", seed=5)
        lora_role(bases[0], "bystander", seed=7)
        critic = lora_role(bases[1], "critic", seed=6, head=True)
        for base in bases if checkpointing else []:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine = make_engine(tmp_path / str(number), policy, 20, packed=True)
        engine.add(critic, 0.1)
        for _ in range(3):
            loss = policy_loss(policy, PPOSettings(), lesson, chunk, Coefficients(0.0, None))
            engine.update(policy, samples, loss, counts(lesson, chunk, 8))
            engine.update(critic, samples, value_loss(critic, lesson.targets[0], 0.2, lesson, chunk),
                          counts(lesson, chunk, 8))  # fmt: skip
        found.append(copied({f"{r.name} {n}": t for r in (policy, critic) for n, t in r.tensors().items()}))
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []
    fresh = copied(lora_role(make_base(), "policy", seed=5).tensors())
    assert all(not torch.equal(tensor, found[0][f"policy {name}"]) for name, tensor in fresh.items())


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "sgd"])
def test_the_optimiser_takes_what_was_said(optimizer: Any) -> None:
    settings = TrainingSettings(learning_rate=1e-3, optimizer=optimizer)
    role = lora_role(make_base("llama"), "policy", r=64, head=True)
    made = make_optimizer(role.parameters, settings, 1e-3)
    for _, parameter in role.parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    kept = [t for state in made.state.values() for t in state.values() if isinstance(t, Tensor) and t.numel() > 1]
    codes = {t.data_ptr() for t in kept if t.numel() == 256 and optimizer == "adamw_8bit"}  # shared tables of codes
    taken = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in codes)
    expected = sum(state_bytes(p, settings) for _, p in role.parameters)
    assert expected == pytest.approx(taken, rel=0.05, abs=64)


def test_memory_is_told_by_role() -> None:
    base, other = make_base("llama"), make_base("llama")
    policy, critic = lora_role(base, "policy"), lora_role(base, "critic", head=True)
    roles = [policy, Role("reference", base), critic, Role("reward-0", other)]
    lines = memory_lines(roles, [policy, critic], TrainingSettings(learning_rate=1.0))
    own = sum(p.numel() * 4 for _, p in policy.parameters)
    weights = sum(p.numel() * 4 for p in other.model.parameters())
    mib = 2**20
    assert lines == [
        f"memory: base llama of policy, reference, critic: {weights / mib:,.1f} MiB",
        f"memory: base llama of reward-0: {weights / mib:,.1f} MiB",
        f"memory: policy: adapter {own / mib:,.1f} MiB, gradient {own / mib:,.1f} MiB, adamw {2 * own / mib:,.1f} MiB",
        "memory: reference: no adapter",
        lines[4],
        "memory: reward-0: no adapter",
        lines[6],
    ]
    head = sum(p.numel() * 4 for n, p in critic.parameters if n.startswith("head."))
    assert lines[4].startswith(f"memory: critic: adapter {(own + head) / mib:,.1f} MiB, gradient ")
    total = 2 * weights + 4 * own + 4 * (own + head)
    assert lines[6] == f"memory: {total / mib:,.1f} MiB in all, activations and caches not counted"


def test_memory_is_that_of_the_parts_that_lie_here(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("llama")
    policy, critic = Role("policy", base, trained=True), lora_role(make_base("llama"), "critic")
    frozen = {id(p) for n, p in critic.base.model.named_parameters() if "lora_" not in n}
    monkeypatch.setattr(
        ppo_memory, "held", lambda p: p.detach().flatten()[::2] if id(p) in frozen else p.detach()
    )  # the critic's base in two parts
    monkeypatch.setattr(ppo_memory.processes, "count", lambda: 2)
    lines = memory_lines([policy, critic], [critic], TrainingSettings(learning_rate=1.0))
    half = sum((p.numel() + 1) // 2 * 4 for p in critic.base.model.parameters() if id(p) in frozen)
    whole = sum(p.numel() * 4 for p in base.model.parameters())
    own = sum(p.numel() * 4 for _, p in critic.parameters)
    assert lines[1] == f"memory: base llama of critic: {half / 2**20:,.1f} MiB"
    assert lines[-1].startswith(f"memory: {(whole + half + 4 * own) / 2**20:,.1f} MiB in all on each process, ")


def test_a_run_tells_its_memory(toy: Toy, world: Path, rm: Path) -> None:
    run = train(content(toy, world, GAE, rewards=[{"run": str(rm)}], training={"max_steps": 1}))
    said = [line.split("memory: ")[1] for line in (run / "run.log").read_text().splitlines() if "memory: " in line]
    assert [line.split(":")[0].split(" of ")[-1] for line in said[:-1]] == [
        "policy, reference, critic, reward-0", "policy", "reference", "critic", "reward-0"
    ]  # fmt: skip
    assert "no adapter" in said[2]
