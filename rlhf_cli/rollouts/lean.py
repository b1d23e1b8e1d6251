"""One decode step of the common decoders, from their own weights, without the detours of a general forward.

A forward of transformers builds masks, walks through a hundred small modules and, with LoRA, casts and drops out at
every layer: for small models and few rows that is most of the time. Here the same sums are done on rows of one new
token each. Whatever is not recognised (another architecture, a window, hooks, a patched layer) is left to the model.

B rows, H hidden size, Q query heads, K key heads, D head size, S slots so far.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.base import Base
from rlhf_cli.models.lighten import is_lighter
from rlhf_cli.rollouts.cache import Growing

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Bodies of transformers that are: embedding, then in each layer norm, attention with rotary positions, norm and gated
feed-forward, then norm."""

Rows = Callable[[Tensor], Tensor]
"""Rows (B, in) to rows (B, out)."""


@dataclass(frozen=True)
class Layer:
    """What one layer does to rows."""

    before: Rows
    query: Rows
    key: Rows
    value: Rows
    query_norm: Rows | None
    key_norm: Rows | None
    out: Rows
    after: Rows
    gate: Rows
    up: Rows
    down: Rows
    act: Rows
    size: int
    """D"""
    scale: float


@dataclass(frozen=True)
class Lean:
    """A decoder, read for one rollout: the weights may not be replaced meanwhile."""

    body: Any
    layers: tuple[Layer, ...]
    norm: Rows

    def step(self, tokens: Tensor, position: Tensor, seen: Tensor | None, cache: Sequence[Growing]) -> Tensor:
        """tokens (B,), position (B, 1), seen (B, 1, 1, S) to be added to the scores -> last hidden states (B, H)."""
        hidden = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(hidden, position)  # (B, 1, D)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for layer, past in zip(self.layers, cache, strict=True):
            hidden = hidden + layer.out(_attend(layer, layer.before(hidden), cos, sin, seen, past))
            inner = layer.after(hidden)
            hidden = hidden + layer.down(layer.act(layer.gate(inner)).mul_(layer.up(inner)))
        return self.norm(hidden)


def _attend(
    layer: Layer, inner: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, past: Growing
) -> Tensor:  # (B, Q D)
    rows, size = len(inner), layer.size
    query, key = layer.query(inner).view(rows, -1, size), layer.key(inner).view(rows, -1, size)
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    heads, groups = query.shape[1], key.shape[1]
    both = torch.cat([query, key], dim=1)  # (B, Q + K, D)
    both = torch.addcmul(both * cos, both.roll(size // 2, -1), sin)
    keys, values = past.update(both[:, heads:, None], layer.value(inner).view(rows, groups, 1, size))
    folded = both[:, :heads].reshape(rows, groups, heads // groups, size)  # a key head's queries as if in a row
    return F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen, scale=layer.scale).reshape(rows, -1)


def lean(base: Base, cache: Sequence[Any]) -> Lean | None:
    """The model as it is now, with the adapter that is on; None where its own forward must be used."""
    body: Any = base.model.base_model
    kind = type(body)
    if kind.__name__ not in DECODERS or not kind.__module__.startswith("transformers.models."):
        return None
    if base.model.config._attn_implementation not in ("sdpa", SEGMENTS):
        return None
    ours = [module for module in body.modules() if module is not body.embed_tokens]  # which is called, hooks and all
    if not all(isinstance(layer, Growing) for layer in cache) or any(map(_changed, ours)):
        return None
    if not all(type(x.mlp).__name__.endswith("MLP") for x in body.layers) or len(cache) != len(body.layers):
        return None
    return Lean(body, tuple(_layer(x, base.active) for x in body.layers), _norm(body.norm))


def _changed(module: nn.Module) -> bool:
    """Whether something was hung onto this module that only its own call would run."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module.training)


def _layer(layer: Any, adapter: str | None) -> Layer:
    attention, mlp, linear = layer.self_attn, layer.mlp, partial(_linear, adapter=adapter)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query_norm, key_norm = (None if norm is None else _norm(norm) for norm in norms)
    return Layer(
        _norm(layer.input_layernorm), linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj),
        query_norm, key_norm, linear(attention.o_proj), _norm(layer.post_attention_layernorm),
        linear(mlp.gate_proj), linear(mlp.up_proj), linear(mlp.down_proj), mlp.act_fn,
        attention.head_dim, attention.scaling,
    )  # fmt: skip


def _norm(module: Any) -> Rows:
    """The norm in one kernel where it computes in float32 anyway."""
    weight: Tensor = module.weight
    if weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type):
        return module  # type: ignore[no-any-return]
    return partial(F.rms_norm, normalized_shape=tuple(weight.shape), weight=weight, eps=module.variance_epsilon)


def _linear(module: Any, adapter: str | None) -> Rows:
    """The product with a plain weight, and what LoRA adds to it; other layers (quantised, DoRA) as they are."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if not _is_lora(module) or module.merged or type(module.base_layer) is not nn.Linear:
        return module  # type: ignore[no-any-return]
    lora: Any = module
    base: Any = module.base_layer
    if adapter is None or adapter not in lora.lora_A:
        return partial(F.linear, weight=base.weight, bias=base.bias)
    if not _plain(lora, adapter):
        return lora  # type: ignore[no-any-return]
    down, up, scale = lora.lora_A[adapter].weight.t(), lora.lora_B[adapter].weight.t(), float(lora.scaling[adapter])

    def product(rows: Tensor) -> Tensor:
        return F.linear(rows, base.weight, base.bias).addmm_(rows @ down, up, alpha=scale)

    return product


def _is_lora(module: Any) -> bool:
    """Whether this is peft's linear layer, or ours in its place; where peft was never imported there is none."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora.layer import Linear

    return type(module) is Linear or (isinstance(module, Linear) and is_lighter(module))


def _plain(module: Any, name: str) -> bool:
    """Whether an adapter adds scale * B A x to this layer, in float32, and nothing else."""
    down, up = module.lora_A[name], module.lora_B[name]
    return (
        name not in module.lora_variant and type(down) is nn.Linear and type(up) is nn.Linear
        and down.bias is None and up.bias is None and not torch.is_autocast_enabled(down.weight.device.type)
        and module.base_layer.weight.dtype == down.weight.dtype == up.weight.dtype == torch.float32
    )  # fmt: skip
