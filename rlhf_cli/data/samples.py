"""Many samples in a few flat arrays, which may lie in a file: a sample is a view, made when it is asked for.

n samples, S segments (a prompt and its completions, sample by sample), C = S - n completions, T tokens, K kinds of
numbers.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

from rlhf_cli.data.column import Column
from rlhf_cli.data.tokens import Completion, Sample

LAYOUT: Mapping[str, tuple[str, tuple[int | None, ...]]] = {
    "ids": ("I32", (None,)),  # (T,) all prompts and completions, one after the other
    "scored": ("BOOL", (None,)),  # (T,) False in prompts
    "ends": ("I64", (None,)),  # (S,) where a segment ends
    "first": ("I64", (None,)),  # (n + 1,) the prompt of each sample among the segments
    "numbers": ("F64", (None, None)),  # (n, K), 0 where there is none
    "given": ("BOOL", (None, None)),  # (n, K) whether there is one; (0, K): everywhere
    "gold": ("F64", (None,)),  # (C,), or (0,): unknown
    "labels": ("F32", (None,)),  # those of all steps
    "label_ends": ("I64", (None,)),  # (C,) where the labels of a completion end; (0,): nothing has steps
}
"""Safetensors dtype and shape of each array, None: any length."""


class Places(Sequence[str]):
    """Where examples came from. Of `file:line`, `file` is kept once."""

    def __init__(self, places: Iterable[str] = ()) -> None:
        self._names: dict[str, int] = {}
        self._spelled: list[str] = []
        self._name, self._number = array("i"), array("q")
        for place in places:
            self.append(place)

    def append(self, place: str) -> None:
        """One more."""
        name = place.rstrip("0123456789")
        digits = place[len(name) :]
        number = int(digits) if len(digits) < 19 and digits == digits.lstrip("0") != "" else -1
        name = place if number < 0 else name
        if name not in self._names:
            self._names[name] = len(self._spelled)
            self._spelled.append(name)
        self._name.append(self._names[name])
        self._number.append(number)

    def __len__(self) -> int:
        return len(self._name)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, number = self._spelled[self._name[index]], self._number[index]
        return name if number < 0 else f"{name}{number}"


class Samples(Sequence[Sample]):
    """Samples, made of the arrays of LAYOUT."""

    def __init__(self, arrays: Mapping[str, np.ndarray], names: Sequence[str], places: Sequence[str]) -> None:
        """names: the K kinds of numbers; places (n,): where each sample came from."""
        assert set(arrays) == set(LAYOUT)
        assert len(places) == len(arrays["first"]) - 1
        self.arrays = {name: np.asarray(values) for name, values in arrays.items()}
        self.names, self._places = tuple(names), places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._sample(i) for i in range(*index.indices(len(self)))]
        return self._sample(range(len(self))[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(i) for i in range(len(self)))

    def _sample(self, i: int) -> Sample:
        a = self.arrays
        low, high = int(a["first"][i]), int(a["first"][i + 1])
        start = int(a["ends"][low - 1]) if low else 0
        ends = a["ends"][low:high].tolist()
        completions = tuple(self._completion(low - i + k, *place) for k, place in enumerate(pairwise(ends)))
        numbers = dict(zip(self.names, a["numbers"][i].tolist(), strict=True))
        if len(a["given"]):
            numbers = {k: v for (k, v), there in zip(numbers.items(), a["given"][i].tolist(), strict=True) if there}
        return Sample(a["ids"][start : ends[0]].copy(), completions, numbers, self._places[i])

    def _completion(self, number: int, start: int, end: int) -> Completion:
        a, labels = self.arrays, None
        if len(a["label_ends"]):
            before = int(a["label_ends"][number - 1]) if number else 0
            labels = a["labels"][before : int(a["label_ends"][number])].copy()
        gold = float(a["gold"][number]) if len(a["gold"]) else math.nan
        return Completion(a["ids"][start:end].copy(), a["scored"][start:end].copy(), gold, labels)

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the prompts (n,) and of the completions (C,)."""
        sizes = np.diff(self.arrays["ends"], prepend=0)
        return sizes[self._prompts()], sizes[~self._prompts()]

    def last(self) -> np.ndarray:
        """The place of the last token of each completion: (C,)."""
        return self.arrays["ends"][~self._prompts()] - 1

    def _prompts(self) -> np.ndarray:
        """Which segments are prompts: (S,) bool."""
        found = np.zeros(len(self.arrays["ends"]), dtype=bool)
        found[self.arrays["first"][:-1]] = True
        return found


class Pile:
    """Samples of one kind as they come, put into arrays that grow."""

    def __init__(self) -> None:
        self._ids, self._scored = Column(np.int32), Column(np.bool_)
        self._ends, self._first = array("q"), array("q", [0])
        self._columns: dict[str, tuple[array[float], bytearray]] = {}
        self._gold, self._labels, self._label_ends = array("d"), array("f"), array("q")

    def add(self, sample: Sample) -> None:
        """One more sample."""
        self._put(sample.prompt, bytes(len(sample.prompt)))
        for completion in sample.completions:
            self._put(completion.ids, completion.scored.tobytes())
            if not math.isnan(completion.gold):
                self._gold.append(completion.gold)
            if completion.labels is not None:
                self._labels.frombytes(completion.labels.tobytes())
                self._label_ends.append(len(self._labels))
        for name, value in sample.numbers.items():
            values, given = self._columns.setdefault(name, (array("d"), bytearray()))
            self._fill(values, given)
            values.append(value)
            given.append(True)
        self._first.append(len(self._ends))

    def _put(self, ids: np.ndarray, scored: bytes) -> None:
        self._ids.extend(ids.tobytes())
        self._scored.extend(scored)
        self._ends.append(len(self._ids))

    def _fill(self, values: array[float], given: bytearray) -> None:
        """Say of the samples so far that they have no such number."""
        missing = len(self._first) - 1 - len(values)
        if missing:
            values.extend([0.0] * missing)
            given += bytes(missing)

    def samples(self, places: Sequence[str]) -> Samples:
        """All of them."""
        for column in self._columns.values():
            self._fill(*column)
        n, k = len(self._first) - 1, len(self._columns)
        assert {len(self._gold), len(self._label_ends)} <= {0, len(self._ends) - n}, "examples of one kind"
        numbers = [_array(values, np.float64) for values, _ in self._columns.values()]
        given = [_array(there, np.bool_) for _, there in self._columns.values()]
        everywhere = all(there.all() for there in given)
        arrays = {
            "ids": self._ids.array(),
            "scored": self._scored.array(),
            "ends": _array(self._ends, np.int64),
            "first": _array(self._first, np.int64),
            "numbers": np.stack(numbers, axis=1) if k else np.zeros((n, 0)),
            "given": np.zeros((0, k), dtype=bool) if everywhere else np.stack(given, axis=1),
            "gold": _array(self._gold, np.float64),
            "labels": _array(self._labels, np.float32),
            "label_ends": _array(self._label_ends, np.int64),
        }
        return Samples(arrays, list(self._columns), places)


def _array(values: array[Any] | bytearray, dtype: Any) -> np.ndarray:
    return np.frombuffer(values, dtype=dtype) if len(values) else np.zeros(0, dtype=dtype)
