"""Where characters of a completion lie among its tokens, and completions in another model's tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlhf_cli.data.examples import Task
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokens import Completion, Sample

BLOCK = 16
"""Tokens that are decoded at once, at least."""


@dataclass(frozen=True)
class _Decoded:
    """The text of a completion, as it grows token by token."""

    template: Template
    sample: Sample
    text: str

    @property
    def ids(self) -> np.ndarray:
        return self.sample.completions[0].ids

    @cached_property
    def marks(self) -> list[tuple[int, int]]:
        """(tokens, characters) where both end together, every few tokens. What lies between two of them decodes by
        itself, given what lies before."""
        found = [(0, 0)]
        while found[-1][0] < len(self.ids):
            start, known = found[-1]
            for stop in range(min(start + BLOCK, len(self.ids)), len(self.ids) + 1):
                piece = self.piece(found, stop)
                if self.text.startswith(piece, known):
                    found.append((stop, known + len(piece)))
                    break
            else:
                break
        return found

    def piece(self, marks: Sequence[tuple[int, int]], stop: int) -> str:
        """The text from the last of these marks up to a token."""
        before = self.sample.prompt if len(marks) == 1 else self.ids[marks[-2][0] : marks[-1][0]]
        return self.template.decode(self.ids[marks[-1][0] : stop], after=before)

    def settled(self, count: int) -> int:
        """Characters that the first `count` tokens settle for good."""
        marks = self.marks[: bisect_right(self.marks, count, key=lambda mark: mark[0])]
        start, known = marks[-1]
        if start == count:
            return known
        piece = self.piece(marks, count)
        if self.text.startswith(piece, known):
            return known + len(piece)
        pairs = enumerate(zip(piece, self.text[known:], strict=False))
        return next((known + n for n, (one, other) in pairs if one != other), len(self.text))

    def token(self, end: int) -> int:
        """Index of the token in which a count of characters is reached."""
        after = bisect_left(self.marks, end, lo=1, key=lambda mark: mark[1])
        low = self.marks[after - 1][0]
        high = self.marks[after][0] if after < len(self.marks) else len(self.ids)
        return low + bisect_left(range(low + 1, high), end, key=self.settled)


def places(template: Template, sample: Sample, text: str, ends: Sequence[int]) -> list[int]:
    """For each count of characters of a completion's text, the index of the token in which the last of them ends.

    That is the first token after which the text, decoded so far, has these characters for good: a character of several
    tokens ends in the last of them. White space that a tokenizer writes into the token of the word after it counts to
    the token before.
    """
    decoded, found = _Decoded(template, sample, text), []
    for end in ends:
        place, bare = decoded.token(end), len(text[:end].rstrip())
        merged = bare < end < decoded.settled(place + 1)
        found.append(max(decoded.token(bare), place - 1) if merged else place)
    return found


def spread(template: Template, sample: Sample, text: str, given: Sequence[tuple[int, float]]) -> np.ndarray:
    """(count of characters, score) pairs as rewards at tokens (L,); their sum is kept."""
    rewards = np.zeros(len(sample.completions[0].ids))
    at = places(template, sample, text, [end for end, _ in given])
    np.add.at(rewards, np.array(at, dtype=np.int64), [score for _, score in given])
    return rewards


def retokenise(template: Template, task: Task, completion: str, *, finished: bool) -> Sample:
    """A completion of the policy in another model's tokens, without the end token when it was cut."""
    ids, scored = template.completion_ids(task.prompt, completion, task.where)
    if not finished and len(ids) > 1:
        ids, scored = ids[:-1], scored[:-1]
    prompt = np.array(template.prompt_ids(task.prompt), dtype=np.int32)
    return Sample(prompt, (Completion(np.array(ids, np.int32), np.array(scored, bool)),), {}, task.where)
