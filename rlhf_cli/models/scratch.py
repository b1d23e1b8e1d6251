"""What computing over the vocabulary takes for a moment, known from the tiles and blocks of objectives/."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_cli.objectives.head import TILE
from rlhf_cli.objectives.head_known import WIDTH, block
from rlhf_cli.objectives.logprob import CHUNK_ELEMENTS, Statistics

CHUNK_COPIES = 6
"""Tensors of a chunk's size at once where logits are formed by plain operations and their gradients with them."""
TILES = {"entropy": 2, "bonus": 2}
"""Of a tile's size at once, by what is asked for besides the log-probability; for anything else 1."""
BONUS_TILES = 3
"""The same of a head that is trained through an entropy bonus."""
DRAW_COPIES = 3
"""Of the logits of a decode step: as they come, by the temperature in float32, their softmax."""


@dataclass(frozen=True)
class HeadUse:
    """How a step uses the language head; `statistics` None: not at all."""

    statistics: Statistics | None
    trained: bool
    known: bool = False
    """Whether the gradient of each log-probability is known beforehand."""


def head_bytes(use: HeadUse, scored: int, vocabulary: int, hidden: int, device: str, dtype: torch.dtype) -> int:
    """Bytes at most while the log-probabilities of so many tokens, or their gradients, are formed."""
    if use.statistics is None:
        return 0
    if use.statistics == "usual":
        return CHUNK_COPIES * 4 * vocabulary * min(scored, max(1, CHUNK_ELEMENTS // vocabulary))
    wide = dtype == torch.float32
    copy = 0 if wide else dtype.itemsize if device == "cuda" else 4
    if use.known and use.trained and use.statistics in ("none", "entropy"):
        rows = min(scored, block(vocabulary, device))
        return rows * ((4 + copy) * vocabulary + 4 * min(WIDTH, vocabulary)) + copy * vocabulary * hidden
    height, width = TILE.get(device, TILE["cpu"])
    rows, columns = min(height, scored), min(width, vocabulary)
    tiles = BONUS_TILES if use.statistics == "bonus" and use.trained else TILES.get(use.statistics, 1)
    return rows * columns * (4 * tiles + copy) + copy * columns * hidden


def draw_bytes(rows: int, vocabulary: int) -> int:
    """Of a decode step."""
    return 4 * DRAW_COPIES * rows * vocabulary
