"""Log-probabilities of tokens from hidden states, in chunks. T tokens, H hidden size, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import logprob
from rlhf_cli.objectives.head import Head
from tests.objectives.support import Check, checks_of, close, finite, gradients, leaf

T, H, V = 15, 6, 23
CAP = 5.0
CHUNKS = (1, 7, T, T + 1, None)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (T, H), weight (V, H), bias (V,), ids (T,)."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) * 1.5).to(dtype)
    bias = torch.randn(V, generator=generator).to(dtype)
    return leaf(hidden), leaf(weight), leaf(bias), torch.randint(V, (T,), generator=generator)


def head_of(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """A head with a bias and soft-capped logits."""
    return lambda hidden: CAP * torch.tanh((hidden @ weight.T + bias) / CAP)


def naive(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """(3, T): logp, entropy, mean, token by token, in float64."""
    rows = []
    for row, token in zip(logits.double() / temperature, ids.tolist(), strict=True):
        log_p = torch.log_softmax(row, dim=-1)
        rows.append(torch.stack([log_p[token], -(log_p.exp() * log_p).sum(), log_p.mean()]))
    return torch.stack(rows, dim=1)


def check_token_logp_by_hand(m: Any) -> None:
    # Logits log 1, log 2, log 5: p = 1/8, 2/8, 5/8.
    hidden = torch.tensor([[0.0, math.log(2), math.log(5)]])
    out = m.token_logp(hidden, lambda h: h, torch.tensor([1]))
    close(out.logp, [math.log(1 / 4)], 1e-6)
    entropy = -(1 / 8 * math.log(1 / 8) + 1 / 4 * math.log(1 / 4) + 5 / 8 * math.log(5 / 8))
    close(out.entropy, [entropy], 1e-6)
    close(out.mean, [(math.log(1 / 8) + math.log(1 / 4) + math.log(5 / 8)) / 3], 1e-6)
    # Temperature 1/2 squares the weights: 1, 4, 25.
    close(m.token_logp(hidden, lambda h: h, torch.tensor([2]), 0.5).logp, [math.log(25 / 30)], 1e-6)


def check_token_logp_chunks(m: Any) -> None:
    for temperature in (0.7, 1.3):
        h, w, b, ids = inputs()
        expected = naive(head_of(w, b)(h), ids, temperature)
        weight = torch.linspace(-1, 2, T)
        wanted = [torch.autograd.grad((e * weight).sum(), (h, w, b), retain_graph=True) for e in expected]
        for chunk in CHUNKS:
            out = m.token_logp(h, head_of(w, b), ids, temperature, chunk)
            for value, plain in zip(out[:3], expected, strict=True):
                close(value, plain.float(), 1e-5)
            for value, plain_gradients in zip(out[:3], wanted, strict=True):
                again = torch.autograd.grad((value * weight).sum(), (h, w, b), retain_graph=True)
                for ours, theirs in zip(again, plain_gradients, strict=True):
                    close(ours, theirs.float(), 1e-5)


def check_entropy_gradient(m: Any) -> None:
    # dH / dz = -p (log p + H); the uniform distribution has entropy log V and gradient 0.
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.7, 0.7, 0.7]])
    x = leaf(logits)
    out = m.token_logp(x, lambda h: h, torch.tensor([0, 1]))
    (g,) = gradients(out.entropy, x)
    log_p = torch.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    close(g, -log_p.exp() * (log_p + entropy), 1e-6)
    close(g[1], torch.zeros(3), 1e-6)
    close(out.entropy[1], math.log(3), 1e-6)


def check_logits_are_never_whole(m: Any) -> None:
    h, w, b, ids = inputs()
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return head_of(w, b)(hidden)

    out = m.token_logp(h, head, ids, chunk=4)
    assert seen == [4, 4, 4, 3]
    out.logp.sum().backward()
    assert len(seen) == 8, "the backward pass recomputes each chunk"
    assert max(seen) == 4
    seen.clear()
    with torch.no_grad():
        close(m.token_logp(h, head, ids, chunk=4).logp, out.logp)
    assert seen == [4, 4, 4, 3]


def check_default_chunk(m: Any) -> None:
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return hidden

    with torch.no_grad():
        m.token_logp(torch.zeros(1030, 2), head, torch.zeros(1030, dtype=torch.int64))
        assert seen == [512, 512, 6]
        seen.clear()
        m.token_logp(torch.zeros(5, 2), head, torch.zeros(5, dtype=torch.int64), vocabulary=m.CHUNK_ELEMENTS // 2)
        assert seen == [2, 2, 1]
        seen.clear()
        m.token_logp(torch.zeros(2, 2), head, torch.zeros(2, dtype=torch.int64), vocabulary=m.CHUNK_ELEMENTS * 2)
        assert seen == [1, 1]
    assert m.CHUNK_ELEMENTS * 4 == 64 * 2**20


def check_half_precision_is_upcast(m: Any) -> None:
    h, w, b, ids = inputs(torch.bfloat16)
    logits = head_of(w, b)(h)
    assert logits.dtype == torch.bfloat16
    out = m.token_logp(h, head_of(w, b), ids, chunk=T)
    for value, plain in zip(out[:3], naive(logits, ids, 1.0), strict=True):
        assert value.dtype == torch.float32
        close(value, plain.float(), 1e-5)
    (g,) = gradients(out.logp, h)
    assert g.dtype == torch.bfloat16
    assert finite(g)


def check_no_tokens(m: Any) -> None:
    _, w, b, _ = inputs()
    for dtype in (torch.float32, torch.bfloat16):
        hidden = leaf(torch.zeros(0, H, dtype=dtype))
        out = m.token_logp(hidden, head_of(w, b), torch.zeros(0, dtype=torch.int64))
        for value in out:
            assert value.shape == (0,)
            assert value.dtype == torch.float32
        out.logp.sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.shape == (0, H)
        assert out.mean.requires_grad


def check_extreme_logits(m: Any) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e30, 1e30, -1e30]])
    x = leaf(logits)
    out = m.token_logp(x, lambda h: h, torch.tensor([0, 1, 1]))
    close(out.logp[:2], [0.0, -2e4])
    close(out.entropy[:2], [0.0, 0.0])
    assert finite(*out)
    for value in out:
        assert finite(*torch.autograd.grad(value.sum(), x, retain_graph=True))


def check_token_logits(m: Any) -> None:
    torch.manual_seed(3)
    weight, tokens = leaf(torch.randn(4, 9)), torch.tensor([7, 2])
    kept, m.CHUNK_ELEMENTS = m.CHUNK_ELEMENTS, 18  # two rows at a time
    seen: list[int] = []

    def head(h: Tensor) -> Tensor:
        seen.append(len(h))
        return h @ weight

    try:
        for count in (0, 1, 5):
            hidden = leaf(torch.randn(count, 4))
            seen.clear()
            found = m.token_logits(hidden, head, tokens, 9)
            assert seen == {0: [0], 1: [1], 5: [2, 2, 1]}[count]
            plain = (hidden @ weight)[:, tokens]
            close(found, plain)
            for one, other in zip(
                gradients(found.square(), hidden, weight), gradients(plain.square(), hidden, weight), strict=True
            ):
                close(one, other)
            with torch.no_grad():
                close(m.token_logits(hidden, head, tokens, 9), plain)
        seen.clear()
        m.token_logits(torch.ones(2, 4), head, tokens, 99)
        assert seen == [1, 1], "a row at a time where not even one fits"
    finally:
        m.CHUNK_ELEMENTS = kept
    assert m.token_logits(torch.ones(1, 2, dtype=torch.bfloat16), lambda h: h, tokens % 2, 2).dtype == torch.float32


def check_token_logp_without_statistics(m: Any) -> None:
    torch.manual_seed(3)
    hidden, weight, ids = torch.randn(5, 4), torch.randn(4, 9), torch.tensor([0, 8, 3, 3, 1])
    whole = m.token_logp(hidden, lambda h: h @ weight, ids, chunk=2)
    alone = m.token_logp(hidden, lambda h: h @ weight, ids, chunk=2, statistics="none")
    close(alone.logp, whole.logp)
    assert alone.entropy.shape == alone.mean.shape == alone.collision.shape == whole.collision.shape == (0,)


def check_token_logp_collision(m: Any) -> None:
    # p = 1/8, 2/8, 5/8: squares sum to 30/64; at temperature 1/2 p = 1/30, 4/30, 25/30
    hidden = leaf(torch.tensor([[0.0, math.log(2), math.log(5)]] * 3))
    ids = torch.tensor([1, 0, 2])
    for temperature, total in ((1.0, 30 / 64), (0.5, 642 / 900)):
        out = m.token_logp(hidden, lambda h: h, ids, temperature, 2, statistics="collision")
        close(out.collision, [math.log(total)] * 3, 1e-6)
        close(out.logp, m.token_logp(hidden, lambda h: h, ids, temperature).logp)
        assert out.entropy.shape == out.mean.shape == (0,)
        assert not out.collision.requires_grad
        assert out.logp.requires_grad
    # A token that is certain, and probabilities whose squares are 0 in float32.
    sure = m.token_logp(torch.tensor([[1e4, -1e4, 0.0]]), lambda h: h, torch.tensor([0]), statistics="collision")
    close(sure.collision, [0.0])


class Silent(Head):
    """A head that goes through the kernel, or fails."""

    def __call__(self, hidden: Tensor) -> Tensor:
        raise AssertionError("the plain path was taken")


def check_token_logp_kinds(m: Any) -> None:
    # Of a head and of a function: the same numbers, with a gradient where that is asked for, and nothing else.
    h, w, b, ids = inputs()
    logp, entropy, _ = naive(head_of(w, b)(h), ids, 1.3)
    squares = torch.log_softmax(head_of(w, b)(h).double() / 1.3, dim=-1).exp().square().sum(-1).log()
    for head in (Silent(w, b, 1.0, CAP), head_of(w, b)):
        for kind in ("none", "entropy", "bonus", "collision"):
            out = m.token_logp(h, head, ids, 1.3, statistics=kind)
            close(out.logp, logp.float(), 1e-5)
            assert out.mean.shape == (0,)
            assert out.collision.shape == ((T,) if kind == "collision" else (0,))
            if kind == "collision":
                close(out.collision, squares.float(), 1e-5)
                assert not out.collision.requires_grad
            assert out.entropy.shape == ((T,) if kind in ("entropy", "bonus") else (0,))
            if len(out.entropy):
                close(out.entropy, entropy.float(), 1e-5)
                assert out.entropy.requires_grad == (kind == "bonus")
        slope = torch.autograd.grad(m.token_logp(h, head, ids, 1.3, statistics="bonus").entropy.sum(), h)[0]
        close(slope, torch.autograd.grad(naive(head_of(w, b)(h), ids, 1.3)[1].sum(), h)[0].float(), 1e-5)
    out = m.token_logp(h, Head(w, b, 1.0, CAP), ids, 1.3, statistics="usual")
    close(out.mean, naive(head_of(w, b)(h), ids, 1.3)[2].float(), 1e-5)


def check_gradient_known_beforehand(m: Any) -> None:
    # Only a trained head at temperature 1, in training, is done with in the forward pass.
    for known, heat, trained, grad in ((-0.5, 1.0, True, True), (None, 1.0, True, True), (-0.5, 2.0, True, True),
                                       (-0.5, 1.0, False, True), (-0.5, 1.0, True, False)):  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (5, 7))
        ids, at_once = torch.arange(5), (known, heat, trained, grad) == (-0.5, 1.0, True, True)
        weight.requires_grad_(trained)
        with torch.set_grad_enabled(grad):
            out = m.token_logp(hidden, Head(weight), ids, heat, statistics="entropy", upstream=known)
        assert (weight.grad is not None) == at_once
        plain = torch.log_softmax((hidden.detach() @ weight.detach().T) / heat, -1)
        close(out.logp, plain[torch.arange(5), ids], 1e-6)
        close(out.entropy, -(plain.exp() * plain).sum(1), 1e-6)
        if grad:
            (out.logp * -0.5).sum().backward()
            assert (weight.grad is not None) == trained
            assert hidden.grad is not None


MODULE = logprob
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("logp: in half precision", check_half_precision_is_upcast, "head(hidden).float()", "head(hidden)"),
    ("logp: temperature forgotten", check_token_logp_by_hand, ".float() / temperature", ".float()"),
    ("logp: the collision takes gradients", check_token_logp_collision, "whole[1].detach() if",
     "whole[1] if"),
    ("logp: logits kept for the backward pass", check_logits_are_never_whole, "if torch.is_grad_enabled():",
     "if False:"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "_chunk: dropped: logits.detach() -> _same(logits)": "detached again by its caller; only memory is saved",
    "_chunk: dropped: total.detach() -> _same(total)": "detached again by its caller; only memory is saved",
    "_chunk: sign: -1 -> +1": "the last of two dimensions",
    ("token_logp: operator: hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32) "
     "-> hidden.sum() * 0.0 - hidden.new_zeros(0, dtype=torch.float32)"): "a part that is empty anyway",
    "token_logp: operator: hidden.sum() * 0.0 -> hidden.sum() / 0.0": "a part that is empty anyway",
    "token_logp: name: hidden.new_zeros(0, dtype=torch.float32) -> hidden.new_ones(0, dtype=torch.float32)":
        "a part that is empty anyway",
    "token_logp: dropped: empty.detach() -> _same(empty)": "a part that is empty anyway",
    "token_logp: name: hidden.sum() -> hidden.mean()": "a part that is empty anyway",
    "token_logp: constant: 0.0 -> 1.0": "a part that is empty anyway",
    "token_logits: constant: False -> True": "a generator's state that nothing draws from",
    "token_logp: constant: True -> False":
        "zip(strict=) of two splits of one length, or a generator's state that nothing draws from",
    "token_logp: constant: False -> True":
        "zip(strict=) of two splits of one length, or a generator's state that nothing draws from",
}  # fmt: skip
