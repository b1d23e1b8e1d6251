"""What happens to a tile of logits between the products that make and that use it: chains of element-wise operations.

R rows of hidden states, C columns of the vocabulary. Each chain overwrites the tile it is given.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_cli.objectives.fused import Fused

Watch = Literal["none", "entropy", "bonus", "collision"]


def bend(logits: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Products (R, C), overwritten, -> logits, and the slope of the cap."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if cap is None:
        return logits, None
    bent = logits.div_(cap).tanh_()
    slope = 1.0 - bent * bent
    return bent.mul_(cap), slope


def absorb(
    logits: Tensor, top: Tensor, mass: Tensor, moment: Tensor, watch: Watch
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """A tile of logits (R, C), which become e^x, and the sums so far (R,) -> x e^x (R, C) where it is watched, how far
    the largest so far lies below the new one, that, and the new sums (R,)."""
    peak = torch.maximum(top, logits.amax(1))
    sink = top - peak
    shrink = sink.exp()
    logits -= peak[:, None]
    tilted = logits.clone() if watch in ("entropy", "bonus") else None
    each = logits.exp_()
    if tilted is not None:
        tilted *= each
        moment = (moment + sink * mass) * shrink + tilted.sum(1)
    elif watch == "collision":
        moment = moment * shrink**2 + torch.einsum("rc,rc->r", each, each)
    return tilted, sink, peak, mass * shrink + each.sum(1), moment


def by_each(logits: Tensor, top: Tensor, share: Tensor) -> Tensor:
    """Logits (R, C), overwritten by e^(logit - top) share; top and share (R,)."""
    logits -= top[:, None]
    return logits.exp_().mul_(share[:, None])


def by_both(logits: Tensor, top: Tensor, mass: Tensor, lift: Tensor, by_entropy: Tensor) -> Tensor:
    """Logits (R, C), overwritten: with x = logit - top, e^x (lift + by_entropy x) / mass; all others (R,)."""
    logits -= top[:, None]
    total = lift[:, None] + by_entropy[:, None] * logits
    return logits.exp_().mul_(total).div_(mass[:, None])


def finish(by_logit: Tensor, bent: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """The gradient by the logits (R, C) becomes, in place, that by the products, and returns rounded as an operand."""
    if bent is not None:
        by_logit *= bent
    if scale != 1.0:
        by_logit *= scale
    return by_logit.to(dtype)


BEND, ABSORB, FINISH = Fused(bend), Fused(absorb), Fused(finish)
BY_EACH, BY_BOTH = Fused(by_each), Fused(by_both)
