"""Laws of losses and estimates over tokens that hold whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.objectives.advantage import Estimate, gae
from rlhf_cli.objectives.kl import k3
from rlhf_cli.objectives.masked import masked_mean, whiten
from rlhf_cli.objectives.policy import clipped_policy, clipped_value
from tests.objectives.support import INF, NAN, close

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def by_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Estimate:
    """GAE of (B, T) with settings that use everything."""
    return gae(rewards, values, mask, None, None, gamma=0.99, lam=0.9, lam_critic=None, length_adaptive=None)


@given(st.floats(-30, 30), st.floats(-30, 30))
@quick
def test_k3_is_never_negative(one: float, other: float) -> None:
    assert float(k3(torch.tensor(one), torch.tensor(other))) >= 0
    assert math.isfinite(float(k3(torch.tensor(one), torch.tensor(other))))


masks = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5)


def noise(mask: Tensor, seed: int) -> Tensor:
    """Numbers of the shape of a mask."""
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@given(masks, st.integers(0, 1000), st.sampled_from([NAN, INF, -INF, 1e30]))
@quick
def test_what_stands_under_a_mask_changes_nothing(drawn: list[list[bool]], seed: int, junk: float) -> None:
    mask = torch.tensor(drawn)
    x, values = noise(mask, seed), noise(mask, seed + 1)
    functions: list[Callable[[Tensor, Tensor], Any]] = [
        lambda a, b: masked_mean(a, mask),
        lambda a, b: whiten(a, mask),
        lambda a, b: whiten(a, mask, shift_mean=False),
        lambda a, b: by_gae(a, b, mask).advantages,
        lambda a, b: by_gae(a, b, mask).returns,
    ]
    for function in functions:
        close(function(torch.where(mask, x, junk), torch.where(mask, values, junk)), function(x, values), 1e-12)


@given(st.floats(-4, 4), st.floats(-5, 5), st.floats(0.01, 0.9), st.floats(0.01, 3), st.floats(1.01, 5))
@quick
def test_the_clipped_loss_is_pessimistic(log_ratio: float, advantage: float, low: float, high: float, c: float) -> None:
    x, a = torch.tensor(log_ratio, dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    loss, decided = clipped_policy(x, zero, a, clip_low=low, clip_high=high, dual_clip=None)
    plain = -torch.exp(x) * a
    assert float(loss) >= float(plain) - 1e-12
    assert bool(decided) == (float(loss) > float(plain))
    dual, _ = clipped_policy(x, zero, a, clip_low=low, clip_high=high, dual_clip=c)
    assert float(dual) <= float(loss)
    if advantage >= 0:
        assert float(dual) == float(loss)
    else:
        assert float(dual) <= -c * advantage + 1e-12


@given(st.floats(-4, 4), st.floats(-4, 4), st.floats(-4, 4), st.floats(0.01, 3))
@quick
def test_the_clipped_value_is_pessimistic(value: float, old: float, target: float, clip: float) -> None:
    v, o, r = (torch.tensor(x, dtype=torch.float64) for x in (value, old, target))
    loss, decided = clipped_value(v, o, r, value_clip=clip)
    plain, _ = clipped_value(v, o, r, value_clip=None)
    assert float(loss) >= float(plain)
    close(plain, 0.5 * (v - r) ** 2, 1e-12)
    if bool(decided):
        assert abs(value - old) > clip
        assert float(loss) > float(plain)
