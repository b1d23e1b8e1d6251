"""The output layer as a kernel, against plain operations in float64. T tokens, H hidden size, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import head
from tests.objectives.support import Check, checks_of, close, leaf

T, H, V = 13, 6, 37
TILES = ((5, 8), (64, 64))
KINDS = ((1.0, None, False, 1.0), (0.7, 4.0, True, 1.3), (0.625, None, True, 0.5))
"""(scale, cap, bias, temperature)."""


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (T, H), weight (V, H), bias (V,), ids (T,), upstream (T,)."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((T, H), (V, H), (V,)))
    ids = torch.randint(V, (T,), generator=generator)
    ids[:2] = torch.tensor([0, V - 1])
    return leaf(hidden), leaf(weight), leaf(bias), ids, torch.randn(T, generator=generator)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, scale: float, cap: float | None, heat: float
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy, collision: (T,) each, in float64."""
    logits = (hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    log_p = torch.log_softmax(logits / heat, dim=-1)
    return log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), torch.logsumexp(2 * log_p, 1)


def pull(watch: str) -> Tensor:
    """The weight of each entropy in the loss (T,)."""
    return torch.linspace(-1.0, 2.0, T) * (watch == "bonus")


def tiled(m: Any, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Set the size of a tile; the old table."""
    old, m.TILE = m.TILE, {"cpu": size}
    return old  # type: ignore[no-any-return]


def check_head_values_and_gradients(m: Any) -> None:
    for (scale, cap, biased, heat), size in ((k, s) for k in KINDS for s in TILES):
        for trained in (False, True):
            h, w, b, ids, upstream = inputs()
            bias = b if biased else None
            logp, entropy, collision = plain(h, w, bias, ids, scale, cap, heat)
            for watch, expected in (("none", None), ("entropy", entropy), ("collision", collision), ("bonus", entropy)):
                h.requires_grad_(), w.requires_grad_(), b.requires_grad_()
                for x in (h, w, b):
                    x.grad = None
                logp, entropy, collision = plain(h, w, bias, ids, scale, cap, heat)
                ((logp + entropy * pull(watch)) * upstream).sum().backward()
                wanted = [None if x.grad is None else x.grad.clone() for x in (h, w, b)]
                for x in (h, w, b):
                    x.grad = None
                w.requires_grad_(trained), b.requires_grad_(trained)
                old = tiled(m, size)
                try:
                    out = m.head_logp(h, m.Head(w, bias, scale, cap), ids, heat, watch)
                    watched = out.watched * pull(watch) if watch == "bonus" else 0.0
                    ((out.logp + watched) * upstream).sum().backward()
                finally:
                    m.TILE = old
                close(out.logp, logp.float(), 1e-5)
                assert out.logp.dtype == out.watched.dtype == torch.float32
                assert out.watched.requires_grad == (watch == "bonus")
                assert out.watched.shape == ((0,) if expected is None else (T,))
                if expected is not None:
                    close(out.watched, expected.float(), 1e-5)
                assert h.grad is not None
                close(h.grad, wanted[0], 1e-5)
                for x, by_hand in ((w, wanted[1]), (b, wanted[2])):
                    if trained and by_hand is not None:
                        assert x.grad is not None
                        close(x.grad, by_hand, 1e-5)
                    else:
                        assert x.grad is None


def check_head_adds_to_gradients(m: Any) -> None:
    # A second micro-batch adds to what the first left, in the same memory.
    h, w, b, ids, upstream = inputs()
    places = []
    for half in (slice(0, 6), slice(6, T)):
        out = m.head_logp(h[half], m.Head(w, b), ids[half])
        (out.logp * upstream[half]).sum().backward()
        places.append(w.grad.data_ptr())
    assert places[0] == places[1]
    together = [x.grad.clone() for x in (h, w, b)]
    for x in (h, w, b):
        x.grad = None
    (m.head_logp(h, m.Head(w, b), ids).logp * upstream).sum().backward()
    for x, twice in zip((h, w, b), together, strict=True):
        close(x.grad, twice, 1e-5)


def check_head_tied_to_the_embedding(m: Any) -> None:
    # Both gradients of one tensor arrive, whichever comes first.
    _, w, _, ids, upstream = inputs()
    rows = torch.nn.functional.embedding(ids.flip(0), w)
    (m.head_logp(rows, m.Head(w), ids).logp * upstream).sum().backward()
    found = w.grad.clone()
    w.grad = None
    rows = torch.nn.functional.embedding(ids.flip(0), w)
    (plain(rows, w, None, ids, 1.0, None, 1.0)[0] * upstream).sum().backward()
    close(found, w.grad, 1e-5)


def check_head_upcasts(m: Any) -> None:
    # Half-precision numbers meet exactly: only the inputs are rounded, the logits are not.
    for trained in (False, True):
        h, w, b, ids, upstream = inputs(torch.bfloat16)
        w.requires_grad_(trained), b.requires_grad_(trained)
        logp, entropy, _ = plain(h, w, b, ids, 1.0, None, 1.0)
        out = m.head_logp(h, m.Head(w, b, dtype=torch.bfloat16), ids, 1.0, "entropy")
        close(out.logp, logp.float(), 1e-5)
        close(out.watched, entropy.float(), 1e-5)
        (out.logp * upstream).sum().backward()
        assert h.grad.dtype == torch.bfloat16
        assert (w.grad is not None) == trained
        ours = [x.grad.float() for x in (h, w, b) if x.grad is not None]
        for x in (h, w, b):
            x.grad = None
        (logp * upstream).sum().backward()
        for mine, x in zip(ours, (h, w, b), strict=False):
            close(mine, x.grad.float(), 4e-2)
    h, w, _, ids, _ = inputs()
    rounded = m.head_logp(h, m.Head(w, dtype=torch.bfloat16), ids).logp
    close(rounded, plain(h.bfloat16(), w.bfloat16(), None, ids, 1.0, None, 1.0)[0].float(), 1e-5)


def check_head_extremes(m: Any) -> None:
    old = tiled(m, (2, 2))
    try:
        w = torch.eye(5)
        rows = torch.tensor([[1e4, -1e4, 0, 0, 0], [-3e4, -3e4, -3e4, -3e4, -3e4], [0, 0, 0, 0, (1e30).__float__()]])
        rows.requires_grad_()
        out = m.head_logp(rows, m.Head(w), torch.tensor([0, 3, 4]), 1.0, "entropy")
        close(out.logp, [0.0, -1.6094379, 0.0], 1e-6)
        close(out.watched, [0.0, 1.6094379, 0.0], 1e-6)
        out.logp.sum().backward()
        assert bool(torch.isfinite(rows.grad).all())
    finally:
        m.TILE = old


def check_head_tile_is_small(m: Any) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 2 and func is not torch.ops.aten.t.default:
                largest = max(largest, out.numel() if out.shape != (V, H) and out.shape != (H, V) else 0)
            return out

    old = tiled(m, (4, 8))
    try:
        h, w, b, ids, _ = inputs()
        with Watch():
            m.head_logp(h, m.Head(w, b, 1.0, 3.0), ids, 1.0, "entropy").logp.sum().backward()
        assert largest <= max(T * H, 4 * 8), largest
    finally:
        m.TILE = old
    assert all(rows * columns * 4 <= 64 * 2**20 for rows, columns in m.TILE.values())


def check_head_plainly(m: Any) -> None:
    h, w, b, ids, _ = inputs()
    for scale, cap, biased, _heat in (*KINDS, (1.25, None, False, 1.0)):
        bias = b if biased else None
        logits = m.Head(w, bias, scale, cap)(h)
        close(
            torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0],
            plain(h, w, bias, ids, scale, cap, 1.0)[0].float(),
            1e-5,
        )


MODULE = head
CHECKS: list[Check] = checks_of(globals())
CLASSICAL = [
    ("head: a gradient not rescaled", check_head_values_and_gradients, "+ more) * shrink[:, None]", "+ more)"),
    ("head: temperature not in the cap", check_head_values_and_gradients, "cap / temperature", "cap"),
    ("head: slope of the cap forgotten", check_head_values_and_gradients, "bent, head.scale", "None, head.scale"),
    ("head: the last micro-batch only", check_head_adds_to_gradients, "parameter.grad is None", "True"),
    ("head: in half precision", check_head_upcasts, "else rounded.float()", "else rounded"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "logits: comparison: (self.bias, self.scale, self.cap) == (None, 1.0, None) "
    "-> (self.bias, self.scale, self.cap) != (None, 1.0, None)": "nothing to do is nothing done",
    "logits: constant: 1.0 -> 1.25": "the same",
    "logits: dropped: self.bias[at].detach() -> _same(self.bias[at])": "gradients are formed by hand",
    "_forward: name: torch.zeros_like(sums.top) -> torch.ones_like(sums.top)": "every token lies in some tile",
    ("__init__: name: rows.new_zeros((3, len(rows)), dtype=torch.float32) "
     "-> rows.new_ones((3, len(rows)), dtype=torch.float32)"): "shrunk to nothing by the first tile",
    "__init__: constant: 0 -> 1": "a sum that nobody reads",
    "__init__: name: torch.zeros_like(rows, dtype=torch.float32) -> torch.ones_like(rows, dtype=torch.float32)":
        "shrunk to nothing by the first tile",
    "add_gradient: comparison: factor.dtype == torch.float32 -> factor.dtype != torch.float32":
        "two ways of adding the same product",
}  # fmt: skip
