"""What happens to a tile of logits, against plain operations in float64. R rows, C columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import tile
from tests.objectives.support import Check, checks_of, close

R, C = 5, 8


def numbers(seed: int, *size: int) -> Tensor:
    return 2.0 * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def check_tile_bends_as_the_architecture_does(m: Any) -> None:
    products, bias = numbers(0, R, C), numbers(1, C)
    for b, scale, cap in ((None, 1.0, None), (bias, 1.0, None), (bias, 0.5, 3.0), (None, 2.0, 1.5)):
        plain = products.double().requires_grad_()
        wanted = (plain + (0.0 if b is None else b.double())) * scale
        before = wanted
        wanted = wanted if cap is None else cap * torch.tanh(wanted / cap)
        logits, slope = m.bend(products.clone(), b, scale, cap)
        close(logits, wanted.float(), 1e-5)
        assert (slope is None) == (cap is None)
        if slope is not None:
            (by_before,) = torch.autograd.grad(wanted.sum(), before)
            close(slope, by_before.float(), 1e-5)


def check_tile_absorbs_as_softmax(m: Any) -> None:
    # Tiles of one row of logits, met one after the other in either order, give the sums of the whole row.
    whole = numbers(2, R, 2 * C)
    log_p = torch.log_softmax(whole.double(), dim=1)
    top = whole.amax(1)
    each = (whole - top[:, None]).double()
    for parts in (whole.split(C, dim=1), whole.split(C, dim=1)[::-1]):
        for watch in ("none", "entropy", "bonus", "collision"):
            sums = torch.full((R,), torch.finfo(torch.float32).min), torch.zeros(R), torch.zeros(R)
            for part in parts:
                given, before = part.clone(), sums[0]
                tilted, sink, *found = m.absorb(given, *sums, watch)
                x = part - found[0][:, None]
                close(given, x.exp(), 1e-6)
                assert (tilted is None) == (watch in ("none", "collision"))
                if tilted is not None:
                    close(tilted, x * x.exp(), 1e-6)
                close(sink, before - found[0], 1e-6)
                sums = tuple(found)
            close(sums[0], top, 0.0)
            close(sums[1].log() + top, torch.logsumexp(whole, 1), 1e-6)
            if watch == "collision":
                close(sums[2].log() - 2.0 * sums[1].log(), torch.logsumexp(2.0 * log_p, 1).float(), 1e-5)
            elif watch != "none":
                close(sums[2], (each * each.exp()).sum(1).float(), 1e-5)


def check_tile_gradients(m: Any) -> None:
    logits, upstream, by_entropy = numbers(3, R, C), numbers(4, R), numbers(5, R)
    top = logits.amax(1)
    mass = (logits - top[:, None]).exp().sum(1)
    plain = logits.double().requires_grad_()
    log_p = torch.log_softmax(plain, dim=1)
    entropy = -(log_p.exp() * log_p).sum(1)
    # Of minus the log of the normaliser, which every column takes part in; that of the token itself is added apart.
    (wanted,) = torch.autograd.grad((-plain.logsumexp(1) * upstream).sum(), plain, retain_graph=True)
    close(m.by_each(logits.clone(), top, -upstream / mass), wanted.float(), 1e-5)
    both = (-plain.logsumexp(1) * upstream + entropy * by_entropy).sum()
    (wanted,) = torch.autograd.grad(both, plain)
    lift = upstream + by_entropy * (entropy.detach().float() - mass.log())
    close(m.by_both(logits.clone(), top, -mass, lift, by_entropy), wanted.float(), 1e-5)


def check_tile_finishes(m: Any) -> None:
    by_logit, bent = numbers(6, R, C), numbers(7, R, C)
    for slope, scale in ((None, 1.0), (bent, 1.0), (None, 0.5), (bent, 3.0)):
        given = by_logit.clone()
        wanted = by_logit * (1.0 if slope is None else slope) * scale
        close(m.finish(given, slope, scale, torch.float32), wanted, 1e-6)
        close(given, wanted, 1e-6)
        assert m.finish(by_logit.clone(), slope, scale, torch.bfloat16).dtype == torch.bfloat16


MODULE = tile
CHECKS: list[Check] = checks_of(globals())
CLASSICAL = [
    ("tile: a sum not rescaled", check_tile_absorbs_as_softmax, "mass * shrink + each", "mass + each"),
    ("tile: slope of the cap forgotten", check_tile_finishes, "by_logit *= bent", "pass"),
    ("tile: scale in the cap", check_tile_bends_as_the_architecture_does, "div_(cap)", "div_(cap * scale)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    f"{name}: constant: 1.0 -> 1.25": "a factor of 1 may be multiplied" for name in ("bend", "finish")
}
