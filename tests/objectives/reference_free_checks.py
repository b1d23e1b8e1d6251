"""Objectives without a reference. B examples, S a summed log-probability, m = S / |y| an average one."""

from __future__ import annotations

import decimal
import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import reference_free
from tests.objectives.preference_support import (
    LOG2,
    extreme,
    holds,
    moves_only_the_policy,
    pair,
    sigma,
    softplus,
    survives,
    upcasts,
)
from tests.objectives.support import Check, checks_of, close, differentiates, doubles, gradients, leaf, refuses

ORPO: dict[str, Any] = {"beta": 0.1, "sft_scope": "completion"}
SIMPO: dict[str, Any] = {"beta": 2.0, "gamma": 0.5, "gamma_beta_ratio": None, "sft_weight": 0.0, "label_smoothing": 0.0}
ALPHAPO: dict[str, Any] = {"beta": 2.0, "alpha": 0.5, "gamma_beta_ratio": 0.25, "sft_weight": 0.0}


def check_half_precision_is_upcast(m: Any) -> None:
    upcasts(m)


def check_only_the_policy_moves(m: Any) -> None:
    moves_only_the_policy(m)


def check_extremes(m: Any) -> None:
    survives(m)


def check_log1mexp(m: Any) -> None:
    decimal.getcontext().prec = 90
    points = [-(10.0**e) for e in range(-37, 2)] + [-0.69, -0.6931471, -0.694, -0.7, -2.0, -17.0, -80.0]
    x = leaf(torch.tensor(points))
    exact = [float((1 - decimal.Decimal(v).exp()).ln()) for v in x.tolist()]
    out = m.log1mexp(x)
    torch.testing.assert_close(out.detach(), torch.tensor(exact), rtol=5e-7, atol=0.0)
    (g,) = gradients(out, x)
    slope = [-1 / math.expm1(-v) for v in x.tolist()]  # -e^x / (1 - e^x)
    torch.testing.assert_close(g, torch.tensor(slope), rtol=1e-6, atol=1e-37)
    far = leaf(torch.tensor([-1e4, -1e30]))
    close(m.log1mexp(far), [0.0, 0.0])
    close(gradients(m.log1mexp(far), far)[0], [0.0, 0.0])
    assert differentiates(m.log1mexp, doubles(-0.01, -0.5, -0.8, -3.0))


# --- ORPO ----------------------------------------------------------------------------------------------


def check_orpo_by_hand(m: Any) -> None:
    # Averages log(1/2) over 2 tokens and log(1/5) over 4: odds 1 and 1/4, LO = log 4, log(1 + 1/4) = 0.2231436.
    chosen, rejected = leaf(doubles(2 * math.log(0.5))), leaf(doubles(4 * math.log(0.2)))
    judged = m.orpo(pair(chosen, rejected, ([2], [4])), **ORPO)
    close(judged.loss, [0.02231436], 1e-8)
    close(judged.rewards, [[0.1 * math.log(0.5), 0.1 * math.log(0.2)]])
    assert judged.likelihood == 1.0
    assert not judged.rewards.requires_grad
    # sigma(-LO) = 1/5: -0.1 x 0.2 / (1 - 1/2) / 2 tokens and 0.1 x 0.2 / (1 - 1/5) / 4 tokens
    close(torch.cat(gradients(judged.loss, chosen, rejected)), [-0.02, 0.00625])
    assert differentiates(
        lambda c, r: m.orpo(pair(c, r, ([2, 3], [4, 1])), **(ORPO | {"beta": 0.3})).loss,
        doubles(-1, -0.05),
        doubles(-0.4, -7),
    )


def check_orpo_limits(m: Any) -> None:
    same = leaf(torch.tensor([-1.0, -0.01, -30.0]))
    close(m.orpo(pair(same, same), **ORPO).loss, [0.1 * LOG2] * 3)
    policy, _, leaves = extreme()
    judged = m.orpo(policy, **ORPO)
    assert holds(judged, leaves)
    # Average -1e4 against a certain completion (-1e-7, log-odds 7 log 10): -LO = 1e4 + 16.1, times 0.1.
    close(judged.loss[:2], [1e3 + 0.7 * math.log(10), 0.0], 1e-6)
    close(judged.loss[2:], [0.1 * LOG2] * 3)


