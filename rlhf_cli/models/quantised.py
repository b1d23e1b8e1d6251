"""bitsandbytes: how a base is quantised, and how it stays as it was quantised."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """transformers' configuration of a quantisation by its name; None for none."""
    if name == "none":
        return None
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """bitsandbytes repacks 4-bit layers at their first evaluation on a CPU with AVX512-BF16, rounding their scales:
    then the weights before and after differ, and odd sizes fail. Training needs the same base throughout."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
