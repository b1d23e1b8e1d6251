"""PPO's losses through the engine: one step is the same however it is cut, and equals one forward of everything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch
from rlhf_cli.data.loader import Loader
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.ppo import PPOSettings
from rlhf_cli.rollouts.experience import Experience, pad
from rlhf_cli.rollouts.rewards import Rollout
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Plain
from rlhf_cli.stages.ppo_losses import (
    Coefficients,
    Lesson,
    Target,
    counts,
    policy_loss,
    value_loss,
)
from rlhf_cli.stages.ppo_setup import Ptx
from rlhf_cli.train.engine import Engine, Losses, Part
from tests.models.worlds import full_role, make_base, tokens
from tests.runs.helpers import make_recipe

LENGTHS = (5, 1, 3, 9, 2)
CHUNK = np.array([3, 0, 4, 1])
"""An update on these completions; the third is not in it."""
ROOM = 12
"""Most tokens a completion may have."""


def make_samples(lengths: tuple[int, ...], seed: int) -> list[Sample]:
    """Prompts of a few tokens with one completion each."""
    random = np.random.default_rng(seed)
    return [
        Sample(tokens(random, 3 + n % 3), (Completion(tokens(random, n), np.ones(n, dtype=bool)),), {}, f"r:{n}")
        for n in lengths
    ]


def make_lesson(samples: list[Sample]) -> Lesson:
    """Made-up advantages and log-probabilities, not far from those of a random model."""
    generator = torch.Generator().manual_seed(4)

    def noise(scale: float, shift: float = 0.0) -> Tensor:
        return pad([torch.randn(n, generator=generator) * scale + shift for n in LENGTHS])[0]

    logp, mask = noise(0.5, -4.0), pad([torch.ones(n) for n in LENGTHS])[1]
    rows = torch.arange(len(LENGTHS))
    experience = Experience(
        Rollout([], [], samples), rows >= 0, rows, mask, logp, logp, noise(0.5, -4.0), torch.zeros_like(logp), noise(1)
    )
    advantages, old = noise(1.0), experience.values
    assert old is not None
    return Lesson(experience, advantages, 0.8, (Target(old, noise(1.0)), Target(noise(0.5), noise(0.5, 2.0))))


def make_engine(folder: Path, role: Role, budget: int, *, packed: bool) -> Engine:
    """An engine that subtracts the gradient."""
    folder.mkdir()
    recipe = make_recipe(
        folder, micro_batch_tokens=budget, optimizer="sgd", max_grad_norm=None, lr_scheduler="constant"
    )
    run = Run.open(recipe, "rlhf ppo", "auto")
    run.begin({})
    engine = Engine(recipe, run, Plain(quiet=True), 10, packed)
    engine.add(role, 0.1)
    return engine


def other_text(role: Role) -> Part:
    """The part that ptx adds: all of two samples."""
    loader = Loader(np.zeros(2, dtype=np.int32), [1.0], 2, 0)
    return Ptx(make_samples((4, 7), 2), loader, 2.0).next(role)


SETTINGS: list[dict[str, Any]] = [
    {"aggregate": aggregate, "ratio": ratio, "kl_in": kl_in}
    for aggregate in ("token", "sequence", "constant")
    for ratio, kl_in in (("token", "loss"), ("sequence", "reward"))
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=lambda s: "-".join(s.values()))
def test_an_update_is_the_same_however_it_is_cut(tmp_path: Path, chosen: dict[str, Any]) -> None:
    samples = make_samples(LENGTHS, 1)
    lesson, settings = make_lesson(samples), PPOSettings(entropy_coef=0.1, **chosen)
    found = []
    for i, (budget, packed) in enumerate(((16, True), (16, False), (40, True), (10**6, True))):
        role = full_role(make_base("llama"), head=True)
        engine = make_engine(tmp_path / str(i), role, budget, packed=packed)
        before = {k: v.clone() for k, v in role.tensors().items()}
        divisors = counts(lesson, CHUNK, ROOM)
        own = [samples[k] for k in CHUNK]
        loss = policy_loss(role, settings, lesson, CHUNK, Coefficients(0.3, 0.7))
        metrics = engine.update(role, own, loss, divisors, also=other_text(role))
        critic = value_loss(role, lesson.targets[0], settings.value_clip, lesson, CHUNK)
        metrics |= {f"critic/{k}": v for k, v in engine.update(role, own, critic, divisors).items()}
        found.append((metrics, {k: before[k] - v for k, v in role.tensors().items()}))
    for metrics, moved in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5, abs=1e-5)
        for name, tensor in moved.items():
            torch.testing.assert_close(tensor, found[0][1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_an_update_by_hand(tmp_path: Path, aggregate: str) -> None:
    """Every term of the policy's loss, against loops over completions and tokens."""
    samples, role = make_samples(LENGTHS, 1), full_role(make_base("llama"))
    lesson = make_lesson(samples)
    engine = make_engine(tmp_path / "run", role, 20, packed=True)
    known = engine.infer(role, samples, lambda b: torch.stack(role.logp(b, 0.8)[:2], dim=1))
    ends = {"token": 17, "sequence": 4, "constant": 4 * ROOM}  # of 9 + 5 + 2 + 1 tokens and 4 completions
    terms = dict.fromkeys(("policy", "entropy", "penalty", "kl"), 0.0)
    for row in CHUNK:
        for t in range(LENGTHS[row]):
            logp, entropy = known[row][t].tolist()
            moved, a = logp - float(lesson.experience.logp[row, t]), float(lesson.advantages[row, t])
            rho, x = math.exp(moved), logp - float(lesson.experience.reference_logp[row, t])
            surrogate = -min(rho * a, min(max(rho, 0.9), 1.3) * a)
            share = 1 / (LENGTHS[row] if aggregate == "sequence" else 1) / ends[aggregate]
            parts = {"policy": surrogate, "entropy": entropy, "penalty": rho - 1 - moved, "kl": x * x / 2}
            terms = {name: value + parts[name] * share for name, value in terms.items()}
    settings = PPOSettings(
        aggregate=aggregate, kl_in="loss", clip_low=0.1, clip_high=0.3, entropy_coef=0.05  # type: ignore[arg-type]
    )  # fmt: skip
    loss = policy_loss(role, settings, lesson, CHUNK, Coefficients(0.3, 0.7))
    metrics = engine.update(role, [samples[k] for k in CHUNK], loss, counts(lesson, CHUNK, ROOM))
    wanted = terms["policy"] - 0.05 * terms["entropy"] + 0.7 * terms["penalty"] + 0.3 * terms["kl"]
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-4)
    for name, value in terms.items():
        assert metrics[f"loss/{name}"] == pytest.approx(value, rel=1e-4), name


