"""Advantage estimators. B rows, T slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.objectives.support import INF, NAN, checks_of, close, refuses


def by_loop(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages and returns of one row of its own length, from the definition: sum of (gamma lam)^k delta_{t+k}."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def example() -> tuple[Tensor, Tensor, Tensor]:
    """rewards, values, mask (5, 8): full, short, one token, none, and one with holes; noise in the masked slots."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    values = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(8)[None] < torch.tensor([8, 5, 1, 0, 7])[:, None]
    mask[4, 2] = mask[4, 3] = mask[4, 0] = False
    return rewards, values, mask


def check_gae_by_hand(m: Any) -> None:
    # delta_2 = 2 - 1.5 = 0.5, delta_1 = 1 + 0.9 x 1.5 - 0.5 = 1.85, A_1 = 1.85 + 0.9 x 0.8 x 0.5 = 2.21.
    everything = torch.ones(1, 2, dtype=torch.bool)
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.5]])
    out = m.gae(rewards, values, everything, None, gamma=0.9, lam=0.8)
    close(out.advantages, [[2.21, 0.5]], 1e-6)
    close(out.returns, [[2.71, 2.0]], 1e-6)
    last = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    out = m.gae(last, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), None, gamma=1.0, lam=0.5)
    close(out.advantages, [[1 / 8, 1 / 4, 1 / 2, 1.0]])


def check_gae_is_the_loop(m: Any) -> None:
    rewards, values, mask = example()
    for gamma, lam in ((1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)):
        out = m.gae(rewards, values, mask, torch.arange(5), gamma=gamma, lam=lam)
        for row in range(5):
            own = mask[row]
            advantages, returns = by_loop(rewards[row, own].tolist(), values[row, own].tolist(), gamma, lam)
            close(out.advantages[row, own], advantages, 1e-9)
            close(out.returns[row, own], returns, 1e-9)
        assert bool((out.advantages[~mask] == 0).all())
        assert bool((out.returns[~mask] == 0).all())


def check_gae_lam_one(m: Any) -> None:
    rewards, values, mask = example()
    rewards, values, mask = rewards[:2], values[:2], mask[:2]
    out = m.gae(rewards, values, mask, None, gamma=1.0, lam=1.0)
    counted = torch.where(mask, rewards, 0.0)
    to_go = counted.flip(1).cumsum(1).flip(1)
    close(out.returns[mask], to_go[mask])
    close(out.advantages[mask], (to_go - values)[mask])


def check_gae_lam_zero(m: Any) -> None:
    rewards, values, mask = example()
    out = m.gae(rewards[:1], values[:1], mask[:1], None, gamma=0.9, lam=0.0)
    after = torch.cat([values[:1, 1:], torch.zeros(1, 1)], dim=1)
    close(out.advantages, rewards[:1] + 0.9 * after - values[:1])


def check_gae_holes_are_deleted(m: Any) -> None:
    rewards, values, mask = example()
    own = mask[4]
    with_holes = m.gae(rewards[4:], values[4:], mask[4:], None, gamma=0.9, lam=0.8)
    deleted = m.gae(rewards[4:, own], values[4:, own], mask[4:, own], None, gamma=0.9, lam=0.8)
    close(with_holes.advantages[:, own], deleted.advantages)
    close(with_holes.returns[:, own], deleted.returns)


def check_gae_rows_are_alone(m: Any) -> None:
    rewards, values, mask = example()
    together = m.gae(rewards, values, mask, None, gamma=0.95, lam=0.9)
    short = m.gae(rewards[1:2, :5], values[1:2, :5], mask[1:2, :5], None, gamma=0.95, lam=0.9)
    close(together.advantages[1:2, :5], short.advantages)
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = m.gae(rewards[order], values[order], mask[order], None, gamma=0.95, lam=0.9)
    close(turned.advantages, together.advantages[order])
    close(turned.returns, together.returns[order])


def check_gae_garbage(m: Any) -> None:
    rewards, values, mask = example()
    clean = m.gae(rewards, values, mask, None, gamma=0.95, lam=0.9)
    for junk in (NAN, INF, -INF, 1e30):
        dirty = m.gae(
            torch.where(mask, rewards, junk), torch.where(mask, values, junk), mask, None, gamma=0.95, lam=0.9
        )
        close(dirty.advantages, clean.advantages)
        close(dirty.returns, clean.returns)


def check_gae_perfect_critic(m: Any) -> None:
    rewards, _, mask = example()
    counted = torch.where(mask, rewards, 0.0)
    to_go = counted.flip(1).cumsum(1).flip(1)
    out = m.gae(rewards, to_go, mask, None, gamma=1.0, lam=0.95)
    close(out.advantages, torch.zeros(5, 8), 1e-9)


def check_gae_edges(m: Any) -> None:
    none = torch.zeros(2, 0)
    out = m.gae(none, none, none.bool(), None, gamma=1.0, lam=0.9)
    assert out.advantages.shape == out.returns.shape == (2, 0)
    one = m.gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[True]]), None, gamma=0.9, lam=0.9)
    close(one.advantages, [[1.5]])
    close(one.returns, [[2.0]])
    assert refuses(ValueError, m.gae, none, None, none.bool(), None, gamma=1.0, lam=0.9)


CHECKS = checks_of(globals())
