"""Quantised bases through bitsandbytes on the CPU: only adapters move, losses fall, layouts agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.data.batch import collate
from rlhf_cli.data.tokens import Sample
from rlhf_cli.models.base import Base, load_base
from rlhf_cli.models.checks import allows_packing, check_logits
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.generate import Sampling, sample
from tests.models.worlds import kinds, lora_role, write_model

KINDS = ["nf4", "fp4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that 4-bit blocks of 64 weights fit its layers."""
    return write_model(tmp_path_factory.mktemp("wide") / "llama", hidden_size=64, intermediate_size=128, head_dim=16)


def load(folder: Path, kind: str, **changes: Any) -> Base:
    settings = ModelSettings(name_or_path=str(folder), quantization=kind, **changes)
    return load_base(str(folder), settings, trained=False)


def logp(role: Role, samples: list[Sample], packed: bool) -> torch.Tensor:
    with role.active():
        return role.logp(collate(samples, packed=packed)).logp


def frozen_state(base: Base) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in base.model.state_dict().items() if "lora_" not in k}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_moves_only_the_adapter_and_the_loss_falls(folder: Path, kind: str, dtype: str) -> None:
    base = load(folder, kind, dtype=dtype)
    check_logits(base)
    base.packed = allows_packing(base)
    assert base.packed, "quantisation is no reason to pad"
    role = lora_role(base, "policy")
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert {p.dtype for _, p in role.parameters} == {torch.float32}
    before, start = frozen_state(base), {k: v.clone() for k, v in role.tensors().items()}
    batch = collate(kinds(1)["demonstrations"], packed=True)
    optimizer = torch.optim.AdamW([p for _, p in role.parameters], lr=1e-2)
    losses = []
    for _ in range(8):
        with role.active(train=True):
            loss = -role.logp(batch).logp.mean()
            role.backward(loss)
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3, losses
    after = frozen_state(base)
    assert set(after) == set(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(not torch.equal(v, start[k]) for k, v in role.tensors().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_with_a_bias_take_an_adapter(tmp_path: Path, dtype: str) -> None:
    """bitsandbytes gives back a view then, which must not be changed in place."""
    folder = write_model(tmp_path / "qwen2", "qwen2", hidden_size=64, intermediate_size=128, head_dim=16)
    role = lora_role(load(folder, "nf4", dtype=dtype), "policy")
    with role.active(train=True):
        role.backward(-role.logp(collate(kinds(1)["demonstrations"], packed=False)).logp.mean())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for _, p in role.parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_padded(folder: Path, kind: str) -> None:
    """int8 scales each row of activations by its own maximum, so even there a token's neighbours do not matter."""
    base = load(folder, kind)
    base.packed = True
    role = lora_role(base, "policy")
    for samples in kinds(2).values():
        packed, padded = (logp(role, samples, p) for p in (True, False))
        torch.testing.assert_close(packed, padded, rtol=1e-3, atol=2e-2 if kind == "int8" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_near_those_of_the_whole_weights(folder: Path, kind: str) -> None:
    quantised, whole = load(folder, kind), load(folder, "none")
    samples = kinds(3)["demonstrations"]
    one, two = (logp(Role("base", b), samples, False) for b in (quantised, whole))
    gap = float((one - two).abs().mean())
    assert 0 < gap < (0.05 if kind == "int8" else 0.6)


def test_adapters_off_is_the_quantised_base(folder: Path) -> None:
    base, fresh = load(folder, "nf4"), load(folder, "nf4")
    samples = kinds(1)["pairs"]
    policy = lora_role(base, "policy")
    assert torch.equal(logp(Role("reference", base), samples, False), logp(Role("base", fresh), samples, False))
    assert not torch.allclose(logp(policy, samples, False), logp(Role("reference", base), samples, False), atol=1e-3)


def test_two_roles_on_a_quantised_base_are_two_bases(folder: Path) -> None:
    shared = load(folder, "nf4")
    policy, critic = lora_role(shared, "policy", seed=1), lora_role(shared, "critic", seed=2, head=True)
    shared.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alone = (
        lora_role(load(folder, "nf4"), "policy", seed=1),
        lora_role(load(folder, "nf4"), "critic", seed=2, head=True),
    )
    batch = collate(kinds(1)["pairs"], packed=False)
    for role, separate in ((policy, alone[0]), (critic, alone[1]), (policy, alone[0])):
        found = []
        for one in (role, separate):
            with one.active(train=True):
                out = one.logp(batch).logp if one.head is None else one.values(batch)
                one.backward((out * torch.linspace(0.5, 1.5, len(out))).sum())
            found.append([p.grad.clone() for _, p in one.parameters])
            for _, p in one.parameters:
                p.grad = None
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_from_a_quantised_base(folder: Path, kind: str) -> None:
    """Recomputed log-probabilities stay near the sampled ones, though kernels for one row and for many differ."""
    base = load(folder, kind)
    role = lora_role(base, "policy")
    prompts = [s.prompt for s in kinds(1)["pairs"]]
    drawn = sample(role, prompts, 2, [2], Sampling(6), 0)
    from rlhf_cli.rollouts.experience import _as_sample

    rows = [_as_sample(p, c, "") for p, group in zip(prompts, drawn, strict=True) for c in group]
    again = logp(role, rows, False)
    sampled = torch.cat([torch.from_numpy(c.logp) for group in drawn for c in group])
    assert float((again - sampled).abs().max()) < (0.1 if kind == "int8" else 1e-3)
