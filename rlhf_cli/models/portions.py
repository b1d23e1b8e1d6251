"""Micro-batches like those of a run, cut down to what is quickly computed. For `rlhf plan`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.data.tokens import Completion, Sample

SHORT = 16
"""Tokens of an example in the smaller of the two micro-batches, at least where it has twice as many."""


def portions(samples: list[Sample], tokens: int, vocabulary: int, *, packed: bool) -> tuple[Batch, Batch]:
    """Two micro-batches like that of these samples with about so many tokens, and half of them, and other ids. Of many
    samples some are taken, so that none is cut to a few tokens."""
    mean = collate(samples, packed=packed).ids.numel() / len(samples)
    count = max(1, min(len(samples), math.ceil(tokens / min(mean, 2 * SHORT))))
    some = [samples[i * len(samples) // count] for i in range(count)]
    slots = collate(some, packed=packed).ids.numel()
    factor = min(1.0, tokens / slots)
    small, large = (scaled(some, f, vocabulary, packed=packed) for f in (factor / 2, factor))
    return small, large


def scaled(samples: list[Sample], factor: float, vocabulary: int, *, packed: bool) -> Batch:
    """A micro-batch like that of these samples, with `factor` of their tokens and other ids."""

    def cut(ids: np.ndarray) -> np.ndarray:
        return (ids[: max(1, round(len(ids) * factor))] % vocabulary).astype(np.int32) if len(ids) else ids

    made = []
    for sample in samples:
        completions = tuple(_cut(c, len(cut(c.ids)), vocabulary) for c in sample.completions)
        made.append(replace(sample, prompt=cut(sample.prompt), completions=completions))
    return collate(made, packed=packed)


def _cut(completion: Completion, length: int, vocabulary: int) -> Completion:
    scored = completion.scored[:length].copy()
    if len(scored) and not scored.any():
        scored[-1] = True
    ids = (completion.ids[:length] % vocabulary).astype(np.int32)
    labels = None if completion.labels is None else np.zeros(int(scored.sum()), dtype=completion.labels.dtype)
    return replace(completion, ids=ids, scored=scored, labels=labels)
