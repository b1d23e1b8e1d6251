"""Ways of computing for a card, on a card: the numbers of the plain ones. Skipped without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import collate
from rlhf_cli.models.attention import Segments, segment_attention
from rlhf_cli.models.checks import allows_packing
from rlhf_cli.models.lighten import lighten
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.head import Head, head_logp
from rlhf_cli.objectives.head_known import known_logp
from tests.models.worlds import kinds, make_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
ROWS, WIDTH, VOCABULARY = 2500, 64, 20_000


def near(found: Tensor, wanted: Tensor, limit: float) -> None:
    """Relative to 1 + the largest number."""
    gap = (found.double() - wanted.double()).abs().max() / (1.0 + wanted.double().abs().max())
    assert float(gap) < limit, float(gap)


def head(trained: bool, dtype: torch.dtype) -> tuple[Tensor, Head, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, device="cuda").to(dtype).requires_grad_(trained)
    return hidden, Head(weight, dtype=dtype), torch.randint(0, VOCABULARY, (ROWS,), device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["frozen", "trained", "bonus", "known"])
def test_the_head_compiled(way: str, dtype: torch.dtype) -> None:
    said = []
    for compiled in (False, True):
        hidden, about, ids = head(way != "frozen", dtype)
        about = dataclasses.replace(about, compiled=compiled)
        if way == "known":
            out = known_logp(hidden, about, ids, 0.5)
            (out.logp * 0.5).sum().backward()
        else:
            out = head_logp(hidden, about, ids, 1.2, "bonus" if way == "bonus" else "entropy")
            (out.logp.sum() + (out.watched.sum() if way == "bonus" else 0.0)).backward()
        gradients = [x.grad for x in (hidden, about.weight) if x.grad is not None]
        said.append([out.logp.detach(), out.watched.detach(), *gradients])
    for one, other in zip(*said, strict=True):
        near(other, one, 1e-5 if dtype == torch.float32 else 1e-2)


def numbers(change: Callable[[Any], None], name: str) -> list[Tensor]:
    """Log-probabilities of a packed batch on the card, and all gradients."""
    base = make_base(name)
    base.model, base.device = base.model.cuda(), torch.device("cuda", 0)
    change(base)
    assert allows_packing(base)
    base.packed = True
    role, batch = Role("policy", base, trained=True), collate(kinds()["pairs"], packed=True).to(base.device)
    with role.active(train=True):
        logp = role.logp(batch, statistics="none").logp
        role.backward((logp * torch.linspace(-1, 2, len(logp), device="cuda")).sum())
    return [logp.detach(), *(p.grad for _, p in role.parameters if p.grad is not None)]


def compiled(base: Any) -> None:
    base.compiled = True
    lighten(base.model, compiled=True)


def flex(base: Any) -> None:
    base.flex = True


@pytest.mark.parametrize("change", [compiled, flex])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_a_model_with_each_lever(change: Callable[[Any], None], name: str) -> None:
    plain, found = numbers(lambda _: None, name), numbers(change, name)
    assert len(plain) == len(found)
    for one, other in zip(plain, found, strict=True):
        near(other, one, 1e-4)  # TF32 is off; the sums go in another order


@pytest.mark.parametrize("window", [None, 200])
def test_one_kernel_over_long_rows(window: int | None) -> None:
    from rlhf_cli.models.flex import Blocks

    torch.manual_seed(0)
    lengths, parent = (700, 130, 260, 1, 500), (None, 0, 0, None, 3)
    masks = [None if p is None else torch.ones(n, lengths[p] + n, dtype=torch.bool, device="cuda").tril(lengths[p])
             for n, p in zip(lengths, parent, strict=True)]  # fmt: skip
    said = []
    for segments in (Segments(lengths, parent, tuple(masks)), Blocks(lengths, parent, torch.device("cuda", 0))):
        q, k, v = (torch.randn(1, heads, sum(lengths), 64, device="cuda").requires_grad_() for heads in (4, 2, 2))
        torch.manual_seed(1)
        with torch.no_grad():
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
        out, _ = segment_attention(torch.nn.Module(), q, k, v, None, segments=segments, sliding_window=window)
        (out * torch.cos(out.detach() * 3.0)).sum().backward()
        said.append([out.detach(), q.grad, k.grad, v.grad])
    for one, other in zip(*said, strict=True):
        near(other, one, 1e-3)  # its products are rounded to TF32
