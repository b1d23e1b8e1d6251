"""Sums and statistics over tokens that count."""

from __future__ import annotations

import math
from typing import Any

import torch

from rlhf_cli.objectives import masked
from tests.objectives.support import INF, NAN, Check, checks_of, close, differentiates, doubles, finite, gradients, leaf

MASK = torch.tensor([[True, True, False], [True, False, False]])
X = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]], dtype=torch.float64)
GARBAGE = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]], dtype=torch.float64)


def check_masked_sum(m: Any) -> None:
    close(m.masked_sum(X, MASK), 9.0)  # 1 + 2 + 6
    x = leaf(GARBAGE)
    close(m.masked_sum(x, MASK), 9.0)
    (g,) = gradients(m.masked_sum(x, MASK), x)
    close(g, MASK.double())


def check_masked_mean(m: Any) -> None:
    close(m.masked_mean(X, MASK), 3.0)  # 9 / 3
    x = leaf(GARBAGE)
    close(m.masked_mean(x, MASK), 3.0)
    (g,) = gradients(m.masked_mean(x, MASK), x)
    close(g, MASK.double() / 3)


def check_mean_of_nothing(m: Any) -> None:
    x = leaf(GARBAGE)
    nothing = torch.zeros_like(MASK)
    close(m.masked_mean(x, nothing), 0.0)
    (g,) = gradients(m.masked_mean(x, nothing), x)
    close(g, torch.zeros_like(X))
    close(m.masked_mean(doubles(), torch.zeros(0, dtype=torch.bool)), 0.0)


def check_whiten_by_hand(m: Any) -> None:
    # 1, 2, 6: mean 3, squares of the differences 4 + 1 + 9 = 14, population variance 14 / 3, root 2.1602469.
    root = math.sqrt(14 / 3)
    expected = [[-2 / root, -1 / root, 0.0], [3 / root, 0.0, 0.0]]
    close(m.whiten(X, MASK), expected, 1e-8)
    close(m.whiten(X, MASK, shift_mean=True), expected, 1e-8)
    kept = [[3 - 2 / root, 3 - 1 / root, 0.0], [3 + 3 / root, 0.0, 0.0]]
    close(m.whiten(X, MASK, shift_mean=False), kept, 1e-8)


def check_whiten_epsilon(m: Any) -> None:
    # +-1e-4: variance 1e-8, so the root is sqrt(2e-8) and the result +-1 / sqrt(2).
    x = doubles(1e-4, -1e-4)
    close(m.whiten(x, torch.ones(2, dtype=torch.bool)), [math.sqrt(0.5), -math.sqrt(0.5)], 1e-9)


def check_whiten_statistics(m: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 9, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.rand(7, 9, generator=generator) < 0.6
    white = m.whiten(x, mask)[mask]
    close(white.mean(), 0.0)
    close(white.var(correction=0), 1.0)
    kept = m.whiten(x, mask, shift_mean=False)[mask]
    close(kept.mean(), x[mask].mean())
    close(kept.var(correction=0), 1.0)


def check_whiten_garbage(m: Any) -> None:
    for shift in (True, False):
        close(m.whiten(GARBAGE, MASK, shift_mean=shift), m.whiten(X, MASK, shift_mean=shift))
        x, clean = leaf(GARBAGE), leaf(X)
        weight = torch.arange(6.0, dtype=torch.float64).view(2, 3)
        (g,) = gradients(m.whiten(x, MASK, shift_mean=shift) * weight, x)
        (g_clean,) = gradients(m.whiten(clean, MASK, shift_mean=shift) * weight, clean)
        close(g, g_clean)
        close(g[~MASK], torch.zeros(3))


def check_whiten_degenerate(m: Any) -> None:
    everything = torch.ones(2, 3, dtype=torch.bool)
    close(m.whiten(torch.full((2, 3), 0.25), everything), torch.zeros(2, 3))
    close(m.whiten(torch.full((2, 3), 0.25), everything, shift_mean=False), torch.full((2, 3), 0.25))
    one = torch.tensor([[True, False, False], [False, False, False]])
    close(m.whiten(X, one), torch.zeros(2, 3))
    for shift in (True, False):
        close(m.whiten(X, torch.zeros_like(MASK), shift_mean=shift), torch.zeros(2, 3))
        assert m.whiten(X[:, :0], MASK[:, :0], shift_mean=shift).shape == (2, 0)
    assert finite(m.whiten(torch.full((64, 64), 0.1), torch.ones(64, 64, dtype=torch.bool)))


def check_sum_by_sequence(m: Any) -> None:
    sequence = torch.tensor([0, 0, 2, 2])
    x = leaf(doubles(1, 2, 3, 4))
    close(m.sum_by_sequence(x, sequence, 4), [3.0, 0.0, 7.0, 0.0])
    (g,) = gradients(m.sum_by_sequence(x, sequence, 4) * doubles(1, 10, 100, 1000), x)
    close(g, [1.0, 1.0, 100.0, 100.0])
    close(m.sum_by_sequence(doubles(1, 2, 3), torch.tensor([1, 0, 1]), 2), [2.0, 4.0])
    close(m.sum_by_sequence(doubles(), torch.zeros(0, dtype=torch.int64), 2), [0.0, 0.0])
    assert differentiates(lambda v: m.sum_by_sequence(v, sequence, 3), doubles(1, 2, 3, 4))


def check_lengths(m: Any) -> None:
    assert m.lengths(torch.tensor([0, 0, 2, 2, 2]), 4).tolist() == [2, 0, 3, 0]
    nothing = m.lengths(torch.zeros(0, dtype=torch.int64), 2)
    assert nothing.tolist() == [0, 0]
    assert nothing.dtype == torch.int64


MODULE = masked
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("whiten: shift inverted", check_whiten_by_hand, "    if not shift_mean:\n", "    if shift_mean:\n"),
    ("whiten: mean over padding", check_whiten_by_hand, "    mean = masked_mean(x, mask)\n", "    mean = x.mean()\n"),
    ("whiten: deviation for variance", check_whiten_by_hand, "torch.rsqrt(variance + 1e-8)",
     "torch.rsqrt(variance.sqrt() + 1e-8)"),
    ("masked: multiplied away", check_masked_sum, "torch.where(mask, x, torch.zeros_like(x)).sum()",
     "(x * mask).sum()"),
    ("masked: mean over all slots", check_masked_mean, "mask.sum().clamp(min=1)", "mask.numel()"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "whiten: name: torch.zeros_like(x) -> torch.ones_like(x)": "what stands under a mask that is put on again",
}  # fmt: skip
