"""Many examples: in memory, or in a file without a name when their texts are too many to hold."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, BinaryIO, cast, overload

from rlhf_cli.data.examples import Comparison, Demonstration, Example, Message, Ranking, Rated, Steps, Task, Verdict

HELD = 2**28
"""Characters of text beyond which examples go to a file."""
KINDS: tuple[Any, ...] = (Demonstration, Comparison, Verdict, Ranking, Rated, Steps)
"""Those that can: the facts of a task may be anything."""


class Heap(Sequence[Example]):
    """Examples in the order in which they came."""

    def __init__(self, items: Iterable[Example] = ()) -> None:
        self._held: list[Example] = []
        self._size, self._most = 0, HELD
        self._file: BinaryIO | None = None
        self._starts = array("q", [0])
        self.extend(items)

    def extend(self, items: Iterable[Example]) -> None:
        """More of them."""
        for item in items:
            self._held.append(item)
            self._size += _characters(item)
        if self._size >= self._most:
            self._put_away()

    def __len__(self) -> int:
        return len(self._starts) - 1 + len(self._held)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index, away = range(len(self))[index], len(self._starts) - 1
        if index >= away:
            return self._held[index - away]
        assert self._file is not None
        self._file.seek(self._starts[index])
        return read(self._file.read(self._starts[index + 1] - self._starts[index]))

    def __iter__(self) -> Iterator[Example]:
        for i in range(len(self._starts) - 1):
            yield self[i]
        yield from self._held

    def clear(self) -> None:
        """None is left."""
        self._held.clear()
        self._starts, self._size = array("q", [0]), 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def taken(self) -> Iterator[Example]:
        """Each once, none of those that were given kept."""
        for i in range(len(self._starts) - 1):
            yield self[i]
        self._held.reverse()
        while self._held:
            yield self._held.pop()
        self.clear()

    def _put_away(self) -> None:
        """Those that are held, into the file. Tasks stay, and all do where the disk has no room."""
        if any(isinstance(item, Task) for item in self._held):
            self._most = 2**62
            return
        try:
            self._file = self._file or cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115
            self._file.seek(self._starts[-1])
            starts = array("q")
            for item in self._held:
                self._file.write(written(item))
                starts.append(self._file.tell())
            self._file.flush()
        except OSError:
            self._most = 2**62
            return
        self._starts += starts
        self._held, self._size = [], 0


def joined(heaps: Sequence[Heap]) -> Heap:
    """All of several, as one."""
    if len(heaps) == 1:
        return heaps[0]
    out = Heap()
    for heap in heaps:
        for item in heap:
            out.extend((item,))
    return out


def written(item: Example) -> bytes:
    """An example as JSON."""
    kind: Any = type(item)
    values = [_plain(getattr(item, name)) for name in _names(kind)]
    return json.dumps([KINDS.index(kind), *values]).encode() + b"\n"


def read(line: bytes) -> Example:
    """What was written."""
    number, *values = json.loads(line)
    kind = KINDS[number]
    return cast("Example", kind(*(_value(name, value) for name, value in zip(_names(kind), values, strict=True))))


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _plain(value: Any) -> Any:
    """Messages as pairs; tuples are lists in JSON."""
    if isinstance(value, tuple) and value and isinstance(value[0], Message):
        return [[message.role, message.content] for message in value]
    return value


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(Message(*pair) for pair in value) if name == "prompt" else tuple(value)


def _characters(item: Example) -> int:
    """About how much text it holds."""
    prompt = item.prompt if isinstance(item.prompt, str) else "".join(message.content for message in item.prompt)
    total, kind = len(prompt), cast("Any", type(item))
    for name in _names(kind):
        value = getattr(item, name)
        if name not in ("prompt", "where") and isinstance(value, str):
            total += len(value)
        elif name in ("completions", "steps"):
            total += sum(map(len, value))
    return total
