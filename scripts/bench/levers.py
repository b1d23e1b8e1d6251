"""What each way of computing takes on this device: plain operations, ours, ours compiled; attention by segments in one
call each and in one kernel.

    python scripts/bench/levers.py [--repeats 5]

Forward and backward pass of each piece by itself, the ways in turn; medians. On a GPU in bfloat16 and the sizes of a
model of 1.5 billion parameters, on a CPU in float32 and small. Memory: over what there was before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from alone import cost
from torch import Tensor

from rlhf_cli.models import kernels
from rlhf_cli.models.attention import Segments, segment_attention
from rlhf_cli.models.flex import Blocks
from rlhf_cli.objectives.head import Head, head_logp
from rlhf_cli.objectives.head_known import known_logp

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
T, H, INNER, V, HEADS, KEYS = (8192, 1536, 8960, 151_936, 12, 2) if GPU else (512, 256, 1024, 16_384, 4, 2)
LENGTHS = (512 if GPU else 64, *([96, 160] * 12 if GPU else [24, 40] * 4))
"""Of the segments of a row: a prompt and its completions, then short texts."""
Ways = dict[str, Callable[[], Any]]


def random(*size: int, trained: bool = True) -> Tensor:
    """Small numbers."""
    return (0.05 * torch.randn(*size, device=DEVICE)).to(DTYPE).requires_grad_(trained)


def back(out: Tensor, *leaves: Tensor) -> None:
    """The backward pass; gradients are not kept."""
    out.float().sum().backward()
    for leaf in leaves:
        leaf.grad = None


def head(trained: bool, promised: bool) -> Ways:
    """Log-probabilities of T tokens."""
    hidden, weight = random(T, H), random(V, H, trained=trained)
    ids = torch.randint(0, V, (T,), device=DEVICE)

    def plain() -> None:
        logits = torch.nn.functional.linear(hidden, weight).float()
        back(-torch.nn.functional.cross_entropy(logits, ids, reduction="sum"), hidden, weight)

    def ours(compiled: bool) -> None:
        about = Head(weight, dtype=DTYPE, compiled=compiled)
        out = known_logp(hidden, about, ids, 1.0) if promised else head_logp(hidden, about, ids)
        back(out.logp, hidden, weight)

    return {"plain": plain, "ours": lambda: ours(False), "compiled": lambda: ours(True)}


def norm() -> Ways:
    """RMSNorm."""
    x, weight = random(T, H), random(H, trained=False)

    def plain() -> None:
        wide = x.float()
        back(weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(DTYPE), x)

    return {"plain": plain, **both(lambda c: back(kernels.RMSNorm.apply(x, weight, 1e-6, True, c), x))}


def gated() -> Ways:
    """silu(gate) up."""
    gate, up = random(T, INNER), random(T, INNER)
    return {
        "plain": lambda: back(torch.nn.functional.silu(gate) * up, gate, up),
        **both(lambda c: back(kernels.Gated.apply(gate, up, c), gate, up)),
    }


def rotary() -> Ways:
    """Queries turned by their positions."""
    x, size = random(1, HEADS, T, H // HEADS), H // HEADS
    angle = torch.arange(T, device=DEVICE)[None, None, :, None] * torch.ones(size, device=DEVICE) / 100
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)

    def plain() -> None:
        low, high = x.chunk(2, dim=-1)
        back(x * cos + torch.cat([-high, low], dim=-1) * sin, x)

    return {"plain": plain, **both(lambda c: back(kernels.Rotary.apply(x, cos, sin, c), x))}


def both(way: Callable[[bool], Any]) -> Ways:
    """Ours, and ours compiled."""
    return {"ours": lambda: way(False), "compiled": lambda: way(True)}


def attention() -> Ways:
    """A packed row: plain with a dense mask, a call for each segment, one kernel."""
    parent = (None, *([0] * (len(LENGTHS) // 2)), *([None] * (len(LENGTHS) - 1 - len(LENGTHS) // 2)))
    length, size = sum(LENGTHS), H // HEADS
    q, k, v = (random(1, heads, length, size) for heads in (HEADS, KEYS, KEYS))
    one = Blocks(LENGTHS, parent, DEVICE)
    index = torch.arange(length, device=DEVICE)
    seen: Any = one.mask(None).mask_mod
    dense = seen(index[0], index[0], index[:, None], index[None, :])
    masks = tuple(
        None if above is None
        else torch.ones(n, LENGTHS[above] + n, dtype=torch.bool, device=DEVICE).tril(LENGTHS[above])
        for n, above in zip(LENGTHS, parent, strict=True)
    )  # fmt: skip
    each = Segments(LENGTHS, parent, masks)

    def plain() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
        back(out, q, k, v)

    def ours(segments: Any) -> None:
        back(segment_attention(torch.nn.Module(), q, k, v, None, segments=segments)[0], q, k, v)

    ways: Ways = {"plain": plain, "ours": lambda: ours(each)}
    return ways | ({"compiled": lambda: ours(one)} if GPU else {})  # it has no backward pass on a CPU


PIECES: dict[str, Callable[[], Ways]] = {
    "log-probabilities, frozen head": lambda: head(False, False),
    "log-probabilities, trained head": lambda: head(True, False),
    "likelihood, trained head": lambda: head(True, True),
    "RMSNorm": norm, "gated MLP": gated, "rotary positions": rotary,
    f"attention of {len(LENGTHS)} segments": attention,
}  # fmt: skip


def measured(ways: Ways, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds (median) and MiB of each way; they take turns, after one to warm up."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            figures: dict[str, Any] = {}
            with cost(figures):
                way()
            if turn:
                found[name].append(figures)
    return {
        name: (statistics.median(f["seconds"] for f in each), max(f["peak"] - f["idle"] for f in each))
        for name, each in found.items()
    }


def row(name: str, found: dict[str, tuple[float, float]]) -> str:
    """A line of the table."""
    base = found["plain"][0]
    cells = [f"{seconds * 1e3:.2f} ms, {memory:.0f} MiB ({base / seconds:.2f})" for seconds, memory in found.values()]
    return f"| {name} | {' | '.join(cells + ['-'] * (3 - len(cells)))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args(arguments)
    torch.manual_seed(0)
    words = f"T = {T}, H = {H}, inner {INNER}, V = {V}, {str(DTYPE).removeprefix('torch.')}"
    print(f"| {words} | plain (times as fast as that) | ours | compiled, or one kernel |\n|---|---|---|---|")
    for name, piece in PIECES.items():
        print(row(name, measured(piece(), asked.repeats)), flush=True)


if __name__ == "__main__":
    main()
