"""Advantage estimators. B rows, T slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import advantage
from tests.objectives.support import INF, NAN, Check, checks_of, close, leaf, refuses


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


def gae(m: Any, rewards: Tensor, values: Tensor | None, mask: Tensor, gamma: float, lam: float, **more: Any) -> Any:
    """Generalised advantage estimation with one lambda, unless `more` says otherwise."""
    settings = {"gamma": gamma, "lam": lam, "lam_critic": None, "length_adaptive": None} | more
    return m.gae(rewards, values, mask, None, None, **settings)


def check_gae_by_hand(m: Any) -> None:
    # delta_2 = 2 - 1.5 = 0.5, delta_1 = 1 + 0.9 x 1.5 - 0.5 = 1.85, A_1 = 1.85 + 0.9 x 0.8 x 0.5 = 2.21.
    everything = torch.ones(1, 2, dtype=torch.bool)
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.5]])
    out = gae(m, rewards, values, everything, 0.9, 0.8)
    close(out.advantages, [[2.21, 0.5]], 1e-6)
    close(out.returns, [[2.71, 2.0]], 1e-6)
    last = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    out = gae(m, last, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), 1.0, 0.5)
    close(out.advantages, [[1 / 8, 1 / 4, 1 / 2, 1.0]])


def check_gae_is_the_loop(m: Any) -> None:
    rewards, values, mask = example()
    for gamma, lam in ((1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)):
        out = gae(m, rewards, values, mask, gamma, lam)
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
    out = gae(m, rewards, values, mask, 1.0, 1.0)
    counted = torch.where(mask, rewards, 0.0)
    to_go = counted.flip(1).cumsum(1).flip(1)
    close(out.returns[mask], to_go[mask])
    close(out.advantages[mask], (to_go - values)[mask])


def check_gae_lam_zero(m: Any) -> None:
    rewards, values, mask = example()
    out = gae(m, rewards[:1], values[:1], mask[:1], 0.9, 0.0)
    after = torch.cat([values[:1, 1:], torch.zeros(1, 1)], dim=1)
    close(out.advantages, rewards[:1] + 0.9 * after - values[:1])


def check_gae_holes_are_deleted(m: Any) -> None:
    rewards, values, mask = example()
    own = mask[4]
    with_holes = gae(m, rewards[4:], values[4:], mask[4:], 0.9, 0.8)
    deleted = gae(m, rewards[4:, own], values[4:, own], mask[4:, own], 0.9, 0.8)
    close(with_holes.advantages[:, own], deleted.advantages)
    close(with_holes.returns[:, own], deleted.returns)


def check_gae_rows_are_alone(m: Any) -> None:
    rewards, values, mask = example()
    together = gae(m, rewards, values, mask, 0.95, 0.9)
    short = gae(m, rewards[1:2, :5], values[1:2, :5], mask[1:2, :5], 0.95, 0.9)
    close(together.advantages[1:2, :5], short.advantages)
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = gae(m, rewards[order], values[order], mask[order], 0.95, 0.9)
    close(turned.advantages, together.advantages[order])
    close(turned.returns, together.returns[order])


def check_gae_garbage(m: Any) -> None:
    rewards, values, mask = example()
    clean = gae(m, rewards, values, mask, 0.95, 0.9)
    for junk in (NAN, INF, -INF, 1e30):
        dirty = gae(m, torch.where(mask, rewards, junk), torch.where(mask, values, junk), mask, 0.95, 0.9)
        close(dirty.advantages, clean.advantages)
        close(dirty.returns, clean.returns)


def check_gae_perfect_critic(m: Any) -> None:
    rewards, _, mask = example()
    counted = torch.where(mask, rewards, 0.0)
    to_go = counted.flip(1).cumsum(1).flip(1)
    out = gae(m, rewards, to_go, mask, 1.0, 0.95)
    close(out.advantages, torch.zeros(5, 8), 1e-9)


def check_gae_edges(m: Any) -> None:
    none = torch.zeros(2, 0)
    out = gae(m, none, none, none.bool(), 1.0, 0.9)
    assert out.advantages.shape == out.returns.shape == (2, 0)
    one = gae(m, torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[True]]), 0.9, 0.9)
    close(one.advantages, [[1.5]])
    close(one.returns, [[2.0]])
    assert refuses(ValueError, gae, m, none, None, none.bool(), 1.0, 0.9)


def check_gae_lam_critic(m: Any) -> None:
    rewards, values, mask = example()
    one, other = gae(m, rewards, values, mask, 0.97, 0.9), gae(m, rewards, values, mask, 0.97, 0.4)
    both = gae(m, rewards, values, mask, 0.97, 0.9, lam_critic=0.4)
    close(both.advantages, one.advantages)
    close(both.returns, other.returns)
    assert float((one.returns - other.returns).abs().max()) > 0.1


def check_gae_length_adaptive(m: Any) -> None:
    # alpha 0.5: 8 tokens give 1 - 1 / 4, 5 give 1 - 1 / 2.5, 4 (7 less 3 masked) 1 - 1 / 2, and 1 not -1 but 0.
    rewards, values, mask = example()
    out = gae(m, rewards, values, mask, 0.97, 0.9, length_adaptive=0.5)
    for row, lam in enumerate((0.75, 0.6, 0.0, 0.0, 0.5)):
        own = mask[row]
        advantages, returns = by_loop(rewards[row, own].tolist(), values[row, own].tolist(), 0.97, lam)
        close(out.advantages[row, own], advantages, 1e-9)
        close(out.returns[row, own], returns, 1e-9)
    # Two tokens: 1 - 1 / (0.6 x 2) = 1 / 6; V = 0, gamma 1: A_1 = r_1 + r_2 / 6.
    two = gae(m, torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool(), 1.0, 0.9, length_adaptive=0.6)
    close(two.advantages, [[7 / 6, 1.0]], 1e-6)
    # 1 - 1 / (0.4 x 2) is negative: 0.
    two = gae(m, torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool(), 1.0, 0.9, length_adaptive=0.4)
    close(two.advantages, [[1.0, 1.0]], 1e-6)
    critic = gae(m, rewards, values, mask, 0.97, 0.9, length_adaptive=0.5, lam_critic=1.0)
    close(critic.advantages, out.advantages)
    close(critic.returns, gae(m, rewards, values, mask, 0.97, 1.0).returns)


def check_gae_is_a_constant(m: Any) -> None:
    rewards, values, mask = (torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool))
    out = gae(m, leaf(rewards), leaf(values), mask, 1.0, 0.9, lam_critic=1.0)
    assert not out.advantages.requires_grad
    assert not out.returns.requires_grad


def check_gae_half_precision(m: Any) -> None:
    # 300 tokens of reward 1: bfloat16 cannot count beyond 256.
    rewards, mask = torch.ones(1, 300, dtype=torch.bfloat16), torch.ones(1, 300, dtype=torch.bool)
    out = gae(m, rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    assert out.advantages.dtype == out.returns.dtype == torch.float32
    assert float(out.advantages[0, 0]) == 300.0


MODULE = advantage
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("gae: without the mask", check_gae_is_the_loop, "        here = mask[:, t]\n",
     "        here = torch.ones_like(mask[:, t])\n"),
    ("gae: values of masked slots", check_gae_is_the_loop, "next_value = torch.where(here, values[:, t], next_value)",
     "next_value = values[:, t]"),
    ("gae: lambda forgotten", check_gae_by_hand, "gamma * lam * carried", "gamma * carried"),
    ("gae: values one late", check_gae_by_hand, "gamma * next_value - values[:, t]",
     "gamma * values[:, t] - next_value"),
    ("gae: returns are the advantages", check_gae_by_hand, "torch.where(mask, wide + values,",
     "torch.where(mask, wide,"),
    ("gae: the critic's lambda for the policy", check_gae_lam_critic,
     "return Estimate(advantages, torch.where(mask, wide", "return Estimate(wide, torch.where(mask, wide"),
    ("gae: lambda from the padded length", check_gae_length_adaptive, "length = mask.sum(1)",
     "length = torch.full_like(mask.sum(1), mask.shape[1])"),
    ("gae: negative lambda for short completions", check_gae_length_adaptive,
     "(1.0 - 1.0 / (length_adaptive * length)).clamp(min=0.0)", "1.0 - 1.0 / (length_adaptive * length)"),
    ("gae: missing detach", check_gae_is_a_constant, "full_precision(x.detach())", "full_precision(x)"),
    ("gae: in half precision", check_gae_half_precision, "(x,) = full_precision(x.detach())", "x = x.detach()"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "gae: dropped: torch.where(mask, wide + values, torch.zeros_like(values)) -> _same(wide + values)":
        "what stands under a mask that is put on again",
}  # fmt: skip
