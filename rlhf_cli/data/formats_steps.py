"""Formats of completions whose parts are judged: steps of a solution, and spans of errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from rlhf_cli.data import rows
from rlhf_cli.data.examples import Prompt, Steps
from rlhf_cli.data.reading import Finished, Format, Wanted, columns
from rlhf_cli.data.rows import BadRow, Row
from rlhf_cli.data.segments import labelled, segments
from rlhf_cli.errors import DataError

CATEGORIES = ("type", "error type", "category")
"""Where an error may carry its category."""
ONLY_ZERO_AND_ONE = "the labels of steps are 0 and 1 only: 0 may mean wrong or neutral"


# --- steps -----------------------------------------------------------------------------------------------


def steps(row: Row, where: str) -> list[Any]:
    asked, found = _asked(row), _texts(row, "steps" if "steps" in row else "completions")
    labels = [_label(v) for v in rows.items(row, "labels")]
    if len(labels) != len(found):
        raise BadRow(f"{len(found)} steps but {len(labels)} labels")
    if all(label is None for label in labels):
        raise BadRow("no step has a label")
    return [Steps(asked, found, tuple(labels), where)]


def first_mistake(row: Row, where: str) -> list[Any]:
    asked, found = _asked(row), _texts(row, "steps")
    if "mistake_index" not in row:
        raise BadRow("no 'mistake_index'")
    index = row["mistake_index"]
    if index is None:
        return [Steps(asked, found, (1.0,) * len(found), where)]
    if isinstance(index, float) and index.is_integer():
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(found):
        raise BadRow(f"'mistake_index' is {index!r}, not the place of one of {len(found)} steps, counted from 0")
    return [Steps(asked, found, (1.0,) * index + (-1.0,) + (None,) * (len(found) - index - 1), where)]


def prm800k(row: Row, where: str) -> list[Any]:
    """The solution that was gone on with, and for each alternative to one of its steps an example of its own, with only
    the alternative labelled. A solution ends where nothing was chosen, with the first completion given there."""
    asked = rows.prompt(_object(row, "question"), "problem")
    path: list[_Step] = []
    others: list[Steps] = []
    for step in rows.items(_object(row, "label"), "steps"):
        taken, rest, goes_on = _candidates(step)
        before = tuple(text for text, _ in path)
        others += [
            Steps(asked, (*before, text), (*(None for _ in before), label), where)
            for text, label in rest
            if label is not None
        ]
        path += taken
        if not goes_on:
            break
    main = Steps(asked, tuple(text for text, _ in path), tuple(label for _, label in path), where)
    found = [main, *others] if any(label is not None for label in main.labels) else others
    if not found:
        raise BadRow("no step has a label")
    return found


_Step: TypeAlias = tuple[str, float | None]


def _candidates(step: Any) -> tuple[list[_Step], list[_Step], bool]:
    """Of one step the completion that was taken, if any, the others, and whether the solution goes on after it."""
    if not isinstance(step, dict):
        raise BadRow(f"a step is {rows.kind_of(step)}, not an object")
    given = [_rated_text(c) for c in step.get("completions") or []]
    chosen, written = step.get("chosen_completion"), step.get("human_completion")
    if chosen is None and written is not None:
        return [_rated_text(written)], given, True
    if chosen is None:
        return given[:1], given[1:], False
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(given):
        raise BadRow(f"'chosen_completion' is {chosen!r}, not the place of one of {len(given)} completions")
    return [given[chosen]], given[:chosen] + given[chosen + 1 :], True


def _object(row: Row, column: str) -> dict[str, Any]:
    value = row.get(column)
    if not isinstance(value, dict):
        raise BadRow(f"no '{column}'" if value is None else f"'{column}' is {rows.kind_of(value)}, not an object")
    return value


def _rated_text(value: Any) -> _Step:
    if not isinstance(value, dict):
        raise BadRow(f"a completion of a step is {rows.kind_of(value)}, not an object")
    return rows.filled(rows.text(value, "text"), "step"), _label(value.get("rating"))


def _asked(row: Row) -> Prompt:
    return rows.prompt(row, "prompt" if "prompt" in row else "input")


def _texts(row: Row, column: str) -> tuple[str, ...]:
    found = rows.items(row, column)
    for value in found:
        if isinstance(value, str):
            rows.sound(value, f"an item of '{column}'")
        else:
            raise BadRow(f"a step is {rows.kind_of(value)}, not text")
        rows.filled(value, "step")
    if not found:
        raise BadRow("no steps")
    return tuple(found)


def _label(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    if isinstance(value, (int, float)) and (value == -1 or 0 <= value <= 1):
        return float(value)
    shown = f"{value:g}" if isinstance(value, (int, float)) and math.isfinite(value) else rows.kind_of(value)
    raise BadRow(f"a label is {shown}: neither true nor false nor -1, 0 or 1 nor between 0 and 1")


def _classes(found: list[Steps], wanted: Wanted) -> Finished:
    """Where the source has no -1 but probabilities, or an objective that knows no neutral steps, 0 means wrong. Raises
    DataError where only 0 and 1 are left, and 0 might be neutral or wrong."""
    values = {label for one in found for label in one.labels if label is not None}
    if -1.0 not in values and ("firm" in wanted.needs or values - {0.0, 1.0}):
        found = [
            Steps(one.prompt, one.steps, tuple(-1.0 if label == 0 else label for label in one.labels), one.where)
            for one in found
        ]
    elif values == {0.0, 1.0}:
        raise DataError(ONLY_ZERO_AND_ONE, found[0].where.rpartition(":")[0], "write true and false, or 1 and -1")
    return _separated(found, wanted)


def _separated(found: list[Steps], wanted: Wanted) -> Finished:
    mark = wanted.step_separator
    return Finished(
        [
            Steps(one.prompt, tuple(s if s.endswith(mark) else s + mark for s in one.steps), one.labels, one.where)
            for one in found
        ],
        [],
    )


# --- spans of errors -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """A completion with its errors, before it is cut into segments."""

    prompt: Prompt
    completion: str
    errors: tuple[tuple[int, int, str | None], ...]
    """Start, end and category of each."""
    where: str


def spans(row: Row, where: str) -> list[Any]:
    asked, (completion,) = rows.answers(row, "completion")
    return [Marked(asked, completion, tuple(_error(v, len(completion)) for v in rows.items(row, "errors")), where)]


def _error(value: Any, length: int) -> tuple[int, int, str | None]:
    if not isinstance(value, dict):
        raise BadRow(f"an error is {rows.kind_of(value)}, not an object")
    start, end = (_place(value.get(at)) for at in ("start", "end"))
    if not 0 <= start < end <= length:
        raise BadRow(f"an error from {start} to {end} in a completion of {length} characters")
    category = next((value[k] for k in CATEGORIES if value.get(k) is not None), None)
    if category is not None and not isinstance(category, str):
        raise BadRow(f"the category of an error is {rows.kind_of(category)}, not text")
    return start, end, category


def _place(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRow("an error without whole numbers as start and end")
    return value


def cut(found: list[Marked], wanted: Wanted) -> Finished:
    """Completions as segments: right where no error of the wanted categories lies in them."""
    if wanted.segments is None:
        raise DataError(
            "the format spans does not say where completions are cut", "data.segments", "for instance {by: sentence}"
        )
    by, categories = wanted.segments.by, wanted.segments.categories
    there = {category for one in found for _, _, category in one.errors if category is not None}
    warnings = tuple(
        f"data.segments.categories: no error of the category {c}; found: {', '.join(sorted(there)) or 'none'}"
        for c in categories or ()
        if c not in there
    )
    made = []
    for one in found:
        errors = [(start, end) for start, end, c in one.errors if categories is None or c in categories]
        pieces = segments(one.completion, by)
        labels = labelled(pieces, errors)
        made.append(_pieces(one, [end for _, end in pieces], labels))
    return Finished(made, [], warnings)


def _pieces(one: Marked, ends: list[int], labels: list[int]) -> Steps:
    """White space at the end of a segment goes to the one after it, as tokenizers have it."""
    texts: list[str] = []
    at = 0
    for start, end in pairwise([0, *ends]):
        stop = start + len(one.completion[start:end].rstrip())
        texts.append(one.completion[at:stop])
        at = stop
    values: list[float | None] = [float(label) for label in labels]
    if at < len(one.completion):
        return Steps(one.prompt, (*texts, one.completion[at:]), (*values, None), one.where)
    return Steps(one.prompt, tuple(texts), tuple(values), one.where)


# --- the formats -----------------------------------------------------------------------------------------

FORMATS = (
    Format("steps", columns("prompt steps labels", "prompt completions labels"), {"steps": steps},
           "the steps of a solution with a label each", {"steps": _classes}),
    Format("first_mistake", columns("prompt steps mistake_index", "input steps mistake_index"),
           {"steps": first_mistake}, "the steps of a solution and the place of the first wrong one",
           {"steps": _separated}),
    Format("prm800k", columns("question label"), {"steps": prm800k},
           "steps with several rated completions each, as PRM800K has them", {"steps": _separated}),
    Format("spans", columns("prompt completion errors"), {"steps": spans},
           "a completion with the places of its errors, cut by data.segments", {"steps": cut}),
)  # fmt: skip
