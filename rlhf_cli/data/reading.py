"""What a format is: which columns it needs, how it reads a row, what it does with all rows together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from rlhf_cli.catalog import Data, Need
from rlhf_cli.data.examples import Prompt, Task
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.rows import Row
from rlhf_cli.recipe.settings.data import RatingSettings, SegmentSettings


@dataclass(frozen=True)
class Wanted:
    """What is made of the rows, besides their kind."""

    needs: tuple[Need, ...] = ()
    """What the objective needs of each example."""
    step_separator: str = "\n"
    segments: SegmentSettings | None = None
    ratings: RatingSettings = field(default_factory=RatingSettings)


class Finished(NamedTuple):
    """What all rows of a source gave together."""

    items: list[Any]
    dropped: list[Dropped]
    """Left out, though nothing is wrong with the rows."""
    warnings: tuple[str, ...] = ()


Reader: TypeAlias = Callable[[Row, str], list[Any]]
"""A row and its `file:line` to examples, mostly one. Raises BadRow."""
Finish: TypeAlias = Callable[[list[Any], Wanted], Finished]


@dataclass(frozen=True)
class Format:
    """A way to read rows."""

    name: str
    needs: tuple[frozenset[str], ...]
    """Sets of columns; the format fits rows that have all of one set."""
    gives: Mapping[Data, Reader]
    """The kinds of example, each with its reader."""
    help: str
    finish: Mapping[Data, Finish] = field(default_factory=dict)
    """What is done with all that the reader gave, when rows belong together or settings matter."""
    optional: frozenset[str] = frozenset()
    """Further columns that it reads where they are there."""

    @property
    def reads(self) -> frozenset[str]:
        """All columns that it reads."""
        return self.optional.union(*self.needs)

    def match(self, columns: set[str]) -> frozenset[str] | None:
        """The largest of its column sets that is there, None when none is."""
        return max((n for n in self.needs if n <= columns), key=len, default=None)


def columns(*sets: str) -> tuple[frozenset[str], ...]:
    """Sets of column names, each written as words."""
    return tuple(frozenset(s.split()) for s in sets)


def as_task(read: Callable[[Row], Prompt], *used: str) -> Reader:
    """Only the prompt; all columns but `used` become facts."""

    def reader(row: Row, where: str) -> list[Any]:
        return [Task(read(row), where, {k: v for k, v in row.items() if k not in used})]

    return reader
