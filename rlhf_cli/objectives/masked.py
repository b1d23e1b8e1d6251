"""Sums and statistics over the tokens that count. B rows, T token slots; masks are bool, made where lengths are known.

Masked slots are replaced with `where`, never multiplied away: they may hold anything, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x (any shape) over mask (same shape), a scalar."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over mask, a scalar; 0 where nothing counts."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """x (B, T) scaled to variance 1 over mask and, with shift_mean, shifted to mean 0; zeros where masked.

    Population variance, epsilon 1e-8 inside the root (Ziegler et al., arXiv:1909.08593, their code).
    """
    x = torch.where(mask, x, torch.zeros_like(x))
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    scaled = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        scaled = scaled + mean
    return torch.where(mask, scaled, torch.zeros_like(x))


def sum_by_sequence(x: Tensor, sequence: Tensor, count: int) -> Tensor:
    """x (T,) summed by sequence (T,) -> (count,). A sequence without tokens gives 0."""
    return x.new_zeros(count).index_add(0, sequence, x)


def lengths(sequence: Tensor, count: int) -> Tensor:
    """Tokens of each sequence: sequence (T,) -> (count,) int64."""
    return torch.bincount(sequence, minlength=count)
