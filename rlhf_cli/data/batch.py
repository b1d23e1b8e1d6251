"""Token segments with known parents: the one batch type of every stage.

R rows, L slots a row, S segments, N sequences (completions), B examples, T scored tokens. A token attends to its own
segment causally and to its parent segment whole. Two layouts give the same numbers:

- packed: everything in one row; a prompt is one segment and each of its completions a child of it, also those of other
  samples with the same prompt;
- padded: a row a sequence, prompt and completion in one segment, the right end padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.tokens import Completion, Sample

NOTHING = Completion(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))
"""Stands for the completion of a sample that has none."""


class Span(NamedTuple):
    """Where a segment lies."""

    row: int
    start: int
    end: int
    parent: int
    """Index of the parent span, -1 for none."""


@dataclass(frozen=True)
class Batch:
    """What is in memory at once."""

    ids: Tensor  # (R, L) int64; 0 where there is no token
    position: Tensor  # (R, L) int64; a completion goes on where its prompt ended
    segment: Tensor  # (R, L) int64 index into `spans`, -1 where there is no token
    predictor: Tensor  # (R, L) int64 column whose hidden state predicts this token, -1 for none
    scored: Tensor  # (R, L) bool, tokens an objective counts
    sequence: Tensor  # (R, L) int64 sequence of a scored token, -1 elsewhere
    last: Tensor  # (N,) int64 flat index of the last token of each sequence
    example: Tensor  # (N,) int64 example of each sequence
    numbers: dict[str, Tensor]  # (B,) each
    gold: Tensor  # (N,) float64 score of each sequence in the data, nan where unknown
    labels: Tensor  # (T,) float64 label of each scored token, in the order of `targets`; nan where unknown
    spans: tuple[Span, ...]
    where: tuple[str, ...]
    """Source of each of the B examples."""
    packed: bool
    dealt: bool = False
    """Whether the tokens of the row are shared out to the processes of a group (models/sequence.py)."""

    @property
    def targets(self) -> Tensor:
        """Flat indices of the scored tokens, sequence by sequence: (T,)."""
        return self.scored.view(-1).nonzero().squeeze(1)

    @property
    def predictors(self) -> Tensor:
        """Flat indices of the hidden states that predict the scored tokens: (T,)."""
        row = torch.arange(len(self.ids), device=self.ids.device)[:, None] * self.ids.shape[1]
        return (self.predictor + row).view(-1)[self.targets]

    @property
    def owners(self) -> Tensor:
        """Sequence of each scored token, ascending: (T,)."""
        return self.sequence.view(-1)[self.targets]

    @property
    def sequences(self) -> int:
        """N."""
        return len(self.last)

    @property
    def examples(self) -> int:
        """B."""
        return len(self.where)

    @property
    def tokens(self) -> int:
        """Real tokens, padding excluded."""
        return sum(span.end - span.start for span in self.spans)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, numbers={k: v.to(device) for k, v in self.numbers.items()})

    def with_numbers(self, **numbers: Tensor) -> Batch:
        """The same batch with further numbers."""
        return replace(self, numbers=self.numbers | numbers)


class _Rows:
    """Grows the rows of a batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, list[np.ndarray]]] = []
        self.spans: list[Span] = []
        self.filled: list[int] = []
        self.last: list[tuple[int, int]] = []

    def row(self) -> int:
        self.rows.append({k: [] for k in ("ids", "position", "segment", "predictor", "scored", "sequence", "label")})
        self.filled.append(0)
        return len(self.rows) - 1

    def append(
        self,
        row: int,
        ids: np.ndarray,  # (n,)
        scored: np.ndarray,  # (n,) bool
        labels: np.ndarray | None = None,  # (scored tokens,)
        *,
        parent: int = -1,
        first_position: int = 0,
        sequence: int = -1,
    ) -> int:
        """A segment at the end of a row; the index of its span."""
        start, n, index = self.filled[row], len(ids), len(self.spans)
        predictor = np.arange(start - 1, start + n - 1)
        if n:
            predictor[0] = self.spans[parent].end - 1 if parent >= 0 else -1
        label = np.full(n, np.nan)
        if labels is not None:
            label[scored] = labels
        columns = {
            "ids": ids,
            "position": np.arange(first_position, first_position + n),
            "segment": np.full(n, index),
            "predictor": predictor,
            "scored": scored,
            "sequence": np.where(scored, sequence, -1),
            "label": label,
        }
        for name, values in columns.items():
            self.rows[row][name].append(values)
        self.spans.append(Span(row, start, start + n, parent))
        self.filled[row] += n
        if sequence >= 0:
            self.last.append((row, self.filled[row] - 1))
        return index

    def tensor(self, name: str, fill: float, dtype: torch.dtype) -> Tensor:
        """(R, L), padded on the right with `fill`."""
        out = torch.full((len(self.rows), max(self.filled, default=0)), fill, dtype=dtype)
        for i, row in enumerate(self.rows):
            if self.filled[i]:
                out[i, : self.filled[i]] = torch.from_numpy(np.concatenate(row[name])).to(dtype)
        return out


