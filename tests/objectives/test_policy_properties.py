"""Laws of the policy gradient that hold whatever the numbers are, and a bandit that every estimator solves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.catalog import ESTIMATORS
from rlhf_cli.objectives.kl import k1, k2, k3, k3_plus
from rlhf_cli.objectives.masked import whiten
from rlhf_cli.objectives.policy import clipped_policy, sequence_log_ratio, total, total_of_means
from tests.objectives.support import INF, NAN, close, doubles, finite

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
WIDTH = 5
row = st.tuples(st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH), st.integers(0, 3))
rollouts = st.lists(row, min_size=1, max_size=7)
Rollout = list[tuple[list[bool], int]]


class World:
    """Made-up numbers of a rollout: rewards, values, mask (B, T), group, greedy (B,)."""

    def __init__(self, drawn: Rollout, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(drawn), WIDTH)
        self.mask = torch.tensor([bits for bits, _ in drawn])
        self.group = torch.tensor([g for _, g in drawn])
        self.rewards = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
        self.values = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.greedy = torch.randn(4, generator=generator, dtype=torch.float64)[self.group]

    def picked(self, rows: Tensor) -> World:
        """Some rows, in that order."""
        other = object.__new__(World)
        for name, value in vars(self).items():
            setattr(other, name, value[rows])
        return other

    def estimate(self, name: str, **changes: Tensor) -> Any:
        """What an estimator says with its default settings."""
        entry = ESTIMATORS[name]
        given = vars(self) | changes
        values = given["values"] if entry.critic else None
        greedy = given["greedy"] if entry.greedy else None
        return entry.load()(
            given["rewards"], values, given["mask"], given["group"], greedy, **entry.settings().model_dump()
        )


@every_estimator
@given(rollouts, st.integers(0, 1000), st.randoms(use_true_random=False))
@quick
def test_the_order_of_the_rows_does_not_matter(name: str, drawn: Rollout, seed: int, random: Any) -> None:
    world = World(drawn, seed)
    order = torch.tensor(random.sample(range(len(drawn)), len(drawn)))
    one, other = world.estimate(name), world.picked(order).estimate(name)
    close(other.advantages, one.advantages[order], 1e-9)
    close(other.returns, one.returns[order], 1e-9)


@every_estimator
@given(rollouts, st.integers(0, 1000), st.sampled_from([NAN, INF, -INF, 1e30]), st.integers(0, 4))
@quick
def test_padding_does_not_matter(name: str, drawn: Rollout, seed: int, junk: float, more: int) -> None:
    """Neither what stands in it nor how much there is."""
    world = World(drawn, seed)
    one = world.estimate(name)
    room = torch.full((len(drawn), more), junk, dtype=torch.float64)
    rewards = torch.cat([torch.where(world.mask, world.rewards, junk), room], dim=1)
    values = torch.cat([torch.where(world.mask, world.values, junk), room], dim=1)
    mask = torch.cat([world.mask, torch.zeros_like(room, dtype=torch.bool)], dim=1)
    other = world.estimate(name, rewards=rewards, values=values, mask=mask)
    close(other.advantages[:, :WIDTH], one.advantages, 1e-9)
    close(other.returns[:, :WIDTH], one.returns, 1e-9)
    assert bool((other.advantages[~mask] == 0).all())
    assert bool((other.returns[~mask] == 0).all())
    assert finite(*other)


@every_estimator
@given(rollouts, st.integers(0, 1000), st.integers(0, 3), st.integers(1, 3))
@quick
def test_completions_without_tokens_do_not_matter(
    name: str, drawn: Rollout, seed: int, prompt: int, count: int
) -> None:
    empty = [([False] * WIDTH, prompt)] * count
    whole = World(drawn + empty, seed)
    rows = torch.arange(len(drawn))
    close(whole.estimate(name).advantages[rows], whole.picked(rows).estimate(name).advantages, 1e-9)


@every_estimator
@given(rollouts, st.integers(0, 1000), st.permutations([11, -4, 0, 700]))
@quick
def test_names_of_groups_do_not_matter(name: str, drawn: Rollout, seed: int, names: list[int]) -> None:
    world = World(drawn, seed)
    close(world.estimate(name, group=torch.tensor(names)[world.group]).advantages, world.estimate(name).advantages)


@given(rollouts, st.integers(0, 1000), st.floats(-50, 50), st.floats(0.1, 10))
@quick
def test_groups_do_not_see_the_level_of_the_scores(drawn: Rollout, seed: int, shift: float, scale: float) -> None:
    world = World(drawn, seed)
    last = torch.zeros_like(world.rewards)
    last[:, -1] = 1.0
    mask = world.mask.clone()
    mask[:, -1] = True
    moved = world.rewards + shift * last
    for name in ("rloo", "dr_grpo"):
        plain = world.estimate(name, mask=mask).advantages
        close(world.estimate(name, mask=mask, rewards=moved).advantages, plain, 1e-6)
        close(world.estimate(name, mask=mask, rewards=scale * world.rewards).advantages, scale * plain, 1e-6)
    grpo = ESTIMATORS["grpo"].load()
    plain, other = (grpo(x, None, mask, world.group, None, epsilon=1e-12) for x in (world.rewards, scale * moved))
    close(other.advantages, plain.advantages, 1e-6)


@given(rollouts, st.integers(0, 1000))
@quick
def test_rloo_is_the_mean_of_the_others(drawn: Rollout, seed: int) -> None:
    world = World(drawn, seed)
    found = world.estimate("rloo").advantages
    scores = torch.where(world.mask, world.rewards, 0.0).sum(1)
    for i, (bits, g) in enumerate(drawn):
        others = [float(scores[j]) for j, (own, h) in enumerate(drawn) if h == g and j != i and any(own)]
        wanted = float(scores[i]) - sum(others) / len(others) if others else 0.0
        close(found[i], doubles(*(wanted * bit for bit in bits)), 1e-9)


owned = st.lists(st.tuples(st.integers(0, 4), st.floats(-6, 6), st.floats(-3, 3)), min_size=1, max_size=12)


@given(owned)
@quick
def test_completions_are_alone_under_a_sequence_ratio(drawn: list[tuple[int, float, float]]) -> None:
    owners = torch.tensor([o for o, _, _ in drawn])
    logp, advantages = (torch.tensor([x[k] for x in drawn], dtype=torch.float64) for k in (1, 2))
    zero = torch.zeros_like(logp)
    clip: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": None}
    whole, _ = clipped_policy(sequence_log_ratio(logp, zero, owners, 5), zero, advantages, **clip)
    parts = 0.0
    for o in range(5):
        own = owners == o
        n = int(own.sum())
        of = sequence_log_ratio(logp[own], zero[own], torch.zeros(n, dtype=torch.int64), 1)
        part, _ = clipped_policy(of, zero[own], advantages[own], **clip)
        close(whole[own], part, 1e-9)
        parts += float(part.mean()) if n else 0.0
    assert float(total_of_means(whole, owners, 5)) == pytest.approx(parts)
    assert float(total(whole, owners, 5)) == pytest.approx(float(whole.sum()))


@given(st.lists(st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0)), min_size=1, max_size=6))
@quick
def test_estimates_of_the_kl(drawn: list[tuple[float, float]]) -> None:
    own, other = (torch.tensor([x[k] for x in drawn]) for k in (0, 1))
    for estimate in (k1, k2, k3, k3_plus):
        assert finite(estimate(own, other))
        assert bool((estimate(own, own) == 0).all())
    for estimate in (k2, k3, k3_plus):
        assert bool((estimate(own, other) >= 0).all())
    close(k3_plus(own, other), k3(own, other), 1e-4)


@every_estimator
def test_a_bandit_is_solved(name: str) -> None:
    """Three tokens of six, even ones pay: 32 rollouts of 8 prompts x 8 completions, whatever the estimator."""
    entry, generator = ESTIMATORS[name], torch.Generator().manual_seed(0)
    logits = torch.zeros(3, 6, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    group, mask = torch.arange(64) // 8, torch.ones(64, 3, dtype=torch.bool)
    score = torch.zeros(64)
    for _ in range(32):
        with torch.no_grad():
            drawn = torch.multinomial(torch.softmax(logits, -1), 64, replacement=True, generator=generator).T  # (64, 3)
            old = torch.log_softmax(logits, -1)[torch.arange(3), drawn]
        score = (drawn % 2 == 0).float().mean(1)
        rewards = torch.zeros(64, 3)
        rewards[:, -1] = score
        greedy = (logits.argmax(-1) % 2 == 0).float().mean().expand(64)
        advantages, _ = entry.load()(
            rewards, torch.full((64, 3), 0.5), mask, group, greedy, **entry.settings().model_dump()
        )
        for _ in range(2):
            logp = torch.log_softmax(logits, -1)[torch.arange(3), drawn]
            loss, _ = clipped_policy(logp, old, whiten(advantages, mask), clip_low=0.2, clip_high=0.2, dual_clip=None)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    assert float(score.mean()) > 0.9
