"""The Lagrange multiplier of PPO-Lag and the mixture of two streams. B completions, T slots."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from rlhf_cli.objectives import lagrange
from tests.objectives.support import Check, checks_of, close

USUAL: dict[str, Any] = {
    "threshold": 0.5, "init": 2.0, "learning_rate": 0.1, "max": 5.0, "window": 4, "delay_steps": 0
}  # fmt: skip


def made(m: Any, **changes: Any) -> Any:
    """A multiplier that starts at 2."""
    return m.Lagrange(**(USUAL | changes))


def check_mixed_by_hand(m: Any) -> None:
    # (3 - 2 x 1) / 3, (1 + 2 x 4) / 3
    close(m.mixed(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, -4.0]]), 2.0), [[1 / 3, 3.0]], 1e-6)
    rewards = torch.tensor([[0.3, -2.0]])
    close(m.mixed(rewards, torch.tensor([[9.0, 9.0]]), 0.0), rewards)


def check_mixed_pays_the_kl_once(m: Any) -> None:
    kl = torch.tensor([[0.2, -0.7, 1.1]])
    for multiplier in (0.0, 0.3, 1.0, 5.0):
        close(m.mixed(-0.05 * kl, 0.05 * kl, multiplier), -0.05 * kl, 1e-6)


def check_follow_by_hand(m: Any) -> None:
    # ln 2 + 0.1 x 2 x (mean(1, 0, 2) - 0.5) = ln 2 + 0.1
    one = made(m)
    one.follow([1.0, 0.0, 2.0])
    assert math.isclose(one.mean, 1.0)
    assert math.isclose(one.multiplier, 2.0 * math.exp(0.1), rel_tol=1e-12)
    # then the newest four of 1, 0, 2, -3, -4: mean -1.25
    before = one.multiplier
    one.follow([-3.0, -4.0])
    assert math.isclose(one.mean, -1.25)
    assert math.isclose(one.multiplier, before * math.exp(0.1 * before * (-1.25 - 0.5)), rel_tol=1e-12)


def check_follow_goes_the_right_way(m: Any) -> None:
    for costs, sign in (([0.9], 1), ([0.5], 0), ([0.1], -1)):
        one = made(m)
        for _ in range(3):
            before = one.multiplier
            one.follow(costs)
            assert (one.multiplier > before) - (one.multiplier < before) == sign
    assert one.multiplier > 0


def check_follow_has_a_ceiling(m: Any) -> None:
    one = made(m)
    one.follow([100.0])
    assert math.isclose(one.multiplier, 5.0, rel_tol=1e-12)
    one.follow([-100.0] * 4)  # and comes down from it at once
    assert one.multiplier < 1.0


def check_follow_waits(m: Any) -> None:
    one = made(m, delay_steps=2)
    for _ in range(2):
        one.follow([3.0])
        assert math.isclose(one.multiplier, 2.0)
    one.follow([3.0])
    assert one.multiplier > 2.0
    nothing = made(m)
    nothing.follow([])
    assert math.isclose(nothing.multiplier, 2.0)


def check_lagrange_goes_on(m: Any) -> None:
    one, other = made(m, delay_steps=1), made(m, delay_steps=1)
    one.follow([1.0, 7.0])
    one.follow([2.0])
    kept = json.loads(json.dumps(one.state_dict()))
    other.load_state_dict(kept)
    for costs in ([3.0, 0.25], [0.1]):
        one.follow(costs)
        other.follow(costs)
        assert (one.multiplier, one.mean) == (other.multiplier, other.mean)
    late = made(m, delay_steps=3)
    late.load_state_dict(kept)
    late.follow([9.0])
    assert late.multiplier == math.exp(kept["log"])  # the third of three rollouts to wait for


MODULE = lagrange
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("lambda: falls when it costs too much", check_follow_goes_the_right_way, "self.mean - self.threshold",
     "self.threshold - self.mean"),
    ("lambda: moved by a constant step", check_follow_by_hand, "self.learning_rate * self.multiplier *",
     "self.learning_rate *"),
    ("lambda: without a ceiling", check_follow_has_a_ceiling, "min(moved, self.limit)", "moved"),
    ("lambda: the mean of all costs so far", check_follow_by_hand, "[-self.window :]", ""),
    ("lambda: the window is lost", check_lagrange_goes_on, 'list(state["costs"])', "[]"),
    ("mixture: the cost is a reward", check_mixed_by_hand, "rewards - multiplier * costs",
     "rewards + multiplier * costs"),
    ("mixture: not a mean", check_mixed_pays_the_kl_once, "/ (1.0 + multiplier)", ""),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
