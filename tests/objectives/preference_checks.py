"""Preference objectives without a reference, and the building blocks. B examples."""

from __future__ import annotations

import decimal
import math
from typing import Any

import torch
from torch import Tensor

from tests.objectives.preference_support import (
    KTO,
    LOG2,
    ODPO,
    SIMPO,
    extreme,
    holds,
    pair,
    softplus,
)
from tests.objectives.support import (
    checks_of,
    close,
    differentiates,
    doubles,
    gradients,
    leaf,
    refuses,
)

# --- building blocks -----------------------------------------------------------------------------------


def check_average(m: Any) -> None:
    chosen, rejected = pair(m, doubles(-6, 0), doubles(-6, -1), ([2, 0], [3, 1])).average()
    close(chosen, [-3.0, 0.0])
    close(rejected, [-2.0, -1.0])


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


def check_half_precision_is_upcast(m: Any) -> None:
    numbers = ([-1040.0, -5.0], [-1064.0, -7.0], [-1000.0, -4.0], [-996.0, -2.0])  # exact in bfloat16
    lengths = ([3, 7], [11, 3])
    scores, desirable = torch.tensor([[0.71875, 0.2109375], [3.0, 0.6640625]]), torch.tensor([True, False])

    def everything(dtype: torch.dtype) -> list[Any]:
        c, r, rc, rr = (torch.tensor(n, dtype=dtype) for n in numbers)
        policy, reference = pair(m, c, r, lengths), pair(m, rc, rr, lengths)
        return [
            m.bradley_terry(c / 128, r / 128, torch.zeros(2, dtype=dtype), centring=0.01),
            m.dpo(policy, reference, beta=0.1, label_smoothing=0.1),
            m.ipo(policy, reference, beta=0.1, average=True),
            m.ipo(policy, reference, beta=0.1, average=False),
            m.kto(c, rc, desirable, torch.tensor(0.5, dtype=dtype), **(KTO | {"beta": 0.1})),
            *(m.odpo(policy, reference, scores.to(dtype), **(ODPO | {"offset": o, "beta": 0.1}))
              for o in ("log", "log1p", "ratio")),
            m.orpo(policy, beta=0.3),
            m.simpo(policy, **(SIMPO | {"beta": 0.3})),
        ]  # fmt: skip

    for half in (torch.bfloat16, torch.float16):
        for low, exact in zip(everything(half), everything(torch.float64), strict=True):
            assert low.loss.dtype == torch.float32
            assert low.rewards.dtype == torch.float32
            close(low.loss, exact.loss.float(), 2e-5)
            close(low.rewards, exact.rewards.float(), 2e-5)


# --- reward models -------------------------------------------------------------------------------------


def check_bradley_terry_by_hand(m: Any) -> None:
    # 2 - 1 - 0.5 = 0.5: log(1 + e^-0.5) = 0.4740770; centring 0.01 x 3^2 = 0.09
    chosen, rejected, margin = leaf(doubles(2)), leaf(doubles(1)), doubles(0.5)
    plain = m.bradley_terry(chosen, rejected, margin, centring=0.0)
    close(plain.loss, [0.4740770], 1e-7)
    close(plain.rewards, [[2.0, 1.0]])
    centred = m.bradley_terry(chosen, rejected, margin, centring=0.01)
    close(centred.loss, [0.5640770], 1e-7)
    # -sigma(-0.5) = -0.3775407; centring adds 2 x 0.01 x 3 = 0.06 to both
    close(torch.stack(gradients(plain.loss, chosen, rejected)), [[-0.3775407], [0.3775407]], 1e-7)
    close(torch.stack(gradients(centred.loss, chosen, rejected)), [[-0.3175407], [0.4375407]], 1e-7)
    assert not plain.rewards.requires_grad
    assert plain.likelihood == 0


def check_bradley_terry_limits(m: Any) -> None:
    same = m.bradley_terry(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 3.0]), torch.zeros(2), centring=0.0)
    close(same.loss, [LOG2, LOG2])
    chosen, rejected = leaf(torch.tensor([-1e4, 1e4, -89.0, 17.0])), leaf(torch.tensor([1e4, -1e4, 0.0, 0.0]))
    far = m.bradley_terry(chosen, rejected, torch.zeros(4), centring=0.0)
    close(far.loss[:3], [2e4, 0.0, 89.0])
    g, h = gradients(far.loss, chosen, rejected)
    close(g[:3], [-1.0, 0.0, -1.0])
    close(g[3] * 1e8, -4.1399376, 1e-4)  # -sigma(-17) is not rounded to 0
    close(h, -g)
    assert differentiates(
        lambda a, b: m.bradley_terry(a, b, doubles(0, 0.5, 1), centring=0.01).loss, doubles(1, -2, 3), doubles(0, 2, 3)
    )


# --- ORPO ----------------------------------------------------------------------------------------------


