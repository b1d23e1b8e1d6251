"""Canonical examples: what a row of any format means, before any tokenizer. No torch.

A prompt is either plain text, continued as it is, or a tuple of chat messages, rendered with the chat template. A
completion is always plain text: what the assistant writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]


@dataclass(frozen=True)
class Demonstration:
    """Something to imitate: a conversation (every assistant turn is trained), a plain prompt with its completion, or
    plain text (prompt empty; every token is trained)."""

    prompt: Prompt
    """Plain text, the messages before the completion, or (without one) a whole conversation."""
    completion: str | None
    """What the assistant writes; None when `prompt` is a conversation, assistant turns included."""
    where: str
    """`file:line` of the row."""


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt, the better one known."""

    prompt: Prompt
    chosen: str
    rejected: str
    where: str
    margin: float = 0.0
    """How much better, as a reward-model margin (0: unknown)."""
    scores: tuple[float, float] | None = None
    """Scores of chosen and rejected."""
    target: float = 1.0
    """Probability that chosen is the better one; 0.5 when the judges are split evenly."""
    safety: tuple[bool, bool] | None = None
    """Whether chosen and rejected are safe."""


@dataclass(frozen=True)
class Verdict:
    """One completion, wanted or not."""

    prompt: Prompt
    completion: str
    desirable: bool
    where: str


@dataclass(frozen=True)
class Ranking:
    """Several completions of one prompt, each with a score."""

    prompt: Prompt
    completions: tuple[str, ...]
    scores: tuple[float, ...]
    """Higher is better, equal is a tie."""
    where: str
    graded: bool = True
    """Whether the sizes of the scores mean something, not only their order."""


@dataclass(frozen=True)
class Rated:
    """One completion with its score."""

    prompt: Prompt
    completion: str
    score: float
    where: str


@dataclass(frozen=True)
class Steps:
    """A completion in pieces, some of them judged."""

    prompt: Prompt
    steps: tuple[str, ...]
    """The pieces in their order, separators included; joined they are the completion."""
    labels: tuple[float | None, ...]
    """1 right, 0 neutral, -1 wrong, between 0 and 1 the probability of being right; None: not judged."""
    where: str


@dataclass(frozen=True)
class Task:
    """A prompt to be completed; the other columns of its row go to the reward functions."""

    prompt: Prompt
    where: str
    facts: dict[str, Any] = field(default_factory=dict)


Example: TypeAlias = Demonstration | Comparison | Verdict | Ranking | Rated | Steps | Task


def digest(items: Iterable[Example]) -> str:
    """SHA-256 of the content of some examples, as Python writes them; where they came from does not matter."""
    state = hashlib.sha256()
    for item in items:
        kind: Any = type(item)
        values = (f"{n}={_written('' if n == 'where' else getattr(item, n))}" for n in _names(kind))
        state.update(f"{kind.__qualname__}({', '.join(values)})".encode("utf-8", "backslashreplace"))
    return state.hexdigest()


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def _written(value: Any) -> str:
    """repr(value), faster where it is messages."""
    if isinstance(value, tuple) and value and isinstance(value[0], Message):
        inside = ", ".join(f"Message(role={m.role!r}, content={m.content!r})" for m in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)
