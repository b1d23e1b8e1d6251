"""What processes that share the tokens of each row send one another (distributed.sequence_parallel). For `rlhf plan`.

G processes of a group, the first of which has l of the L tokens of a micro-batch's row. In each layer, before
attention, it sends what others want of its l queries, keys and values: (G - 1) / G of them, where keys and values are
repeated until G divides their heads. Behind attention it sends the answers of its share of the heads (1 / G) for the
L - l tokens of the others. The backward pass sends the gradients the other way; a layer that is recomputed sends all
of its forward once more. Last, what was read of the tokens (4 bytes a number) is put together for all, every process's
rows filled up to the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_cli.data.batch import collate, micro_batches
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import RecipeError
from rlhf_cli.models import sequence
from rlhf_cli.models.base import Base
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.plan_work import Data, Use
from rlhf_cli.train.lockstep import every_share

READ = 4
"""Bytes of a number that is read of a token."""


@dataclass(frozen=True)
class Rows:
    """Terms of the formula, of an update: means over the steps looked at."""

    members: int
    """G."""
    own: float
    """l, of all its micro-batches together."""
    tokens: float
    """L."""
    queries: int
    """Bytes of the queries of a token in all layers, and of its answers."""
    keys: int
    """Bytes of its keys and values in all layers, repeated where they are."""
    again: float
    """The part of the layers that are recomputed."""
    read: float
    """Bytes of what was read of the tokens."""

    @property
    def forward(self) -> float:
        """Bytes that a forward sends."""
        return self._sent(self.queries + self.keys, self.queries)

    @property
    def sent(self) -> float:
        """Bytes of an update: `distributed/exchanged_bytes`, of what is trained."""
        backward = self._sent(self.queries, self.queries + self.keys)
        return self.forward * (1 + self.again) + backward + self.read

    def _sent(self, own: float, of_others: float) -> float:
        return self.own * own * (self.members - 1) / self.members + (self.tokens - self.own) * of_others / self.members


def check(recipe: Recipe, world: int, outline: Base | None = None) -> None:
    """RecipeError or ModelError where the run would be refused with so many processes."""
    size = recipe.distributed.sequence_parallel
    if world % size:
        raise RecipeError(f"{size} processes are to share each sequence, and {world} is no multiple of that",
                          "--world-size", f"give one, for instance --world-size {size}")  # fmt: skip
    if outline is not None:
        sequence.check_heads(outline.model.config, outline.source, size)


def rows(
    recipe: Recipe, data: Data, use: Use, outline: Base, budget: int, recomputed: float, world: int
) -> Rows | None:
    """The terms for a recipe; None where no row is shared."""
    members = recipe.distributed.sequence_parallel
    if members == 1:
        return None
    sums = torch.zeros(3, dtype=torch.float64)
    for samples in data.deals:
        of_groups = []
        for share in every_share(samples, packed=True, count=world // members):
            chosen = [samples[i] for i in share]
            groups = micro_batches(chosen, budget, packed=True)
            each = [_micro_batch([chosen[i] for i in group], use, members) for group in groups]
            of_groups.append(torch.tensor(each, dtype=torch.float64).reshape(-1, 3).sum(0))
        sums += max(of_groups, key=lambda one: float(one[1]))
    tokens, own, read = (sums / len(data.deals)).tolist()
    queries, keys = _of_a_token(outline, members)
    return Rows(members, own, tokens, queries, keys, recomputed, READ * use.columns * read)


def _micro_batch(samples: Sequence[Sample], use: Use, members: int) -> tuple[int, int, int]:
    """Its tokens, those of the first process, and of the places that are read the most of one process."""
    batch = collate(samples, packed=True)
    places = {"predictors": batch.predictors, "targets": batch.targets, "last": batch.last}[use.at]
    parts = sequence.parts(batch.ids.shape[1], members)
    owners = torch.bucketize(places, torch.tensor(parts).cumsum(0), right=True)
    return sum(parts), parts[0], int(torch.bincount(owners, minlength=members).max())


def _of_a_token(outline: Base, members: int) -> tuple[int, int]:
    """Bytes of its queries in all layers, and of its keys and values as they are sent."""
    config: Any = outline.model.config.get_text_config()
    heads = config.num_attention_heads
    few = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    each = config.num_hidden_layers * size * outline.dtype.itemsize
    return heads * each, 2 * sequence.repeated(few, heads, members) * each
