"""Layers that keep less for the backward pass, and pass over memory fewer times. models/lighten.py puts them in place.

- RMSNorm keeps its input and one number a row, instead of three tensors of the input's size.
- The gated MLP keeps gate and up, and forms silu(gate) again.
- Rotary positions keep nothing but the angles, and turn both halves without copies of them.
- LoRA adds its product to the layer's where that lies, without two more tensors of its size.

B rows, L tokens a row, H hidden size, D head size, I inner size, R rank, O output size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """x (..., H), weight (H,), eps, late -> x / rms(x) * weight; late: rounded to x's dtype before the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, late: bool) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        unit = wide * inverse
        if not late:
            return unit.mul_(weight.float()).to(x.dtype)
        unit = unit.to(x.dtype)
        return unit.mul_(weight) if weight.dtype == unit.dtype else unit * weight

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, by_out, by_weight = x.float(), upstream.float(), None
        product = by_out * wide
        if ctx.needs_input_grad[1]:
            by_weight = (inverse.reshape(1, -1) @ product.flatten(0, -2))[0].to(weight.dtype)
        along = (product @ weight.float())[..., None] * inverse.pow(3) / len(weight)
        found = torch.mul(by_out, weight.float(), out=product).mul_(inverse)
        return found.addcmul_(wide, along, value=-1.0).to(x.dtype), by_weight, None, None


class Rotary(torch.autograd.Function):
    """x (B, heads, L, D), cos and sin (B, 1, L, D) -> x turned by its position: x cos + (-x2, x1) sin of its halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        low, high = sin.chunk(2, dim=-1)
        return _turn(x, cos, low, -1.0, high, 1.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        low, high = sin.chunk(2, dim=-1)
        return _turn(upstream, cos, high, 1.0, low, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, low: Tensor, low_sign: float, high: Tensor, high_sign: float) -> Tensor:
    """x cos + (low_sign x2 low, high_sign x1 high)."""
    out = x * cos
    (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    out1.addcmul_(x2, low, value=low_sign)
    out2.addcmul_(x1, high, value=high_sign)
    return out


class Gated(torch.autograd.Function):
    """gate, up (..., I) -> silu(gate) up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        by_gate = torch.ops.aten.silu_backward(upstream * up, gate)
        return by_gate, F.silu(gate).mul_(upstream)


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
