"""Activation checkpointing layer by layer: which layers are recomputed in the backward pass, and what the others keep.

The first layers are those that are recomputed: their turn comes last in the backward pass, when what later layers kept
is freed already. Neither values nor gradients depend on how many they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models import sharding
from rlhf_cli.models.roles import Role

PROBE = 16
"""Tokens of the smallest forward that is looked at; the others have twice and three times as many."""


@dataclass(frozen=True)
class Footprint:
    """What a training forward keeps for its backward pass, in bytes."""

    layers: int
    """That can be recomputed each by itself."""
    layer: float
    """A token, in each layer that keeps its activations."""
    weights: float
    """Whatever the number of tokens, in each such layer: copies of weights in another dtype."""
    border: float
    """A token, of each layer that is recomputed: its input."""
    rest: float
    """A token, outside of these layers."""

    def each(self, recomputed: int) -> float:
        """A token with so many layers recomputed, at the worst moment: one layer more, for the layer under way."""
        return recomputed * self.border + (self.layers - recomputed + 1) * self.layer + self.rest

    def fixed(self, recomputed: int) -> float:
        """Whatever the number of tokens."""
        return (self.layers - recomputed + 1) * self.weights


def enable(model: Any, wanted: bool | Literal["auto"]) -> None:
    """Recompute every layer where that is wanted; `auto` leaves alone what cannot, and waits for `recompute`."""
    if wanted is True or (wanted == "auto" and model.supports_gradient_checkpointing):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be recomputed each by itself, in the order of the forward."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recomputed(model: nn.Module) -> int:
    """How many layers are."""
    return sum(layer.gradient_checkpointing for layer in layers(model))


def recompute(model: nn.Module, count: int) -> None:
    """Recompute the first `count` layers, and only those; none of a model that was never enabled."""
    for i, layer in enumerate(layers(model)):
        layer.gradient_checkpointing = i < count and hasattr(layer, "_gradient_checkpointing_func")


def recompute_more(model: nn.Module) -> int:
    """Half of the layers that keep their activations are recomputed as well, at least one; how many are by then, 0 when
    there are no more."""
    count, before = len(layers(model)), recomputed(model)
    recompute(model, count - (count - before) // 2)
    after = recomputed(model)
    return after if after > before else 0


def made_up(role: Role, length: int, count: int = 1) -> Batch:
    """So many examples of `length` tokens, a prompt with two completions each, of no meaning."""
    random = np.random.Generator(np.random.Philox(key=[7, 7]))
    rows = int(role.base.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]

    def ids(n: int) -> np.ndarray:
        return random.integers(0, rows, n).astype(np.int32)

    part = max(length // 4, 1)
    samples = [
        Sample(ids(max(length - 2 * part, 1)), tuple(Completion(ids(part), np.ones(part, dtype=bool)) for _ in "ab"),
               {}, "made up") for _ in range(count)
    ]  # fmt: skip
    return collate(samples, packed=role.base.packed).to(role.base.device)


def passed(role: Role, batch: Batch) -> Tensor:
    """A number with gradient that used the role as training does. Call within `active`."""
    return role.logp(batch, statistics="entropy").logp.sum() if role.head is None else role.score(batch).sum()


def bound(role: Role) -> Footprint:
    """More than a model keeps that takes packed rows, and so has no attention matrix: sixteen numbers for each one that
    goes into a matrix or comes out of it. Known without a forward."""
    matrices = [p for p in role.base.model.parameters() if p.ndim > 1]
    numbers = sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] for p in matrices)
    return Footprint(len(layers(role.base.model)), 0.0, 0.0, 0.0, 16.0 * 4.0 * numbers)


def footprint(role: Role, length: int) -> Footprint:
    """Seen in small forwards of the role, for examples of `length` tokens: attention may cost more the longer they are.

    The numbers of a forward's tokens are those of a polynomial of degree two, which three forwards determine.
    """
    found, before = layers(role.base.model), recomputed(role.base.model)
    recompute(role.base.model, 0)
    step = min(PROBE, max(length // 12, 1) * 4)
    seen = np.array([_kept(role, found, n * step) for n in (1, 2, 3)])  # (3, 3): in layers, outside, borders
    recompute(role.base.model, before)
    square = np.maximum((seen[2] - 2 * seen[1] + seen[0]) / (2 * step * step), 0.0)
    linear = (seen[1] - seen[0]) / step - square * 3 * step
    constant = np.maximum(seen[0] - linear * step - square * step**2, 0.0)
    each, count = linear + square * length, max(len(found), 1)
    return Footprint(len(found), each[0] / count, constant[0] / count, each[2] / count, each[1])


def _kept(role: Role, found: list[GradientCheckpointingLayer], tokens: int) -> tuple[float, float, float]:
    """Bytes that a forward of an example of so many tokens keeps in these layers and outside of them, weights not
    counted; and bytes of the inputs of these layers."""
    own = {sharding.held(p).untyped_storage().data_ptr() for p in role.base.model.parameters()}
    stored: dict[int, tuple[int, bool]] = {}
    inside, border = [False], [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored.setdefault(storage.data_ptr(), (storage.nbytes(), inside[0]))
        return tensor

    def enter(module: nn.Module, arguments: tuple[Any, ...], more: dict[str, Any]) -> None:
        inside[0] = True
        own.update(p.untyped_storage().data_ptr() for p in module.parameters())  # whole, where they were in parts
        border[0] += (arguments[0] if arguments else more["hidden_states"]).nbytes

    def leave(*_: Any) -> None:
        inside[0] = False

    with _hooked(found, enter, leave), role.active(train=True), torch.autograd.graph.saved_tensors_hooks(keep, _same):
        graph = passed(role, made_up(role, tokens))
    role.abandon()
    del graph  # until here its tensors were alive, and no two of them shared an address
    sizes = list(stored.values())
    return float(sum(n for n, deep in sizes if deep)), float(sum(n for n, deep in sizes if not deep)), float(border[0])


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _hooked(found: list[GradientCheckpointingLayer], enter: Any, leave: Any) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in found]
    handles += [layer.register_forward_hook(leave) for layer in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
