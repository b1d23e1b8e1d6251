"""The lean decode step: equal to the model's own forward where it is taken, and not taken where it would not be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.base import Base
from rlhf_cli.models.roles import Role
from rlhf_cli.rollouts import forward
from rlhf_cli.rollouts.generate import Sampling, sample
from rlhf_cli.rollouts.lean import Lean, lean
from tests.models.worlds import CPU, EOS, PAD, full_role, lora_role, make_base
from tests.rollouts.test_generate import everything, ids_of, prompts, recomputed

TAKEN = ["llama", "llama-tied", "qwen2", "mistral"]
NOT_TAKEN = [
    "gpt2",
    "gemma2",
    "gemma3-window-32",
    "mixtral",
    "bloom",
    "falcon",
    "lfm2",
    "mistral-window-8",
    "mistral-window-32",
    "cohere",
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each rollout took the lean step."""
    found: list[bool] = []

    def watched(*rest: Any) -> Lean | None:
        result = lean(*rest)
        found.append(result is not None)
        return result

    monkeypatch.setattr(forward, "lean", watched)
    return found


def never(*_: Any) -> None:
    """In place of `lean`: the model's own forward."""


def qwen3() -> Base:
    """Norms on queries and keys, a bias nowhere, heads wider than the hidden size says."""
    torch.manual_seed(4)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(SEGMENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False).add_(torch.randn_like(parameter) * 0.1)
    return Base(model, "qwen3", "made", CPU, torch.float32, True)


def both(role: Role, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Asserts the same ids and log-probabilities with the lean step and without, and recomputed ones."""
    lean_way = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(14, **settings), 4)
    with monkeypatch.context() as patch:
        patch.setattr(forward, "lean", never)
        plain_way = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(14, **settings), 4)
    assert ids_of(lean_way) == ids_of(plain_way)
    sampled, plain = (torch.from_numpy(np.concatenate([c.logp for c in everything(d)])) for d in (lean_way, plain_way))
    torch.testing.assert_close(sampled, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sampled, recomputed(role, prompts(), lean_way, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*TAKEN, "qwen3"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_same_as_the_model_itself(name: str, adapter: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    base = qwen3() if name == "qwen3" else make_base(name)
    role = lora_role(base, "policy") if adapter else full_role(base)
    both(role, monkeypatch)
    both(role, monkeypatch, greedy=True)
    assert taken == [True, True]


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_other_architectures_use_their_own_forward(name: str, taken: list[bool]) -> None:
    sample(full_role(make_base(name)), prompts(), 2, [EOS], Sampling(4), 0)
    assert taken in ([False], [])  # none is asked for where no keys and values are kept


def test_a_window_that_no_row_fills_is_none(taken: list[bool]) -> None:
    role, short = full_role(make_base("mistral-window-32")), prompts(lengths=(3, 7, 18))
    drawn = sample(role, short, 3, [EOS, 5], Sampling(14), 0)
    assert taken == [True]
    sampled = torch.from_numpy(np.concatenate([c.logp for c in everything(drawn)]))
    torch.testing.assert_close(sampled, recomputed(role, short, drawn, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"use_rslora": True}, {"dropout": 0.3}],
    ids=str,
)  # fmt: skip
def test_kinds_of_adapters(lora: dict[str, Any], taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    both(lora_role(make_base("llama", dropout=True), "policy", **lora), monkeypatch)
    assert taken == [True]


def test_the_adapter_of_the_role_and_its_weights_of_now(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("llama")
    policy, other = lora_role(base, "policy", seed=1), lora_role(base, "other", seed=2)
    for role in (policy, other, Role("reference", base), policy):
        both(role, monkeypatch)
        with torch.no_grad():
            for _, parameter in role.parameters:
                parameter.mul_(0.7)
    assert taken == [True] * 4


def test_a_hook_is_run(taken: list[bool]) -> None:
    """Anything hung onto a layer: the model's own forward is used, so that it sees every token."""
    role, seen = full_role(make_base("llama")), []
    handle = role.base.model.model.layers[1].mlp.register_forward_hook(lambda *a: seen.append(a[2].shape[1]))
    hooked = sample(role, prompts(), 2, [EOS], Sampling(6, greedy=True), 0)
    handle.remove()
    assert taken == [False]
    assert seen[1:] == [1] * 5
    assert ids_of(hooked) == ids_of(sample(role, prompts(), 2, [EOS], Sampling(6, greedy=True), 0))
    assert taken == [False, True]


def test_a_hook_on_the_embedding_is_run_by_the_lean_step(taken: list[bool]) -> None:
    """As checkpointing of a frozen base needs one."""
    role, seen = lora_role(make_base("llama"), "policy"), []
    role.base.model.get_input_embeddings().register_forward_hook(lambda *a: seen.append(a[1][0].numel()))
    sample(role, prompts(), 2, [], Sampling(4), 0)
    assert taken == [True]
    assert seen[1:] == [12] * 3


def test_a_patched_layer_and_eager_attention(taken: list[bool]) -> None:
    role = full_role(make_base("llama"))
    mlp = role.base.model.model.layers[0].mlp
    mlp.forward = lambda x, right=mlp.forward: right(x) * 2
    sample(role, prompts(), 2, [EOS], Sampling(3), 0)
    del mlp.forward
    role.base.model.set_attn_implementation("eager")
    sample(role, prompts(), 2, [EOS], Sampling(3), 0)
    assert not any(taken)


def test_under_autocast(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rounds at other places only: the same first tokens, log-probabilities within bf16's accuracy."""
    role = lora_role(make_base("llama", dtype=torch.bfloat16), "policy")
    lean_way = everything(sample(role, prompts(), 1, [], Sampling(3), 4))
    monkeypatch.setattr(forward, "lean", never)
    plain_way = everything(sample(role, prompts(), 1, [], Sampling(3), 4))
    assert taken == [True]
    alike = [(a, b) for a, b in zip(lean_way, plain_way, strict=True) if a.ids.tolist() == b.ids.tolist()]
    assert len(alike) >= 4
    for a, b in alike:
        np.testing.assert_allclose(a.logp, b.logp, atol=0.1)


def test_the_step_leaves_the_weights_alone() -> None:
    role = lora_role(make_base("llama"), "policy")
    before = {name: tensor.clone() for name, tensor in role.base.model.state_dict().items()}
    sample(role, prompts(), 2, [EOS], Sampling(8), 0)
    after: dict[str, Tensor] = role.base.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
