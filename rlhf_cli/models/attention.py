"""Attention over segments: each attends to itself causally and to its parent whole, and to nothing else.

Registered with transformers under the name `rlhf_segments`. A forward that passes `segments=` computes one SDPA call a
segment, or all in one kernel (models/flex.py), so no (L x L) mask exists; any other forward (padded rows, decoding with
a cache) is transformers' own SDPA.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_cli.data.batch import Batch
from rlhf_cli.models import flex, sequence

NAME = "rlhf_segments"


@dataclass(frozen=True)
class Segments:
    """The segments of a packed row, one behind the other, and the masks of those that have a parent."""

    lengths: tuple[int, ...]
    parent: tuple[int | None, ...]
    """Which of them."""
    mask: tuple[Tensor | None, ...]  # (own, parent + own) bool
    bands: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """Masks of sliding windows, by (own, parent + own, window): made by the first layer that asks, for all of them."""

    def band(self, queries: int, keys: int, window: int, device: torch.device) -> Tensor:
        """Causal mask (queries, keys) of the last queries of a sequence, each seeing `window` keys, itself included."""
        which = (queries, keys, window)
        if which not in self.bands:
            ahead = keys - queries
            whole = torch.ones(queries, keys, dtype=torch.bool, device=device)
            self.bands[which] = whole.tril(ahead).triu(ahead - window + 1)
        return self.bands[which]


def plan(batch: Batch, *, one_kernel: bool = False) -> Segments | flex.Blocks:
    """The segments of a packed batch, in the order of the row; an only child right behind its parent continues it,
    which is the same and needs no mask."""
    lengths: list[int] = []
    parent: list[int | None] = []
    masks: list[Tensor | None] = []
    place: dict[int, int] = {}
    children = Counter(span.parent for span in batch.spans if span.end > span.start)
    for index, span in enumerate(batch.spans):
        length = span.end - span.start
        if not length:
            continue
        above = place.get(span.parent)
        if above is not None and children[span.parent] == 1 and above == len(lengths) - 1:
            lengths[above] += length
            continue
        place[index] = len(lengths)
        mask = None
        if above is not None and not one_kernel:
            seen = lengths[above]
            mask = torch.ones(length, seen + length, dtype=torch.bool, device=batch.ids.device).tril(seen)
        lengths.append(length)
        parent.append(above)
        masks.append(mask)
    if one_kernel:
        return flex.Blocks(tuple(lengths), tuple(parent), batch.ids.device)
    return Segments(tuple(lengths), tuple(parent), tuple(masks))


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, L, head size)
    key: Tensor,  # (1, key heads, L, head size)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | flex.Blocks | sequence.Dealt | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: output (1, L, heads, head size)."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if isinstance(segments, sequence.Dealt):
        shares = sequence.whole_heads(query, key, value, segments.length)
        own, _ = segment_attention(module, *shares, None, dropout, scaling, segments.segments, **kwargs)
        return sequence.own_tokens(own, segments.length), None
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"attention by segments knows no {unknown[0]}")
    window = kwargs.get("sliding_window")
    if isinstance(segments, flex.Blocks):
        return flex.attend(query, key, value, segments.mask(window), scaling).transpose(1, 2), None
    grouped, outputs = query.shape[1] != key.shape[1], []
    if grouped and query.is_cuda:  # there, with a mask, grouped heads are slow
        repeat, grouped = query.shape[1] // key.shape[1], False
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    queries, keys, values = (x.split(segments.lengths, dim=2) for x in (query, key, value))
    for i, (parent, whole) in enumerate(zip(segments.parent, segments.mask, strict=True)):
        k, v, mask = keys[i], values[i], whole
        if parent is not None:
            k, v = torch.cat([keys[parent], k], dim=2), torch.cat([values[parent], v], dim=2)
        if window is not None and k.shape[2] > window:
            mask = segments.band(segments.lengths[i], k.shape[2], window, query.device)
        seen = F.scaled_dot_product_attention(
            queries[i], k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
            enable_gqa=grouped,
        )  # fmt: skip
        outputs.append(seen.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def forward_arguments(batch: Batch, *, one_kernel: bool = False) -> dict[str, Any]:
    """Keyword arguments of a backbone's forward for this batch. one_kernel: segments by FlexAttention.

    A packed batch brings a 4-D placeholder as mask, which transformers hands through untouched, so that it does not
    build a dense one from the restarting positions.
    """
    common: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.position, "use_cache": False}
    if batch.packed:
        blank = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids.device)
        segments = plan(batch, one_kernel=one_kernel)
        if not batch.dealt:
            return common | {"attention_mask": blank, "segments": segments}
        length = batch.ids.shape[1]
        mine = {name: common[name][:, sequence.own(length)] for name in ("input_ids", "position_ids")}
        return common | mine | {"attention_mask": blank, "segments": sequence.Dealt(segments, length)}
    return common | {"attention_mask": (batch.segment >= 0).long()}
