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

from rlhf_cli.objectives.fused import Fused
from rlhf_cli.objectives.head import Head, HeadLogp, add_gradient, operand, prepare_gradients, product
from rlhf_cli.objectives.tile import FINISH

BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits of a block: 32 MiB in float32; on a GPU 256 MiB, as each block reads the head and adds to all its gradient."""
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
    finish = FINISH.by(head.compiled)
    exponentiate = _EXPONENTIATE.by(head.compiled)
    height = block(vocabulary, rows.device.type)
    for first in range(0, count, height):
        r = slice(first, min(first + height, count))
        logits, bent = head.logits(rows[r], slice(0, vocabulary))  # (R, V)
        token = ids[r]
        own, mass, moment = exponentiate(logits, token)
        logp[r] = own - mass.log()
        entropy[r] = mass.log() - moment / mass
        by_logit = logits.mul_((-upstream / mass)[:, None])
        by_logit.scatter_add_(1, token[:, None], torch.full_like(own, upstream)[:, None])
        factor = finish(by_logit, bent, head.scale, rows.dtype)
        found[r] = product(factor, head.columns(slice(0, vocabulary)))
        add_gradient(head, slice(0, vocabulary), factor, by_logit, rows[r])
        del logits, bent, by_logit, factor  # before the next block is formed
    return logp, entropy, found


def block(vocabulary: int, device: str) -> int:
    """Rows of a block."""
    elements, (fewest, most) = BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS["cpu"]), BLOCK
    return min(max(elements // vocabulary, fewest), most)


def _exponentiate(logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (R, V) become e^x, x the logit less the largest of its row -> x of the token, the sums over V of
    e^x and of x e^x: (R,) each."""
    logits -= logits.amax(1, keepdim=True)
    own = logits.gather(1, token[:, None])[:, 0]
    mass, moment = logits.new_zeros((2, len(logits)))
    for tile in logits.split(WIDTH, dim=1):
        each = tile.exp()
        mass += each.sum(1)
        moment += torch.einsum("rc,rc->r", each, tile)
        tile.copy_(each)
        del each
    return own, mass, moment


def _at_once(logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_exponentiate`, all columns in one go."""
    x = logits - logits.amax(1, keepdim=True)
    each = x.exp()
    logits.copy_(each)
    return x.gather(1, token[:, None])[:, 0], each.sum(1), (each * x).sum(1)


_EXPONENTIATE = Fused(_exponentiate, _at_once)
