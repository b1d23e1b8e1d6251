"""PPO's losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import policy
from tests.objectives.support import (
    Check,
    checks_of,
    close,
    differentiates,
    doubles,
    finite,
    gradients,
    leaf,
    untouched,
)

PLAIN: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
CASES: list[tuple[float, float, dict[str, Any], float, float, bool]] = [
    # ratio, advantage, settings, loss, d loss / d logp, did the clip decide
    (1.5, 2.0, {}, -2.4, 0.0, True),  # above, good: min(3, 1.2 x 2)
    (1.5, -2.0, {}, 3.0, 3.0, False),  # above, bad: min(-3, -2.4): pulled back with full force
    (1.1, 2.0, {}, -2.2, -2.2, False),  # inside: the plain ratio, its gradient is ratio x -A
    (1.1, -2.0, {}, 2.2, 2.2, False),
    (0.5, 2.0, {}, -1.0, -1.0, False),  # below, good: min(1, 0.8 x 2)
    (0.5, -2.0, {}, 1.6, 0.0, True),  # below, bad: min(-1, -1.6)
    (1.0, 2.0, {}, -2.0, -2.0, False),  # ratio 1: the policy gradient, -A
    (1.0, -2.0, {}, 2.0, 2.0, False),
    (1.5, 0.0, {}, 0.0, 0.0, False),
    (1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5, False),  # a wider upper side
    (1.35, 2.0, {"clip_high": 0.28}, -2.56, 0.0, True),
    (0.75, -2.0, {"clip_high": 0.28}, 1.6, 0.0, True),  # leaves the lower side alone
    (0.7, -2.0, {"clip_low": 0.4}, 1.4, 1.4, False),  # a wider lower side
    (1.25, 2.0, {"clip_low": 0.4}, -2.4, 0.0, True),
    (5.0, -2.0, {}, 10.0, 10.0, False),  # without the dual clip: unbounded
    (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0, False),  # bounded at 3 x 2
    (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0, False),  # within the bound
    (0.5, -2.0, {"dual_clip": 3.0}, 1.6, 0.0, True),
    (5.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0, True),  # never for a good action
    (0.5, 2.0, {"dual_clip": 3.0}, -1.0, -1.0, False),
    (5.0, 0.0, {"dual_clip": 3.0}, 0.0, 0.0, False),
]


def check_ratio(m: Any) -> None:
    close(m.ratio(doubles(-1, -2, -3), doubles(-1, -3, -2)), [1.0, math.e, 1 / math.e])
    close(m.ratio(doubles(0, -1e4), doubles(-1e4, 0)).log(), [20.0, -20.0])
    close(m.ratio(doubles(19.9, -19.9), doubles(0, 0)), [math.exp(19.9), math.exp(-19.9)])
    x = leaf(doubles(0.5))
    (g,) = gradients(m.ratio(x, doubles(0)), x)
    close(g, [math.exp(0.5)])


def check_clip_table(m: Any) -> None:
    for ratio, advantage, changes, loss, slope, decided in CASES:
        old = doubles(-1.5)
        logp = leaf(old + math.log(ratio))
        got, clipped = m.clipped_policy(logp, old, doubles(advantage), **(PLAIN | changes))
        case = f"ratio {ratio}, advantage {advantage}, {changes}"
        assert math.isclose(got.item(), loss, abs_tol=1e-9), case
        assert clipped.dtype == torch.bool, case
        assert bool(clipped) is decided, case
        (g,) = gradients(got, logp)
        assert math.isclose(float(g), slope, abs_tol=1e-9), case


def check_first_pass(m: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 4, generator=generator) * 9
    advantages = torch.randn(3, 4, generator=generator)
    logp = leaf(old)
    loss, clipped = m.clipped_policy(logp, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert bool((loss == -advantages).all())
    assert not clipped.any()
    assert bool((m.ratio(logp, old) == 1).all())
    (g,) = gradients(loss, logp)
    assert bool((g == -advantages).all())


def check_policy_takes_the_only_gradient(m: Any) -> None:
    logp, old, advantages = leaf(doubles(-1, -2)), leaf(doubles(-1.1, -1.9)), leaf(doubles(1, -1))
    loss, clipped = m.clipped_policy(logp, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert untouched(loss, old, advantages)
    assert not untouched(loss, logp)
    assert not clipped.requires_grad


def check_policy_extremes(m: Any) -> None:
    logp = leaf(torch.tensor([0.0, 0.0, -1e4, -1e4]))
    old = torch.tensor([-1e4, -1e4, 0.0, 0.0])
    for dual in (None, 3.0):
        settings = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": dual}
        loss, _ = m.clipped_policy(logp, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), **settings)
        assert finite(loss, *gradients(loss, logp))
    empty, clipped = m.clipped_policy(torch.zeros(0), torch.zeros(0), torch.zeros(0), **PLAIN)
    assert empty.shape == clipped.shape == (0,)


def check_policy_finite_differences(m: Any) -> None:
    old = doubles(-1, -2, -3, -1, -2, -3)
    logp = old + doubles(0.5, 0.1, -0.7, 0.5, 0.1, -0.7)
    advantages = doubles(1, 2, 3, -1, -2, -3)
    for dual in (None, 1.3):
        settings = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": dual}
        assert differentiates(lambda x, s=settings: m.clipped_policy(x, old, advantages, **s)[0], logp)


OWNERS = torch.tensor([0, 0, 2, 0, 2])
"""Of five tokens: three of completion 0, two of completion 2, none of completion 1."""


def check_completion_means(m: Any) -> None:
    x = leaf(doubles(1, 2, 5, 6, 8))
    close(m.completion_means(x, OWNERS, 3), [3.0, 0.0, 6.5])
    close(gradients(m.completion_means(x, OWNERS, 3), x)[0], [1 / 3, 1 / 3, 1 / 2, 1 / 3, 1 / 2])
    assert m.completion_means(torch.zeros(0), OWNERS[:0], 0).shape == (0,)
    close(m.completion_means(doubles(4), OWNERS[:1], 1), [4.0])


def check_aggregates(m: Any) -> None:
    # (1 + 2 + 6) / 3 + (5 + 8) / 2 = 9.5 for two completions; 22 for five tokens.
    x = doubles(1, 2, 5, 6, 8)
    assert float(m.total(x, OWNERS, 3)) == 22.0
    assert float(m.total_of_means(x, OWNERS, 3)) == 9.5
    assert differentiates(lambda y: m.total_of_means(y, OWNERS, 3), x)
    assert differentiates(lambda y: m.total(y, OWNERS, 3), x)


def check_sequence_log_ratio(m: Any) -> None:
    # Log-ratios 0.1, 0.4, 1 | 0.3, -0.5: means 0.5 and -0.1, at each of their tokens.
    old = doubles(-1, -2, -3, -1, -2)
    logp = old + doubles(0.1, 0.4, 0.3, 1.0, -0.5)
    found = m.sequence_log_ratio(logp, old, OWNERS, 3)
    close(found, [0.5, 0.5, -0.1, 0.5, -0.1])
    assert bool((m.sequence_log_ratio(old, old, OWNERS, 3) == 0).all())
    assert differentiates(lambda x: m.sequence_log_ratio(x, old, OWNERS, 3), logp)
    moved = leaf(old)
    assert untouched(m.sequence_log_ratio(leaf(logp), moved, OWNERS, 3), moved)


def check_sequence_ratio_clips_whole_completions(m: Any) -> None:
    # Ratio exp(0.5) of completion 0 with A = 2 is clipped at 1.2 for all its tokens; exp(-0.1) of 2 is not.
    old = doubles(-1, -2, -3, -1, -2)
    logp = leaf(old + doubles(0.1, 0.4, 0.3, 1.0, -0.5))
    of = m.sequence_log_ratio(logp, old, OWNERS, 3)
    loss, clipped = m.clipped_policy(of, torch.zeros_like(old), doubles(2, 2, 3, 2, 3), **PLAIN)
    low = -3 * math.exp(-0.1)
    close(loss, [-2.4, -2.4, low, -2.4, low])
    assert clipped.tolist() == [True, True, False, True, False]
    # A loss of a completion is the mean of its tokens: its gradient is shared out, rho A / L each.
    (g,) = gradients(m.total_of_means(loss, OWNERS, 3), logp)
    close(g, [0.0, 0.0, low / 2, 0.0, low / 2])


def check_sequence_log_ratio_extremes(m: Any) -> None:
    logp = leaf(torch.tensor([0.0, 0.0, -1e4, 0.0, -1e4]))
    of = m.sequence_log_ratio(logp, torch.tensor([-1e4, -1e4, 0.0, -1e4, 0.0]), OWNERS, 3)
    loss, _ = m.clipped_policy(of, torch.zeros(5), torch.ones(5), **PLAIN)
    assert finite(loss, *gradients(loss, logp))


def _value(m: Any, value: float, old: float, target: float, clip: float | None) -> tuple[float, float, bool]:
    """Loss, gradient, did the clip decide."""
    v = leaf(doubles(value))
    loss, clipped = m.clipped_value(v, doubles(old), doubles(target), value_clip=clip)
    assert clipped.dtype == torch.bool
    (g,) = gradients(loss, v)
    return round(loss.item(), 9), round(g.item(), 9), bool(clipped)


def check_value_by_hand(m: Any) -> None:
    # Old value 0.5, target 0, clip 0.2, so the clipped value lies in 0.3 ... 0.7.
    assert _value(m, 1.0, 0.5, 0.0, 0.2) == (0.5, 1.0, False)  # max(1, 0.49) / 2
    assert _value(m, 0.1, 0.5, 0.0, 0.2) == (0.045, 0.0, True)  # max(0.01, 0.09) / 2: no reward for going far
    assert _value(m, 0.6, 0.5, 0.0, 0.2) == (0.18, 0.6, False)  # inside: the plain error
    assert _value(m, 1.0, 0.5, 2.0, 0.2) == (0.845, 0.0, True)  # max(1, 1.3 ** 2) / 2
    assert _value(m, 0.5, 0.5, 2.0, 0.2) == (1.125, -1.5, False)  # unchanged: the plain gradient
    assert _value(m, 0.1, 0.5, 0.0, None) == (0.005, 0.1, False)
    assert _value(m, 0.1, 0.5, 0.0, 5.0) == (0.005, 0.1, False)


def check_value_first_pass(m: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    old, target = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    values = leaf(old)
    loss, clipped = m.clipped_value(values, old, target, value_clip=0.2)
    plain, never = m.clipped_value(values, old, target, value_clip=None)
    assert bool((loss == plain).all())
    assert not clipped.any()
    assert not never.any()
    (g,) = gradients(loss, values)
    close(g, old - target, 1e-6)


def check_value_inside_is_never_clipped(m: Any) -> None:
    # old + (value - old) is not value to the last bit: that must not count as a decision of the clip.
    generator = torch.Generator().manual_seed(1)
    old = torch.rand(4000, generator=generator) * 0.19
    values = torch.rand(4000, generator=generator) * 0.19
    _, clipped = m.clipped_value(values, old, torch.zeros(4000), value_clip=0.2)
    assert not clipped.any()


def check_value_takes_the_only_gradient(m: Any) -> None:
    for clip in (0.2, None):
        values, old, target = leaf(doubles(1, 2)), leaf(doubles(0, 2)), leaf(doubles(3, -1))
        loss, clipped = m.clipped_value(values, old, target, value_clip=clip)
        assert untouched(loss, old, target)
        assert not untouched(loss, values)
        assert not clipped.requires_grad


def check_value_finite_differences(m: Any) -> None:
    old, target = doubles(0.5, 0.5, 0.5, 0.5), doubles(0, 0, 2, 2)

    def loss(values: Tensor, clip: float | None) -> Tensor:
        return m.clipped_value(values, old, target, value_clip=clip)[0]

    for clip in (0.2, None):
        assert differentiates(lambda v, c=clip: loss(v, c), doubles(1.0, 0.1, 0.6, 1.3))
    values = leaf(torch.tensor([1e4, -1e4]))
    out, _ = m.clipped_value(values, torch.zeros(2), torch.zeros(2), value_clip=0.2)
    assert finite(out, *gradients(out, values))


MODULE = policy
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("ppo: maximum", check_clip_table, "torch.minimum(plain, clipped)", "torch.maximum(plain, clipped)"),
    ("ppo: sign", check_clip_table, "return -surrogate", "return surrogate"),
    ("ppo: clip on the log-ratio", check_clip_table, "torch.clamp(rho, 1.0 - clip_low, 1.0 + clip_high)",
     "torch.exp(torch.clamp(torch.log(rho), -clip_low, clip_high))"),
    ("ppo: clip sides swapped", check_clip_table, "1.0 - clip_low, 1.0 + clip_high",
     "1.0 - clip_high, 1.0 + clip_low"),
    ("ppo: dual clip for all", check_clip_table, "torch.where(advantages < 0, torch.maximum(",
     "torch.where(advantages == advantages, torch.maximum("),
    ("ppo: unclamped ratio", check_policy_extremes, "torch.exp(torch.clamp(logp - old_logp, -20.0, 20.0))",
     "torch.exp(logp - old_logp)"),
    ("ppo: old log-probs take gradients", check_policy_takes_the_only_gradient, "ratio(logp, old_logp.detach())",
     "ratio(logp, old_logp)"),
    ("ppo: advantages take gradients", check_policy_takes_the_only_gradient, "advantages = advantages.detach()",
     "advantages = advantages"),
    ("value: minimum", check_value_by_hand, "0.5 * torch.maximum(plain, clipped)",
     "0.5 * torch.minimum(plain, clipped)"),
    ("value: clipped around the target", check_value_by_hand, "near = old_values + ", "near = returns + "),
    ("value: returns take gradients", check_value_takes_the_only_gradient, "returns = returns.detach()",
     "returns = returns"),
    ("value: rounding counted as a clip", check_value_inside_is_never_clipped, "outside & (clipped > plain)",
     "clipped > plain"),
    ("sequence ratio: a sum for a mean", check_sequence_log_ratio,
     "/ lengths(owners, count).clamp(min=1)", "* 1"),
    ("sequence ratio: no gradient", check_sequence_ratio_clips_whole_completions,
     "completion_means(logp - old_logp.detach(), owners, count)[owners]",
     "completion_means(logp.detach() - old_logp.detach(), owners, count)[owners]"),
    ("sequence ratio: old log-probs take gradients", check_sequence_log_ratio,
     "completion_means(logp - old_logp.detach()",
     "completion_means(logp - old_logp"),
    ("sequence ratio: mean of ratios", check_sequence_log_ratio,
     "completion_means(logp - old_logp.detach(), owners, count)[owners]",
     "completion_means((logp - old_logp.detach()).exp(), owners, count)[owners].log()"),
    ("aggregate: tokens for completions", check_aggregates, "return completion_means(x, owners, count).sum()",
     "return x.sum()"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "clipped_policy: boundary: advantages < 0 -> advantages <= 0": "both sides agree at the boundary",
    "clipped_value: boundary: (values - old_values).abs() > value_clip -> (values - old_values).abs() >= value_clip":
        "both sides agree at the boundary",
    "clipped_value: boundary: clipped > plain -> clipped >= plain": "both sides agree at the boundary",
}  # fmt: skip