def check_orpo_by_hand(m: Any) -> None:
    # Averages log(1/2) over 2 tokens and log(1/5) over 4: odds 1 and 1/4, LO = log 4, log(1 + 1/4) = 0.2231436.
    chosen, rejected = leaf(doubles(2 * math.log(0.5))), leaf(doubles(4 * math.log(0.2)))
    judged = m.orpo(pair(m, chosen, rejected, ([2], [4])), beta=0.1)
    close(judged.loss, [0.02231436], 1e-8)
    close(judged.rewards, [[0.1 * math.log(0.5), 0.1 * math.log(0.2)]])
    assert judged.likelihood == 1.0
    assert not judged.rewards.requires_grad
    # sigma(-LO) = 1/5: -0.1 x 0.2 / (1 - 1/2) / 2 tokens and 0.1 x 0.2 / (1 - 1/5) / 4 tokens
    close(torch.cat(gradients(judged.loss, chosen, rejected)), [-0.02, 0.00625])
    assert differentiates(
        lambda c, r: m.orpo(pair(m, c, r, ([2, 3], [4, 1])), beta=0.3).loss, doubles(-1, -0.05), doubles(-0.4, -7)
    )


def check_orpo_limits(m: Any) -> None:
    same = leaf(torch.tensor([-1.0, -0.01, -30.0]))
    close(m.orpo(pair(m, same, same), beta=0.1).loss, [0.1 * LOG2] * 3)
    policy, _, leaves = extreme(m)
    judged = m.orpo(policy, beta=0.1)
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
            assert holds(m.orpo(pair(m, first, second), beta=0.1), [chosen, rejected])
    # At -1e-6 the odds are 1 / 1e-6 to six digits; against average log(1/2), whose odds are 1: LO = log 1e6.
    near, half = leaf(torch.tensor([-1e-6])), torch.tensor([math.log(0.5)])
    close(m.orpo(pair(m, half, near), beta=1.0).loss, [math.log(1e6)], 1e-5)
    (g,) = gradients(m.orpo(pair(m, half, near), beta=1.0).loss, near)
    close(g, [1e6], 1e-4)  # sigma(log 1e6) / (1 - p) = 1 / 1e-6
    # Below -1e-7 nothing is asked for any more.
    sure = leaf(torch.tensor([-1e-9]))
    close(m.orpo(pair(m, half, sure), beta=1.0).loss, [math.log(1e7)], 1e-5)
    assert float(gradients(m.orpo(pair(m, half, sure), beta=1.0).loss, sure)[0]) == 0.0


# --- SimPO ---------------------------------------------------------------------------------------------


def check_simpo_by_hand(m: Any) -> None:
    # Averages -2 / 4 = -0.5 and -3 / 2 = -1.5: 2 x 1 - 0.5 = 1.5, log(1 + e^-1.5) = 0.2014133.
    chosen, rejected = leaf(doubles(-2)), leaf(doubles(-3))
    policy = pair(m, chosen, rejected, ([4], [2]))
    judged = m.simpo(policy, **SIMPO)
    close(judged.loss, [0.2014133], 1e-7)
    close(judged.rewards, [[-1.0, -3.0]])
    assert not judged.rewards.requires_grad
    # -beta sigma(-1.5) / 4 tokens and + / 2; sigma(-1.5) = 0.1824255
    close(torch.cat(gradients(judged.loss, chosen, rejected)), [-2 * 0.1824255 / 4, 2 * 0.1824255 / 2], 1e-7)
    assert judged.likelihood == 0
    assert m.simpo(policy, **(SIMPO | {"sft_weight": 0.3})).likelihood == 0.3
    assert differentiates(
        lambda c, r: m.simpo(pair(m, c, r, ([2, 3], [4, 1])), **SIMPO).loss, doubles(-1, -9), doubles(-4, -7)
    )


def check_simpo_margin(m: Any) -> None:
    same = doubles(-4)

    def at(**settings: Any) -> Tensor:
        return m.simpo(pair(m, same, same), **(SIMPO | settings)).loss

    # Identical completions: -log sigma(-gamma) = log(1 + e^gamma).
    close(at(beta=3.0, gamma=0.5), [softplus(0.5)])
    close(at(beta=3.0, gamma=0.0), [LOG2])
    close(at(beta=3.0, gamma=None, gamma_beta_ratio=0.4), [softplus(1.2)])
    close(at(beta=3.0, gamma=None, gamma_beta_ratio=0.0), [LOG2])
    close(at(beta=3.0, gamma=None), [softplus(0.75)])
    for both in ((0.5, 0.25), (0.0, 0.0)):
        assert refuses(ValueError, at, gamma=both[0], gamma_beta_ratio=both[1])


def check_simpo_limits(m: Any) -> None:
    policy, _, leaves = extreme(m)
    judged = m.simpo(policy, **SIMPO)
    assert holds(judged, leaves)
    close(judged.loss, [2e4 + 0.5, 0.0, softplus(0.5), softplus(0.5), softplus(0.5)], 1e-5)


CHECKS = checks_of(globals())
