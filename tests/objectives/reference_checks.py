"""Preference objectives with a reference. B examples; u = policy - reference, D = u chosen - u rejected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.objectives.preference_support import (
    DPO,
    KTO,
    LOG2,
    ODPO,
    equal,
    extreme,
    holds,
    pair,
    sigma,
    softplus,
    two,
)
from tests.objectives.support import (
    checks_of,
    close,
    differentiates,
    doubles,
    finite,
    gradients,
    leaf,
    refuses,
    untouched,
)

# --- DPO -----------------------------------------------------------------------------------------------


def check_dpo_by_hand(m: Any) -> None:
    # D = 2 and -2, beta 0.5: z = 1 and -1. log(1 + 1/e) = 0.3132617, log(1 + e) = 1.3132617
    policy, reference, _ = two(m)
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
        policy, reference, leaves = two(m)
        loss = m.dpo(policy, reference, beta=0.5, label_smoothing=eps).loss
        assert untouched(loss, *leaves[2:])
        g, h = gradients(loss, *leaves[:2])
        close(g, [0.5 * (sigma(1) - (1 - eps)), 0.5 * (sigma(-1) - (1 - eps))])
        close(h, -g)
        assert differentiates(
            lambda c, r, e=eps: m.dpo(pair(m, c, r), two(m)[1], beta=0.5, label_smoothing=e).loss,
            doubles(-10, -20),
            doubles(-14, -17),
        )
    # Smoothing puts the minimum at sigma(z) = 0.9, z = log 9.
    chosen = leaf(doubles(math.log(9) / 0.5))
    zero = doubles(0)
    lowest = m.dpo(pair(m, chosen, zero), pair(m, zero, zero), beta=0.5, label_smoothing=0.1)
    close(gradients(lowest.loss, chosen)[0], [0.0])


def check_dpo_limits(m: Any) -> None:
    for eps in (0.0, 0.2):
        start = m.dpo(*equal(m), beta=0.3, label_smoothing=eps)
        close(start.loss, [LOG2] * 3, 1e-6)
        close(start.rewards, torch.zeros(3, 2))
        policy, reference, leaves = extreme(m)
        judged = m.dpo(policy, reference, beta=0.1, label_smoothing=eps)
        assert holds(judged, leaves)
        close(judged.loss[:2], [(1 - eps) * 1e3, eps * 1e3], 1e-5)
    chosen, zero = leaf(torch.tensor([17.0])), torch.zeros(1)
    (g,) = gradients(m.dpo(pair(m, chosen, zero), pair(m, zero, zero), beta=1.0, label_smoothing=0.0).loss, chosen)
    close(g * 1e8, [-4.1399376], 1e-4)


# --- IPO -----------------------------------------------------------------------------------------------


def _ipo(m: Any, average: bool) -> tuple[Any, list[Tensor]]:
    """u = 4 over 2 tokens and -6 over 3: h = 2 + 2 averaged, 10 summed."""
    leaves = [leaf(doubles(v)) for v in (-5.0, -16.0, -9.0, -10.0)]
    policy, reference = pair(m, *leaves[:2], ([2], [3])), pair(m, *leaves[2:], ([2], [3]))
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
        policy, zero = pair(m, doubles(4), doubles(-3), lengths), pair(m, doubles(0), doubles(0), lengths)
        close(m.ipo(policy, zero, beta=0.1, average=True).loss, [(h - 5) ** 2])


def check_ipo_limits(m: Any) -> None:
    for average in (True, False):
        start = m.ipo(*equal(m), beta=0.1, average=average)
        close(start.loss, [25.0] * 3, 1e-6)  # 1 / (4 x 0.01)
        close(start.rewards, torch.zeros(3, 2))
        policy, reference, leaves = extreme(m)
        assert holds(m.ipo(policy, reference, beta=0.1, average=average), leaves)
        assert differentiates(
            lambda c, r, a=average: (
                m.ipo(pair(m, c, r, ([2, 5], [3, 1])), pair(m, r * 0, r * 0), beta=0.1, average=a).loss
            ),
            doubles(-1, -7),
            doubles(-2, -3),
        )


# --- KTO -----------------------------------------------------------------------------------------------


def _kto(m: Any, kl: Tensor) -> tuple[Any, list[Tensor]]:
    """u = 2.5 and -1.5 with a KL of 0.5 and beta 0.5: sigma of 1 and -1; desirable, undesirable, desirable."""
    policy, reference = leaf(doubles(-5, -9, -5)), leaf(doubles(-7.5, -7.5, -7.5))
    return m.kto(policy, reference, torch.tensor([True, False, True]), kl, **KTO), [policy, reference]


def check_kto_by_hand(m: Any) -> None:
    # 1.5 (1 - sigma(1)) = 1.5 x 0.2689414 and 2 (1 - sigma(0.5 (0.5 + 1.5))) = 2 x 0.2689414
    for kl in (doubles(0.5).squeeze(), doubles(0.5, 0.5, 0.5)):
        judged, _ = _kto(m, kl)
        close(judged.loss, [0.4034121, 0.5378828, 0.4034121], 1e-7)
        close(judged.rewards, [[1.25], [-0.75], [1.25]])
        assert not judged.rewards.requires_grad
        assert judged.likelihood == 0


def check_kto_gradient(m: Any) -> None:
    # -w beta s (1 - s) for desirable rows, + for the others; s (1 - s) = 0.1966119 at +-1.
    kl = leaf(doubles(0.5).squeeze())
    judged, (policy, reference) = _kto(m, kl)
    assert untouched(judged.loss, reference, kl)
    (g,) = gradients(judged.loss, policy)
    close(g, [-1.5 * 0.5 * 0.1966119, 2 * 0.5 * 0.1966119, -1.5 * 0.5 * 0.1966119], 1e-7)
    good, bad = torch.tensor([True, True]), torch.tensor([False, False])
    for label in (good, bad):
        assert differentiates(
            lambda p, d=label: m.kto(p, doubles(-7, -7), d, doubles(0.5).squeeze(), **KTO).loss, doubles(-5, -9)
        )


def check_kto_limits(m: Any) -> None:
    labels = torch.tensor([True, False, True, False])
    same = torch.tensor([-1.0, -2.0, -30.0, 0.0])
    start = m.kto(leaf(same), same, labels, torch.zeros(()), **KTO)
    close(start.loss, [0.75, 1.0, 0.75, 1.0])  # half the weight
    close(start.rewards, torch.zeros(4, 1))
    policy = leaf(torch.tensor([-1e4, -1e4, 1e4, 1e4]))
    far = m.kto(policy, torch.zeros(4), labels, torch.zeros(()), **KTO)
    close(far.loss, [1.5, 0.0, 0.0, 2.0])
    assert holds(far, [policy])


def check_kto_rows_are_alone(m: Any) -> None:
    # A row's loss knows nothing of how many rows of each kind there are: the mean is over the mixed batch.
    policy, reference = doubles(-5, -9, -5, -6), doubles(-7, -7, -7, -7)
    labels = torch.tensor([True, False, True, True])
    whole = m.kto(policy, reference, labels, doubles(0.5).squeeze(), **KTO)
    for i in range(4):
        one = slice(i, i + 1)
        alone = m.kto(policy[one], reference[one], labels[one], doubles(0.5).squeeze(), **KTO)
        close(alone.loss, whole.loss[one])


# --- ODPO ----------------------------------------------------------------------------------------------


def check_odpo_by_hand(m: Any) -> None:
    # z = 1 for the first pair of `two`, -1 for the second.
    policy, reference, _ = two(m)
    # gap 2: 1 - log 2 -> log(1 + 2 / e) = 0.5514447; gap 1/2: -1 + log 2 -> log(1 + e / 2)
    scores = torch.tensor([[3.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    judged = m.odpo(policy, reference, scores, **ODPO)
    close(judged.loss, [math.log(1 + 2 / math.e), math.log(1 + math.e / 2)])
    close(judged.loss[0], 0.5514447, 1e-7)
    close(judged.rewards, [[0.5, -0.5], [0.0, 1.0]])
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0
    identity = m.odpo(policy, reference, scores, **(ODPO | {"offset": "identity", "alpha": 0.25}))
    close(identity.loss, [softplus(-(1 - 0.5)), softplus(-(-1 - 0.125))])
    # gap e - 1: log1p gives 1, so z - 1 = 0
    log1p = m.odpo(policy, reference, doubles(math.e, 1, math.e, 1).view(2, 2), **(ODPO | {"offset": "log1p"}))
    close(log1p.loss, [LOG2, softplus(2)])
    # 4 / 2: the ratio gives log 2; 3 / 3 gives 0
    ratio = m.odpo(policy, reference, doubles(4, 2, 3, 3).view(2, 2), **(ODPO | {"offset": "ratio"}))
    close(ratio.loss, [math.log(1 + 2 / math.e), softplus(1)])


def check_odpo_gradient(m: Any) -> None:
    # -beta sigma(-(z - offset)) and minus that.
    policy, reference, leaves = two(m)
    scores = torch.tensor([[3.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    loss = m.odpo(policy, reference, scores, **ODPO).loss
    assert untouched(loss, *leaves[2:])
    g, h = gradients(loss, *leaves[:2])
    close(g, [-0.5 * sigma(-(1 - LOG2)), -0.5 * sigma(-(-1 + LOG2))])
    close(h, -g)
    for offset in ("log", "identity", "log1p", "ratio"):
        settings = ODPO | {"offset": offset, "alpha": 0.7}
        assert differentiates(
            lambda c, r, s=settings: m.odpo(pair(m, c, r), two(m)[1], scores, **s).loss,
            doubles(-10, -20),
            doubles(-14, -17),
        )


def check_odpo_start(m: Any) -> None:
    gaps = {"log": LOG2, "identity": 2.0, "log1p": math.log(3), "ratio": math.log(3)}
    for offset, shift in gaps.items():
        judged = m.odpo(*equal(m), torch.tensor([[3.0, 1.0]] * 3), beta=0.1, alpha=0.5, offset=offset)
        close(judged.loss, [softplus(0.5 * shift)] * 3, 1e-6)
        close(judged.rewards, torch.zeros(3, 2))


def check_odpo_empty_gap(m: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        policy, reference, leaves = two(m, dtype)
        scores = torch.tensor([[2.0, 2.0], [3.0, 1.0]], dtype=dtype)
        judged = m.odpo(policy, reference, scores, **ODPO)
        close(judged.loss, [0.0, softplus(1 + LOG2)], 1e-6)
        assert judged.loss[0].item() == 0.0
        g, h = gradients(judged.loss, *leaves[:2])
        assert float(g[0]) == float(h[0]) == 0.0
        assert finite(g, h)
        assert float(g[1]) < -0.1
        for offset in ("identity", "log1p", "ratio"):
            plain = m.odpo(policy, reference, torch.ones(2, 2, dtype=dtype), **(ODPO | {"offset": offset}))
            close(plain.loss, m.dpo(policy, reference, **DPO).loss)


def check_odpo_without_alpha_is_dpo(m: Any) -> None:
    policy, reference, _ = two(m)
    plain = m.dpo(policy, reference, **DPO)
    for scores in ([[3.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [1.0, 5.0]]):
        for offset in ("log", "identity", "log1p", "ratio"):
            judged = m.odpo(
                policy, reference, torch.tensor(scores, dtype=torch.float64),
                **(ODPO | {"alpha": 0.0, "offset": offset}),
            )  # fmt: skip
            close(judged.loss, plain.loss)


def check_odpo_refuses(m: Any) -> None:
    policy, reference, _ = two(m)
    for offset in ("log", "identity", "log1p", "ratio"):
        wrong = torch.tensor([[3.0, 1.0], [1.0, 1.5]])
        assert refuses(ValueError, m.odpo, policy, reference, wrong, **(ODPO | {"offset": offset}))
    for low in (0.0, -1.0):
        wrong = torch.tensor([[3.0, low], [1.0, 0.5]])
        assert refuses(ValueError, m.odpo, policy, reference, wrong, **(ODPO | {"offset": "ratio"}))
        assert finite(m.odpo(policy, reference, wrong, **ODPO).loss)


def check_odpo_extremes(m: Any) -> None:
    policy, reference, leaves = extreme(m)
    scores = torch.tensor([[1e4, 0.5], [1.0, 1.0], [2.0, 1.0], [1e-30, 5e-31], [7.0, 7.0]])
    for offset in ("log", "identity", "log1p", "ratio"):
        assert holds(m.odpo(policy, reference, scores, **(ODPO | {"offset": offset})), leaves)


CHECKS = checks_of(globals())
