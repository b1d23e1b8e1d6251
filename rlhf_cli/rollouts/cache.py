"""Keys and values of the rows of a decode loop: room to grow in place, rows that leave without moving the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_cli.models.base import Base

SPARE = 64
"""Slots added when a buffer is full, and a quarter of its length more; never more than all rows can fill."""


class Growing(DynamicLayer):
    """One layer's keys and values as the front part of larger buffers: a new column is written, not concatenated.

    R rows, S slots; buffers (R, heads, S, head size); `most` slots can be needed.
    """

    def __init__(self, is_sliding: bool, most: int) -> None:
        super().__init__()
        self.is_sliding, self.most = is_sliding, most
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; all keys and values so far."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self.room_keys, self.room_values = key_states, value_states
        elif self.length > self.room_keys.shape[-2]:
            self.room_keys, self.room_values = self._wider(self.room_keys), self._wider(self.room_values)
        if start:
            self.room_keys[:, :, start : self.length] = key_states
            self.room_values[:, :, start : self.length] = value_states
        self.keys, self.values = self.room_keys[:, :, : self.length], self.room_values[:, :, : self.length]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self.length

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, with room for more slots."""
        self.room_keys, self.room_values = self._wider(self.room_keys, repeats), self._wider(self.room_values, repeats)

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Rows `source` over rows `target`; then only the first `rows` are left."""
        for buffer in (self.room_keys, self.room_values):
            buffer[target, :, : self.length] = buffer[source, :, : self.length]
        self.room_keys, self.room_values = self.room_keys[:rows], self.room_values[:rows]

    def _wider(self, buffer: Tensor, repeats: int = 1) -> Tensor:
        rows, heads, slots, size = buffer.shape
        wide = max(slots, min(slots + slots // 4 + SPARE, self.most))
        room = buffer.new_empty(rows, repeats, heads, wide, size)
        room[:, :, :, :slots] = buffer[:, None]
        return room.view(rows * repeats, heads, -1, size)


class Cache:
    """Keys and values of the rows so far. Where an architecture keeps something else (a state of a recurrence or a
    convolution), whose rows cannot be repeated and dropped, there is none, and every step reads the rows anew."""

    def __init__(self, base: Base, slots: int) -> None:
        cache = DynamicCache(config=base.model.config)
        cache.layers = [_growing(layer, slots) for layer in cache.layers]
        wanted = ("batch_repeat_interleave", "batch_select_indices")
        whole = all(hasattr(layer, name) for layer in cache.layers for name in wanted)
        self.keys: DynamicCache | None = cache if whole else None

    @property
    def layers(self) -> Sequence[Any]:
        """What each layer keeps."""
        return () if self.keys is None else self.keys.layers

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a forward."""
        return {"use_cache": False} if self.keys is None else {"past_key_values": self.keys, "use_cache": True}

    def repeat(self, count: int) -> None:
        """Each row `count` times."""
        if self.keys is not None:
            self.keys.batch_repeat_interleave(count)

    def move(self, source: Tensor, target: Tensor, order: Tensor) -> None:
        """Rows `source` over rows `target`, so that the rows are now those of `order`, in that order."""
        for layer in self.layers:
            if isinstance(layer, Growing):
                layer.move(source, target, len(order))
            else:
                layer.batch_select_indices(order)

    def next(self, before: Tensor, new: Tensor) -> Tensor:
        """What the next forward reads: the new column (B, 1), or all columns."""
        return new if self.keys is not None else torch.cat([before, new], dim=1)


def _growing(layer: Any, slots: int) -> Any:
    """The layer, or one that grows in place where it would hold all of these slots."""
    if type(layer) is DynamicLayer:
        return Growing(False, slots)
    if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= slots:
        return Growing(True, slots)
    return layer