def collate(samples: Sequence[Sample], *, packed: bool) -> Batch:
    """Samples -> one batch. Sequences are numbered sample by sample, completion by completion; a sample without
    completions is a sequence by itself, nothing of it scored."""
    rows, sequence, example = _Rows(), 0, []
    prompts: dict[bytes, int] = {}
    shared = rows.row() if packed else -1
    for b, sample in enumerate(samples):
        plain = np.zeros(len(sample.prompt), dtype=bool)
        if packed and sample.completions and len(sample.prompt):
            content = sample.prompt.tobytes()
            if content not in prompts:
                prompts[content] = rows.append(shared, sample.prompt, plain)
            for c in sample.completions:
                rows.append(
                    shared, c.ids, c.scored, c.labels,
                    parent=prompts[content], first_position=len(sample.prompt), sequence=sequence,
                )  # fmt: skip
                sequence += 1
        else:
            for c in sample.completions or (NOTHING,):
                whole = np.concatenate([sample.prompt, c.ids]), np.concatenate([plain, c.scored])
                rows.append(shared if packed else rows.row(), *whole, c.labels, sequence=sequence)
                sequence += 1
        example += [b] * max(1, len(sample.completions))
    names = set.intersection(*(set(s.numbers) for s in samples)) if samples else set()
    ids, scored = rows.tensor("ids", 0, torch.int64), rows.tensor("scored", 0, torch.bool)
    return Batch(
        ids=ids,
        position=rows.tensor("position", 0, torch.int64),
        segment=rows.tensor("segment", -1, torch.int64),
        predictor=rows.tensor("predictor", -1, torch.int64),
        scored=scored,
        sequence=rows.tensor("sequence", -1, torch.int64),
        last=torch.tensor([row * ids.shape[1] + column for row, column in rows.last], dtype=torch.int64),
        example=torch.tensor(example, dtype=torch.int64),
        numbers={k: torch.tensor([s.numbers[k] for s in samples], dtype=torch.float64) for k in sorted(names)},
        gold=torch.tensor([c.gold for s in samples for c in s.completions or (NOTHING,)], dtype=torch.float64),
        labels=rows.tensor("label", torch.nan, torch.float64)[scored],
        spans=tuple(rows.spans),
        where=tuple(s.where for s in samples),
        packed=packed,
    )


def size(sample: Sample, *, packed: bool) -> int:
    """Tokens a sample takes in memory (padding of its row to the longest in the micro-batch not counted)."""
    completions = sum(len(c.ids) for c in sample.completions)
    copies = 1 if packed else max(1, len(sample.completions))
    return len(sample.prompt) * copies + completions


def micro_batches(samples: Sequence[Sample], budget: int, *, packed: bool) -> list[list[int]]:
    """Indices of the samples of one step, grouped so that each group fits `budget` tokens, similar lengths together;
    packed, those of one prompt come together, which is counted once.

    A sample larger than the budget goes alone. Padded layouts count padding. Deterministic in its arguments.
    """
    sizes = [size(sample, packed=packed) for sample in samples]
    return _packed(samples, sizes, budget) if packed else _padded(samples, sizes, budget)


def _packed(samples: Sequence[Sample], sizes: Sequence[int], budget: int) -> list[list[int]]:
    families: dict[bytes | int, list[int]] = {}
    for i in sorted(range(len(samples)), key=lambda i: (-sizes[i], i)):
        alone = not samples[i].completions or not len(samples[i].prompt)
        families.setdefault(i if alone else samples[i].prompt.tobytes(), []).append(i)
    groups: list[list[int]] = []
    used = 0
    for family in families.values():
        prompt, inside = len(samples[family[0]].prompt), False
        for i in family:
            cost = sizes[i] - prompt * inside
            if not groups or used + cost > budget:
                groups.append([])
                used, cost = 0, sizes[i]
            groups[-1].append(i)
            used, inside = used + cost, True
    return [sorted(group) for group in groups]


def _padded(samples: Sequence[Sample], sizes: Sequence[int], budget: int) -> list[list[int]]:
    groups: list[list[int]] = []
    widest, height = 0, 0
    for i in sorted(range(len(samples)), key=lambda i: (-sizes[i], i)):
        longest = len(samples[i].prompt) + max((len(c.ids) for c in samples[i].completions), default=0)
        count = max(1, len(samples[i].completions))
        if not groups or max(widest, longest) * (height + count) > budget:
            groups.append([])
            widest, height = 0, 0
        groups[-1].append(i)
        widest, height = max(widest, longest), height + count
    return [sorted(group) for group in groups]
