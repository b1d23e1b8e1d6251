"""Steps of a solution, and spans of errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.examples import Message, Steps
from rlhf_cli.data.formats import FORMATS, detect
from rlhf_cli.data.formats_steps import ONLY_ZERO_AND_ONE, Marked
from rlhf_cli.data.reading import Wanted
from rlhf_cli.data.rows import BadRow
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import SegmentSettings

W = "f:1"
TEXT = "Hello, you. It is fine."
ERRORS = [{"start": 7, "end": 10, "type": "rude"}, {"start": 18, "end": 22, "error type": "wrong"}]


def read(name: str, row: dict[str, Any]) -> list[Any]:
    return FORMATS[name].gives["steps"](row, W)


def finish(name: str, found: list[Any], **wanted: Any) -> Any:
    return FORMATS[name].finish["steps"](found, Wanted(**wanted))


def rated(text: str, rating: int | None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": False}


PRM = {
    "question": {"problem": "q", "ground_truth_answer": "4"},
    "label": {
        "steps": [
            {"completions": [rated("a", 1), rated("b", -1)], "human_completion": None, "chosen_completion": 0},
            {"completions": [rated("c", 0), rated("d", None)], "human_completion": None, "chosen_completion": 1},
            {"completions": [rated("e", -1)], "human_completion": rated("f", None), "chosen_completion": None},
            {"completions": [rated("g", -1), rated("h", 1)], "human_completion": None, "chosen_completion": None},
            {"completions": [rated("never", 1)], "human_completion": None, "chosen_completion": 0},
        ]
    },
}

CASES: list[tuple[str, str, dict[str, Any], list[Any]]] = [
    (
        "steps",
        "steps",
        {"prompt": "q", "steps": ["a", "b", "c"], "labels": [True, False, None]},
        [Steps("q", ("a", "b", "c"), (1.0, -1.0, None), W)],
    ),
    (
        "steps",
        "steps",
        {"prompt": [{"role": "user", "content": "q"}], "completions": ["a", "b", "c"], "labels": [1, 0, -1]},
        [Steps((Message("user", "q"),), ("a", "b", "c"), (1.0, 0.0, -1.0), W)],
    ),
    (
        "steps",
        "steps",
        {"prompt": "q", "steps": ["a", "b"], "labels": [0.25, 1.0]},
        [Steps("q", ("a", "b"), (0.25, 1.0), W)],
    ),
    (
        "first_mistake",
        "steps",
        {"prompt": "q", "steps": ["a", "b", "c"], "mistake_index": 1},
        [Steps("q", ("a", "b", "c"), (1.0, -1.0, None), W)],
    ),
    (
        "first_mistake",
        "steps",
        {"input": "q", "steps": ["a", "b"], "mistake_index": 0},
        [Steps("q", ("a", "b"), (-1.0, None), W)],
    ),
    (
        "first_mistake",
        "steps",
        {"input": "q", "steps": ["a", "b"], "mistake_index": None},
        [Steps("q", ("a", "b"), (1.0, 1.0), W)],
    ),
    # a, d and the written f were taken, and it ends with g; b, c, e and h were not taken.
    (
        "prm800k",
        "steps",
        PRM,
        [
            Steps("q", ("a", "d", "f", "g"), (1.0, None, None, -1.0), W),
            Steps("q", ("b",), (-1.0,), W),
            Steps("q", ("a", "c"), (None, 0.0), W),
            Steps("q", ("a", "d", "e"), (None, None, -1.0), W),
            Steps("q", ("a", "d", "f", "h"), (None, None, None, 1.0), W),
        ],
    ),
    (
        "spans",
        "steps",
        {"prompt": "q", "completion": TEXT, "errors": ERRORS},
        [Marked("q", TEXT, ((7, 10, "rude"), (18, 22, "wrong")), W)],
    ),
    ("spans", "steps", {"prompt": "q", "completion": "a", "errors": []}, [Marked("q", "a", (), W)]),
]


@pytest.mark.parametrize(("name", "kind", "row", "expected"), CASES)
def test_each_format_reads_its_rows(name: str, kind: str, row: dict[str, Any], expected: list[Any]) -> None:
    assert read(name, row) == expected


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("steps", {"steps": ["a"], "labels": [True, False]}, "1 steps but 2 labels"),
    ("steps", {"steps": [], "labels": []}, "no steps"),
    ("steps", {"steps": ["a", " "], "labels": [1, 1]}, "empty step"),
    ("steps", {"steps": ["a", 3], "labels": [1, 1]}, "a step is a number, not text"),
    ("steps", {"steps": "a", "labels": [1]}, "'steps' is text, not a list"),
    ("steps", {"steps": ["a"], "labels": None}, "no 'labels'"),
    ("steps", {"steps": ["a"], "labels": [None]}, "no step has a label"),
    (
        "steps",
        {"steps": ["a"], "labels": [2]},
        "a label is 2: neither true nor false nor -1, 0 or 1 nor between 0 and 1",
    ),
    (
        "steps",
        {"steps": ["a"], "labels": [-0.5]},
        "a label is -0.5: neither true nor false nor -1, 0 or 1 nor between 0 and 1",
    ),
    (
        "steps",
        {"steps": ["a"], "labels": ["+"]},
        "a label is text: neither true nor false nor -1, 0 or 1 nor between 0 and 1",
    ),
    (
        "steps",
        {"steps": ["a"], "labels": [float("nan")]},
        "a label is a number: neither true nor false nor -1, 0 or 1 nor between 0 and 1",
    ),
    ("first_mistake", {"steps": ["a"]}, "no 'mistake_index'"),
    (
        "first_mistake",
        {"steps": ["a"], "mistake_index": 1},
        "'mistake_index' is 1, not the place of one of 1 steps, counted from 0",
    ),
    (
        "first_mistake",
        {"steps": ["a"], "mistake_index": "0"},
        "'mistake_index' is '0', not the place of one of 1 steps, counted from 0",
    ),
    ("prm800k", {"question": None}, "no 'question'"),
    ("prm800k", {"question": "q"}, "'question' is text, not an object"),
    ("prm800k", {"question": {}}, "no 'problem'"),
    ("prm800k", {"question": {"problem": "q"}, "label": {}}, "no 'steps'"),
    ("prm800k", {"question": {"problem": "q"}, "label": {"steps": ["a"]}}, "a step is text, not an object"),
    (
        "prm800k",
        {"question": {"problem": "q"}, "label": {"steps": [{"completions": [rated("a", 1)], "chosen_completion": 1}]}},
        "'chosen_completion' is 1, not the place of one of 1 completions",
    ),
    (
        "prm800k",
        {"question": {"problem": "q"}, "label": {"steps": [{"completions": ["a"]}]}},
        "a completion of a step is text, not an object",
    ),
    (
        "prm800k",
        {"question": {"problem": "q"}, "label": {"steps": [{"completions": [rated("a", None)]}]}},
        "no step has a label",
    ),
    ("spans", {"completion": "a", "errors": None}, "no 'errors'"),
    ("spans", {"completion": "a", "errors": ["x"]}, "an error is text, not an object"),
    ("spans", {"completion": "a", "errors": [{"start": 0}]}, "an error without whole numbers as start and end"),
    (
        "spans",
        {"completion": "a", "errors": [{"start": 0, "end": 2}]},
        "an error from 0 to 2 in a completion of 1 characters",
    ),
    (
        "spans",
        {"completion": "a", "errors": [{"start": 1, "end": 1}]},
        "an error from 1 to 1 in a completion of 1 characters",
    ),
    (
        "spans",
        {"completion": "a", "errors": [{"start": 0, "end": 1, "type": 3}]},
        "the category of an error is a number, not text",
    ),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_bad_rows_are_named(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(name, {"prompt": "q"} | row)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("prompt steps labels", "steps"),
        ("prompt completions labels", "steps"),
        ("prompt steps mistake_index", "first_mistake"),
        ("input steps target answer mistake_index", "first_mistake"),
        ("labeler question label", "prm800k"),
        ("prompt completion errors", "spans"),
    ],
)
def test_detection(columns: str, expected: str) -> None:
    assert detect(columns.split(), "steps", "f").name == expected


def test_the_separator_follows_every_step() -> None:
    found = [Steps("q", ("a", "b\n"), (1.0, -1.0), W)]
    for name in ("steps", "first_mistake", "prm800k"):
        assert finish(name, found).items == [Steps("q", ("a\n", "b\n"), (1.0, -1.0), W)]
        assert finish(name, found, step_separator=" ki").items[0].steps == ("a ki", "b\n ki")
        assert finish(name, found, step_separator="").items == found


def labels_of(*rows: tuple[float | None, ...]) -> tuple[list[tuple[float | None, ...]], tuple[str, ...]]:
    """What the labels of a source of steps become, and the warnings."""
    done = finish("steps", [Steps("q", tuple("abc"[: len(row)]), row, W) for row in rows])
    return [one.labels for one in done.items], done.warnings


def test_zero_is_wrong_among_probabilities_and_neutral_among_classes() -> None:
    assert labels_of((0.0, 0.5), (1.0, None)) == ([(-1.0, 0.5), (1.0, None)], ())
    assert labels_of((0.0, 1.0), (-1.0,)) == ([(0.0, 1.0), (-1.0,)], ())
    assert labels_of((1.0, -1.0)) == ([(1.0, -1.0)], ())
    with pytest.raises(DataError, match=ONLY_ZERO_AND_ONE):
        labels_of((0.0,), (1.0,))


def test_zero_is_wrong_where_nothing_is_neutral() -> None:
    done = finish("steps", [Steps("q", ("a", "b"), (0.0, 1.0), W)], needs=("firm",))
    assert done.items[0].labels == (-1.0, 1.0)
    done = finish("steps", [Steps("q", ("a", "b", "c"), (0.0, 1.0, -1.0), W)], needs=("firm",))
    assert done.items[0].labels == (0.0, 1.0, -1.0)


# --- spans -----------------------------------------------------------------------------------------------


def cut(by: Any, *categories: str, text: str = TEXT, errors: Any = ((7, 10, "rude"), (18, 22, "wrong"))) -> Any:
    settings = SegmentSettings(by=by, categories=list(categories) or None)
    return finish("spans", [Marked("q", text, tuple(errors), W)], segments=settings)


def test_spans_become_judged_segments() -> None:
    assert cut("sub_sentence").items == [Steps("q", ("Hello,", " you.", " It is fine."), (1.0, -1.0, -1.0), W)]
    assert cut("sentence").items == [Steps("q", ("Hello, you.", " It is fine."), (-1.0, -1.0), W)]
    assert cut("answer", errors=()).items == [Steps("q", (TEXT,), (1.0,), W)]
    assert cut("sentence", text="So. \n", errors=()).items == [Steps("q", ("So.", " \n"), (1.0, None), W)]


def test_only_wanted_categories_count() -> None:
    done = cut("sentence", "wrong")
    assert (done.items[0].labels, done.warnings) == ((1.0, -1.0), ())
    done = cut("sentence", "wrong", "bad")
    assert done.warnings == ("data.segments.categories: no error of the category bad; found: rude, wrong",)


def test_spans_need_to_know_where_to_cut() -> None:
    with pytest.raises(DataError) as caught:
        finish("spans", [Marked("q", "a", (), W)])
    assert str(caught.value) == (
        "data.segments: the format spans does not say where completions are cut (for instance {by: sentence})"
    )


@given(
    st.text("ab ,.\n!é", min_size=1, max_size=40).filter(str.strip),
    st.sampled_from(["sub_sentence", "sentence", "answer"]),
)
def test_pieces_join_to_the_completion(text: str, by: Any) -> None:
    (found,) = cut(by, text=text, errors=()).items
    assert "".join(found.steps) == text
    assert all(
        re.search(r"\S$", piece) for piece, label in zip(found.steps, found.labels, strict=True) if label is not None
    )
