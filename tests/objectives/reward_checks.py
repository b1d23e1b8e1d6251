"""Reward and cost models. B examples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import reward
from tests.objectives.preference_support import LOG2, holds, sigma, softplus
from tests.objectives.support import (
    Check,
    checks_of,
    close,
    differentiates,
    doubles,
    gradients,
    leaf,
    refuses,
    untouched,
)

ONE = torch.ones


def bradley_terry(m: Any, chosen: Tensor, rejected: Tensor, margin: float = 0.0, centring: float = 0.0) -> Any:
    """With sure labels and one margin for all."""
    return m.bradley_terry(
        chosen, rejected, torch.full_like(chosen, margin), torch.ones_like(chosen), centring=centring
    )


# --- Bradley-Terry -------------------------------------------------------------------------------------


def check_bradley_terry_by_hand(m: Any) -> None:
    # 2 - 1 - 0.5 = 0.5: log(1 + e^-0.5) = 0.4740770; centring 0.01 x 3^2 = 0.09
    chosen, rejected = leaf(doubles(2)), leaf(doubles(1))
    plain = bradley_terry(m, chosen, rejected, 0.5)
    close(plain.loss, [0.4740770], 1e-7)
    close(plain.rewards, [[2.0, 1.0]])
    centred = bradley_terry(m, chosen, rejected, 0.5, 0.01)
    close(centred.loss, [0.5640770], 1e-7)
    # -sigma(-0.5) = -0.3775407; centring adds 2 x 0.01 x 3 = 0.06 to both
    close(torch.stack(gradients(plain.loss, chosen, rejected)), [[-0.3775407], [0.3775407]], 1e-7)
    close(torch.stack(gradients(centred.loss, chosen, rejected)), [[-0.3175407], [0.4375407]], 1e-7)
    assert not plain.rewards.requires_grad
    assert plain.likelihood == 0


def check_bradley_terry_soft_labels(m: Any) -> None:
    # d = 2 - 1 - 0.5: 0.7 x 0.4740770 + 0.3 x log(1 + e^0.5) = 0.3318539 + 0.3 x 0.9740770 = 0.6240770
    chosen, rejected, half = leaf(doubles(2)), leaf(doubles(1)), doubles(0.5)
    soft = m.bradley_terry(chosen, rejected, half, doubles(0.7), centring=0.0)
    close(soft.loss, [0.6240770], 1e-7)
    # sigma(d) - q = 0.6224593 - 0.7
    close(torch.cat(gradients(soft.loss, chosen, rejected)), [-0.0775407, 0.0775407], 1e-7)
    # A label of 0 turns the pair round; a label of 1/2 is at rest at equal scores.
    turned = m.bradley_terry(chosen, rejected, doubles(0), doubles(0), centring=0.0)
    close(turned.loss, bradley_terry(m, rejected, chosen).loss)
    even = leaf(doubles(3))
    close(m.bradley_terry(even, doubles(3), doubles(0), doubles(0.5), centring=0.0).loss, [LOG2])
    close(gradients(m.bradley_terry(even, doubles(3), doubles(0), doubles(0.5), centring=0.0).loss, even)[0], [0.0])


def check_bradley_terry_limits(m: Any) -> None:
    same = torch.tensor([0.0, 3.0])
    close(bradley_terry(m, same, same).loss, [LOG2, LOG2])
    close(bradley_terry(m, same, same, 1.0).loss, [softplus(1.0)] * 2)
    chosen, rejected = leaf(torch.tensor([-1e4, 1e4, -89.0, 17.0])), leaf(torch.tensor([1e4, -1e4, 0.0, 0.0]))
    far = bradley_terry(m, chosen, rejected)
    close(far.loss[:3], [2e4, 0.0, 89.0])
    g, h = gradients(far.loss, chosen, rejected)
    close(g[:3], [-1.0, 0.0, -1.0])
    close(g[3] * 1e8, -4.1399376, 1e-4)  # -sigma(-17) is not rounded to 0
    close(h, -g)
    soft = m.bradley_terry(chosen, rejected, torch.zeros(4), torch.full((4,), 0.3), centring=0.01)
    assert holds(soft, [chosen, rejected])
    assert differentiates(
        lambda a, b: m.bradley_terry(a, b, doubles(0, 0.5, 1), doubles(1, 0.2, 0.5), centring=0.01).loss,
        doubles(1, -2, 3),
        doubles(0, 2, 3),
    )


# --- regression ----------------------------------------------------------------------------------------


def check_regression_by_hand(m: Any) -> None:
    score, target = leaf(doubles(1.5, -2.0, 0.0, 3.0)), leaf(doubles(1.0, 1.0, 0.0, 2.0))
    squared = m.regression(score, target, loss="mse", delta=1.0)
    close(squared.loss, [0.25, 9.0, 0.0, 1.0])  # errors 0.5, -3, 0, 1
    close(squared.rewards, [[1.5], [-2.0], [0.0], [3.0]])
    assert not squared.rewards.requires_grad
    assert squared.likelihood == 0
    close(gradients(squared.loss, score)[0], [1.0, -6.0, 0.0, 2.0])
    assert untouched(squared.loss, target)
    # delta 2: 0.5 / 2 x 0.5; 2 x (3 - 1); 0; 1 / 2
    huber = m.regression(score, target, loss="huber", delta=2.0)
    close(huber.loss, [0.125, 4.0, 0.0, 0.5])
    close(gradients(huber.loss, score)[0], [0.5, -2.0, 0.0, 1.0])
    assert refuses(KeyError, m.regression, score, target, loss="l1", delta=1.0)
    for loss in ("mse", "huber"):
        assert differentiates(
            lambda s, loss=loss: m.regression(s, doubles(1, 1), loss=loss, delta=0.5).loss, doubles(1.2, 3)
        )


def check_regression_limits(m: Any) -> None:
    score = leaf(torch.tensor([1e4, -1e4, 0.0]))
    for loss in ("mse", "huber"):
        assert holds(m.regression(score, torch.zeros(3), loss=loss, delta=1.0), [score])
    # Scores of zero: the mean is the variance of targets of mean 0.
    targets = doubles(-1.5, 0.5, 1.0)
    close(m.regression(doubles(0, 0, 0), targets, loss="mse", delta=1.0).loss.mean(), targets.var(correction=0))


# --- cost ----------------------------------------------------------------------------------------------

SAFETY = torch.tensor([[True, False], [True, True], [False, False]])


def check_cost_by_hand(m: Any) -> None:
    # Costs -1 (safe) and 2 (unsafe): log(1 + e^-3) + log(1 + e^-1) + log(1 + e^-2); l2: 0.1 x (1 + 4) / 2 = 0.25
    chosen, rejected = leaf(doubles(-1, -1, -1)), leaf(doubles(2, 2, 2))
    judged = m.cost(chosen, rejected, SAFETY, l2=0.1)
    order = softplus(-3)
    close(
        judged.loss,
        [
            order + softplus(-1) + softplus(-2) + 0.25,
            order + softplus(-1) + softplus(2) + 0.25,  # both are safe: the cost 2 is wrong
            order + softplus(1) + softplus(-2) + 0.25,  # both are unsafe: the cost -1 is wrong
        ],
    )
    close(judged.loss[:1], [0.4887774 + 0.25], 1e-6)
    close(judged.rewards, [[-1.0, 2.0]] * 3)
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0


def check_cost_gradient(m: Any) -> None:
    # d / d C_r = -sigma(C_c - C_r) - h_r sigma(-h_r C_r), and the opposite order for C_c; l2 adds l2 C.
    chosen, rejected = leaf(doubles(-1, 0.5, 2)), leaf(doubles(2, 0.25, -3))
    g = gradients(m.cost(chosen, rejected, SAFETY, l2=0.1).loss, chosen, rejected)
    for row in range(3):
        c, r = float(chosen[row]), float(rejected[row])
        h_c, h_r = (-1 if safe else 1 for safe in SAFETY[row].tolist())
        close(g[0][row], sigma(c - r) - h_c * sigma(-h_c * c) + 0.1 * c)
        close(g[1][row], -sigma(c - r) - h_r * sigma(-h_r * r) + 0.1 * r)
    assert differentiates(lambda c, r: m.cost(c, r, SAFETY, l2=0.1).loss, doubles(-1, 0.5, 2), doubles(2, 0.25, -3))


def check_cost_limits(m: Any) -> None:
    zero = leaf(torch.zeros(3))
    close(m.cost(zero, zero, SAFETY, l2=0.001).loss, [3 * LOG2] * 3)
    assert math.isclose(3 * LOG2, 2.079442, abs_tol=1e-6)
    chosen, rejected = leaf(torch.tensor([1e4, -1e4, 0.0])), leaf(torch.tensor([-1e4, 1e4, -1e4]))
    judged = m.cost(chosen, rejected, SAFETY, l2=0.0)
    assert holds(judged, [chosen, rejected])
    # Row 0 is wrong three times: 2e4 + 1e4 + 1e4. Row 1: order and chosen right, rejected (safe) wrong.
    close(judged.loss, [4e4, 1e4, 1e4 + LOG2 + 1e4], 1e-6)


def check_reward_half_precision(m: Any) -> None:
    for half in (torch.bfloat16, torch.float16):
        a, b = torch.tensor([0.71875, 2.5], dtype=half), torch.tensor([0.2109375, -3.0], dtype=half)
        soft, safety = torch.tensor([0.75, 0.3125], dtype=half), SAFETY[:2]
        wide = [x.double() for x in (a, b, soft)]
        for low, exact in (
            (m.bradley_terry(a, b, soft, soft, centring=0.01), m.bradley_terry(*wide, wide[2], centring=0.01)),
            (m.regression(a, b, loss="mse", delta=1.0), m.regression(*wide[:2], loss="mse", delta=1.0)),
            (m.regression(a, b, loss="huber", delta=0.3), m.regression(*wide[:2], loss="huber", delta=0.3)),
            (m.cost(a, b, safety, l2=0.01), m.cost(*wide[:2], safety, l2=0.01)),
        ):
            assert low.loss.dtype == low.rewards.dtype == torch.float32
            close(low.loss, exact.loss.float(), 1e-6)
            close(low.rewards, exact.rewards.float(), 1e-6)


MODULE = reward
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("bradley-terry: margin added", check_bradley_terry_by_hand, "d = chosen - rejected - margin\n    loss",
     "d = chosen - rejected + margin\n    loss"),
    ("bradley-terry: centring of the difference", check_bradley_terry_by_hand, "(chosen + rejected).square()",
     "(chosen - rejected).square()"),
    ("bradley-terry: centring of each", check_bradley_terry_by_hand, "(chosen + rejected).square()",
     "(chosen.square() + rejected.square()) / 2"),
    ("bradley-terry: overflow", check_bradley_terry_limits, "-target * F.logsigmoid(d) -",
     "target * torch.log(1 + torch.exp(-d)) -"),
    ("bradley-terry: log of a sigmoid", check_bradley_terry_limits, "-target * F.logsigmoid(d) -",
     "-target * torch.log(torch.sigmoid(d)) -"),
    ("bradley-terry: 1 - sigmoid", check_bradley_terry_limits, "-target * F.logsigmoid(d) -",
     "-target * torch.log(1 - (1 - torch.sigmoid(d))) -"),
    ("bradley-terry: hard labels", check_bradley_terry_soft_labels,
     "chosen, rejected, margin, target = full_precision(",
     "target = (target > 0.5).double()\n    chosen, rejected, margin, target = full_precision("),
    ("bradley-terry: label turned", check_bradley_terry_soft_labels, "-target * F.logsigmoid(d) - (1 - target) *",
     "-(1 - target) * F.logsigmoid(d) - target *"),
    ("regression: target takes gradients", check_regression_by_hand, "target.detach()", "target"),
    ("regression: half the square", check_regression_by_hand, "error.square()", "error.square() / 2"),
    ("regression: error not squared", check_regression_by_hand, "error.square()", "size"),
    ("cost: the data's sign of safety", check_cost_by_hand, "torch.where(safety, -costs, costs)",
     "torch.where(safety, costs, -costs)"),
    ("cost: ordered as rewards", check_cost_by_hand, "F.logsigmoid(rejected - chosen)",
     "F.logsigmoid(chosen - rejected)"),
    ("cost: signs forgotten", check_cost_limits, "order + signs + l2", "order + l2"),
    ("cost: l2 summed", check_cost_by_hand, "costs.square().mean(dim=1)", "costs.square().sum(dim=1)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
