"""The output layer of a language model as a kernel: log-probabilities and their gradient, tile by tile.

Nothing of size (tokens x vocabulary) exists: rows of hidden states meet columns of the vocabulary in tiles that stay in
the cache, with a running maximum and sum (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867), in float32.

- A frozen head (LoRA): the gradient for a hidden state, W[token] - sum_v p_v W[v], is summed up in the forward pass,
  while each tile is at hand; the backward pass multiplies it by a number for each token.
- A trained head: the backward pass forms each tile again and adds to the head's gradient where that lies, so that no
  second tensor of its size exists.

T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.objectives.tile import ABSORB, BEND, BY_BOTH, BY_EACH, FINISH, Watch

TILE = {"cpu": (512, 4096), "cuda": (2048, 8192)}
"""Rows and columns of a tile: 8 MiB in float32, which a cache holds; on a GPU 64 MiB, which keeps it busy."""


@dataclass(frozen=True)
class Head:
    """logits = cap tanh(scale (hidden W^T + bias) / cap); without a cap scale (hidden W^T + bias)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None
    dtype: torch.dtype = torch.float32
    """What hidden states and weights are rounded to before they meet; products are summed in float32."""
    compiled: bool = False
    """Whether what happens to a tile between its products is compiled into one pass (objectives/fused.py)."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden (C, H) -> logits (C, V) in its own dtype, by plain operations with gradient."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @property
    def trained(self) -> bool:
        """Whether it takes gradients."""
        return self.weight.requires_grad

    def tiles(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of each tile, row block by row block."""
        height, width = TILE.get(self.weight.device.type, TILE["cpu"])
        for r in range(0, rows, height):
            for c in range(0, len(self.weight), width):
                yield slice(r, min(r + height, rows)), slice(c, min(c + width, len(self.weight)))

    def columns(self, at: slice) -> Tensor:
        """Weights of some columns as they enter a product: (C, H)."""
        return operand(self.weight[at], self.dtype)

    def logits(self, hidden: Tensor, at: slice) -> tuple[Tensor, Tensor | None]:
        """hidden (R, H), an operand -> float32 logits of some columns (R, C), and the slope of the cap."""
        logits = product(hidden, self.columns(at).T)
        if (self.bias, self.scale, self.cap) == (None, 1.0, None):
            return logits, None
        bias = None if self.bias is None else self.bias[at].detach()
        return BEND.by(self.compiled)(logits, bias, self.scale, self.cap)


class HeadLogp(NamedTuple):
    """What the vocabulary says of T tokens."""

    logp: Tensor  # (T,) log-probability of the token
    watched: Tensor  # (T,) the statistic asked for; (0,) for none


