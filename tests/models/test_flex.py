"""Attention over segments as one kernel: the numbers of the calls by segment, gradients too.

PyTorch refuses the backward pass of FlexAttention on a CPU; its plain form has one, which these tests let through.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import collate
from rlhf_cli.models.attention import plan
from rlhf_cli.models.checks import allows_packing
from rlhf_cli.models.flex import Blocks
from rlhf_cli.models.roles import Role
from tests.models.worlds import kinds, make_base

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
SHAPES = {
    "short segments in one block": ((5, 3, 6, 9, 4, 2), (None, 0, 0, None, 3, 3)),
    "a prompt of three blocks and its answers": ((390, 140, 3, 260), (None, 0, 0, 0)),
    "whole texts of one block each": ((128, 128, 128), (None, None, None)),
    "parents far away": ((100, 300, 40, 60, 200), (None, None, 0, 1, 0)),
    "one token": ((1,), (None,)),
    "a segment ends with its block": ((256, 128, 64, 64), (None, 0, None, 2)),
}


@pytest.fixture
def backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is let through."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def allowed(lengths: tuple[int, ...], parent: tuple[int | None, ...], window: int | None) -> Tensor:
    """(L, L) bool, by the rule: a token sees its segment up to itself and its parent whole, the last of them."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for i, above in enumerate(parent):
        for n in range(lengths[i]):
            before = [] if above is None else list(range(starts[above], starts[above] + lengths[above]))
            keys = before + list(range(starts[i], starts[i] + n + 1))
            seen[starts[i] + n, keys[-window:] if window else keys] = True
    return seen


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_the_rule(shape: str, window: int | None) -> None:
    lengths, parent = SHAPES[shape]
    blocks = Blocks(lengths, parent, torch.device("cpu"))
    mask, wanted = blocks.mask(window), allowed(lengths, parent, window)
    index = torch.arange(sum(lengths))
    zero = torch.tensor(0)
    rule = mask.mask_mod(zero, zero, index[:, None], index[None, :])
    assert torch.equal(rule, wanted)
    some, full = blocks.met()
    padded = torch.nn.functional.pad(wanted, (0, -len(wanted) % 128) * 2)
    count = len(padded) // 128
    tiles = padded.view(count, 128, count, 128).transpose(1, 2).flatten(2)
    assert not bool((tiles.any(-1) & ~some).any()), "a block that is met is left out"
    if window is None:
        assert torch.equal(some, tiles.any(-1))
        assert not bool((full & ~tiles.all(-1)).any()), "a block that is met in part is not looked into"
        segment = blocks.tokens()[0]
        pure = torch.tensor([len(set(segment[n * 128 :][:128].tolist())) == 1 for n in range(count)])
        assert torch.equal(full & pure[:, None], tiles.all(-1) & pure[:, None])
    listed = mask.to_dense()[0, 0].bool()
    assert torch.equal(listed, some)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window-8", "gemma3-window-32", "gpt2", "mixtral"])
@pytest.mark.usefixtures("backward")
def test_one_kernel_gives_the_same_numbers(name: str) -> None:
    said = []
    for flex in (False, True):
        base = make_base(name)
        base.flex = flex
        assert allows_packing(base)
        base.packed = True
        role = Role("policy", base, trained=True)
        batch = collate(kinds()["pairs"] + kinds()["pairs"][:1], packed=True)
        assert isinstance(plan(batch, one_kernel=True), Blocks)
        with role.active(train=True):
            logp = role.logp(batch, statistics="none").logp
            role.backward((logp * torch.linspace(-1, 2, len(logp))).sum())
        said.append((logp.detach(), {n: p.grad for n, p in role.parameters if p.grad is not None}))
    (logp, gradients), (found, ours) = said
    torch.testing.assert_close(found, logp, rtol=1e-5, atol=1e-5)
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        limit = 1e-5 * (1.0 + float(gradient.abs().max()))
        torch.testing.assert_close(ours[key], gradient, rtol=0, atol=limit, msg=lambda m, key=key: f"{key}: {m}")


def test_across_blocks_it_is_the_plain_attention() -> None:
    lengths, parent = SHAPES["parents far away"]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 16) for heads in (4, 2, 2))
    from rlhf_cli.models.flex import attend

    for window in (None, 50):
        found = attend(q, k, v, Blocks(lengths, parent, torch.device("cpu")).mask(window), 0.3)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed(lengths, parent, window), scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
