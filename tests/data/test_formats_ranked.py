"""Rankings, votes, safety labels and games."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.examples import Comparison, Message, Ranking, Rated, Task, Verdict
from rlhf_cli.data.formats import FORMATS, detect
from rlhf_cli.data.formats_ranked import Game
from rlhf_cli.data.reading import Wanted
from rlhf_cli.data.rows import BadRow

W = "f:1"
ASKED = (Message("user", "q"),)


def read(name: str, kind: Any, row: dict[str, Any]) -> list[Any]:
    return FORMATS[name].gives[kind](row, W)


FOUR = ["a", "b", "c", "d"]
OBJECTS = [{"solution": "a", "is_correct": True}, {"solution": "b", "is_correct": False}]
SAFE = {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 1,
        "is_response_0_safe": False, "is_response_1_safe": True}  # fmt: skip

CASES: list[tuple[str, str, dict[str, Any], list[Any]]] = [
    (
        "ranking",
        "ranking",
        {"prompt": "q", "completions": FOUR[:3], "scores": [1, 2.5, 1]},
        [Ranking("q", ("a", "b", "c"), (1.0, 2.5, 1.0), W)],
    ),
    (
        "ranking",
        "ranking",
        {"prompt": "q", "completions": FOUR[:3], "ranks": [2, 1, 2]},
        [Ranking("q", ("a", "b", "c"), (-2.0, -1.0, -2.0), W, graded=False)],
    ),
    # Pairs ab ac ad bc bd cd: a ties b, c beats a, a beats d, b ties c, b ties d, c ties d.
    # a = 1/2 + 0 + 1, b = 1/2 + 1/2 + 1/2, c = 1 + 1/2 + 1/2, d = 0 + 1/2 + 1/2
    (
        "ranking",
        "ranking",
        {"prompt": "q", "completions": FOUR, "preferences": [0, 2, 1, 0, 0, 0]},
        [Ranking("q", ("a", "b", "c", "d"), (1.5, 1.5, 2.0, 1.0), W, graded=False)],
    ),
    (
        "ranking",
        "ranking",
        {"prompt": "q", "completions": FOUR[:3], "best": 0},
        [Ranking("q", ("a", "b", "c"), (1.0, 0.0, 0.0), W, graded=False)],
    ),
    ("ranking", "ranking", {"prompt": "q", "completions": OBJECTS}, [Ranking("q", ("a", "b"), (1.0, 0.0), W)]),
    (
        "ranking",
        "ranking",
        {"prompt": "q", "completions": [[{"role": "assistant", "content": "a"}], "b"], "scores": [0, 1]},
        [Ranking(ASKED, ("a", "b"), (0.0, 1.0), W)],
    ),
    (
        "ranking",
        "ranking",
        {"prompt": "q", "completions": [{"role": "assistant", "content": "a", "score": 3}, {"text": "b", "rating": 2}]},
        [Ranking(ASKED, ("a", "b"), (3.0, 2.0), W)],
    ),
    (
        "ranking",
        "comparison",
        {"prompt": "q", "completions": FOUR[:3], "scores": [2, 3, 1]},
        [Comparison("q", "b", "c", W, scores=(3.0, 1.0))],
    ),
    ("ranking", "comparison", {"prompt": "q", "completions": FOUR[:3], "best": 2}, [Comparison("q", "c", "b", W)]),
    (
        "ranking",
        "rated",
        {"prompt": "q", "completions": FOUR[:2], "scores": [2, 3]},
        [Rated("q", "a", 2.0, W), Rated("q", "b", 3.0, W)],
    ),
    (
        "ranking",
        "verdict",
        {"prompt": "q", "completions": OBJECTS},
        [Verdict("q", "a", True, W), Verdict("q", "b", False, W)],
    ),
    ("ranking", "task", {"prompt": "q", "completions": 3}, [Task("q", W, {"completions": 3})]),
    (
        "ultrafeedback",
        "ranking",
        {
            "instruction": "q",
            "completions": [{"response": "a", "overall_score": 7.5}, {"response": "b", "overall_score": 4}],
        },
        [Ranking(ASKED, ("a", "b"), (7.5, 4.0), W)],
    ),
    ("ultrafeedback", "task", {"instruction": "q", "source": "s"}, [Task(ASKED, W, {"source": "s"})]),
    (
        "votes",
        "comparison",
        {"prompt": "q", "completions": ["a", "b"], "votes": [2, 2, 1]},
        [Comparison("q", "b", "a", W, target=2 / 3)],
    ),
    (
        "votes",
        "comparison",
        {"instruction": "do", "input": "it", "completions": ["a", "b"], "votes": [0, 0, 1]},
        [Comparison((Message("user", "do\nit"),), "a", "b", W, target=2 / 3)],
    ),
    (
        "votes",
        "comparison",
        {"prompt": "q", "completions": ["a", "b"], "votes": [1, 2]},
        [Comparison("q", "a", "b", W, target=0.5)],
    ),
    ("safety", "comparison", SAFE, [Comparison("q", "b", "a", W, safety=(True, False))]),
    (
        "safety",
        "comparison",
        SAFE | {"safer_response_id": 0, "is_response_0_safe": 1, "is_response_1_safe": 1},
        [Comparison("q", "a", "b", W, safety=(True, True))],
    ),
    ("games", "rated", {"prompt": "q", "a": "x", "b": "y", "outcome": 0.5}, [Game("q", "x", "y", 0.5, W)]),
    ("scored", "ranking", {"prompt": "q", "completion": "a", "score": 1}, [Rated("q", "a", 1.0, W)]),
    ("scored", "rated", {"prompt": "q", "completion": "a", "score": 1}, [Rated("q", "a", 1.0, W)]),
    (
        "preference",
        "comparison",
        {"prompt": "q", "chosen": "a", "rejected": "b", "target": 0.75, "chosen_safe": 1, "rejected_safe": False},
        [Comparison("q", "a", "b", W, target=0.75, safety=(True, False))],
    ),
]


@pytest.mark.parametrize(("name", "kind", "row", "expected"), CASES)
def test_each_format_reads_its_rows(name: str, kind: str, row: dict[str, Any], expected: list[Any]) -> None:
    found = read(name, kind, row)
    assert [type(one) for one in found] == [type(one) for one in expected]
    assert found == expected


BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("ranking", "ranking", {"completions": ["a"], "scores": [1]}, "a ranking needs two completions"),
    ("ranking", "ranking", {"completions": [], "scores": []}, "a ranking needs two completions"),
    ("ranking", "ranking", {"completions": "ab", "scores": [1]}, "'completions' is text, not a list"),
    ("ranking", "ranking", {"scores": [1]}, "no 'completions'"),
    ("ranking", "ranking", {"completions": ["a", 3], "scores": [1, 2]}, "a completion is a number, not text"),
    ("ranking", "ranking", {"completions": ["a", None], "scores": [1, 2]}, "a completion is null, not text"),
    ("ranking", "ranking", {"completions": ["a", " "], "scores": [1, 2]}, "empty completion"),
    ("ranking", "ranking", {"completions": ["a", "b"], "scores": [1]}, "2 completions but 1 scores"),
    ("ranking", "ranking", {"completions": ["a", "b"], "scores": [1, "2"]}, "a score is text, not a number"),
    ("ranking", "ranking", {"completions": ["a", "b"], "scores": [1, None]}, "a score is null, not a number"),
    ("ranking", "ranking", {"completions": ["a", "b"], "scores": [1, float("nan")]}, "a score is not a finite number"),
    ("ranking", "ranking", {"completions": ["a", "b"], "ranks": [1, 2, 3]}, "2 completions but 3 ranks"),
    ("ranking", "ranking", {"completions": ["a", "b"], "ranks": [1, "2"]}, "a rank is text, not a number"),
    (
        "ranking",
        "ranking",
        {"completions": FOUR, "preferences": [1, 1, 1]},
        "4 completions make 6 pairs but there are 3 preferences",
    ),
    (
        "ranking",
        "ranking",
        {"completions": ["a", "b"], "preferences": [3]},
        "a preference is 3, neither 0 (tie) nor 1 (first) nor 2 (second)",
    ),
    (
        "ranking",
        "ranking",
        {"completions": ["a", "b"], "best": 2},
        "'best' is 2, not the place of one of 2 completions, counted from 0",
    ),
    (
        "ranking",
        "ranking",
        {"completions": ["a", "b"], "best": True},
        "'best' is True, not the place of one of 2 completions, counted from 0",
    ),
    (
        "ranking",
        "ranking",
        {"completions": ["a", "b"], "best": 0, "scores": [1, 2]},
        "give one of scores, ranks, preferences, best; found: scores, best",
    ),
    (
        "ranking",
        "ranking",
        {"completions": ["a", "b"]},
        "a completion without a score: give scores, ranks, preferences, best, or objects with one of score, reward, "
        "rating, overall_score, is_correct",
    ),
    (
        "ranking",
        "ranking",
        {"completions": [{"score": 1}, {"text": "b", "score": 2}]},
        "a completion without a text (one of text, completion, response, solution, content, answer)",
    ),
    ("ranking", "ranking", {"completions": ["a", "a"], "scores": [1, 2]}, "the same completion with different scores"),
    (
        "ranking",
        "rated",
        {"completions": ["a", "b"], "ranks": [1, 2]},
        "no scores: ranks, preferences, best only give an order",
    ),
    ("ranking", "verdict", {"completions": ["a", "b"], "scores": [1, 0]}, "the scores are not true or false"),
    ("ranking", "verdict", {"completions": ["a", "b"], "best": 0}, "the scores are not true or false"),
    (
        "votes",
        "comparison",
        {"completions": FOUR, "votes": [1]},
        "votes are between two completions, here are 4",
    ),
    ("votes", "comparison", {"completions": ["a", "b"], "votes": []}, "no votes"),
    ("votes", "comparison", {"completions": ["a", "a"], "votes": [1]}, "both completions are the same"),
    (
        "votes",
        "comparison",
        {"completions": ["a", "b"], "votes": ["1"]},
        "a vote is '1', neither 0 (tie) nor 1 (first) nor 2 (second)",
    ),
    ("safety", "comparison", SAFE | {"response_1": "a"}, "both completions are the same"),
    ("safety", "comparison", SAFE | {"safer_response_id": 2}, "'safer_response_id' is neither true nor false"),
    ("safety", "comparison", SAFE | {"is_response_1_safe": None}, "no 'is_response_1_safe'"),
    ("games", "rated", {"a": "x", "b": "x", "outcome": 1}, "a and b are the same"),
    ("games", "rated", {"a": "x", "b": "y"}, "no 'outcome'"),
    (
        "games",
        "rated",
        {"a": "x", "b": "y", "outcome": 2},
        "'outcome' is 2, neither 1 (a won) nor 0.5 (tie) nor 0 (b won)",
    ),
    (
        "preference",
        "comparison",
        {"chosen": "a", "rejected": "b", "target": 0.4},
        "'target' is below 0.5: chosen would be the worse one",
    ),
    ("preference", "comparison", {"chosen": "a", "rejected": "b", "target": 1.5}, "'target' is not between 0 and 1"),
    (
        "preference",
        "verdict",
        {"chosen": "a", "rejected": "b", "target": 0.5},
        "'target' is 0.5: neither completion is the better one",
    ),
    (
        "preference",
        "comparison",
        {"chosen": "a", "rejected": "b", "chosen_safe": "yes", "rejected_safe": True},
        "'chosen_safe' is neither true nor false",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "row", "reason"), BAD)
def test_bad_rows_are_named(name: str, kind: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(name, kind, {"prompt": "q"} | row)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        ("prompt completions", "ranking", "ranking"),
        ("prompt completions scores", "comparison", "ranking"),
        ("prompt completions votes", "comparison", "votes"),
        ("instruction input completions votes", "comparison", "votes"),
        ("source instruction completions models", "ranking", "ultrafeedback"),
        ("prompt completion score", "ranking", "scored"),
        ("prompt completion score", "rated", "scored"),
        ("prompt a b outcome", "rated", "games"),
        (" ".join(SAFE), "comparison", "safety"),
    ],
)
def test_detection(columns: str, kind: Any, expected: str) -> None:
    assert detect(columns.split(), kind, "f").name == expected


def test_a_tied_ranking_makes_no_pair() -> None:
    tied = read("ranking", "comparison", {"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]})
    clear = read("ranking", "comparison", {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]})
    done = FORMATS["ranking"].finish["comparison"](tied + clear, Wanted())
    assert done.items == clear
    assert [(d.reason, d.where) for d in done.dropped] == [("all completions have the same score", W)]


@given(
    st.integers(2, 6).flatmap(
        lambda k: st.lists(st.integers(0, 2), min_size=k * (k - 1) // 2, max_size=k * (k - 1) // 2)
    )
)
def test_every_pair_gives_one_point(outcomes: list[int]) -> None:
    count = next(k for k in range(2, 7) if k * (k - 1) // 2 == len(outcomes))
    names = [f"c{i}" for i in range(count)]
    (found,) = read("ranking", "ranking", {"prompt": "q", "completions": names, "preferences": outcomes})
    assert sum(found.scores) == len(outcomes)
