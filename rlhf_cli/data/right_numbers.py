"""Numbers at which texts end, and the right ones in a column of the data, for rules of right or wrong. No torch.

`numbers` reads the numbers of a text exactly: 1,000 = 1000 = 1000.0, $1,000 and 1000 % the same, 1/2 = 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from rlhf_cli.data.examples import Task
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.rewards import RewardSettings

_NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.])((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE]([+-]?[0-9]{1,2})(?![0-9A-Za-z_]))?"
)
_FREE = r"(?:^|[^0-9A-Za-z_)\]}.%])"
_SIGN = re.compile(rf"{_FREE}[-−](?:[$€£¥]\s?)?\Z|{_FREE}[$€£¥][-−]\Z")
"""Before a number: a minus that belongs to it, not one between two numbers or in front of a list item."""
_OVER = re.compile(r"\s?/\s?")
_DIGITS = 200
"""Longer numbers are none."""


def numbers(text: str) -> Iterator[Fraction]:
    """The numbers of a text, exactly, in their order."""
    found = list(_NUMBER.finditer(text))
    skip = -1
    for i, one in enumerate(found):
        if i == skip or len(one[1]) > _DIGITS:
            continue
        value = _value(one)
        below = found[i + 1] if i + 1 < len(found) else None
        if below is not None and _OVER.fullmatch(text, one.end(), below.start()) and 0 < len(below[1]) <= _DIGITS:
            under = _value(below)
            if under:
                value, skip = value / under, i + 1
        yield -value if _SIGN.search(text, max(0, one.start() - 6), one.start()) else value


def _value(found: re.Match[str]) -> Fraction:
    return Fraction(found[1].replace(",", "")) * Fraction(10) ** int(found[2] or 0)


def answer(text: str, marker: str, without_marker: str) -> Fraction | None:
    """The number a text ends on: the first after its last marker, or its last; None without one."""
    _, mark, rest = text.rpartition(marker) if marker else ("", "", text)
    if mark:
        return next(numbers(rest), None)
    if marker and without_marker == "wrong":
        return None
    return next(reversed(list(numbers(text))), None)


def gold(task: Task, column: str, marker: str, key: str = "column") -> Fraction:
    """The right number of a row; key: where the column is named. Raises DataError when it is missing or holds none."""
    given = task.facts.get(column)
    if given is None:
        known = ", ".join(sorted(task.facts)) or "none"
        raise DataError(f"no column '{column}' for the rule numeric_answer; columns besides the prompt: {known}",
                        task.where, f"name it in {key}")  # fmt: skip
    found = answer(str(given), marker, "last") if isinstance(given, int | float | str) else None
    if found is None or isinstance(given, bool):
        raise DataError(f"no number in column '{column}': {str(given)[:40]}", task.where)
    return found


def check_rule(settings: RewardSettings, tasks: Sequence[Task], key: str) -> None:
    """DataError for a row without what a rule reads there; key: of the reward in the recipe, `rewards.0`."""
    rule: Any = settings.rule
    if rule is None or rule.name != "numeric_answer":
        return
    _check_column(rule.column, tasks)
    for task in tasks:
        gold(task, rule.column, rule.marker, f"{key}.rule.column")


def _check_column(column: str, tasks: Sequence[Task]) -> None:
    """DataError naming the first row that lacks a column which other rows have."""
    lacking = [task for task in tasks if task.facts.get(column) is None]
    have = len(tasks) - len(lacking)
    if lacking and have:
        raise DataError(f"this row has no '{column}' for the rule numeric_answer; {have} of {len(tasks)} rows have one",
                        lacking[0].where, "fill it in, or leave the row out")  # fmt: skip
