"""What a reward function returned, taken apart: numbers, named parts, or places with scores; faults named by row."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from rlhf_cli.rollouts.foreign import shown

WANTED = "a list of numbers is wanted"
PAIRS = f"{WANTED}, or a list of (end, score) for each completion"
_SHOWN = 60
"""Characters of a wrong value that are shown."""
_NAMED = 4
"""Rows that are named in one message."""
Pairs = list[tuple[int, float]]
"""(count of characters, score) of each reward inside a completion."""


class Malformed(Exception):
    """It is no answer; the text says what was returned and for which row."""


class Answer(NamedTuple):
    """What a function said."""

    numbers: np.ndarray  # (N,) NaN where it could not score; 0 where it gave pairs
    pairs: list[Pairs] | None
    parts: dict[str, np.ndarray]  # (N,) each
    """The named parts of the score, when it gave such."""


def taken_apart(result: Any, rows: Sequence[str]) -> Answer:
    """Numbers, pairs for each completion, or a mapping of names to numbers. `rows`: where each prompt stands.

    Raises Malformed for anything else.
    """
    if isinstance(result, Mapping):
        if not result or not all(isinstance(name, str) for name in result):
            raise Malformed(f"returned {_kind(result)}; {WANTED}")
        parts = {name: _numbers(values, rows, f" in part '{name}'") for name, values in result.items()}
        return Answer(np.sum(list(parts.values()), axis=0), None, parts)
    if isinstance(result, list | tuple) and any(isinstance(row, list | tuple) for row in result):
        _check_length(result, rows)
        found = [None if given is None else _pairs(given, row) for given, row in zip(result, rows, strict=True)]
        lost = [given is None or any(math.isnan(score) for _, score in given) for given in found]
        kept: list[Pairs] = [[] if gone or given is None else given for given, gone in zip(found, lost, strict=True)]
        return Answer(np.where(lost, np.nan, 0.0), kept, {})
    return Answer(_numbers(result, rows), None, {})


def _numbers(result: Any, rows: Sequence[str], part: str = "") -> np.ndarray:
    """A sequence of numbers and None as floats. Not text, mappings and sets, which only look like one."""
    try:
        if isinstance(result, str | bytes | Mapping | Set):
            raise TypeError
        values = list(result)
    except TypeError as error:
        raise Malformed(f"returned {_kind(result)}{part}; {WANTED}") from error
    _check_length(values, rows, part)
    return np.array([_number(value, value, row, WANTED) for value, row in zip(values, rows, strict=True)], np.float64)


def _number(value: Any, entry: Any, row: str, wanted: str) -> float:
    """`entry`: what the row's answer was, to show when this is no number."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return math.nan if value is None else float(value)
    except OverflowError as error:
        raise Malformed(f"returned a number for {row} that is too large: {shown(value, _SHOWN)}") from error
    except (TypeError, ValueError) as error:
        raise Malformed(f"returned {_kind(entry)} for {row}; {wanted}") from error


def _pairs(given: Any, row: str) -> Pairs:
    """(count of characters, score) pairs."""
    if not isinstance(given, list | tuple):
        raise Malformed(f"returned {_kind(given)} for {row}; {PAIRS}")
    found = []
    for pair in given:
        try:
            end, score = pair if isinstance(pair, list | tuple) else ()
            if isinstance(end, bool):
                raise TypeError
            end = operator.index(end)
        except (TypeError, ValueError) as error:
            raise Malformed(f"returned {_kind(pair)} in the list for {row}; {PAIRS}") from error
        found.append((end, _number(score, pair, row, PAIRS)))
    return found


def _check_length(values: Sequence[Any], rows: Sequence[str], part: str = "") -> None:
    if len(values) != len(rows):
        raise Malformed(f"returned {len(values)} scores{part} for {len(rows)} completions, of {_names(rows)}")


def _names(rows: Iterable[str]) -> str:
    """Each row once, in order; the first few."""
    known = list(dict.fromkeys(rows))
    more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
    return f"{', '.join(known[:_NAMED])}{more}"


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {shown(value, _SHOWN)}"
