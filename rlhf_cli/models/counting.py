"""Bytes that tensors hold at most while something is computed: counted storage by storage, alike on every device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _product(x: Tensor, codes: Tensor, shape: Sequence[int], *_: Any, **__: Any) -> Tensor:
    return x.new_zeros(*x.shape[:-1], shape[0])


def _widened(codes: Tensor, scales: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return codes.new_zeros(shape, dtype=dtype)


HOLLOW = {"bitsandbytes::gemm_4bit": _product, "bitsandbytes::dequantize_4bit": _widened}
"""Operations that take long on a CPU, and what has the size of their results: only that is looked at."""


class Ledger(TorchDispatchMode):
    """While it is on, every storage that an operation makes is counted until it is freed. What was there before is not,
    and neither is scratch memory inside an operation. The results of some operations (HOLLOW) are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.peaks: list[int] = []
        """Of the stretches before the present one."""
        self._known: dict[int, int] = {}

    def turn(self) -> None:
        """A stretch ends here, and the next begins with what is alive."""
        self.peaks.append(self.peak)
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = HOLLOW.get(func._schema.name, func)(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), before)
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in before:
            return
        self._known[key] = storage.nbytes()
        self.live += self._known[key]
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


class Peaks(NamedTuple):
    """Bytes of a forward and backward, counted in three places."""

    kept: int
    """When the forward is done: what it keeps for the backward."""
    start: int
    """At most, up to the moment when the gradient reaches the embeddings."""
    tail: int
    """From then on; 0 where it never does."""


def peaks(function: Callable[[], Tensor], backward: Callable[[Tensor], None], embedding: nn.Module) -> Peaks:
    """Of `backward(function())`."""
    ledger = Ledger()

    def arrived(gradient: Tensor) -> Tensor:
        ledger.turn()
        return gradient

    def watch(module: nn.Module, arguments: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(arrived)

    handle = embedding.register_forward_hook(watch)
    try:
        with ledger:
            loss = function()
            kept = ledger.live
            backward(loss)
    finally:
        handle.remove()
    start, tail = (ledger.peaks[0], ledger.peak) if ledger.peaks else (ledger.peak, 0)
    return Peaks(kept, start, tail)
