"""DPO and the objectives nearest to it. B examples; u = policy - reference, D = u chosen - u rejected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import preference
from tests.objectives.preference_support import (
    LOG2,
    at,
    equal,
    extreme,
    holds,
    moves_only_the_policy,
    pair,
    sigma,
    survives,
    two,
    upcasts,
)  # fmt: skip
from tests.objectives.support import (
    Check,
    checks_of,
    close,
    differentiates,
    doubles,
    gradients,
    leaf,
    untouched,
)  # fmt: skip

DPO = {"beta": 0.5, "label_smoothing": 0.0}


def check_half_precision_is_upcast(m: Any) -> None:
    upcasts(m)


def check_only_the_policy_moves(m: Any) -> None:
    moves_only_the_policy(m)


def check_extremes(m: Any) -> None:
    survives(m)


# --- DPO -----------------------------------------------------------------------------------------------


def check_dpo_by_hand(m: Any) -> None:
    # D = 2 and -2, beta 0.5: z = 1 and -1. log(1 + 1/e) = 0.3132617, log(1 + e) = 1.3132617
    policy, reference, _ = two()
    plain = m.dpo(policy, reference, **DPO)
    close(plain.loss, [0.3132617, 1.3132617], 1e-7)
    close(plain.rewards, [[0.5, -0.5], [0.0, 1.0]])
    # eps 0.1: 0.9 x 0.3132617 + 0.1 x 1.3132617, and the other way round
    smooth = m.dpo(policy, reference, beta=0.5, label_smoothing=0.1)
    close(smooth.loss, [0.4132617, 1.2132617], 1e-7)
    assert not plain.rewards.requires_grad
    assert plain.likelihood == 0


def check_dpo_gradient(m: Any) -> None:
    # d loss / d chosen = beta (sigma(z) - (1 - eps)) and minus that; nothing into the reference.
    for eps in (0.0, 0.1):
        policy, reference, leaves = two()
        loss = m.dpo(policy, reference, beta=0.5, label_smoothing=eps).loss
        assert untouched(loss, *leaves[2:])
        g, h = gradients(loss, *leaves[:2])
        close(g, [0.5 * (sigma(1) - (1 - eps)), 0.5 * (sigma(-1) - (1 - eps))])
        close(h, -g)
        assert differentiates(
            lambda c, r, e=eps: m.dpo(pair(c, r), two()[1], beta=0.5, label_smoothing=e).loss,
            doubles(-10, -20),
            doubles(-14, -17),
        )
    # Smoothing puts the minimum at sigma(z) = 0.9, z = log 9.
    chosen = leaf(doubles(math.log(9) / 0.5))
    zero = doubles(0)
    lowest = m.dpo(pair(chosen, zero), pair(zero, zero), beta=0.5, label_smoothing=0.1)
    close(gradients(lowest.loss, chosen)[0], [0.0])


def check_dpo_limits(m: Any) -> None:
    for eps in (0.0, 0.2):
        start = m.dpo(*equal(), beta=0.3, label_smoothing=eps)
        close(start.loss, [LOG2] * 3, 1e-6)
        close(start.rewards, torch.zeros(3, 2))
        policy, reference, leaves = extreme()
        judged = m.dpo(policy, reference, beta=0.1, label_smoothing=eps)
        assert holds(judged, leaves)
        close(judged.loss[:2], [(1 - eps) * 1e3, eps * 1e3], 1e-5)
    chosen, zero = leaf(torch.tensor([17.0])), torch.zeros(1)
    (g,) = gradients(m.dpo(pair(chosen, zero), pair(zero, zero), beta=1.0, label_smoothing=0.0).loss, chosen)
    close(g * 1e8, [-4.1399376], 1e-4)


# --- robust, hinge, SPIN -------------------------------------------------------------------------------


def check_robust(m: Any) -> None:
    # z = 1: (0.9 x 0.3132617 - 0.1 x 1.3132617) / 0.8 = 0.1882617, z = -1: 1.4382617
    policy, reference, leaves = two()
    judged = m.robust(policy, reference, beta=0.5, label_smoothing=0.1)
    close(judged.loss, [0.1882617, 1.4382617], 1e-7)
    close(judged.rewards, [[0.5, -0.5], [0.0, 1.0]])
    assert judged.likelihood == 0
    # -beta (sigma(-z) + eps / (1 - 2 eps)), which never vanishes
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [-0.5 * (sigma(-1) + 0.125), -0.5 * (sigma(1) + 0.125)])
    close(h, -g)
    close(m.robust(policy, reference, **DPO).loss, m.dpo(policy, reference, **DPO).loss)
    close(m.robust(*equal(), beta=0.1, label_smoothing=0.2).loss, [LOG2] * 3, 1e-6)


def check_hinge(m: Any) -> None:
    # z = 0.5 and -0.5; with beta 1, 2 and -2
    policy, reference, leaves = two()
    judged = m.hinge(policy, reference, beta=0.25)
    close(judged.loss, [0.5, 1.5])
    close(judged.rewards, [[0.25, -0.25], [0.0, 0.5]])
    assert judged.likelihood == 0
    close(torch.stack(gradients(judged.loss, *leaves[:2])), [[-0.25, -0.25], [0.25, 0.25]])
    wide = m.hinge(policy, reference, beta=1.0)
    close(wide.loss, [0.0, 3.0])
    close(torch.stack(gradients(wide.loss, *leaves[:2])), [[0.0, -1.0], [0.0, 1.0]])
    close(m.hinge(*equal(), beta=0.1).loss, [1.0] * 3)


def check_spin(m: Any) -> None:
    policy, reference, _ = two()
    same = {"logistic": m.dpo(policy, reference, **DPO), "hinge": m.hinge(policy, reference, beta=0.5)}
    for shape, other in same.items():
        judged = m.spin(policy, reference, beta=0.5, shape=shape)
        close(judged.loss, other.loss)
        close(judged.rewards, other.rewards)
        assert judged.likelihood == 0
    close(m.spin(*equal(), beta=0.1, shape="logistic").loss, [LOG2] * 3, 1e-6)
    close(m.spin(*equal(), beta=0.1, shape="hinge").loss, [1.0] * 3, 1e-6)
    # z = 0.25 x 2 lies inside the hinge: 1 - 0.5
    close(m.spin(*at(1, -1)[:2], beta=0.25, shape="hinge").loss, [0.5])


# --- IPO -----------------------------------------------------------------------------------------------


def _ipo(m: Any, average: bool) -> tuple[Any, list[Tensor]]:
    """u = 4 over 2 tokens and -6 over 3: h = 2 + 2 averaged, 10 summed."""
    leaves = [leaf(doubles(v)) for v in (-5.0, -16.0, -9.0, -10.0)]
    policy, reference = pair(*leaves[:2], ([2], [3])), pair(*leaves[2:], ([2], [3]))
    return m.ipo(policy, reference, beta=0.1, average=average), leaves


def check_ipo_by_hand(m: Any) -> None:
    # The target is 1 / 0.2 = 5: (4 - 5)^2 = 1 averaged, (10 - 5)^2 = 25 summed.
    averaged, leaves = _ipo(m, True)
    close(averaged.loss, [1.0])
    close(averaged.rewards, [[0.4, -0.6]])
    assert untouched(averaged.loss, *leaves[2:])
    # 2 (h - 5) / length: -2 / 2 and +2 / 3
    close(torch.cat(gradients(averaged.loss, *leaves[:2])), [-1.0, 2 / 3])
    summed, leaves = _ipo(m, False)
    close(summed.loss, [25.0])
    close(summed.rewards, [[0.4, -0.6]])
    assert untouched(summed.loss, *leaves[2:])
    close(torch.cat(gradients(summed.loss, *leaves[:2])), [10.0, -10.0])
    assert not summed.rewards.requires_grad
    assert summed.likelihood == 0


def check_ipo_lengths(m: Any) -> None:
    # u = 4 and -3. One token: nothing to average. No token counts as one, so that nothing is divided by zero.
    for lengths, h in ((([1], [1]), 7.0), (([2], [1]), 5.0), (([1], [2]), 5.5), (([0], [0]), 7.0)):
        policy, zero = pair(doubles(4), doubles(-3), lengths), pair(doubles(0), doubles(0), lengths)
        close(m.ipo(policy, zero, beta=0.1, average=True).loss, [(h - 5) ** 2])


def check_ipo_limits(m: Any) -> None:
    for average in (True, False):
        start = m.ipo(*equal(), beta=0.1, average=average)
        close(start.loss, [25.0] * 3, 1e-6)  # 1 / (4 x 0.01)
        close(start.rewards, torch.zeros(3, 2))
        policy, reference, leaves = extreme()
        assert holds(m.ipo(policy, reference, beta=0.1, average=average), leaves)
        assert differentiates(
            lambda c, r, a=average: m.ipo(pair(c, r, ([2, 5], [3, 1])), pair(r * 0, r * 0), beta=0.1, average=a).loss,
            doubles(-1, -7),
            doubles(-2, -3),
        )


MODULE = preference
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("dpo: sign", check_dpo_by_hand, "    loss = _logistic(beta * (chosen - rejected)",
     "    loss = _logistic(beta * (rejected - chosen)"),
    ("dpo: beta outside", check_dpo_by_hand, "    loss = _logistic(beta * (chosen - rejected)",
     "    loss = beta * _logistic((chosen - rejected)"),
    ("dpo: averaged", check_dpo_by_hand, "    loss = _logistic(beta * (chosen - rejected)",
     "    loss = _logistic(beta * (chosen / policy.chosen_length - rejected / policy.rejected_length)"),
    ("dpo: smoothing ignored", check_dpo_by_hand, " - smoothing * F.logsigmoid(-z)", ""),
    ("dpo: log of a sigmoid", check_dpo_limits, "return -(1 - smoothing) * F.logsigmoid(z) ",
     "return -(1 - smoothing) * torch.log(torch.sigmoid(z)) "),
    ("dpo: 1 - sigmoid", check_dpo_limits, "return -(1 - smoothing) * F.logsigmoid(z) ",
     "return -(1 - smoothing) * torch.log(1 - (1 - torch.sigmoid(z))) "),
    ("robust: conservative DPO", check_robust,
     "(-(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)) / (1 - 2 * label_smoothing)",
     "_logistic(z, label_smoothing)"),
    ("robust: divisor forgotten", check_robust, " / (1 - 2 * label_smoothing)", ""),
    ("hinge: beta for a margin", check_hinge, "F.relu(1 - beta * (chosen - rejected))",
     "F.relu(beta - (chosen - rejected))"),
    ("hinge: absolute", check_hinge, "F.relu(1 - beta * (chosen - rejected))",
     "(1 - beta * (chosen - rejected)).abs()"),
    ("spin: shapes swapped", check_spin, 'if shape == "hinge"', 'if shape != "hinge"'),
    ("ipo: summed", check_ipo_by_hand, "    if average:\n", "    if False:\n"),
    ("ipo: one length for both", check_ipo_by_hand, "- rejected / policy.rejected_length",
     "- rejected / policy.chosen_length"),
    ("ipo: beta twice", check_ipo_by_hand, "(h - 1 / (2 * beta))", "(beta * h - 1 / (2 * beta))"),
    ("ipo: empty completion", check_ipo_lengths, "h = chosen / policy.chosen_length.clamp(min=1)",
     "h = chosen / policy.chosen_length"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
