"""Put the layers of models/kernels.py in place of an architecture's own where both give the same numbers.

A layer is replaced by a subclass of its own class, so that names, weights, adapters and files stay as they are. Which
formula a class computes is not looked up by its name but tried: on made-up numbers, values and gradients must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cli.models.kernels import AddLora, Gated, RMSNorm, Rotary

TOLERANCE = 1e-5
"""Largest gap, relative to 1 + the largest number, between a layer and what replaces it, in float32."""
COARSE = 2e-2
"""The same in half precision, which rounds in other places."""
ROTATE = "apply_rotary_pos_emb"
"""The name by which an attention layer's forward calls the function that turns queries and keys by their positions."""


def _norm_late(self: Any, x: Tensor) -> Tensor:
    out: Tensor = RMSNorm.apply(x, self.weight, self.variance_epsilon, True, self.compiled)
    return out


def _norm_from_one(self: Any, x: Tensor) -> Tensor:
    out: Tensor = RMSNorm.apply(x, 1.0 + self.weight.float(), self.eps, False, self.compiled)
    return out


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x), self.compiled))
    return out


KINDS: tuple[tuple[str, Callable[[Any, Tensor], Tensor], tuple[str, ...]], ...] = (
    ("RMSNorm", _norm_late, ("weight", "variance_epsilon")),
    ("RMSNorm", _norm_from_one, ("weight", "eps")),
    ("MLP", _gated_mlp, ("gate_proj", "up_proj", "down_proj", "act_fn")),
)
"""End of the class's name, the forward that may replace its own, and what that reads."""


def lighten(model: nn.Module, *, compiled: bool = False) -> dict[str, int]:
    """Replace what can be replaced; how many of each class. compiled: by layers whose element-wise chains are."""
    found: dict[type[nn.Module], type[nn.Module] | None] = {}
    count: dict[str, int] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in found:
            found[kind] = _lighter(module, compiled)
        lighter = found[kind]
        if lighter is not None and not module._forward_hooks and not module._forward_pre_hooks:
            module.__class__ = lighter
            count[kind.__name__] = count.get(kind.__name__, 0) + 1
    return count


def _lighter(module: nn.Module, compiled: bool) -> type[nn.Module] | None:
    """A subclass of the module's class that keeps less, when it computes the same."""
    kind = type(module)
    for end, forward, reads in KINDS:
        if kind.__name__.endswith(end) and all(hasattr(module, name) for name in reads):
            lighter = _subclass(kind, forward, compiled=compiled)
            if _same(module, lighter):
                return lighter
    return _with_own_rotation(kind, compiled)


def _subclass(kind: type[nn.Module], forward: Any, **more: Any) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__} | more)


# --- rotary positions ------------------------------------------------------------------------------------------------


def _with_own_rotation(kind: type[nn.Module], compiled: bool) -> type[nn.Module] | None:
    """An attention class whose forward is the same code, but for the function by which it rotates."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or ROTATE not in forward.__code__.co_names:
        return None
    rotate = _lighter_rotation(forward.__globals__[ROTATE], compiled)
    if not _rotates_alike(rotate, forward.__globals__[ROTATE]):
        return None
    names = forward.__globals__ | {ROTATE: rotate}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return _subclass(kind, own)


def _lighter_rotation(
    plain: Callable[..., tuple[Tensor, Tensor]], compiled: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that keeps less; calls of another kind go to the plain one."""

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        usual = not more and not named and cos.dim() == 3 and not cos.requires_grad
        if not usual or cos.dtype != q.dtype or cos.shape[-1] != q.shape[-1]:
            return plain(q, k, cos, sin, *more, **named)
        cos, sin = cos[:, None], sin[:, None]
        return Rotary.apply(q, cos, sin, compiled), Rotary.apply(k, cos, sin, compiled)

    return rotate


