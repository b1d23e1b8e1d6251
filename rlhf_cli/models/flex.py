"""Attention over segments as one kernel: PyTorch's FlexAttention, told by a mask of blocks what need not be computed.

A packed row of many short segments costs one call a segment otherwise, and a GPU waits for each. Which blocks of
queries meet which blocks of keys follows from where the segments lie; inside a block that is met in part, the rule
decides token by token. No (L x L) mask exists. FlexAttention (arXiv:2412.05496) has no backward pass on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block."""


@dataclass(frozen=True)
class Blocks:
    """The segments of a packed row of L tokens, one behind the other."""

    lengths: tuple[int, ...]
    parent: tuple[int | None, ...]
    """Which of them."""
    device: torch.device
    masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """By the window of the layer: made by the first that asks, for all of them."""

    def mask(self, window: int | None) -> BlockMask:
        """What is computed. window: how many tokens a query sees of its sequence, itself included; None: all."""
        if window not in self.masks:
            self.masks[window] = self._make(window)
        return self.masks[window]

    def _make(self, window: int | None) -> BlockMask:
        from torch.nn.attention.flex_attention import BlockMask

        segment, above, position = (tensor.to(self.device) for tensor in self.tokens())

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (segment[query] == segment[key]) & (query >= key)
            both: Tensor = own | (above[query] == segment[key])
            return both if window is None else both & (position[query] - position[key] < window)

        some, full = self.met()
        if window is not None:
            full = torch.zeros_like(full)
        length = sum(self.lengths)
        return BlockMask.from_kv_blocks(
            *_listed(some & ~full, self.device), *_listed(full, self.device), BLOCK_SIZE=BLOCK, mask_mod=seen,
            seq_lengths=(length, length),
        )  # fmt: skip

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token: its segment, that one's parent (-1 for none), and its position in the sequence: (L,) each."""
        counts = torch.tensor(self.lengths)
        parents = torch.tensor([-1 if p is None else p for p in self.parent])
        starts = counts.cumsum(0) - counts
        before = torch.where(parents < 0, 0, counts[parents.clamp(min=0)])
        segment = torch.repeat_interleave(torch.arange(len(counts)), counts)
        position = torch.arange(len(segment)) - starts[segment] + before[segment]
        return segment, parents[segment], position

    def met(self) -> tuple[Tensor, Tensor]:
        """Which blocks of queries (rows) meet which of keys (columns) at all, and which whole: (N, N) bool each."""
        segment, above, _ = self.tokens()
        count = -(-len(segment) // BLOCK)
        first, last = segment[::BLOCK], segment[torch.arange(1, count + 1).mul(BLOCK).clamp(max=len(segment)) - 1]
        some = (last[None, :] >= first[:, None]).tril()
        bounds = torch.tensor((0, *self.lengths)).cumsum(0).tolist()
        for own, parent in enumerate(self.parent):
            if parent is not None:
                rows, columns = (slice(bounds[s] // BLOCK, -(-bounds[s + 1] // BLOCK)) for s in (own, parent))
                some[rows, columns] = True
        pure = (first == last) & (torch.arange(1, count + 1) * BLOCK <= len(segment))
        same = (first[:, None] == first[None, :]).tril(-1)
        return some, (same | (above[::BLOCK, None] == first[None, :])) & pure[:, None] & pure[None, :]


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, N) bool -> how many columns of each row (1, 1, N), and which, in order, before the others (1, 1, N, N)."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None].to(device), order.int()[None, None].to(device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """query (1, heads, L, head size), key and value (1, key heads, L, head size) -> (1, heads, L, head size)."""
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = _kernel(query.is_cuda)(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out


@cache
def _kernel(compiled: bool) -> Callable[..., Any]:
    """FlexAttention; as it stands it forms all scores, which is for tests on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Any = flex_attention
    return torch.compile(kernel, dynamic=True) if compiled else kernel  # type: ignore[no-any-return]
