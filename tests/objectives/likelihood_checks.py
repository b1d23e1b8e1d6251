"""Maximum likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from rlhf_cli.objectives import likelihood
from rlhf_cli.objectives.logprob import token_logp
from tests.objectives.support import INF, Check, checks_of, close, differentiates, doubles, gradients, leaf


def check_cross_entropy_by_hand(m: Any) -> None:
    # Probabilities 1/2, 1/4, 1/4, the token has the first: mean of the logs -(1 + 2 + 2) log 2 / 3.
    logp, mean = doubles(math.log(0.5)), doubles(-5 / 3 * math.log(2))
    close(m.cross_entropy(logp, mean, label_smoothing=0.0), [math.log(2)])
    # 0.9 log 2 + 0.1 x 5/3 log 2 = 1.0666667 log 2 = 0.7393570
    close(m.cross_entropy(logp, mean, label_smoothing=0.1), [0.7393570], 1e-7)


def check_cross_entropy_without_smoothing(m: Any) -> None:
    logp = doubles(-1, -1e4, 0)
    close(m.cross_entropy(logp, doubles(-INF, -INF, -INF), label_smoothing=0.0), [1.0, 1e4, 0.0])
    assert m.cross_entropy(doubles(), doubles(), label_smoothing=0.1).shape == (0,)


def check_cross_entropy_is_torchs(m: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 11, generator=generator) * 3
    ids = torch.randint(11, (6,), generator=generator)
    for eps in (0.0, 0.2):
        x, y = leaf(logits), leaf(logits)
        of = token_logp(x, lambda h: h, ids)
        ours = m.cross_entropy(of.logp, of.mean, label_smoothing=eps)
        theirs = F.cross_entropy(y, ids, reduction="none", label_smoothing=eps)
        close(ours, theirs, 1e-5)
        (g,), (h,) = gradients(ours, x), gradients(theirs, y)
        close(g, h, 1e-6)


def check_cross_entropy_gradient(m: Any) -> None:
    # d loss / d logits = p - (1 - eps) [the token] - eps / V, so it sums to zero.
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.1]])
    ids, eps = torch.tensor([2]), 0.2
    x = leaf(logits)
    of = token_logp(x, lambda h: h, ids)
    (g,) = gradients(m.cross_entropy(of.logp, of.mean, label_smoothing=eps), x)
    wanted = torch.softmax(logits, -1) - torch.tensor([[0.0, 0.0, 1 - eps, 0.0]]) - eps / 4
    close(g, wanted, 1e-6)
    close(g.sum(), 0.0, 1e-6)
    for smoothing in (0.0, 0.3):
        assert differentiates(
            lambda a, b, s=smoothing: m.cross_entropy(a, b, label_smoothing=s), doubles(-1, -2), doubles(-3, -4)
        )


MODULE = likelihood
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("cross-entropy: smoothing of the wrong part", check_cross_entropy_by_hand,
     "-(1 - label_smoothing) * logp - label_smoothing * mean",
     "-label_smoothing * logp - (1 - label_smoothing) * mean"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
