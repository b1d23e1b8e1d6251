"""What a model takes, known from its configuration alone: an outline of it without a number in memory.

The outline is the architecture's own class on the meta device, with peft's own adapters on it, so names, shapes, ties
and dtypes are those of the real thing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.base import get_keys_to_not_convert

from rlhf_cli.errors import ModelError
from rlhf_cli.models import adapters
from rlhf_cli.models.base import Base, Text, quiet
from rlhf_cli.models.quantised import ALIGNED
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings, Quantization

BLOCK, NESTED = 64, 256
"""Numbers that share a scale in four bits, and scales that share one of their own (bitsandbytes, double quantisation).
"""
TABLES = (16 + 256) * 4 + 4
"""Bytes that each layer in four bits has besides: the values of its codes, those of its scales, their mean."""


@dataclass(frozen=True)
class Weights:
    """Of a base, adapters not counted."""

    numbers: int
    bytes: int
    """As they lie in memory, scales included."""
    quantised: int
    """How many of the numbers."""
    largest: int
    """Bytes of the largest tensor."""


def outline(
    text: Text, settings: ModelSettings, dtype: torch.dtype, lora: LoraSettings | None, *, trained: bool
) -> Base:
    """The model of a recipe on the meta device: in float32 when its weights are `trained`, else in `dtype`; with a
    fresh adapter `policy` where there is a `lora`. Raises ModelError for an architecture that cannot be outlined."""
    quiet()
    config = copy.deepcopy(text.config)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if trained else dtype)
        except Exception as error:  # whatever a library says of a configuration
            raise ModelError(f"no model can be made of its config.json: {_line(error)}", text.source) from error
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        base = Base(model, text.source, "", torch.device("meta"), dtype)
        if lora is not None:
            adapters.add_adapter(base, "policy", adapters.lora_config(lora))
    return base


def layer_matrices(base: Base) -> dict[int, nn.Parameter]:
    """What several processes can hold in parts (models/sharding.py), by identity: the matrices of the layers."""
    found = [layer for layer in base.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    return {
        id(p): p for layer in found for name, p in layer.named_parameters() if p.ndim > 1 and not _adapter(name)
    }  # fmt: skip


class Slice(NamedTuple):
    """A matrix of a layer that is cut by its rows; one in 4 bits by its bytes."""

    rows: int
    kept: int
    """Bytes of a row as it lies."""
    gathered: int
    """Bytes of a row where the layer computes."""
    whole: int
    """Bytes of all that is cut, where one process has it."""

    def of(self, processes: int) -> int:
        """Rows of the largest of so many parts."""
        return math.ceil(self.rows / processes)


def slices(base: Base, quantization: Quantization) -> list[Slice]:
    """Of all layers."""
    packed, found = _quantised_matrices(base, quantization), []
    for key, p in layer_matrices(base).items():
        width = p.numel() // p.shape[0]
        if key in packed:
            codes, scales = math.ceil(p.numel() / 2), math.ceil(p.numel() / BLOCK)
            found.append(Slice(math.ceil(codes / ALIGNED) * ALIGNED + scales, 1, 1, codes + scales))
        else:
            found.append(Slice(p.shape[0], width * p.element_size(), width * base.dtype.itemsize, nbytes([p])))
    return found


def gathered_bytes(base: Base, quantization: Quantization, processes: int, layers: int | None = None) -> int:
    """Bytes of the matrices of all layers as so many processes gather them, every part filled up to the largest; of so
    many layers."""
    every = sum(processes * one.of(processes) * one.gathered for one in slices(base, quantization))
    count = int(base.model.config.get_text_config().num_hidden_layers)
    return every if layers is None else every * min(layers, count) // max(count, 1)


def part(parameter: nn.Parameter, processes: int) -> nn.Parameter:
    """What the first of so many processes holds of a parameter that is cut by its rows."""
    rows = math.ceil(parameter.shape[0] / processes)
    return nn.Parameter(parameter.detach()[:rows], requires_grad=parameter.requires_grad)


def saved(base: Base, quantization: Quantization, processes: int) -> int:
    """Bytes of its layers that a process does not hold when so many hold parts of them."""
    return sum(one.whole - one.of(processes) * one.kept for one in slices(base, quantization))


def parts_bytes(base: Base, quantization: Quantization, processes: int, *, pinned: bool = False) -> int:
    """Bytes of its layers that a process holds when so many hold parts of them; pinned: in memory that a card reads."""
    found = [one.of(processes) * one.kept for one in slices(base, quantization)]
    return sum(map(pinned_bytes, found) if pinned else found)


def pinned_bytes(size: int) -> int:
    """What PyTorch takes of main memory for so many bytes that a card reads by itself: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def weights(base: Base, quantization: Quantization) -> Weights:
    """Of an outline, had it been loaded with this quantisation."""
    matrices = _quantised_matrices(base, quantization)
    numbers = total = quantised = largest = 0
    for name, parameter in base.model.named_parameters():
        if _adapter(name):
            continue
        size = _quantised(parameter, quantization) if id(parameter) in matrices else nbytes([parameter])
        numbers, total, largest = numbers + parameter.numel(), total + size, max(largest, size)
        quantised += parameter.numel() if id(parameter) in matrices else 0
    return Weights(numbers, total + nbytes(base.model.buffers()), quantised, largest)


def _quantised_matrices(base: Base, quantization: Quantization) -> set[int]:
    """Those that a quantisation takes, by identity."""
    if quantization == "none":
        return set()
    kept = set(get_keys_to_not_convert(base.model))
    return {
        id(module.weight) for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and not _adapter(name) and not _among(name, kept)
    }  # fmt: skip


def _quantised(matrix: torch.Tensor, quantization: Quantization) -> int:
    """Bytes of a matrix in bitsandbytes' layout."""
    n = matrix.numel()
    if quantization == "int8":
        return n + 4 * matrix.shape[0]
    scales = math.ceil(n / BLOCK)
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / NESTED) + TABLES


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors, as their dtype says."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def adapter(base: Base, name: str = "policy") -> list[tuple[str, nn.Parameter]]:
    """The parameters of an adapter of an outline."""
    return adapters.adapter_parameters(base, name)


def cache_bytes(config: Any, slots: int, dtype: torch.dtype) -> int:
    """Keys and values of a row of so many tokens in all layers; a layer with a window keeps no more than that."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kept = 0
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=text).layers]
    for window in windows or [None] * text.num_hidden_layers:
        kept += min(slots, window) if window else slots
    return 2 * kept * heads * size * dtype.itemsize


def _adapter(name: str) -> bool:
    return "lora_" in name


def _among(name: str, kept: set[str]) -> bool:
    plain = name.removesuffix(".base_layer")
    return any(plain == key or plain.endswith(f".{key}") for key in kept)


def _line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
