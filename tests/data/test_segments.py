from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.segments import By, labelled, segments


def parts(text: str, by: By = "sub_sentence") -> list[str]:
    return [text[start:end] for start, end in segments(text, by)]


SUB_SENTENCES = [
    "One, |two; |three: |four.",
    "Is it? |Yes! |No.",
    "Wait... |what?! |Nothing.",
    "It costs 3.5 dollars, |or 1,000 yen, |at 10:30 on a.b.c/d:e.",
    "Mr. Smith met Dr. J. R. Jones, |e.g., in the U.S. capital, |at 5 p.m. sharp. |Then he left.",
    "He said \"go.\" |She said 'no', |then (never). |End",
    "First line\n|second line \n \n |third, |end\n",
    "1. apples\n|2. pears, |ripe\n|10. plums",
    "in 1999. |It",
    "no mark at all",
    "你好，|世界。|“好！”|完",
    "  leading white space, |kept  ",
    "\n\nfirst, |last",
    "a,b is one; |a, |b are two",
    ", |odd",
    "...",
]


@pytest.mark.parametrize("marked", SUB_SENTENCES)
def test_sub_sentences(marked: str) -> None:
    assert parts(marked.replace("|", "")) == marked.split("|")


@pytest.mark.parametrize(
    "marked",
    [
        "One, two; three: four. |Five!",
        "Is it? |Yes! |No.",
        "Mr. Smith paid 3.5, i.e. less. |Good.",
        "A line, with a comma\n|another",
        "你好，世界。|完",
        "1. One. |Two.\n|2. Three",
    ],
)
def test_sentences(marked: str) -> None:
    assert parts(marked.replace("|", ""), "sentence") == marked.split("|")


def test_answer() -> None:
    assert segments("One. Two,\nthree.", "answer") == [(0, 16)]


def test_nothing_and_white_space() -> None:
    for by in ("sub_sentence", "sentence", "answer"):
        assert segments("", by) == []
        assert segments(" \n\n ", by) == [(0, 4)]
        assert segments("x", by) == [(0, 1)]


def test_spans() -> None:
    assert segments("One, two. Three", "sub_sentence") == [(0, 5), (5, 10), (10, 15)]


texts = st.text(alphabet="abU1 .,;:!?\n\"')(“。，", max_size=40)


@given(texts)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_they_cover_the_text(text: str) -> None:
    fine, coarse = segments(text, "sub_sentence"), segments(text, "sentence")
    for spans in (fine, coarse, segments(text, "answer")):
        assert "".join(text[start:end] for start, end in spans) == text
        assert all(start < end for start, end in spans)
        assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
        if text.strip():
            assert all(text[start:end].strip() for start, end in spans)
            assert not any(text[start].isspace() for start, _ in spans[1:]), "white space belongs to the segment before"


def test_an_error_touches_what_it_shares_a_character_with() -> None:
    spans = [(0, 5), (5, 10), (10, 15)]
    assert labelled(spans, []) == [1, 1, 1]
    assert labelled(spans, [(5, 10)]) == [1, -1, 1]
    assert labelled(spans, [(4, 5)]) == [-1, 1, 1]
    assert labelled(spans, [(4, 6)]) == [-1, -1, 1]
    assert labelled(spans, [(0, 15)]) == [-1, -1, -1]
    assert labelled(spans, [(14, 99), (-3, 1)]) == [-1, 1, -1]
    assert labelled(spans, [(7, 7), (9, 8)]) == [1, 1, 1], "an error without characters touches nothing"
    assert labelled([], [(0, 3)]) == []
