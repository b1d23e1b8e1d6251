"""The forwards of a decode loop: the prompts whole, then a token a row, with the keys and values so far."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.models.base import Base
from rlhf_cli.rollouts.cache import Cache
from rlhf_cli.rollouts.lean import Lean, lean


class Forward:
    """R rows, W columns; the mask (R, slots) says which of all slots hold a token, or will."""

    def __init__(self, base: Base, mask: Tensor) -> None:
        self.base, self.mask, self.width = base, mask, 0
        self.cache = Cache(base, mask.shape[1])
        self.lean: Lean | None = None
        self.unseen: Tensor | None = None
        """(R, 1, 1, slots) to be added to the scores, for the lean step; None where every slot holds a token."""

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """tokens and position (R, W) the first time, then the new column (R, 1), or all columns where nothing can be
        kept -> last hidden states (R, H)."""
        first = self.width == 0
        self.width = self.width + tokens.shape[1] if self.cache.keys is not None else tokens.shape[1]
        if self.lean is not None:
            unseen = None if self.unseen is None else self.unseen[..., : self.width]
            return self.lean.step(tokens[:, 0], position, unseen, self.cache.layers)
        states: Tensor = self.base.model.base_model(
            input_ids=tokens, attention_mask=self.mask[:, : self.width], position_ids=position,
            **self.cache.arguments(),
        ).last_hidden_state  # fmt: skip
        if first and self.cache.keys is not None:
            self._start()
        return states[:, -1]

    def _start(self) -> None:
        self.lean = lean(self.base, self.cache.layers)
        if self.lean is not None and not bool(self.mask.all()):
            self.unseen = torch.zeros(self.mask.shape, dtype=self.cache.layers[0].dtype, device=self.mask.device)
            self.unseen = self.unseen.masked_fill_(self.mask == 0, -torch.inf)[:, None, None]

    def repeat(self, count: int) -> None:
        """Each row `count` times."""
        self.cache.repeat(count)
        self._rows(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(count))

    def move(self, source: Tensor, target: Tensor, order: Tensor) -> None:
        """Rows `source` over rows `target`, so that the rows are now those of `order`, in that order."""
        self.cache.move(source, target, order)
        self._rows(order)

    def _rows(self, order: Tensor) -> None:
        self.mask = self.mask[order]
        if self.unseen is not None:
            self.unseen = self.unseen[order]

    def next(self, before: Tensor, new: Tensor) -> Tensor:
        """What the next forward reads: the new column (R, 1), or all columns."""
        return self.cache.next(before, new)