def test_which_clip_decides(tmp_path: Path) -> None:
    """Shares of tokens by the end of the range and by the dual clip; what lies past a completion counts nowhere."""
    samples, role = make_samples(LENGTHS, 1), full_role(make_base("llama"))
    lesson = make_lesson(samples)
    lesson.advantages[0, 1], lesson.advantages[~lesson.experience.mask] = 0.0, math.nan
    engine = make_engine(tmp_path / "run", role, 20, packed=True)
    known = engine.infer(role, samples, lambda b: role.logp(b, 0.8).logp)
    shares = dict.fromkeys(("", "_high", "_low", "_dual"), 0.0)
    for row in CHUNK:
        for t in range(LENGTHS[row]):
            rho = math.exp(float(known[row][t]) - float(lesson.experience.logp[row, t]))
            a = float(lesson.advantages[row, t])
            high, low = a > 0 and rho > 1.2, a < 0 and rho < 0.9
            found = {"": high or low, "_high": high, "_low": low, "_dual": a < 0 and rho > 1.4}
            shares = {name: value + found[name] / 17 for name, value in shares.items()}
    assert min(shares.values()) > 0
    assert shares["_low"] > shares["_high"]
    for dual in (1.4, None):
        settings = PPOSettings(clip_low=0.1, clip_high=0.2, dual_clip=dual)
        loss = policy_loss(role, settings, lesson, CHUNK, Coefficients(0.0, None))
        metrics = engine.measure(role, [samples[k] for k in CHUNK], loss, counts(lesson, CHUNK, ROOM))
        wanted = shares if dual else shares | {"_dual": 0.0}
        assert {name: metrics[f"policy/clipfrac{name}"] for name in wanted} == pytest.approx(wanted)


