"""One trunk for policy and critics: the losses of both from one forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch
from rlhf_cli.models.build import with_values
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.ppo import CriticSettings, PPOSettings
from rlhf_cli.stages.ppo_losses import Coefficients, Lesson, counts, head_loss, joint_loss, policy_loss
from rlhf_cli.train.engine import Losses
from tests.models.worlds import full_role, make_base
from tests.stages.test_ppo_losses import CHUNK, LENGTHS, ROOM, make_engine, make_lesson, make_samples


def shared_role() -> Role:
    """A policy with a head for two values that says something."""
    role = with_values(full_role(make_base("llama")), 2)
    assert role.value_head is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in role.value_head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return role


def one_step(folder: Path, loss_of: Any, budget: int = 30) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics of an update with such a loss, and how far each tensor moved."""
    role, samples = shared_role(), make_samples(LENGTHS, 1)
    lesson = make_lesson(samples)
    engine = make_engine(folder, role, budget, packed=True)
    before = {k: v.clone() for k, v in role.tensors().items()}
    metrics = engine.update(role, [samples[k] for k in CHUNK], loss_of(role, lesson), counts(lesson, CHUNK, ROOM))
    return metrics, {k: before[k] - v for k, v in role.tensors().items()}


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_one_trunk_has_the_gradient_of_both_losses(tmp_path: Path, aggregate: Any) -> None:
    """The joint step is the policy's step plus coef times that of each value loss, each from a forward of its own."""
    settings, critic = PPOSettings(aggregate=aggregate, entropy_coef=0.05), CriticSettings(shared=True, coef=0.3)
    off = Coefficients(0.0, None)

    def joint(role: Role, lesson: Lesson) -> Any:
        return joint_loss(role, settings, critic, lesson, CHUNK, off)

    def plain(role: Role, lesson: Lesson) -> Any:
        return policy_loss(role, settings, lesson, CHUNK, off)

    def values(k: int) -> Any:
        def of(role: Role, lesson: Lesson) -> Any:
            head = role.value_head
            assert head is not None

            def loss(batch: Batch, group: list[int]) -> Losses:
                own = role.hidden(batch)[batch.predictors] @ head.weight[k] + head.bias[k]
                rows = CHUNK[group]
                old, goal = (
                    lesson.flat(x, rows, own.device) for x in (lesson.targets[k].old, lesson.targets[k].returns)
                )
                near = old + (own - old).clamp(-0.2, 0.2)
                return Losses({"token": 0.5 * torch.maximum((own - goal) ** 2, (near - goal) ** 2).sum()}, {})

            return loss

        return of

    both, moved = one_step(tmp_path / "joint", joint)
    (alone, by_policy), (first, by_first), (second, by_second) = (
        one_step(tmp_path / name, of) for name, of in (("plain", plain), ("first", values(0)), ("second", values(1)))
    )
    assert both["loss/value"] == pytest.approx(first["loss"], rel=1e-5)
    assert both["cost/loss/value"] == pytest.approx(second["loss"], rel=1e-5)
    assert both["loss"] == pytest.approx(alone["loss"] + 0.3 * (first["loss"] + second["loss"]), rel=1e-5)
    for name, tensor in moved.items():
        wanted = by_policy[name] + 0.3 * (by_first[name] + by_second[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-6, msg=name)
        assert float(tensor.abs().max()) > 0, name
    cut, cut_moved = one_step(tmp_path / "cut", joint, budget=12)
    assert cut == pytest.approx(both, rel=1e-5, abs=1e-5)
    for name, tensor in cut_moved.items():
        torch.testing.assert_close(tensor, moved[name], rtol=1e-4, atol=1e-6, msg=name)


def test_detached_values_leave_the_trunk_to_the_policy(tmp_path: Path) -> None:
    """With `detach` the trunk moves as if there were no values, the head as if it were not detached; and in
    pre-training nothing but the head moves."""
    settings, off = PPOSettings(), Coefficients(0.0, None)

    def joint(*, detach: bool) -> Any:
        critic = CriticSettings(shared=True, detach=detach)
        return lambda role, lesson: joint_loss(role, settings, critic, lesson, CHUNK, off)

    _, plain = one_step(tmp_path / "plain", lambda role, lesson: policy_loss(role, settings, lesson, CHUNK, off))
    _, cut = one_step(tmp_path / "cut", joint(detach=True))
    _, whole = one_step(tmp_path / "whole", joint(detach=False))
    _, warm = one_step(tmp_path / "warm", lambda role, lesson: head_loss(role, lesson, CHUNK))
    free = PPOSettings(value_clip=None)
    alone = CriticSettings(shared=True, detach=True, coef=1.0)
    _, full = one_step(tmp_path / "full", lambda role, lesson: joint_loss(role, free, alone, lesson, CHUNK, off))
    for name, tensor in cut.items():
        if name.startswith("value_head"):
            torch.testing.assert_close(warm[name], full[name], rtol=1e-5, atol=1e-7, msg=name)
        head = name.startswith("value_head")
        torch.testing.assert_close(tensor, (whole if head else plain)[name], rtol=1e-5, atol=1e-7, msg=name)
        assert (float(warm[name].abs().max()) > 0) == head
    trunk = [name for name in cut if name.endswith("q_proj.weight")]
    assert [name for name in trunk if torch.equal(cut[name], whole[name])] == []
