"""The vocabulary is the memory problem: no tensor of tokens x vocabulary may ever exist."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.models.base import Base
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.logprob import CHUNK_ELEMENTS
from tests.models.worlds import CPU, lora_role, make_sample

VOCABULARY, HIDDEN = 151_936, 16
TOKENS = 250


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation gave, in elements, and its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            head = isinstance(tensor, torch.Tensor) and sorted(tensor.shape) == [HIDDEN, VOCABULARY]
            if isinstance(tensor, torch.Tensor) and not head and tensor.numel() > self.elements:
                self.elements, self.shape = tensor.numel(), tuple(tensor.shape)
        return out


def wide_base(dtype: torch.dtype = torch.float32) -> Base:
    """A small body with a large vocabulary."""
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="rlhf_segments").to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Base(model.eval(), "wide", "made", CPU, dtype, True)


def batch_of(tokens: int) -> Batch:
    """That many scored tokens, after prompts of 10."""
    random = np.random.default_rng(0)
    return collate([make_sample(random, 10, tokens // 2), make_sample(random, 10, tokens - tokens // 2)], packed=True)


def step(role: Role, tokens: int) -> None:
    with role.active(train=True):
        of = role.logp(batch_of(tokens))
        role.backward(-of.logp.mean() + 0.01 * of.entropy.mean())


@pytest.mark.parametrize(("kind", "dtype"), [("full", torch.float32), ("lora", torch.bfloat16)])
def test_the_largest_tensor(kind: str, dtype: torch.dtype) -> None:
    base = wide_base(dtype)
    role = lora_role(base, "policy") if kind == "lora" else Role("policy", base, trained=True)
    whole = TOKENS * VOCABULARY
    with Largest() as seen:
        step(role, TOKENS)
    assert seen.elements <= CHUNK_ELEMENTS < whole / 2, seen.shape
    assert seen.elements >= VOCABULARY, "the probe sees the logits of a chunk"
    with Largest() as seen, role.active():
        role.logp(batch_of(TOKENS))
    assert seen.elements <= CHUNK_ELEMENTS


def test_values_and_scores_need_no_vocabulary() -> None:
    role = lora_role(wide_base(), "critic", head=True)
    with Largest() as seen, role.active(train=True):
        role.backward(role.values(batch_of(TOKENS)).sum())
    assert seen.elements < 100_000, seen.shape
    with Largest() as seen, role.active():
        role.score(batch_of(TOKENS))
    assert seen.elements < 100_000, seen.shape


def test_sampling_needs_one_row_of_the_vocabulary_a_completion() -> None:
    from rlhf_cli.rollouts.generate import Sampling, sample

    prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (40, 60, 50)]
    with Largest() as seen:
        sample(Role("policy", wide_base()), prompts, 2, [2], Sampling(3), 0)
    assert seen.elements <= 6 * VOCABULARY, seen.shape


def test_what_waits_for_the_backward_pass() -> None:
    """Chunks are computed again: none of their logits is kept."""
    role, kept = lora_role(wide_base(), "policy"), [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if sorted(tensor.shape) != [HIDDEN, VOCABULARY]:
            kept[0] += tensor.numel()
        return tensor

    with role.active(train=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        of = role.logp(batch_of(TOKENS))
    assert 0 < kept[0] < VOCABULARY
    role.abandon()
    del of
