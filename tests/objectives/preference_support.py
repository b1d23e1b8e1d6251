"""What the checks of preference objectives share. B examples, u = policy - reference, D = u chosen - u rejected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.objectives.support import finite, gradients, leaf

LOG2 = math.log(2)
DPO = {"beta": 0.5, "label_smoothing": 0.0}
KTO = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 2.0}
ODPO = {"beta": 0.5, "alpha": 1.0, "offset": "log"}
SIMPO: dict[str, Any] = {"beta": 2.0, "gamma": 0.5, "gamma_beta_ratio": None, "sft_weight": 0.0}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    """log(1 + e^x) = -log sigma(-x)."""
    return math.log1p(math.exp(x))


def pair(m: Any, chosen: Tensor, rejected: Tensor, lengths: tuple[list[int], list[int]] | None = None) -> Any:
    """Sums (B,) with lengths 1 unless given."""
    first, second = lengths or ([1] * len(chosen), [1] * len(chosen))
    return m.Pair(chosen, rejected, torch.tensor(first), torch.tensor(second))


def two(m: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, list[Tensor]]:
    """policy, reference with u = (1, -1) and (0, 2), so D = 2 and -2; and the four tensors, all taking gradients."""
    numbers = ([-10.0, -20.0], [-14.0, -17.0], [-11.0, -20.0], [-13.0, -19.0])
    leaves = [leaf(torch.tensor(n, dtype=dtype)) for n in numbers]
    return pair(m, *leaves[:2]), pair(m, *leaves[2:]), leaves


def equal(m: Any, size: int = 3) -> tuple[Any, Any]:
    """A policy that is its reference."""
    chosen, rejected = torch.linspace(-9, -3, size), torch.linspace(-1, -30, size)
    lengths = (list(range(1, size + 1)), list(range(size + 1, 1, -1)))
    return pair(m, leaf(chosen), leaf(rejected), lengths), pair(m, chosen, rejected, lengths)


def extreme(m: Any) -> tuple[Any, Any, list[Tensor]]:
    """float32: +-1e4 nats apart, equal, and empty completions."""
    chosen = leaf(torch.tensor([-1e4, 0.0, -1e4, -3.0, 0.0]))
    rejected = leaf(torch.tensor([0.0, -1e4, -1e4, -3.0, 0.0]))
    lengths = ([1, 7, 10, 2, 0], [5, 1, 10, 2, 0])
    zero = torch.zeros(5)
    return pair(m, chosen, rejected, lengths), pair(m, zero, zero, lengths), [chosen, rejected]


def holds(judged: Any, inputs: list[Tensor]) -> bool:
    """Loss, rewards and gradients are finite."""
    return finite(judged.loss, judged.rewards, *gradients(judged.loss, *inputs))