def check_orpo_certain(m: Any) -> None:
    # Memorised completions: averages at and around 0 in float32, where log1p(-exp(m)) is -inf.
    values = [0.0, -1e-9, -6e-8, -1e-7, -1.2e-7, -1e-6]
    for other in (-1.0, -1e-8, 0.0):
        chosen, rejected = leaf(torch.tensor(values)), leaf(torch.full((len(values),), other))
        for first, second in ((chosen, rejected), (rejected, chosen)):
            assert holds(m.orpo(pair(first, second), **ORPO), [chosen, rejected])
    # At -1e-6 the odds are 1 / 1e-6 to six digits; against average log(1/2), whose odds are 1: LO = log 1e6.
    near, half = leaf(torch.tensor([-1e-6])), torch.tensor([math.log(0.5)])
    close(m.orpo(pair(half, near), **(ORPO | {"beta": 1.0})).loss, [math.log(1e6)], 1e-5)
    (g,) = gradients(m.orpo(pair(half, near), **(ORPO | {"beta": 1.0})).loss, near)
    close(g, [1e6], 1e-4)  # sigma(log 1e6) / (1 - p) = 1 / 1e-6
    # Below -1e-7 nothing is asked for any more.
    sure = leaf(torch.tensor([-1e-9]))
    close(m.orpo(pair(half, sure), **(ORPO | {"beta": 1.0})).loss, [math.log(1e7)], 1e-5)
    assert float(gradients(m.orpo(pair(half, sure), **(ORPO | {"beta": 1.0})).loss, sure)[0]) == 0.0


# --- SimPO ---------------------------------------------------------------------------------------------


def check_simpo_by_hand(m: Any) -> None:
    # Averages -2 / 4 = -0.5 and -3 / 2 = -1.5: 2 x 1 - 0.5 = 1.5, log(1 + e^-1.5) = 0.2014133.
    chosen, rejected = leaf(doubles(-2)), leaf(doubles(-3))
    policy = pair(chosen, rejected, ([4], [2]))
    judged = m.simpo(policy, **SIMPO)
    close(judged.loss, [0.2014133], 1e-7)
    close(judged.rewards, [[-1.0, -3.0]])
    assert not judged.rewards.requires_grad
    # -beta sigma(-1.5) / 4 tokens and + / 2; sigma(-1.5) = 0.1824255
    close(torch.cat(gradients(judged.loss, chosen, rejected)), [-2 * 0.1824255 / 4, 2 * 0.1824255 / 2], 1e-7)
    assert judged.likelihood == 0
    assert m.simpo(policy, **(SIMPO | {"sft_weight": 0.3})).likelihood == 0.3
    assert differentiates(
        lambda c, r: m.simpo(pair(c, r, ([2, 3], [4, 1])), **SIMPO).loss, doubles(-1, -9), doubles(-4, -7)
    )


def check_simpo_margin(m: Any) -> None:
    same = doubles(-4)

    def at(**settings: Any) -> Tensor:
        return m.simpo(pair(same, same), **(SIMPO | settings)).loss

    # Identical completions: -log sigma(-gamma) = log(1 + e^gamma).
    close(at(beta=3.0, gamma=0.5), [softplus(0.5)])
    close(at(beta=3.0, gamma=0.0), [LOG2])
    close(at(beta=3.0, gamma=None, gamma_beta_ratio=0.4), [softplus(1.2)])
    close(at(beta=3.0, gamma=None, gamma_beta_ratio=0.0), [LOG2])
    close(at(beta=3.0, gamma=None), [softplus(0.75)])
    for both in ((0.5, 0.25), (0.0, 0.0)):
        assert refuses(ValueError, at, gamma=both[0], gamma_beta_ratio=both[1])


def check_simpo_limits(m: Any) -> None:
    policy, _, leaves = extreme()
    judged = m.simpo(policy, **SIMPO)
    assert holds(judged, leaves)
    close(judged.loss, [2e4 + 0.5, 0.0, softplus(0.5), softplus(0.5), softplus(0.5)], 1e-5)


def check_simpo_smoothing(m: Any) -> None:
    # z = 1.5: 0.9 x 0.2014133 + 0.1 x 1.7014133
    chosen, rejected = leaf(doubles(-2)), leaf(doubles(-3))
    judged = m.simpo(pair(chosen, rejected, ([4], [2])), **(SIMPO | {"label_smoothing": 0.1}))
    close(judged.loss, [0.3514133], 1e-7)
    close(gradients(judged.loss, chosen)[0], [2 * (sigma(1.5) - 0.9) / 4])


# --- AlphaPO -------------------------------------------------------------------------------------------


