"""The model of a recipe and its adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rlhf_cli.catalog import Positive, Settings, Share
from rlhf_cli.recipe.settings.blocks import Checked, Count, Name

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "fp4", "int8"]


def _an_expression(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"this is no regular expression: {error}") from None
    return value


Layers = Annotated[str, Field(min_length=1), AfterValidator(_an_expression)]


class ModelSettings(Checked):
    name_or_path: Name
    """A hub id, a folder, or the directory of an earlier run."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Dtype = "auto"
    """Dtype of frozen weights and of the computation. `auto`: bfloat16 on a device that has it, else float32.
    Trained weights are always kept in float32."""
    quantization: Quantization = "none"
    """Quantise the frozen base with bitsandbytes; needs `lora`."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """`auto` computes attention segment by segment (packing, shared prompts) where the architecture allows it;
    flex_attention: the same, all segments of a row in one compiled kernel, on a GPU."""
    kernels: Literal["auto", "compiled", "reference"] = "auto"
    """auto: layers that keep less for the backward pass, where they agree with the architecture's own; compiled: the
    same, their element-wise operations and those over the vocabulary compiled into single passes (torch.compile; needs
    Triton on a GPU, a C++ compiler on a CPU, and a minute before the first step); reference: the architecture's own."""
    chat_template: str | None = None
    """A file with a Jinja template, or the template itself; default: the tokenizer's."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. `auto`: of as many layers as
    the free memory asks for, and of more when it runs out. Never changes the result."""

    def contradictions(self) -> Iterator[str]:
        if self.attn_implementation == "flash_attention_2" and self.dtype == "float32":
            yield "attn_implementation flash_attention_2 knows no dtype float32: use bfloat16, or sdpa"


class LoraSettings(Settings):
    r: Count = 16
    """Rank."""
    alpha: Positive = 32.0
    """Scale: updates are multiplied by alpha / r (by alpha / sqrt(r) with use_rslora)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input. Used by sft; the other stages compare the model with itself and switch it off."""
    target_modules: Layers | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = "all-linear"
    """Which layers: all-linear, a list of names, or a regular expression."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    use_rslora: bool = False
    """Rank-stabilised scale (arXiv:2312.03732)."""

    @property
    def kind(self) -> str:
        """What such an adapter is called."""
        return "DoRA" if self.use_dora else "LoRA"
