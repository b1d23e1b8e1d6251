"""Attention over segments: each attends to itself causally and to its parent whole, and to nothing else.

Registered with transformers under the name `rlhf_segments`. A forward that passes `segments=` computes one SDPA call a
segment, so no (L x L) mask exists; any other forward (padded rows, decoding with a cache) is transformers' own SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_cli.data.batch import Batch

NAME = "rlhf_segments"


@dataclass(frozen=True)
class Segments:
    """Where each segment of a packed row lies, and the mask of those that have a parent."""

    own: tuple[slice, ...]
    parent: tuple[slice | None, ...]
    mask: tuple[Tensor | None, ...]  # (own, parent + own) bool


def plan(batch: Batch) -> Segments:
    """The segments of a packed batch, in the order of the row."""
    own: list[slice] = []
    parent: list[slice | None] = []
    masks: list[Tensor | None] = []
    for span in batch.spans:
        if span.end == span.start:
            continue
        own.append(slice(span.start, span.end))
        if span.parent < 0:
            parent.append(None)
            masks.append(None)
            continue
        above = batch.spans[span.parent]
        length, seen = span.end - span.start, above.end - above.start
        parent.append(slice(above.start, above.end))
        masks.append(torch.ones(length, seen + length, dtype=torch.bool, device=batch.ids.device).tril(seen))
    return Segments(tuple(own), tuple(parent), tuple(masks))


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, heads, L, head size)
    key: Tensor,  # (1, key heads, L, head size)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: output (1, L, heads, head size)."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"attention by segments knows no {unknown[0]}")
    window, outputs = kwargs.get("sliding_window"), []
    for own, parent, whole in zip(segments.own, segments.parent, segments.mask, strict=True):
        k, v = key[:, :, own], value[:, :, own]
        if parent is not None:
            k, v = torch.cat([key[:, :, parent], k], dim=2), torch.cat([value[:, :, parent], v], dim=2)
        mask = whole
        if window is not None and k.shape[2] > window:
            mask = _band(own.stop - own.start, k.shape[2], window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own], k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Causal mask (queries, keys) of the last queries of a sequence, each seeing `window` keys, itself included."""
    ahead = keys - queries
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(ahead).triu(ahead - window + 1)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def forward_arguments(batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a backbone's forward for this batch.

    A packed batch brings a 4-D placeholder as mask, which transformers hands through untouched, so that it does not
    build a dense one from the restarting positions.
    """
    common = {"input_ids": batch.ids, "position_ids": batch.position, "use_cache": False}
    if batch.packed:
        blank = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids.device)
        return common | {"attention_mask": blank, "segments": plan(batch)}
    return common | {"attention_mask": (batch.segment >= 0).long()}
