"""Layers that keep less for the backward pass, in place of the architecture's own where both give the same numbers.

A layer is replaced by a subclass of its own class, so that names, weights, adapters and files stay as they are. Which
formula a class computes is not looked up by its name but tried: on made-up numbers, values and gradients must agree.

- RMSNorm keeps its input and one number a row, instead of three tensors of the input's size.
- The gated MLP keeps gate and up, and forms silu(gate) again.

L rows, H hidden size, I inner size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Largest gap, relative to 1 + the largest number, between a layer and what replaces it, in float32."""
COARSE = 2e-2
"""The same in half precision, which rounds in other places."""


class _RMSNorm(torch.autograd.Function):
    """x (..., H), weight (H,), eps, late -> x / rms(x) * weight; late: rounded to x's dtype before the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, late: bool) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        unit = wide * inverse
        return unit.to(x.dtype) * weight if late else (unit * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit, wide = x.float() * inverse, upstream.float()
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype)
        wide = wide * weight.float()
        along = (wide * unit).mean(-1, keepdim=True)
        return wide.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), by_weight, None, None


class _Gated(torch.autograd.Function):
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


def _norm_late(self: Any, x: Tensor) -> Tensor:
    out: Tensor = _RMSNorm.apply(x, self.weight, self.variance_epsilon, True)
    return out


def _norm_from_one(self: Any, x: Tensor) -> Tensor:
    out: Tensor = _RMSNorm.apply(x, 1.0 + self.weight.float(), self.eps, False)
    return out


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))
    return out


KINDS: tuple[tuple[str, Callable[[Any, Tensor], Tensor], tuple[str, ...]], ...] = (
    ("RMSNorm", _norm_late, ("weight", "variance_epsilon")),
    ("RMSNorm", _norm_from_one, ("weight", "eps")),
    ("MLP", _gated_mlp, ("gate_proj", "up_proj", "down_proj", "act_fn")),
)
"""End of the class's name, the forward that may replace its own, and what that reads."""


def lighten(model: nn.Module) -> dict[str, int]:
    """Replace what can be replaced; how many of each class."""
    found: dict[type[nn.Module], type[nn.Module] | None] = {}
    count: dict[str, int] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in found:
            found[kind] = _lighter(module)
        lighter = found[kind]
        if lighter is not None and not module._forward_hooks and not module._forward_pre_hooks:
            module.__class__ = lighter
            count[kind.__name__] = count.get(kind.__name__, 0) + 1
    return count


def _lighter(module: nn.Module) -> type[nn.Module] | None:
    """A subclass of the module's class that keeps less, when it computes the same."""
    kind = type(module)
    for end, forward, reads in KINDS:
        if kind.__name__.endswith(end) and all(hasattr(module, name) for name in reads):
            lighter = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
            if _same(module, lighter):
                return lighter
    return None


def _same(module: nn.Module, lighter: type[nn.Module]) -> bool:
    """Whether both give the same values and gradients on made-up numbers."""
    weight = getattr(module, "weight", None)
    width = int(module.gate_proj.in_features if weight is None else len(weight))  # type: ignore[union-attr, arg-type]
    like = next(iter(module.parameters()))
    dtype = like.dtype if like.is_floating_point() else torch.float32  # quantised weights are packed in integers
    x = torch.linspace(-2.0, 3.0, 3 * width, device=like.device).sin().view(3, width).to(dtype).requires_grad_()
    tensors = [x] if weight is None else [x, weight]
    known = [tensor.requires_grad for tensor in tensors]
    try:
        with torch.enable_grad():
            for tensor in tensors:
                tensor.requires_grad_()
            said = []
            for forward in (type(module).forward, lighter.forward):
                out = forward(module, x)
                said.append((out.detach(), *torch.autograd.grad(out, tensors, torch.cos(out.detach() * 3.0))))
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        for tensor, flag in zip(tensors, known, strict=True):
            tensor.requires_grad_(flag)
    limit = TOLERANCE if like.dtype == torch.float32 else COARSE
    gaps = [float((a - b).abs().max() / (1.0 + b.abs().max())) for a, b in zip(*said, strict=True)]
    return max(gaps) <= limit