def check_alphapo_by_hand(m: Any) -> None:
    # m = -0.5 and -1.5, r = -2 (e^(m / -2) - 1): r(-0.5) - r(-1.5) = 2 (e^0.75 - e^0.25); minus 0.25, times 2
    chosen, rejected = leaf(doubles(-2)), leaf(doubles(-3))
    policy = pair(chosen, rejected, ([4], [2]))
    judged = m.alphapo(policy, **ALPHAPO)
    z = 2 * (2 * (math.exp(0.75) - math.exp(0.25)) - 0.25)
    close(judged.loss, [softplus(-z)])
    close(judged.rewards, [[2 * -2 * math.expm1(0.25), 2 * -2 * math.expm1(0.75)]])
    assert not judged.rewards.requires_grad
    # r' = e^(-alpha m)
    g, h = gradients(judged.loss, chosen, rejected)
    close(torch.cat([g, h]), [-2 * sigma(-z) * math.exp(0.25) / 4, 2 * sigma(-z) * math.exp(0.75) / 2])
    assert judged.likelihood == 0
    assert m.alphapo(policy, **(ALPHAPO | {"sft_weight": 0.3})).likelihood == 0.3


def check_alphapo_limits(m: Any) -> None:
    chosen, rejected = doubles(-2), doubles(-3)
    policy = pair(chosen, rejected, ([4], [2]))
    simpo = m.simpo(policy, **(SIMPO | {"gamma": None, "gamma_beta_ratio": 0.25}))
    for alpha in (0.0, 1e-9, -1e-9):
        judged = m.alphapo(policy, **(ALPHAPO | {"alpha": alpha}))
        close(judged.loss, simpo.loss)
        close(judged.rewards, simpo.rewards)
    same = m.alphapo(pair(chosen, chosen), **ALPHAPO)
    close(same.loss, [softplus(2 * 0.25)])
    # Exponents end at 20: m = -50 there, -80 no further; and with alpha -0.5 they end at -20.
    for alpha, bent in ((0.5, -math.expm1(20) / 0.5), (-0.5, math.expm1(-20) / 0.5)):
        low = leaf(doubles(-80))
        judged = m.alphapo(pair(low, doubles(0)), **(ALPHAPO | {"alpha": alpha}))
        close(judged.rewards[:, 0], [2 * bent], 1e-15)
        close(gradients(judged.loss, low)[0], [0.0])
        inside = m.alphapo(pair(doubles(-38), doubles(0)), **(ALPHAPO | {"alpha": alpha}))
        close(inside.rewards[:, 0], [-2 * math.expm1(-alpha * -38) / alpha], 1e-15)


# --- CPO, SLiC, likelihood -----------------------------------------------------------------------------


def check_cpo(m: Any) -> None:
    # Sums, whatever the lengths: 0.5 (-2 + 3) = 0.5
    chosen, rejected = leaf(doubles(-2)), leaf(doubles(-3))
    judged = m.cpo(pair(chosen, rejected, ([4], [2])), beta=0.5, sft_weight=0.7)
    close(judged.loss, [softplus(-0.5)])
    close(judged.rewards, [[-1.0, -1.5]])
    assert not judged.rewards.requires_grad
    close(torch.cat(gradients(judged.loss, chosen, rejected)), [-0.5 * sigma(-0.5), 0.5 * sigma(-0.5)])
    assert judged.likelihood == 0.7
    close(m.cpo(pair(chosen, chosen), beta=0.5, sft_weight=0.7).loss, [LOG2])


def check_slic(m: Any) -> None:
    # 1 + 2 - 2.5 = 0.5, plus 0.1 x 2; and 1 + 2 - 5 < 0, which leaves the likelihood alone
    chosen, rejected = leaf(doubles(-2, -2)), leaf(doubles(-2.5, -5))
    judged = m.slic(pair(chosen, rejected, ([4, 4], [2, 2])), delta=1.0, sft_weight=0.1)
    close(judged.loss, [0.7, 0.2])
    close(judged.rewards, [[-2.0, -2.5], [-2.0, -5.0]])
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0
    close(torch.stack(gradients(judged.loss, chosen, rejected)), [[-1.1, -0.1], [1.0, 0.0]])
    close(m.slic(pair(chosen, chosen), delta=0.5, sft_weight=0.1).loss, [0.7, 0.7])


