"""Roles on one base: as good as separate models, never in each other's way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import collate
from rlhf_cli.models import adapters
from rlhf_cli.models.base import Base
from rlhf_cli.models.build import load_reference
from rlhf_cli.models.roles import Role, RoleError, disable_dropout
from tests.models.worlds import full_role, kinds, lora_role, make_base, make_model


def logp_of(role: Role, packed: bool = True) -> Tensor:
    with role.active():
        return role.logp(collate(kinds(1)["pairs"], packed=packed)).logp


def backward(role: Role, kind: str = "logp", seed: int = 1) -> None:
    """One forward and backward of a role."""
    batch = collate(kinds(seed)["pairs"], packed=role.base.packed)
    with role.active(train=True):
        out = role.logp(batch).logp if kind == "logp" else role.values(batch)
        role.backward((out * torch.linspace(-1.0, 1.5, len(out))).sum())


def gradients(role: Role) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in role.parameters if p.grad is not None}
    for _, p in role.parameters:
        p.grad = None
    return found


def both(checkpointing: bool, name: str = "llama") -> tuple[Role, Role]:
    """Policy and critic on one base."""
    base = make_base(name)
    policy, critic = lora_role(base, "policy", seed=5), lora_role(base, "critic", seed=6, head=True)
    if checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy, critic


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_base_is_two_bases(checkpointing: bool, name: str) -> None:
    """Log-probabilities, values and gradients of policy and critic are those of two peft models on two copies."""
    policy, critic = both(checkpointing, name)
    alone = lora_role(make_base(name), "policy", seed=5), lora_role(make_base(name), "critic", seed=6, head=True)
    for _ in range(2):  # policy, critic, policy, critic
        for role, separate, kind in ((policy, alone[0], "logp"), (critic, alone[1], "values")):
            backward(role, kind)
            backward(separate, kind)
            ours, theirs = gradients(role), gradients(separate)
            assert set(ours) == set(theirs) == {n for n, _ in role.parameters}
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=key)
                assert float(ours[key].abs().max()) > 0, key
    torch.testing.assert_close(logp_of(policy), logp_of(alone[0]), rtol=0, atol=1e-6)


def test_against_plain_peft() -> None:
    """The same adapter in a plain peft model on a plain transformers model, one row at a time."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    policy, _ = both(True)
    tensors = adapters.adapter_tensors(policy.base, "policy")
    plain = get_peft_model(make_model("llama"), LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear"))
    set_peft_model_state_dict(plain, {k: v.clone() for k, v in tensors.items()})
    plain.eval()
    total, wanted = [], []
    for sample in kinds(1)["pairs"]:
        for completion in sample.completions:
            ids = torch.from_numpy(np.concatenate([sample.prompt, completion.ids]).astype(np.int64))[None]
            logp = torch.log_softmax(plain(input_ids=ids).logits[0].float(), -1)
            total += [logp[i - 1, ids[0, i]] for i in range(len(sample.prompt), ids.shape[1])]
    stacked = torch.stack(total)
    (stacked * torch.linspace(-1.0, 1.5, len(total))).sum().backward()
    wanted = {n.replace("base_model.model.", "", 1).replace(".default.", ".policy."): p.grad
              for n, p in plain.named_parameters() if p.requires_grad}  # fmt: skip
    torch.testing.assert_close(logp_of(policy), stacked.detach(), rtol=1e-5, atol=1e-5)
    backward(policy)
    ours = gradients(policy)
    assert set(ours) == set(wanted)
    for key in ours:
        torch.testing.assert_close(ours[key], wanted[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("packed", [True, False])
def test_checkpointing_changes_no_gradient(kind: str, name: str, packed: bool) -> None:
    results = []
    for on in (False, True):
        base = make_base(name, packed=packed)
        role = full_role(base) if kind == "full" else lora_role(base, "policy")
        if on:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        inner = next(m for n, m in base.model.named_modules() if n.endswith(("layers.0.self_attn", "h.0.attn")))
        handle = inner.register_forward_pre_hook(count)
        backward(role)
        handle.remove()
        assert calls == (2 if on else 1), "checkpointing computes a layer again"
        results.append(gradients(role))
    for key in results[0]:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-5, atol=1e-6, msg=key)


def test_switching_with_an_open_graph_is_refused() -> None:
    policy, critic = both(True)
    batch = collate(kinds(1)["pairs"], packed=True)
    with policy.active(train=True):
        loss = policy.logp(batch).logp.sum()
    for frozen in (critic, Role("reference", policy.base)):
        with pytest.raises(RoleError, match="backward pass of policy"), frozen.active():
            pass
    with pytest.raises(RoleError, match="no graph"):
        critic.backward(loss)
    with policy.active(train=True):
        policy.backward(loss)
    with critic.active():
        critic.values(batch)
    with pytest.raises(RoleError, match="no graph"):
        policy.backward(loss)


def test_a_graph_can_be_given_up() -> None:
    policy, critic = both(False)
    with policy.active(train=True):
        policy.logp(collate(kinds(1)["pairs"], packed=True))
    critic.abandon()
    with pytest.raises(RoleError), critic.active():
        pass
    policy.abandon()
    with critic.active():
        pass


def test_a_frozen_forward_leaves_no_graph() -> None:
    policy, critic = both(False)
    assert not logp_of(policy).requires_grad
    with critic.active():
        pass
    reference = Role("reference", policy.base)
    with reference.active(train=True):
        assert not reference.logp(collate(kinds(1)["pairs"], packed=True)).logp.requires_grad


def everything(roles: list[Role]) -> dict[str, Tensor]:
    """Every tensor of the base, of all adapters and of all heads."""
    found = {n: p.detach().clone() for n, p in roles[0].base.model.named_parameters()}
    found |= {f"buffer {n}": b.clone() for n, b in roles[0].base.model.named_buffers()}
    for role in roles:
        if role.head is not None:
            found |= {f"{role.name} head {n}": p.detach().clone() for n, p in role.head.named_parameters()}
    return found


@pytest.mark.parametrize("trained", ["policy", "critic"])
def test_training_a_role_moves_nothing_else(trained: str) -> None:
    base = make_base("llama")
    roles = [lora_role(base, "policy"), lora_role(base, "critic", head=True), lora_role(base, "reward", head=True),
             lora_role(base, "reference", head=False)]  # fmt: skip
    role = next(r for r in roles if r.name == trained)
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = everything(roles)
    optimizer = torch.optim.AdamW([p for _, p in role.parameters], lr=1e-2)
    for step in range(3):
        for other in roles:  # every role computes in between
            logp_of(other)
        backward(role, "logp" if trained == "policy" else "values", step)
        strangers = [n for n, p in base.model.named_parameters() if p.grad is not None and f".{trained}." not in n]
        assert strangers == []
        optimizer.step()
        optimizer.zero_grad()
    after = everything(roles)
    own = {n for n, _ in role.parameters if not n.startswith("head.")} | {
        f"{trained} head {n.removeprefix('head.')}" for n, _ in role.parameters if n.startswith("head.")
    }
    assert len(own) == (28 if trained == "policy" else 30)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (name not in own), name


def test_full_fine_tuning_moves_every_tensor() -> None:
    role = full_role(make_base("llama"), head=True)
    names = {n for n, _ in role.parameters}
    assert {"head.weight", "head.bias", "model.embed_tokens.weight"} <= names
    assert "lm_head.weight" not in names, "a role with a head of its own does not train the language head"
    assert "lm_head.weight" in {n for n, _ in full_role(make_base("llama")).parameters}
    backward(role, "values")
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for _, p in role.parameters)


def test_a_tied_head_is_trained_as_the_embedding() -> None:
    role = full_role(make_base("llama-tied"), head=True)
    assert "model.embed_tokens.weight" in {n for n, _ in role.parameters}


def test_switching_back_and_forth_keeps_both_trainable() -> None:
    policy, critic = both(False)
    optimizers = {r.name: torch.optim.SGD([p for _, p in r.parameters], lr=1e-2) for r in (policy, critic)}
    for role in (policy, critic, policy, critic, policy):
        before = role.tensors()
        before = {k: v.clone() for k, v in before.items()}
        backward(role, "values" if role is critic else "logp")
        optimizers[role.name].step()
        optimizers[role.name].zero_grad()
        assert all(not torch.equal(v, before[k]) for k, v in role.tensors().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_off_is_the_base_bit_for_bit(name: str) -> None:
    policy, _ = both(True, name)
    fresh = make_base(name)
    batch = collate(kinds(2)["pairs"], packed=True)
    backward(policy)
    reference = Role("reference", policy.base)
    for _ in range(2):
        outputs = []
        for role in (reference, Role("base", fresh)):
            with role.active():
                outputs.append(role.base.logits(role.hidden(batch)))
        assert torch.equal(*outputs)
        assert not torch.equal(logp_of(policy), logp_of(reference))


# --- which reference ---------------------------------------------------------------------------------------


def described(kind: str) -> Any:
    return SimpleNamespace(path=SimpleNamespace(kind=kind, name="runs/sft"), source="base")


def train(role: Role, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for _, p in role.parameters], lr=1e-2)
    for _ in range(steps):
        backward(role)
        optimizer.step()
        optimizer.zero_grad()


def test_the_reference_of_a_policy_that_started_from_an_adapter() -> None:
    """A frozen copy of that adapter: adapters off would be another model."""
    policy = lora_role(make_base("llama"), "policy")
    start = logp_of(policy)
    reference, words = load_reference(policy, described("adapter"))
    assert "frozen copy of the adapter in runs/sft" in words
    assert torch.equal(logp_of(reference), start)
    assert not torch.allclose(logp_of(Role("off", policy.base)), start, atol=1e-2)
    train(policy)
    assert torch.equal(logp_of(reference), start)
    assert not torch.allclose(logp_of(policy), start, atol=1e-2)
    assert reference.parameters == []


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_reference_of_a_fresh_adapter(lora: dict[str, Any]) -> None:
    """Adapters off, which a fresh adapter equals at the start."""
    base = make_base("llama")
    adapters.add_adapter(base, "policy", adapters.lora_config(_settings(**lora)))
    policy = Role("policy", base, "policy", trained=True)
    reference, words = load_reference(policy, described("full"))
    assert words == "base with adapters off"
    start = logp_of(reference)
    torch.testing.assert_close(logp_of(policy), start, rtol=0, atol=0 if not lora.get("use_dora") else 1e-5)
    train(policy)
    assert torch.equal(logp_of(reference), start)
    assert not torch.allclose(logp_of(policy), start, atol=1e-2)


def _settings(**lora: Any) -> Any:
    from rlhf_cli.recipe.settings.model import LoraSettings

    return LoraSettings(r=4, alpha=8.0, **lora)


def test_the_reference_of_full_fine_tuning() -> None:
    policy = full_role(make_base("llama"))
    reference, words = load_reference(policy, described("full"))
    assert words == "a frozen copy of runs/sft"
    start = logp_of(policy)
    assert torch.equal(logp_of(reference), start)
    train(policy)
    assert torch.equal(logp_of(reference), start)
    assert not torch.allclose(logp_of(policy), start, atol=1e-2)
    assert not any(p.requires_grad for p in reference.base.model.parameters())


def test_the_frozen_copy_is_in_the_compute_dtype() -> None:
    base = make_base("llama", dtype=torch.bfloat16)
    base.model.float()
    reference, _ = load_reference(full_role(base), described("full"))
    assert {p.dtype for p in reference.base.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


# --- dropout -----------------------------------------------------------------------------------------------


def test_dropout_is_disabled() -> None:
    """GPT-2 has dropout in its layers and attention, the adapter on its input: in training mode all are gone."""

    def two(prepare: Callable[[Base], None]) -> bool:
        base = make_base("gpt2", dropout=True)
        role = lora_role(base, "policy", dropout=0.5)
        prepare(base)
        batch = collate(kinds(1)["pairs"], packed=False)
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            with role.active(train=True):
                outputs.append(role.logp(batch).logp)
                role.backward(outputs[-1].sum())
        return bool(torch.equal(*(o.detach() for o in outputs)))

    assert not two(lambda base: None)
    assert two(disable_dropout)


def test_dropout_is_off_outside_training() -> None:
    role = lora_role(make_base("gpt2", dropout=True), "policy", dropout=0.5)
    backward(role)
    assert not role.base.model.training
    assert torch.equal(logp_of(role), logp_of(role))


# --- checkpoints -------------------------------------------------------------------------------------------


def test_tensors_round_trip() -> None:
    policy, critic = both(False)
    kept = {r.name: copy.deepcopy(r.tensors()) for r in (policy, critic)}
    before = logp_of(policy)
    train(policy)
    assert not torch.equal(logp_of(policy), before)
    policy.load_tensors(kept["policy"])
    assert torch.equal(logp_of(policy), before)
    with pytest.raises(RoleError, match="other tensors than its own"):
        policy.load_tensors(kept["critic"])