def head_logp(hidden: Tensor, head: Head, ids: Tensor, temperature: float = 1.0, watch: Watch = "none") -> HeadLogp:
    """Log-probability of `ids` (T,) under softmax(logits of hidden (T, H) / temperature), float32.

    Gradients reach hidden states, and the head's weight and bias where they take them: those are added to `.grad`
    in the backward pass, which therefore runs once. watch: `entropy` in nats; `bonus`, the same with gradient; or
    `collision`, the log of the sum of the squared probabilities.
    """
    hot = replace(head, scale=head.scale / temperature, cap=None if head.cap is None else head.cap / temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        logp, watched = _HeadLogp.apply(hidden, hot, ids, watch)
    return HeadLogp(logp, watched)


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the dtype of the computation. A CPU multiplies in float32, which holds such numbers exactly."""
    rounded = tensor.to(dtype)
    return rounded if tensor.is_cuda else rounded.float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (R, K) b (K, C) -> float32 (R, C)."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


class _HeadLogp(torch.autograd.Function):
    """hidden, head, ids, watch -> logp (T,), watched (T,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, ids: Tensor, watch: Watch) -> tuple[Tensor, Tensor]:
        slopes = hidden.requires_grad and not head.trained
        logp, mass, watched, found = _forward(operand(hidden, head.dtype), head, ids, watch, slopes=slopes)
        ctx.head, ctx.watch = head, watch
        ctx.save_for_backward(
            *([slope.to(hidden.dtype) for slope in found] if slopes else (hidden, ids, mass, watched))
        )
        if watch != "bonus":
            ctx.mark_non_differentiable(watched)
        return logp, watched

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, by_entropy: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.head.trained:
            by_each = zip((upstream, by_entropy), ctx.saved_tensors, strict=False)
            return sum(by[:, None].to(slope.dtype) * slope for by, slope in by_each), None, None, None
        hidden, ids, mass, entropy = ctx.saved_tensors
        bonus = (by_entropy, entropy) if ctx.watch == "bonus" else None
        return _backward(hidden, ctx.head, ids, mass, upstream, bonus), None, None, None


class _Sums:
    """Sums over the columns seen so far, of T tokens, weighed with e^x: x is the logit less the largest so far."""

    def __init__(self, rows: Tensor, watch: Watch, *, slopes: bool, compiled: bool) -> None:
        self.top, self.mass, self.moment = rows.new_zeros((3, len(rows)), dtype=torch.float32)  # (T,) each
        self.top.fill_(torch.finfo(torch.float32).min)
        self.watch: Watch = watch
        self.absorb = ABSORB.by(compiled)
        count = (1 + (watch == "bonus")) if slopes else 0
        self.weights = [torch.zeros_like(rows, dtype=torch.float32) for _ in range(count)]
        """Of the columns' weights, and of x times them: (T, H)."""

    def add(self, r: slice, logits: Tensor, bent: Tensor | None, columns: Tensor) -> None:
        """A tile: logits (R, C), overwritten; slopes of the cap (R, C); weights of the columns (C, H)."""
        before = self.top[r], self.mass[r], self.moment[r]
        tilted, sink, peak, mass, moment = self.absorb(logits, *before, self.watch)
        self.top[r], self.mass[r], self.moment[r] = peak, mass, moment
        each, shrink = logits, sink.exp()
        if len(self.weights) == 2 and tilted is not None:
            self._weigh(1, r, tilted, bent, columns, self.weights[0][r] * sink[:, None], shrink)
        if self.weights:
            self._weigh(0, r, each, bent, columns, 0.0, shrink)

    def _weigh(
        self,
        i: int,
        r: slice,
        factor: Tensor,
        bent: Tensor | None,
        columns: Tensor,
        more: Tensor | float,
        shrink: Tensor,
    ) -> None:
        factor = factor if bent is None else factor.mul_(bent)
        seen = (self.weights[i][r] + more) * shrink[:, None]
        self.weights[i][r] = seen + product(factor.to(columns.dtype), columns)

    def watched(self) -> Tensor:
        """The statistic asked for (T,), or (0,)."""
        if self.watch == "none":
            return self.moment[:0]
        if self.watch == "collision":
            return self.moment.log() - 2.0 * self.mass.log()
        return self.mass.log() - self.moment / self.mass


def _forward(
    rows: Tensor, head: Head, ids: Tensor, watch: Watch, *, slopes: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """rows (T, H), an operand -> logp (T,), largest logit and sum of e^(logit - largest) (2, T), watched (T,), and the
    slopes d logp / d row and, for the bonus, d entropy / d row (T, H)."""
    sums = _Sums(rows, watch, slopes=slopes, compiled=head.compiled)
    token, bend = torch.zeros_like(sums.top), torch.ones_like(sums.top)
    for r, c in head.tiles(len(ids)):
        logits, bent = head.logits(rows[r], c)
        hit, own = _inside(ids[r], c)
        token[r] = torch.where(hit, logits.gather(1, own)[:, 0], token[r])
        if bent is not None:
            bend[r] = torch.where(hit, bent.gather(1, own)[:, 0], bend[r])
        sums.add(r, logits, bent, head.columns(c))
        del logits, bent  # before the next tile is formed
    spread, watched = sums.mass.log(), sums.watched()
    means = [total / sums.mass[:, None] for total in sums.weights]
    found = []
    if means:
        found.append(head.scale * (bend[:, None] * operand(head.weight[ids], head.dtype) - means[0]))
    if len(means) == 2:
        found.append(head.scale * ((spread - watched)[:, None] * means[0] - means[1]))
    return token - sums.top - spread, torch.stack([sums.top, sums.mass]), watched, found


def _inside(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which tokens (R,) lie among these columns, and where (R, 1): without a count, which would wait for a GPU."""
    own = ids - columns.start
    width = columns.stop - columns.start
    return (own >= 0) & (own < width), own.clamp(0, width - 1)[:, None]


def _backward(
    hidden: Tensor, head: Head, ids: Tensor, mass: Tensor, upstream: Tensor, bonus: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The gradient by hidden (T, H); those by weight and bias are added to their `.grad`. bonus: the gradient by each
    entropy and the entropies (T,)."""
    rows = operand(hidden, head.dtype)
    share = -upstream / mass[1]
    found = torch.zeros_like(rows, dtype=torch.float32)
    by_each, by_both = BY_EACH.by(head.compiled), BY_BOTH.by(head.compiled)
    finish = FINISH.by(head.compiled)
    prepare_gradients(head)
    for r, c in head.tiles(len(ids)):
        logits, bent = head.logits(rows[r], c)
        hit, own = _inside(ids[r], c)
        by_token = torch.where(hit, upstream[r], 0.0)[:, None]
        if bonus is None:
            by_logit = by_each(logits, mass[0, r], share[r])
        else:
            lift = upstream[r] + bonus[0][r] * (bonus[1][r] - mass[1, r].log())
            by_logit = by_both(logits, mass[0, r], -mass[1, r], lift, bonus[0][r])
        by_logit.scatter_add_(1, own, by_token)
        factor = finish(by_logit, bent, head.scale, rows.dtype)
        found[r] += product(factor, head.columns(c))
        add_gradient(head, c, factor, by_logit, rows[r])
        del logits, bent, by_logit, factor
    return found.to(hidden.dtype)


def prepare_gradients(head: Head) -> None:
    """Give a head that is trained gradients to add to."""
    for parameter in (head.weight, head.bias):
        if parameter is not None and parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def add_gradient(head: Head, at: slice, factor: Tensor, by_logit: Tensor, rows: Tensor) -> None:
    """Add to the gradients of some columns: by_logit (R, C) of their logits before the scale, and the same rounded as
    an operand (R, C), meet rows (R, H)."""
    assert head.weight.grad is not None
    if factor.dtype == torch.float32 and head.weight.dtype == torch.float32:
        head.weight.grad[at].addmm_(factor.T, rows)
    else:
        head.weight.grad[at] += product(factor.T, rows).to(head.weight.dtype)
    if head.bias is not None and head.bias.requires_grad:
        assert head.bias.grad is not None
        head.bias.grad[at] += by_logit.sum(0).to(head.bias.dtype)