def check_sft(m: Any) -> None:
    judged = m.sft(pair(leaf(doubles(-2, -3)), leaf(doubles(-4, -5)), ([4, 4], [2, 2])))
    close(judged.loss, [0.0, 0.0])
    assert not judged.loss.requires_grad
    close(judged.rewards, [[-2.0, -4.0], [-3.0, -5.0]])
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 1.0


MODULE = reference_free
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("orpo: log1p(-exp) alone", check_orpo_certain, "    near_zero = x > -math.log(2.0)\n",
     "    return torch.log1p(-torch.exp(x))\n"),
    ("orpo: one where only", check_log1mexp, "torch.full_like(x, -1.0), x)", "x, x)"),
    ("orpo: summed", check_orpo_by_hand, "average = torch.stack(policy.average())",
     "average = torch.stack(policy[:2])"),
    ("orpo: log sigmoid added", check_orpo_by_hand, "loss = -beta * F.logsigmoid(odds[0]",
     "loss = beta * F.logsigmoid(odds[0]"),
    ("orpo: probabilities for odds", check_orpo_by_hand, "odds = average - log1mexp(average)", "odds = average"),
    ("orpo: certain completions unclamped", check_orpo_certain, "average.clamp(max=-1e-7)", "average"),
    ("orpo: no likelihood", check_orpo_by_hand, "average[1]), likelihood=1.0", "average[1]), likelihood=0.0"),
    ("simpo: ratio taken as gamma", check_simpo_margin,
     "gamma = beta * (0.25 if gamma_beta_ratio is None else gamma_beta_ratio)",
     "gamma = 0.25 if gamma_beta_ratio is None else gamma_beta_ratio"),
    ("simpo: a gamma of 0 taken as none", check_simpo_margin, "    if gamma is None:\n", "    if not gamma:\n"),
    ("simpo: margin inside beta", check_simpo_by_hand, "z = beta * (chosen - rejected) - gamma",
     "z = beta * (chosen - rejected - gamma)"),
    ("simpo: summed", check_simpo_by_hand, "chosen, rejected = policy.average()", "chosen, rejected = policy[:2]"),
    ("simpo: smoothing ignored", check_simpo_smoothing, " - label_smoothing * F.logsigmoid(-z)", ""),
    ("alphapo: bent the other way", check_alphapo_by_hand, "torch.clamp(-alpha * m,", "torch.clamp(alpha * m,"),
    ("alphapo: 0 / 0", check_alphapo_limits, "    if alpha == 0:\n        return m\n", ""),
    ("alphapo: unbounded", check_extremes, "torch.expm1(torch.clamp(-alpha * m, -20.0, 20.0))",
     "torch.expm1(-alpha * m)"),
    ("alphapo: ratio outside beta", check_alphapo_by_hand, "beta * (chosen - rejected - gamma_beta_ratio)",
     "beta * (chosen - rejected) - gamma_beta_ratio"),
    ("alphapo: summed", check_alphapo_by_hand, "for m in policy.average())", "for m in policy[:2])"),
    ("cpo: averaged", check_cpo,
     "chosen, rejected = full_precision(policy.chosen, policy.rejected)\n    loss = -F.logsigmoid(",
     "chosen, rejected = policy.average()\n    loss = -F.logsigmoid("),
    ("slic: likelihood subtracted", check_slic, "- sft_weight * chosen", "+ sft_weight * chosen"),
    ("slic: without the hinge", check_slic, "F.relu(delta - chosen + rejected)", "(delta - chosen + rejected)"),
    ("slic: margin on the wrong side", check_slic, "F.relu(delta - chosen + rejected)",
     "F.relu(chosen - rejected - delta)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "log1mexp: boundary: x > -math.log(2.0) -> x >= -math.log(2.0)": "both forms keep their digits there",
    "log1mexp: name: math.log(2.0) -> math.log1p(2.0)": "both forms keep their digits there",
    "log1mexp: constant: 2.0 -> 2.5": "both forms keep their digits there",
    "log1mexp: dropped: torch.where(near_zero, x, torch.full_like(x, -0.1)) -> _same(x)":
        "the form that is not used is finite there",
    "log1mexp: sign: -0.1 -> +0.1": "stands in for an argument that is not used",
    "log1mexp: sign: -1.0 -> +1.0": "stands in for an argument that is not used",
    "log1mexp: constant: 0.1 -> 0.125": "stands in for an argument that is not used",
    "log1mexp: constant: 1.0 -> 1.25": "stands in for an argument that is not used",
}  # fmt: skip
