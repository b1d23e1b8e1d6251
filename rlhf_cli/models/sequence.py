"""One row of tokens over several processes: each of a group computes a part of them (sequence parallelism).

All of a layer but its attention goes token by token. Attention goes head by head over whole sequences: before it each
process of a group gives the others its tokens of their share of the heads, behind it the other way round (all-to-all:
DeepSpeed-Ulysses, arXiv:2309.14509). So the activations of a row are shared out, and no number changes but by rounding.

What is read of the tokens (log-probabilities, values, scores) is computed where they are and put together for all of
the group, who then form the same loss; its gradient goes back to each one's own tokens. Added up over all processes, as
gradients are anyway, that is the gradient of the step.

L tokens of a row, l of them here; G processes of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models import processes, traffic

WHERE = "distributed.sequence_parallel"
_size: int = 1
_group: Any = None


def ask(wanted: int) -> None:
    """How many processes share each row from here on; all ask together. Raises RecipeError when their number is no
    multiple of that."""
    global _size, _group  # noqa: PLW0603
    _size, _group = 1, None
    if wanted == 1:
        return
    total = processes.count()
    if total % wanted:
        words = "there is one process" if total == 1 else f"there are {total} processes"
        raise RecipeError(f"{wanted} processes are to share each sequence, and {words}", WHERE,
                          f"start {wanted} or a multiple of it with torchrun, or lower it")  # fmt: skip
    _group = processes.own_of([range(first, first + wanted) for first in range(0, total, wanted)])
    _size = wanted


# --- who -------------------------------------------------------------------------------------------------------------


def size() -> int:
    """G."""
    return _size if processes.count() > 1 else 1


def groups() -> int:
    """How many groups share the samples of a step."""
    return processes.count() // size()


def group() -> int:
    """Which of them this process is of."""
    return processes.rank() // size() if processes.count() > 1 else 0


def member() -> int:
    """Which of its group this process is."""
    return processes.rank() % size() if processes.count() > 1 else 0


def parts(length: int, among: int | None = None) -> list[int]:
    """How many tokens of a row each process of the group has (of so many), one part behind the other."""
    count = size() if among is None else among
    return [length // count + (i < length % count) for i in range(count)]


def own(length: int) -> slice:
    """Those of this process."""
    first = sum(parts(length)[: member()])
    return slice(first, first + parts(length)[member()])


# --- attention -------------------------------------------------------------------------------------------------------


class Dealt(NamedTuple):
    """The segments of a row of which each process has a part."""

    segments: Any
    length: int
    """L."""


def whole_heads(query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """query (1, heads, l, D), key and value (1, key heads, l, D) -> the same of all L tokens and a share of the heads:
    (1, heads / G, L, D)."""
    repeat = repeated(key.shape[1], query.shape[1], size()) // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    # attention computes in the dtype of the values, whatever positions made of the others
    query, key, value = (_Exchange.apply(x.to(value.dtype), length, True) for x in (query, key, value))
    return query, key, value


def repeated(few: int, heads: int, among: int) -> int:
    """How many key heads there must be, so that each of so many processes gets a whole number of them."""
    return next(few * n for n in range(1, heads + 1) if few * n % among == 0)


def own_tokens(out: Tensor, length: int) -> Tensor:
    """Attention of a share of the heads (1, L, heads / G, D) -> of all heads, own tokens: (1, l, heads, D)."""
    found: Tensor = _Exchange.apply(out.transpose(1, 2), length, False)
    return found.transpose(1, 2)


class _Exchange(torch.autograd.Function):
    """x, L, forth -> (1, heads, l, D) to (1, heads / G, L, D), or back; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int, forth: bool) -> Tensor:
        ctx.length, ctx.forth = length, forth
        return _exchange(x, length, forth)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(upstream, ctx.length, not ctx.forth), None, None


def _exchange(x: Tensor, length: int, forth: bool) -> Tensor:
    import torch.distributed as dist

    heads, depth, each = x.shape[1], x.shape[3], parts(length)
    cut = x[0].split(heads // size() if forth else each, dim=0 if forth else 1)
    share, tokens = (heads // size(), each[member()]) if forth else (heads, each[member()])
    sent = torch.cat([part.reshape(-1) for part in cut])
    counts = [share * n * depth for n in each] if forth else [share * tokens * depth for _ in each]
    found = sent.new_empty(sum(counts))
    dist.all_to_all_single(found, sent, counts, [part.numel() for part in cut], group=_group)
    traffic.add("exchanged", sent.nbytes - cut[member()].nbytes)
    shapes = [(share, n, depth) for n in each] if forth else [(share, tokens, depth) for _ in each]
    blocks = [part.view(shape) for part, shape in zip(found.split(counts), shapes, strict=True)]
    return torch.cat(blocks, dim=1 if forth else 0)[None]


# --- what is read ----------------------------------------------------------------------------------------------------


def read(hidden: Tensor, at: Tensor, length: int, function: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """function(states, which) (n, ...) of the states at some places of the row, put together in their order: (T, ...).

    hidden: (l, H) of this process; at: (T,) places among L. function gets states (n, H) of those that lie here, and
    which of `at` they are (n,).
    """
    bounds = torch.tensor(parts(length), device=at.device).cumsum(0)
    owner = torch.bucketize(at, bounds, right=True)  # (T,)
    order = owner.argsort(stable=True)
    here = (owner == member()).nonzero().squeeze(1)
    own_rows = function(hidden[at[here] - own(length).start], here)
    rows: Tensor = _Gather.apply(own_rows, torch.bincount(owner, minlength=size()).tolist())
    return rows[order.argsort()]


class _Gather(torch.autograd.Function):
    """Rows (n, ...) and how many each process of the group has -> those of all: each goes on alike with them, so the
    gradient of the own ones is there whole."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        import torch.distributed as dist

        ctx.first, ctx.count = sum(counts[: member()]), len(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded, group=_group)
        traffic.add("exchanged", padded.nbytes)
        return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[ctx.first : ctx.first + ctx.count], None


def check(config: Any, source: str, *, packed: bool) -> None:
    """ModelError unless rows of a model that is trained can be shared: each process would add the gradient of them
    whole. packed: whether its rows are."""
    if size() == 1:
        return
    check_heads(config, source, size())
    if not packed:
        kind = type(config).__name__.removesuffix("Config")
        raise ModelError(f"{kind} cannot share sequences out to several processes", source, f"set {WHERE}: 1")


def check_heads(config: Any, source: str, among: int) -> None:
    """ModelError unless the heads can be shared out among so many."""
    heads = int(getattr(config.get_text_config(), "num_attention_heads", 0))
    if among > 1 and heads % among:
        raise ModelError(f"{among} processes cannot share {heads} attention heads evenly", source, f"lower {WHERE}")
