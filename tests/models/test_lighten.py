"""Layers that keep less: the numbers of the architecture's own, and less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_cli.data.batch import collate
from rlhf_cli.models.lighten import is_lighter, lighten
from rlhf_cli.models.roles import Role
from tests.models.worlds import ARCHITECTURES, kinds, lora_role, make_base

REPLACED = {"llama": (5, 2, 2), "qwen2": (5, 2, 2), "qwen3": (9, 2, 2), "mistral": (5, 2, 2), "gemma2": (9, 0, 2),
            "gemma3-window-32": (13, 0, 2), "mixtral": (5, 0, 2), "granite": (5, 2, 2), "cohere": (0, 2, 0),
            "gpt2": (0, 0, 0), "bloom": (0, 0, 0)}  # fmt: skip
"""How many norms, gated MLPs and rotations of each are replaced; Gemma's gate is not a SiLU, Cohere turns
neighbours."""
assert set(REPLACED) <= set(ARCHITECTURES)


def numbers(base: Any, *, train: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of a batch, and the gradient of their weighted sum by every parameter."""
    role = Role("policy", base, trained=train)
    batch = collate(kinds()["pairs"], packed=False)
    with role.active(train=train):
        logp = role.logp(batch, statistics="none").logp
        if train:
            role.backward((logp * torch.linspace(-1, 2, len(logp))).sum())
    found = {name: p.grad.clone() for name, p in role.parameters if p.grad is not None}
    for _, parameter in role.parameters:
        parameter.grad = None
    return logp.detach(), found


@pytest.mark.parametrize(
    ("name", "compiled"),
    [(name, False) for name in REPLACED] + [(name, True) for name in ("llama", "gemma3-window-32", "cohere")],
)
def test_lighter_layers_give_the_same_numbers(name: str, compiled: bool, request: pytest.FixtureRequest) -> None:
    if compiled:
        request.getfixturevalue("compiler")
    base = make_base(name)
    for parameter in base.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    plain_logp, plain = numbers(base, train=True)
    count = lighten(base.model, compiled=compiled)
    base.compiled = compiled
    replaced = tuple(sum(n for kind, n in count.items() if kind.endswith(end)) for end in ("Norm", "MLP", "Attention"))
    assert (replaced, sum(count.values())) == (REPLACED[name], sum(replaced)), count
    logp, found = numbers(base, train=True)
    torch.testing.assert_close(logp, plain_logp, rtol=1e-5, atol=1e-5)
    assert set(found) == set(plain)
    for key, gradient in plain.items():
        scale = 1.0 + float(gradient.abs().max())
        torch.testing.assert_close(
            found[key], gradient, rtol=0, atol=1e-5 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_names_files_and_copies_stay() -> None:
    base = make_base("llama")
    names = dict(base.model.named_parameters()).keys()
    lighten(base.model)
    assert dict(base.model.named_parameters()).keys() == names
    assert type(base.model.model.norm).__name__ == "LlamaRMSNorm"
    twin = copy.deepcopy(base.model)
    with torch.no_grad():
        twin.model.norm.weight.fill_(0.0)
    x = torch.ones(1, 32)
    assert float(twin.model.norm(x).abs().max()) == 0.0
    assert float(base.model.model.norm(x).abs().max()) > 0.5


class OddRMSNorm(nn.Module):
    """Looks like one and is another: its weight comes in squared."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 1.5))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight**2 * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class HookedRMSNorm(OddRMSNorm):
    """The usual formula."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def test_what_computes_something_else_is_left_alone() -> None:
    assert lighten(nn.Sequential(OddRMSNorm())) == {}
    assert lighten(nn.Sequential(HookedRMSNorm(), HookedRMSNorm())) == {"HookedRMSNorm": 2}
    hooked = HookedRMSNorm()
    hooked.register_forward_hook(lambda *_: None)
    assert lighten(nn.Sequential(hooked)) == {}


def saved_bytes(base: Any) -> int:
    """Bytes kept for the backward pass, each storage once, parameters left out."""
    role, seen = Role("policy", base, trained=True), {p.data_ptr() for p in base.model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with role.active(train=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logp = role.logp(collate(kinds()["pairs"], packed=False), statistics="none").logp
        keep = logp.sum()
    role.abandon()
    del keep
    return total


def test_they_keep_less() -> None:
    base = make_base("llama")
    plain = saved_bytes(base)
    lighten(base.model)
    assert saved_bytes(base) < 0.8 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_they_round_as_the_architecture_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = make_base("llama").model.model.norm.to(dtype)
    light = copy.deepcopy(plain)
    assert sum(lighten(nn.Sequential(light)).values()) == 1
    x = torch.randn(7, 32).to(dtype)
    assert torch.equal(plain(x), light(x))
    assert light(x).dtype == dtype


def adapted(role: Role) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of a batch through an adapter, and the gradient of their weighted sum."""
    torch.manual_seed(3)
    with role.active(train=role.trained):
        logp = role.logp(collate(kinds()["pairs"], packed=True), statistics="none").logp
        if role.trained:
            role.backward((logp * torch.linspace(-1, 2, len(logp))).sum())
    found = {name: p.grad.clone() for name, p in role.parameters if p.grad is not None}
    for _, parameter in role.parameters:
        parameter.grad = None
    return logp.detach(), found


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"dropout": 0.5}, {"target_modules": ["q_proj", "down_proj"]}],
)
def test_adapted_layers_give_the_same_numbers(settings: dict[str, Any]) -> None:
    said = []
    for light in (False, True):
        base = make_base(dropout=True)
        base.light = light
        roles = [lora_role(base, "policy", **settings), lora_role(base, "other", seed=6)]
        assert any(map(is_lighter, base.model.modules())) == light
        base.model.train("dropout" in settings)
        said.append([adapted(role) for role in roles] + [adapted(Role("reference", base))])
    for (plain_logp, plain), (logp, found) in zip(*said, strict=True):
        torch.testing.assert_close(logp, plain_logp, rtol=1e-5, atol=1e-5)
        assert set(found) == set(plain)
        for key, gradient in plain.items():
            limit = 1e-5 * (1.0 + float(gradient.abs().max()))
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=limit, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapted_layers_in_half_precision_are_as_exact_as_the_plain_ones(dtype: torch.dtype) -> None:
    exact, _ = adapted(lora_role(make_base(), "policy"))
    gaps = []
    for light in (False, True):
        base = make_base(dtype=dtype)
        base.light = light
        gaps.append(float((adapted(lora_role(base, "policy"))[0] - exact).abs().mean()))
    assert gaps[1] <= 1.2 * gaps[0] + 1e-6, gaps
