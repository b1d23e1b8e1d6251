"""Small models of many architectures, made in memory, and samples to feed them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import ModelError, RlhfError
from rlhf_cli.models import adapters
from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.base import Base
from rlhf_cli.models.build import scalar_head
from rlhf_cli.models.roles import Role, disable_dropout
from rlhf_cli.recipe.settings.model import LoraSettings
from tests.data.conftest import CHATML, byte_level

VOCABULARY = 97
SPECIALS = ["<pad>", "<s>", "</s>"]
PAD, BOS, EOS = 0, 1, 2
CPU = torch.device("cpu")
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _PLAIN),
    "llama-tied": ("llama", _PLAIN | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", _PLAIN),
    "qwen3": ("qwen3", _PLAIN | {"head_dim": 8}),
    "mistral": ("mistral", _PLAIN | {"sliding_window": None}),
    "mistral-window-8": ("mistral", _PLAIN | {"sliding_window": 8}),
    "mistral-window-32": ("mistral", _PLAIN | {"sliding_window": 32}),
    "gemma3-window-32": ("gemma3_text", _PLAIN | {"head_dim": 8, "sliding_window": 32}),
    "mixtral": ("mixtral", _PLAIN | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("cohere", _PLAIN | {"logit_scale": 0.5}),
    "granite": ("granite", _PLAIN | {"logits_scaling": 2.0}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512,
         "bos_token_id": BOS, "eos_token_id": EOS},
    ),
    "gemma2": (
        "gemma2",
        _PLAIN | {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "lfm2": ("lfm2", _PLAIN | {"layer_types": ["conv", "full_attention"]}),
    "gpt-oss": (
        "gpt_oss",
        _PLAIN | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
}  # fmt: skip
"""By name: transformers' model type and configuration."""
PACKED = [
    "llama", "llama-tied", "qwen2", "qwen3", "mistral", "mistral-window-8", "mistral-window-32", "gemma3-window-32",
    "mixtral", "cohere", "granite", "gpt2",
]  # fmt: skip
"""Those that take packed rows."""
PADDED = ["gemma2", "bloom", "falcon", "lfm2", "gpt-oss"]
"""Those that must fall back to padded rows."""


@cache
def _model(name: str) -> Any:
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SEGMENTS)
    with torch.no_grad():  # distributions that are not flat, biases and norms that are not trivial
        for parameter_name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim < 2 else 0.08))
            if parameter_name == "lm_head.weight":
                parameter.mul_(2.0)
    return model.eval()


def make_model(name: str = "llama") -> Any:
    """A model of its own, always the same weights."""
    return copy.deepcopy(_model(name))


def make_base(
    name: str = "llama", *, packed: bool | None = None, dtype: torch.dtype = torch.float32, dropout: bool = False
) -> Base:
    """A frozen base around such a model."""
    model = make_model(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    base = Base(model.to(dtype), name, "made", CPU, dtype, name in PACKED if packed is None else packed)
    if not dropout:
        disable_dropout(base)
    return base


def lora_role(base: Base, name: str, *, seed: int = 5, head: bool = False, **lora: Any) -> Role:
    """A trained role with a LoRA adapter that already does something."""
    settings = LoraSettings(**({"r": 4, "alpha": 8.0} | lora))
    adapters.add_adapter(base, name, adapters.lora_config(settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in adapters.adapter_parameters(base, name):
            if "magnitude" not in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    weight = torch.randn(1, base.model.config.hidden_size, generator=generator) * 0.5 if head else None
    return Role(name, base, name, scalar_head(base, weight, 0.3) if head else None, trained=True)


def full_role(base: Base, name: str = "policy", *, head: bool = False) -> Role:
    """A role that trains the whole base."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(1, base.model.config.hidden_size, generator=generator) * 0.5 if head else None
    return Role(name, base, None, scalar_head(base, weight, 0.3) if head else None, trained=True)


def tokens(random: np.random.Generator, n: int) -> np.ndarray:
    """(n,) ids without special tokens."""
    return random.integers(3, VOCABULARY, n).astype(np.int32)


def make_sample(
    random: np.random.Generator, prompt: int, *lengths: int, every: bool = True, **numbers: float
) -> Sample:
    """A sample with these lengths; every: all completion tokens scored, else about half and the last."""
    completions = []
    for n in lengths:
        scored = np.ones(n, dtype=bool) if every else random.random(n) < 0.5
        scored[-1] = True
        completions.append(Completion(tokens(random, n), scored))
    return Sample(tokens(random, prompt), tuple(completions), numbers, f"sample-{prompt}-{lengths}")


def kinds(seed: int = 0) -> dict[str, list[Sample]]:
    """Samples of every shape the stages make."""
    random = np.random.default_rng(seed)
    one, other = (make_sample(np.random.default_rng(seed + 9 + n), n, 3) for n in (14, 5))
    return {
        "demonstrations": [make_sample(random, p, n, every=False) for p, n in ((7, 9), (1, 12), (20, 1), (3, 5))],
        "pairs": [make_sample(random, p, a, b) for p, a, b in ((9, 4, 11), (30, 25, 6), (2, 1, 1), (1, 3, 7))],
        "rankings": [make_sample(random, 12, 5, 1, 9, 3), make_sample(random, 40, 20, 2, 13)],
        "tasks": [make_sample(random, 6), make_sample(random, 1), make_sample(random, 11, 3)],
        "samples of a prompt": [
            replace(make_sample(random, 1, *n, every=False), prompt=s.prompt)
            for s, n in ((one, (8,)), (other, (4,)), (one, (1,)), (one, (6, 11)), (other, (9,)))
        ],
    }


def write_tokenizer(folder: Path, **changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with pad, bos and eos, and a chat template."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | changes
    specials = [*SPECIALS, "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(specials), **{k: v for k, v in names.items() if v is not None}
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A model folder with tokenizer, as a user would have it."""
    tokenizer = write_tokenizer(folder)
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(settings | {"vocab_size": len(tokenizer)} | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5.0)
    model.save_pretrained(folder)
    return folder


def refused(call: Callable[[], Any], *words: str, kind: type[RlhfError] = ModelError) -> str:
    """Asserts an error of that kind, of one line, with these words; the line, for more."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    for word in words:
        assert word in text, text
    return text
