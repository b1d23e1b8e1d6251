"""The samples of a split, found where an earlier run left them or made of the examples."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from rlhf_cli.data.examples import Example, Task
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.heap import Heap
from rlhf_cli.data.lints import silent_turns, spelled_out
from rlhf_cli.data.samples import Places
from rlhf_cli.data.shelf import Shelf, pack, unpack
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokenizing import Tokenized, tokenize
from rlhf_cli.data.tokens import Truncation

TRIMMED = 2**14
"""Examples after which the memory of those before is given back."""


@dataclass(frozen=True)
class How:
    """What decides the samples besides examples and template."""

    max_length: int
    truncation: Truncation
    train_on_prompt: bool


@dataclass(frozen=True)
class Split:
    """Samples, and what is still known of their examples."""

    made: Tokenized
    source: np.ndarray
    """Source of each example: (examples,) int32."""
    places: Places
    """Of each example."""
    tasks: list[Task]
    """Of each sample; empty unless the examples are tasks."""
    lints: list[Dropped]
    """What is odd about the examples, seen with the tokenizer."""
    shelved: Callable[[], None] | None
    """Lets later runs find the samples; None where they are not kept."""

    def cut(self, source: int | None = None) -> list[Dropped]:
        """What tokenising left out, of one source or of all."""
        return self._named(self.made.dropped, source)

    def refused(self, source: int | None = None) -> list[Dropped]:
        """What the chat template refuses, likewise."""
        return self._named(self.made.refused, source)

    def _named(self, left: list[tuple[int, str]], source: int | None) -> list[Dropped]:
        return [Dropped(reason, self.places[i]) for i, reason in left if source is None or self.source[i] == source]


def make_split(
    items: Heap,
    source: np.ndarray,
    content: Sequence[tuple[str, int]],
    how: How,
    template: Template,
    shelf: Shelf | None,
    *,
    strict: bool = True,
) -> Split:
    """The samples of some examples, of which none is left afterwards, so that they need not stay in memory.

    source (examples,): the source of each; content: digest and number of the examples of each source; strict: as
    `tokenize`.
    """
    places = Places(item.where for item in items)
    tasks = [item for item in items if isinstance(item, Task)] if len(items) and isinstance(items[0], Task) else []
    about = {"examples": [list(one) for one in content], "template": template.digest, **asdict(how)}
    shelf = shelf if template.steady else None
    found = None if shelf is None else shelf.find(about)
    lints = spelled_out(items, template) + silent_turns(items, template)
    shelved = None
    if found is not None:
        made = unpack(*found, places)
        items.clear()
    else:
        made = tokenize(
            _handed_over(items), template, how.max_length, how.truncation, how.train_on_prompt, strict=strict
        )
    trim()
    if shelf is not None:
        shelved = partial(shelf.keep, about, *pack(made)) if found is None else partial(shelf.used, about)
    return Split(made, source, places, [tasks[i] for i in made.kept] if tasks else [], lints, shelved)


def _handed_over(items: Heap) -> Iterator[Example]:
    """The items in their order, none of them kept; their memory is given back as it goes."""
    for number, item in enumerate(items.taken(), start=1):
        yield item
        if number % TRIMMED == 0:
            trim()


def trim() -> None:
    """Give freed memory back to the system, where the C library would keep it (glibc)."""
    if sys.platform == "linux" and (function := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        function(0)
