"""bitsandbytes: how a base is quantised, how it stays as it was quantised, and how several processes hold it in parts.

A matrix in 4 bits is a row of codes, two a byte, and a scale for each block of them. To be held in parts both become
one row of bytes, which can be cut anywhere: a layer takes it apart again when its turn comes, and bitsandbytes computes
with what was in it, to the last bit what it was before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from rlhf_cli.errors import ModelError

BYTES_FROM = (2, 12)
"""Version of PyTorch from which FSDP2 takes parameters of bytes, which have no gradient."""
ALIGNED = 512
"""Bytes: codes are filled up to a multiple of this, so that their scales begin where a kernel may want them to."""


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """transformers' configuration of a quantisation by its name; None for none."""
    if name == "none":
        return None
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_4bit_layout(model: nn.Module) -> None:
    """bitsandbytes repacks 4-bit layers at their first evaluation on a CPU with AVX512-BF16, rounding their scales:
    then the weights before and after differ, and odd sizes fail. Training needs the same base throughout."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def numbers(parameter: Tensor) -> int:
    """How many numbers of the model a tensor stands for: of one in 4 bits, those that its codes are of."""
    shape = getattr(parameter, "stands_for", None)
    if shape is None and (state := getattr(parameter, "quant_state", None)) is not None:
        shape = state.shape
    return parameter.numel() if shape is None else math.prod(shape)


# --- layer by layer --------------------------------------------------------------------------------------------------


def put_off(model: Any, settings: Any) -> Callable[[nn.Module, torch.device], None]:
    """Mark the layers of a plain model that these settings quantise, as transformers chooses them. What is returned
    quantises those within a module, on a device: so no device ever holds more than one of them as it was."""
    before = dict(model.named_modules())
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    plain = {new: before[name] for name, new in model.named_modules() if new is not before.get(name)}

    def quantise(within: nn.Module, device: torch.device) -> None:
        for layer in within.modules():
            if layer in plain:
                _quantise(layer, plain.pop(layer), device)

    return quantise


def _quantise(layer: Any, plain: Any, device: torch.device) -> None:
    """Fill an empty layer of bitsandbytes from the plain one it stands for."""
    matrix = plain.weight.detach()
    matrix = matrix.T if isinstance(plain, Conv1D) else matrix
    layer.weight = type(layer.weight)(matrix, requires_grad=False, **layer.weight.__dict__).to(device)
    layer.bias = plain.bias
    plain.weight = None


# --- in parts --------------------------------------------------------------------------------------------------------


def in_4_bits(model: nn.Module) -> list[Any]:
    """The layers in 4 bits."""
    return [m for m in model.modules() if hasattr(m, "quant_storage") and getattr(m, "quant_state", None) is not None]


def check_parts(source: str) -> None:
    """ModelError where PyTorch cannot hold what is in 4 bits in parts."""
    found = str(torch.__version__)
    if tuple(int(part) for part in found.split(".")[:2]) < BYTES_FROM:
        least = ".".join(map(str, BYTES_FROM))
        raise ModelError(f"weights in 4 bits are shared out from PyTorch {least} on, and this is {found}", source,
                         f"install torch>={least}, or use distributed.shard: none")  # fmt: skip


def join(layer: Any) -> None:
    """Make codes and scales one row of bytes (n, 1), which the layer takes apart whenever it computes."""
    state, codes = layer.weight.quant_state, layer.weight.data.contiguous().view(-1).view(torch.uint8)
    scales = state.absmax.contiguous().view(-1).view(torch.uint8)
    filled = codes.new_zeros(-len(codes) % ALIGNED)
    layer.joined = len(codes), len(codes) + len(filled), state.absmax.dtype, layer.weight.dtype
    layer.kept = {name: getattr(layer.weight, name) for name in ("compress_statistics", "quant_type")}
    layer.weight = nn.Parameter(torch.cat([codes, filled, scales])[:, None], requires_grad=False)
    layer.quant_state = copy.copy(state)
    layer.quant_state.absmax = scales.new_empty(0)  # no view, which would keep them all
    kind: Any = type(layer)
    layer.__class__ = _joined_class(kind)


def mark(layer: Any) -> None:
    """What peft and we look for at a weight in 4 bits, put on the tensor that now stands for it."""
    for name, value in layer.kept.items():
        setattr(layer.weight, name, value)
    layer.weight.stands_for = layer.quant_state.shape


@cache
def _joined_class(kind: Any) -> type[nn.Module]:
    """A subclass whose forward is bitsandbytes' own, with views of the bytes that were gathered: they are filled again
    for the backward pass where they lie."""

    def forward(self: Any, x: Tensor) -> Tensor:
        from bitsandbytes.nn import Params4bit

        joined = self.weight
        weight, state = apart(self)
        self._parameters["weight"] = Params4bit(weight, quant_state=state, bnb_quantized=True)
        try:
            out: Tensor = kind.forward(self, x)
            return out
        finally:
            self._parameters["weight"] = joined

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def apart(layer: Any) -> tuple[Tensor, Any]:
    """Codes and quantisation state of a layer whose bytes are all there; views of them."""
    codes, start, of_scales, of_codes = layer.joined
    row = layer.weight.detach().view(-1)
    state = copy.copy(layer.quant_state)
    state.absmax = row[start:].view(of_scales)
    return row[:codes].view(of_codes).view(-1, 1), state
