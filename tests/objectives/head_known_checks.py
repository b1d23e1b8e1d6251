"""The output layer where the gradient is known beforehand, against the kernel that learns it later."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_cli.objectives import head_known
from rlhf_cli.objectives.head import Head, head_logp
from tests.objectives.head_checks import KINDS, T, V, inputs, plain
from tests.objectives.support import Check, checks_of, close

UPSTREAM = -0.3


def small(m: Any) -> tuple[dict[str, int], tuple[int, int], int]:
    """Blocks of 5 rows, 8 columns at a time; the old sizes."""
    old = m.BLOCK_ELEMENTS, m.BLOCK, m.WIDTH
    m.BLOCK_ELEMENTS, m.BLOCK, m.WIDTH = {"cpu": 5 * V}, (1, 1024), 8
    return old  # type: ignore[no-any-return]


def check_known_values_and_gradients(m: Any) -> None:
    for (scale, cap, biased, _), blocks in ((k, b) for k in KINDS for b in (False, True)):
        h, w, b, ids, _ = inputs()
        bias = b if biased else None
        logp, entropy, _ = plain(h, w, bias, ids, scale, cap, 1.0)
        (logp * UPSTREAM).sum().backward()
        wanted = [None if x.grad is None else x.grad.clone() for x in (h, w, b)]
        for x in (h, w, b):
            x.grad = None
        old = small(m) if blocks else None
        try:
            out = m.known_logp(h, Head(w, bias, scale, cap), ids, UPSTREAM)
        finally:
            if old is not None:
                m.BLOCK_ELEMENTS, m.BLOCK, m.WIDTH = old
        close(out.logp, logp.float(), 1e-5)
        close(out.watched, entropy.float(), 1e-5)
        assert out.logp.dtype == out.watched.dtype == torch.float32
        assert not out.watched.requires_grad
        (out.logp * UPSTREAM).sum().backward()
        for x, by_hand in zip((h, w, b), wanted, strict=True):
            assert (x.grad is None) == (by_hand is None)
            if x.grad is not None:
                close(x.grad, by_hand, 1e-5)


def check_known_adds_to_gradients(m: Any) -> None:
    h, w, b, ids, _ = inputs()
    for half in (slice(0, 6), slice(6, T)):
        (m.known_logp(h[half], Head(w, b), ids[half], UPSTREAM).logp * UPSTREAM).sum().backward()
    twice = [x.grad.clone() for x in (h, w, b)]
    for x in (h, w, b):
        x.grad = None
    (head_logp(h, Head(w, b), ids).logp * UPSTREAM).sum().backward()
    for x, found in zip((h, w, b), twice, strict=True):
        close(x.grad, found, 1e-5)


def check_known_keeps_its_promise(m: Any) -> None:
    h, w, _, ids, _ = inputs()
    for wrong in (-UPSTREAM, UPSTREAM * 1.001, torch.linspace(0.9, 1.1, T) * UPSTREAM):
        out = m.known_logp(h, Head(w), ids, UPSTREAM)
        said = ""
        try:
            (out.logp * wrong).sum().backward()
        except RuntimeError as error:
            said = str(error)
        assert "promised" in said
    m.known_logp(h, Head(w), ids, 0.1).logp.sum().mul(torch.tensor(0.1)).backward()


def check_known_in_half_precision(m: Any) -> None:
    h, w, b, ids, _ = inputs(torch.bfloat16)
    logp, entropy, _ = plain(h, w, b, ids, 1.0, None, 1.0)
    (logp * UPSTREAM).sum().backward()
    wanted = [x.grad.clone() for x in (h, w, b)]
    for x in (h, w, b):
        x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        out = m.known_logp(h, Head(w, b, dtype=torch.bfloat16), ids, UPSTREAM)
    close(out.logp, logp.float(), 1e-5)
    close(out.watched, entropy.float(), 1e-5)
    (out.logp * UPSTREAM).sum().backward()
    for x, by_hand in zip((h, w, b), wanted, strict=True):
        assert x.grad.dtype == torch.bfloat16
        close(x.grad.float(), by_hand.float(), 4e-2)


def check_known_extremes(m: Any) -> None:
    rows = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]], requires_grad=True)
    w = torch.eye(3).requires_grad_()
    out = m.known_logp(rows, Head(w), torch.tensor([0, 2]), -0.5)
    close(out.logp, [0.0, -1.0986123], 1e-6)
    (out.logp * -0.5).sum().backward()
    assert all(x.grad is not None and bool(torch.isfinite(x.grad).all()) for x in (rows, w))


def check_known_forms_logits_once(m: Any) -> None:
    products = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal products
            out = func(*args, **(kwargs or {}))
            products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
            return out

    h, w, _, ids, _ = inputs()
    with Count():
        (m.known_logp(h, Head(w), ids, UPSTREAM).logp * UPSTREAM).sum().backward()
    assert products == 3, products
    assert m.BLOCK_ELEMENTS["cpu"] * 4 <= 32 * 2**20
    assert m.BLOCK_ELEMENTS["cuda"] * 4 <= 256 * 2**20
    assert m.BLOCK[0] * 151_936 * 4 <= 40 * 2**20


def check_known_all_columns_at_once(m: Any) -> None:
    # The form for a compiler, called as it stands.
    logits, ids = 3.0 * torch.randn(T, V, generator=torch.Generator().manual_seed(2)), inputs()[3]
    said = []
    for form in (m._exponentiate, m._at_once):
        tensor = logits.clone()
        said.append((tensor, *form(tensor, ids)))
    for one, other in zip(*said, strict=True):
        close(one, other, 1e-5)


MODULE = head_known
CHECKS: list[Check] = checks_of(globals())
CLASSICAL = [
    ("known: slope of the cap forgotten", check_known_values_and_gradients, "(by_logit, bent, h", "(by_logit, None, h"),
    ("known: scale forgotten", check_known_values_and_gradients, "bent, head.scale, r", "bent, 1.0, r"),
    ("known: a promise nobody checks", check_known_keeps_its_promise, "if not torch", "if False and torch"),
]  # fmt: skip
_ROWS = "how many rows a block has changes no number"
SURVIVORS: dict[str, str] = {
    "block: name: min(max(elements // vocabulary, fewest), most) "
    "-> max(max(elements // vocabulary, fewest), most)": _ROWS,
    "block: name: max(elements // vocabulary, fewest) -> min(elements // vocabulary, fewest)": _ROWS,
    "_pass: constant: 0 -> 1": _ROWS,
    "_pass: constant: 1.0 -> 1.25": "a factor of 1 may be multiplied",
    "backward: constant: 1e-05 -> 1.25e-05": "what counts as rounding",
}
