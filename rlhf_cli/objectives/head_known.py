"""The output layer as a kernel for likelihoods whose gradient is known beforehand: one pass forms all there is.

Maximum likelihood divides the sum over tokens by their count, so the gradient of the loss by each log-probability is
the same number, known before the forward pass. Then a block of rows forms its logits once: log-probabilities, gradient
by the hidden states, and gradient by the head, which is added where that lies. (With a gradient that is only known
later, objectives/head.py forms the logits a second time.)

T tokens, H hidden size, V vocabulary, R rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives.head import Head, HeadLogp, add_gradient, operand, prepare_gradients, product

BLOCK_ELEMENTS = 2**23
"""Logits of a block (32 MiB in float32)."""
BLOCK = (64, 1024)
"""Fewest and most rows of a block."""
WIDTH = 4096
"""Columns that are summed up together, so that they stay in the cache."""


def known_logp(hidden: Tensor, head: Head, ids: Tensor, upstream: float) -> HeadLogp:
    """Log-probability of `ids` (T,) under softmax(logits of hidden (T, H)), and its entropy without gradient.

    upstream: the gradient that each log-probability will be given; another one raises RuntimeError in the backward
    pass. The gradients of the head, which must be trained, are there when this returns.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        logp, entropy = _KnownLogp.apply(hidden, head, ids, upstream)
    return HeadLogp(logp, entropy)


class _KnownLogp(torch.autograd.Function):
    """hidden, head, ids, upstream -> logp (T,), entropy (T,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, ids: Tensor, upstream: float) -> tuple[Tensor, Tensor]:
        logp, entropy, found = _pass(operand(hidden, head.dtype), head, ids, upstream)
        ctx.upstream = upstream
        ctx.save_for_backward(found.to(hidden.dtype))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (found,) = ctx.saved_tensors
        if not torch.allclose(upstream, torch.full_like(upstream, ctx.upstream), rtol=1e-5, atol=0.0):
            raise RuntimeError(f"the gradient of the log-probabilities is not the {ctx.upstream} that was promised")
        return found, None, None, None


def _pass(rows: Tensor, head: Head, ids: Tensor, upstream: float) -> tuple[Tensor, Tensor, Tensor]:
    """rows (T, H), an operand -> logp (T,), entropy (T,), gradient by the rows (T, H)."""
    count, vocabulary = len(ids), len(head.weight)
    prepare_gradients(head)
    logp, entropy = rows.new_empty((2, count), dtype=torch.float32)
    found = torch.empty_like(rows, dtype=torch.float32)
    height = min(max(BLOCK_ELEMENTS // vocabulary, BLOCK[0]), BLOCK[1])
    for first in range(0, count, height):
        r = slice(first, min(first + height, count))
        logits, bent = head.logits(rows[r], slice(0, vocabulary))  # (R, V)
        token = ids[r, None]
        logits -= logits.amax(1, keepdim=True)
        own = logits.gather(1, token)[:, 0]
        mass, moment = _exponentiate(logits)
        logp[r] = own - mass.log()
        entropy[r] = mass.log() - moment / mass
        by_logit = logits.mul_((-upstream / mass)[:, None])
        by_logit.scatter_add_(1, token, torch.full_like(token, upstream, dtype=torch.float32))
        if bent is not None:
            by_logit *= bent
        if head.scale != 1.0:
            by_logit *= head.scale
        factor = by_logit.to(rows.dtype)
        found[r] = product(factor, head.columns(slice(0, vocabulary)))
        add_gradient(head, slice(0, vocabulary), factor, by_logit, rows[r])
        del logits, bent, by_logit, factor  # before the next block is formed
    return logp, entropy, found


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (R, V) become e^logits; the sums over V of that and of that times the logit: (R,) each."""
    mass, moment = logits.new_zeros((2, len(logits)))
    for tile in logits.split(WIDTH, dim=1):
        each = tile.exp()
        mass += each.sum(1)
        moment += torch.einsum("rc,rc->r", each, tile)
        tile.copy_(each)
        del each
    return mass, moment