def test_an_update_of_the_critic_by_hand(tmp_path: Path) -> None:
    samples, role = make_samples(LENGTHS, 1), full_role(make_base("llama"), head=True)
    lesson = make_lesson(samples)
    engine = make_engine(tmp_path / "run", role, 20, packed=True)
    values = engine.infer(role, samples, role.values)
    old, returns = lesson.targets[0].old, lesson.targets[0].returns
    wanted = 0.0
    for row in CHUNK:
        for t in range(LENGTHS[row]):
            v, before, target = float(values[row][t]), float(old[row, t]), float(returns[row, t])
            near = before + min(max(v - before, -0.2), 0.2)
            wanted += max((v - target) ** 2, (near - target) ** 2) / 2 / 17
    loss = value_loss(role, lesson.targets[0], 0.2, lesson, CHUNK)
    metrics = engine.update(role, [samples[k] for k in CHUNK], loss, counts(lesson, CHUNK, ROOM))
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-4)


def test_another_part_adds_its_gradient(tmp_path: Path) -> None:
    """Together they move the weights as far as each of them from the same start."""
    samples = make_samples(LENGTHS, 1)
    lesson, settings = make_lesson(samples), PPOSettings()
    moved, losses = [], []
    for i, (first, second) in enumerate(((True, True), (True, False), (False, True))):
        role = full_role(make_base("llama"))
        engine = make_engine(tmp_path / str(i), role, 20, packed=True)
        before = {k: v.clone() for k, v in role.tensors().items()}
        part = other_text(role)
        loss = policy_loss(role, settings, lesson, CHUNK, Coefficients(0.0, None))
        own = Part([samples[k] for k in CHUNK], loss, counts(lesson, CHUNK, ROOM))
        metrics = engine.update(role, *(own if first else part)[:3], also=part if first and second else None)
        losses.append(metrics["loss"])
        moved.append({k: before[k] - v for k, v in role.tensors().items()})
        assert ("loss/ptx" in metrics) == second
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-6)
    for name, both in moved[0].items():
        torch.testing.assert_close(both, moved[1][name] + moved[2][name], rtol=1e-4, atol=1e-6, msg=name)


def test_ptx_by_hand(tmp_path: Path) -> None:
    """coef times the mean over all scored tokens, at no temperature."""
    role = full_role(make_base("llama"))
    engine = make_engine(tmp_path / "run", role, 12, packed=True)
    logps = engine.infer(role, make_samples((4, 7), 2), lambda b: role.logp(b).logp)
    nll = -sum(float(x.sum()) for x in logps) / 11
    metrics = engine.update(role, *other_text(role)[:3])
    assert metrics["loss/ptx"] == pytest.approx(nll, rel=1e-5)
    assert metrics["loss"] == pytest.approx(2 * nll, rel=1e-5)


def test_another_part_that_does_not_fit(tmp_path: Path) -> None:
    """Out of memory in the second part: the whole step is done again, with the same result."""
    samples = make_samples(LENGTHS, 1)
    lesson, found = make_lesson(samples), []
    for limit in (10**6, 15):
        role = full_role(make_base("llama"))
        engine = make_engine(tmp_path / str(limit), role, 100, packed=True)
        part = other_text(role)

        def loss(batch: Batch, group: list[int], part: Part = part, limit: int = limit) -> Losses:
            if batch.tokens > limit:
                raise torch.OutOfMemoryError("simulated")
            return part.loss(batch, group)

        own = policy_loss(role, PPOSettings(), lesson, CHUNK, Coefficients(0.0, None))
        also = part._replace(loss=loss)
        metrics = engine.update(role, [samples[k] for k in CHUNK], own, counts(lesson, CHUNK, ROOM), also=also)
        found.append((metrics, role.tensors(), engine.tokens))
        assert (engine.budget < 100) == (limit == 15)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
    assert found[1][2] == found[0][2]
    for name, tensor in found[1][1].items():
        torch.testing.assert_close(tensor, found[0][1][name], rtol=1e-4, atol=1e-6, msg=name)
