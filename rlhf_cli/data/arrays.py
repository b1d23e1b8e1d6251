"""The rows of a JSON array, one by one, each with the line it begins in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

from rlhf_cli.errors import DataError

BLANKS = re.compile(r"[ \t\n\r]*")
SIGN = re.compile(rf"{BLANKS.pattern}([\[,\]]){BLANKS.pattern}")


class TwiceError(Exception):
    """An object has a key twice, of which one would be lost."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises TwiceError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TwiceError(next(name for name in names if names.count(name) > 1)[:60])
    return found


def unreadable(error: Exception, where: str) -> DataError:
    """What is wrong with a row that is JSON and still cannot be read."""
    if isinstance(error, TwiceError):
        return DataError(f"the key '{error}' is given twice", where, "keep one of them")
    return DataError(f"not readable JSON: {short(error)}", where)


def short(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "integer string conversion" in str(error):
        return "a number with thousands of digits"
    return next(iter(str(error).splitlines()), type(error).__name__)


def placed(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """What an array holds, each with `path:line`, or `path:row N` (from 1) where several begin in one line.

    Raises DataError with the line and column, or the line in which the row begins.
    """
    before, end = 0, (0, text.count("\n") + 2, None)
    for (number, line, value), (_, after, _) in pairwise(chain(_elements(text, path), [end])):
        yield f"{path}:{line}" if before < line < after else f"{path}:row {number}", value
        before = line


def _elements(text: str, path: str) -> Iterator[tuple[int, int, Any]]:
    """Number, line and value of each."""
    decode = json.JSONDecoder(object_pairs_hook=once).raw_decode
    number, line, counted = 0, 1, 0
    try:
        sign, at = _sign(text, 0, "[", "Expecting value")
        if text[at : at + 1] == "]":
            sign, at = _sign(text, at, "]", "")
        while sign != "]":
            number, line, counted = number + 1, line + text.count("\n", counted, at), at
            value, at = decode(text, at)
            yield number, line, value
            sign, at = _sign(text, at, ",]", "Expecting ',' delimiter")
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", f"{path}:{error.lineno}:{error.colno}") from None
    except (TwiceError, RecursionError, ValueError) as error:
        raise unreadable(error, f"{path}:{line}") from None


def _sign(text: str, at: int, wanted: str, problem: str) -> tuple[str, int]:
    """The next character that is not blank, one of those that are wanted, and where something follows it."""
    found = SIGN.match(text, at)
    if found is None or found[1] not in wanted:
        raise json.JSONDecodeError(problem, text, BLANKS.match(text, at).end())  # type: ignore[union-attr]
    return found[1], found.end()