def _rotates_alike(one: Callable[..., tuple[Tensor, Tensor]], other: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether both give the same values and gradients on made-up numbers."""
    angle = torch.linspace(0.0, 2.0, 12).view(1, 3, 4).repeat(1, 1, 2)
    said = []
    try:
        with torch.enable_grad():
            for rotate in (one, other):
                q, k = (torch.linspace(-2.0, 3.0, n * 24).sin().view(1, n, 3, 8).requires_grad_() for n in (2, 1))
                out = rotate(q, k, angle.cos(), angle.sin())
                total = sum((part * torch.cos(part.detach() * 3.0)).sum() for part in out)
                assert isinstance(total, Tensor)
                said.append([*(part.detach() for part in out), *torch.autograd.grad(total, (q, k))])
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    return _agree(said, TOLERANCE)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lighten_adapters(model: nn.Module, name: str) -> int:
    """Replace the layers with an adapter `name` by ones that keep less; how many. What a call needs beyond a plain
    adapter (dropout, several at once, merged weights, DoRA, another dtype) is left to peft's own forward."""
    from peft.tuners.lora import LoraLayer

    found: dict[type[nn.Module], type[nn.Module] | None] = {}
    count = 0
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
    for module in layers:
        kind = type(module)
        if is_lighter(module):
            continue
        if kind not in found:
            own = _subclass(kind, _adapted, lighter=True)
            found[kind] = own if _adapts_alike(module, own, name) else None
        lighter = found[kind]
        if lighter is not None and not module._forward_hooks and not module._forward_pre_hooks:
            module.__class__ = lighter
            count += 1
    return count


def is_lighter(module: nn.Module) -> bool:
    """Whether this adapted layer is one of those."""
    return getattr(type(module), "lighter", False)


def _adapted(self: Any, x: Tensor, *more: Any, **named: Any) -> Tensor:
    """The forward of an adapted linear layer."""
    plain: Callable[..., Tensor] = type(self).__bases__[0].forward  # type: ignore[attr-defined]
    active = self.active_adapters
    if more or named or self.merged or (len(active) != 1 and not self.disable_adapters):
        return plain(self, x, *more, **named)  # type: ignore[no-any-return]
    if self.disable_adapters or active[0] not in self.lora_A:
        return self.base_layer(x)  # type: ignore[no-any-return]
    name = active[0]
    down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else down.weight.dtype
    usual = (
        name not in self.lora_variant and down.bias is None and up.bias is None
        and (isinstance(dropout, nn.Identity) or not dropout.training) and x.dtype == dtype
    )  # fmt: skip
    if not usual:
        return plain(self, x)  # type: ignore[no-any-return]
    out, scale = self.base_layer(x), self.scaling[name]
    out = out.clone() if out._is_view() else out  # of a 4-bit layer with a bias, which autograd lets nobody change
    if out.dtype != dtype or not out.is_contiguous():
        return (out + up(down(x)) * scale).to(out.dtype)  # type: ignore[no-any-return]
    total: Tensor = AddLora.apply(out, x, down.weight, up.weight, float(scale))
    return total


def _adapts_alike(module: Any, lighter: type[nn.Module], name: str) -> bool:
    """Whether both give the same values and gradients on made-up numbers through this adapter, the layer's first, which
    peft switches on."""
    down, up = (getattr(module, part)[name].weight for part in ("lora_A", "lora_B"))
    if module.active_adapters != [name] or module.disable_adapters:
        return False
    x = torch.linspace(-2.0, 3.0, 3 * down.shape[1], device=down.device).sin().view(1, 3, -1).to(down.dtype)
    kept, flags, training, kind = (
        up.detach().clone(),
        (down.requires_grad, up.requires_grad),
        module.training,
        type(module),
    )
    try:
        module.eval()  # dropout would differ by chance
        with torch.no_grad():  # a fresh adapter adds nothing
            up.copy_(torch.linspace(-1.0, 1.0, up.numel(), device=up.device).sin().view_as(up))
        with torch.enable_grad():
            said = []
            for module.__class__ in (kind, lighter):
                tensors = (x.detach().requires_grad_(), down.requires_grad_(), up.requires_grad_())
                out = module(tensors[0])
                said.append([out.detach(), *torch.autograd.grad(out, tensors, torch.cos(out.detach() * 3.0))])
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    finally:
        module.__class__ = kind
        module.train(training)
        with torch.no_grad():
            up.copy_(kept)
        for weight, flag in zip((down, up), flags, strict=True):
            weight.requires_grad_(flag)
    return _agree(said, TOLERANCE if down.dtype == torch.float32 else COARSE)


# --- the test of a layer ---------------------------------------------------------------------------------------------


def _same(module: nn.Module, lighter: type[nn.Module]) -> bool:
    """Whether both give the same values and gradients on made-up numbers."""
    kind, weight = type(module), getattr(module, "weight", None)
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
            for module.__class__ in (kind, lighter):
                out = module(x)
                said.append((out.detach(), *torch.autograd.grad(out, tensors, torch.cos(out.detach() * 3.0))))
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        module.__class__ = kind
        for tensor, flag in zip(tensors, known, strict=True):
            tensor.requires_grad_(flag)
    return _agree(said, TOLERANCE if like.dtype == torch.float32 else COARSE)


def _agree(said: Sequence[Sequence[Tensor]], limit: float) -> bool:
    """Whether two say the same tensors, each relative to 1 + its largest number."""
    one, other = said
    gaps = [float((a - b).abs().max() / (1.0 + b.abs().max())) for a, b in zip(one, other, strict=True)]
    return max(gaps) <= limit
