"""Layers that keep less for the backward pass, and pass over memory fewer times. models/lighten.py puts them in place.

- RMSNorm keeps its input and one number a row, instead of three tensors of the input's size.
- The gated MLP keeps gate and up, and forms silu(gate) again.
- Rotary positions keep nothing but the angles, and turn both halves without copies of them.
- LoRA adds its product to the layer's where that lies, without two more tensors of its size.

Each takes `compiled`: whether its chains of element-wise operations are compiled into one pass (objectives/fused.py).

B rows, L tokens a row, H hidden size, D head size, I inner size, R rank, O output size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.fused import Fused


class RMSNorm(torch.autograd.Function):
    """x (..., H), weight (H,), eps, late -> x / rms(x) * weight; late: rounded to x's dtype before the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, late: bool, compiled: bool = False) -> Tensor:
        out, inverse = _NORM.by(compiled)(x, weight, eps, late)
        ctx.save_for_backward(x, weight, inverse)
        ctx.compiled = compiled
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        by_x, by_weight = _NORM_BACK.by(ctx.compiled)(upstream, x, weight, inverse, ctx.needs_input_grad[1])
        return by_x, by_weight, None, None, None


def _norm(x: Tensor, weight: Tensor, eps: float, late: bool) -> tuple[Tensor, Tensor]:
    """Output (..., H), and 1 / rms(x) (..., 1)."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    unit = wide * inverse
    if not late:
        return unit.mul_(weight.float()).to(x.dtype), inverse
    unit = unit.to(x.dtype)
    return unit.mul_(weight) if weight.dtype == unit.dtype else unit * weight, inverse


def _norm_back(
    upstream: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, weighs: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients by x and, where that is trained, by the weight."""
    wide, by_out, by_weight = x.float(), upstream.float(), None
    product = by_out * wide
    if weighs:
        by_weight = (inverse.reshape(1, -1) @ product.flatten(0, -2))[0].to(weight.dtype)
    along = (product @ weight.float())[..., None] * inverse.pow(3) / len(weight)
    found = torch.mul(by_out, weight.float(), out=product).mul_(inverse)
    return found.addcmul_(wide, along, value=-1.0).to(x.dtype), by_weight


def _norm_back_at_once(
    upstream: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, weighs: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_norm_back`, without matrix products."""
    wide, by_unit = x.float(), upstream.float() * weight.float()
    along = (by_unit * wide).sum(-1, keepdim=True) * inverse.pow(3) / len(weight)
    by_weight = (upstream.float() * wide * inverse).flatten(0, -2).sum(0).to(weight.dtype) if weighs else None
    return (by_unit * inverse - wide * along).to(x.dtype), by_weight


_NORM, _NORM_BACK = Fused(_norm), Fused(_norm_back, _norm_back_at_once)


class Rotary(torch.autograd.Function):
    """x (B, heads, L, D), cos and sin (B, 1, L, D) -> x turned by its position: x cos + (-x2, x1) sin of its halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, compiled: bool = False) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.compiled = compiled
        return _TURN.by(compiled)(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _TURN_BACK.by(ctx.compiled)(upstream, *ctx.saved_tensors), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x * cos
    (x1, x2), (out1, out2), (low, high) = (part.chunk(2, dim=-1) for part in (x, out, sin))
    out1.addcmul_(x2, low, value=-1.0)
    out2.addcmul_(x1, high)
    return out


def _turn_back(upstream: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = upstream * cos
    (x1, x2), (out1, out2), (low, high) = (part.chunk(2, dim=-1) for part in (upstream, out, sin))
    out1.addcmul_(x2, high)
    out2.addcmul_(x1, low, value=-1.0)
    return out


_TURN, _TURN_BACK = Fused(_turn), Fused(_turn_back)


class Gated(torch.autograd.Function):
    """gate, up (..., I) -> silu(gate) up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, compiled: bool = False) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.compiled = compiled
        return _GATE.by(compiled)(gate, up)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *_GATE_BACK.by(ctx.compiled)(upstream, *ctx.saved_tensors), None


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _gate_back(upstream: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by gate and up."""
    return torch.ops.aten.silu_backward(upstream * up, gate), F.silu(gate).mul_(upstream)


_GATE, _GATE_BACK = Fused(_gate), Fused(_gate_back)


class AddLora(torch.autograd.Function):
    """out (..., O), x (..., I), down (R, I), up (O, R), scale -> out + scale x down^T up^T, where `out` lies; all of
    one dtype but down and up, which are rounded to it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        narrow = F.linear(x, down.to(x.dtype)).flatten(0, -2)
        out.view(-1, out.shape[-1]).addmm_(narrow, up.to(x.dtype).t(), alpha=scale)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, narrow, down, up)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        x, narrow, down, up = ctx.saved_tensors
        rows = upstream.flatten(0, -2)
        by_narrow = (rows @ up.to(x.dtype)).mul_(ctx.scale)  # (T, R)
        by_x = by_down = by_up = None
        if ctx.needs_input_grad[1]:
            by_x = (by_narrow @ down.to(x.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            by_down = (by_narrow.t() @ x.flatten(0, -2)).to(down.dtype)
        if ctx.needs_input_grad[3]:
            by_up = (rows.t() @ narrow).mul_(ctx.scale).to(up.dtype)
        return upstream, by_x, by_down, by_up, None
