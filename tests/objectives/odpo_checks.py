"""ODPO. B examples; u = policy - reference, D = u chosen - u rejected."""

from __future__ import annotations

import math
from typing import Any

import torch

from rlhf_cli.objectives import preference
from tests.objectives.preference_support import LOG2, equal, extreme, holds, pair, sigma, softplus, two
from tests.objectives.support import (
    Check,
    checks_of,
    close,
    differentiates,
    doubles,
    finite,
    gradients,
    refuses,
    untouched,
)  # fmt: skip

DPO = {"beta": 0.5, "label_smoothing": 0.0}
ODPO: dict[str, Any] = {"beta": 0.5, "alpha": 1.0, "offset": "log"}


def check_odpo_by_hand(m: Any) -> None:
    # z = 1 for the first pair of `two`, -1 for the second.
    policy, reference, _ = two()
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
    policy, reference, leaves = two()
    scores = torch.tensor([[3.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    loss = m.odpo(policy, reference, scores, **ODPO).loss
    assert untouched(loss, *leaves[2:])
    g, h = gradients(loss, *leaves[:2])
    close(g, [-0.5 * sigma(-(1 - LOG2)), -0.5 * sigma(-(-1 + LOG2))])
    close(h, -g)
    for offset in ("log", "identity", "log1p", "ratio"):
        settings = ODPO | {"offset": offset, "alpha": 0.7}
        assert differentiates(
            lambda c, r, s=settings: m.odpo(pair(c, r), two()[1], scores, **s).loss,
            doubles(-10, -20),
            doubles(-14, -17),
        )


def check_odpo_start(m: Any) -> None:
    gaps = {"log": LOG2, "identity": 2.0, "log1p": math.log(3), "ratio": math.log(3)}
    for offset, shift in gaps.items():
        judged = m.odpo(*equal(), torch.tensor([[3.0, 1.0]] * 3), beta=0.1, alpha=0.5, offset=offset)
        close(judged.loss, [softplus(0.5 * shift)] * 3, 1e-6)
        close(judged.rewards, torch.zeros(3, 2))


def check_odpo_empty_gap(m: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        policy, reference, leaves = two(dtype)
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
    policy, reference, _ = two()
    plain = m.dpo(policy, reference, **DPO)
    for scores in ([[3.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [1.0, 5.0]]):
        for offset in ("log", "identity", "log1p", "ratio"):
            judged = m.odpo(
                policy, reference, torch.tensor(scores, dtype=torch.float64),
                **(ODPO | {"alpha": 0.0, "offset": offset}),
            )  # fmt: skip
            close(judged.loss, plain.loss)


def check_odpo_refuses(m: Any) -> None:
    policy, reference, _ = two()
    for offset in ("log", "identity", "log1p", "ratio"):
        wrong = torch.tensor([[3.0, 1.0], [1.0, 1.5]])
        assert refuses(ValueError, m.odpo, policy, reference, wrong, **(ODPO | {"offset": offset}))
    for low in (0.0, -1.0):
        wrong = torch.tensor([[3.0, low], [1.0, 0.5]])
        assert refuses(ValueError, m.odpo, policy, reference, wrong, **(ODPO | {"offset": "ratio"}))
        assert finite(m.odpo(policy, reference, wrong, **ODPO).loss)


def check_odpo_extremes(m: Any) -> None:
    policy, reference, leaves = extreme()
    scores = torch.tensor([[1e4, 0.5], [1.0, 1.0], [2.0, 1.0], [1e-30, 5e-31], [7.0, 7.0]])
    for offset in ("log", "identity", "log1p", "ratio"):
        assert holds(m.odpo(policy, reference, scores, **(ODPO | {"offset": offset})), leaves)


MODULE = preference
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("odpo: offset times beta", check_odpo_by_hand, "shift = alpha *", "shift = beta * alpha *"),
    ("odpo: offset added", check_odpo_by_hand, "F.logsigmoid(z - torch.where(free",
     "F.logsigmoid(z + torch.where(free"),
    ("odpo: empty gap as no offset", check_odpo_empty_gap, "torch.where(free, torch.zeros_like(loss), loss)", "loss"),
    ("odpo: negative gaps let through", check_odpo_refuses, "    if bool((gap < 0).any()):\n", "    if False:\n"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "odpo: name: torch.zeros_like(shift) -> torch.ones_like(shift)": "under a mask that is put on again",
}
