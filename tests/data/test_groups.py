"""Examples that are made of several rows, and those that an objective cannot use."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_cli.data.examples import Comparison, Ranking, Rated
from rlhf_cli.data.formats_ranked import Game, rate
from rlhf_cli.data.grouping import rank_by_score
from rlhf_cli.data.reading import Wanted
from rlhf_cli.data.suited import suited
from rlhf_cli.recipe.settings.data import RatingSettings

W = "f:1"


def parted(items: list[Any], wanted: Wanted) -> tuple[list[Any], Any, Any]:
    """`suited`, what is good as a list."""
    good, bad, left = suited(items, wanted)
    return list(good), bad, left


def finish(found: list[Game], **ratings: Any) -> Any:
    return rate(found, Wanted(ratings=RatingSettings(**ratings)))


# --- rows of one prompt ----------------------------------------------------------------------------------


def test_scored_rows_make_one_ranking_a_prompt() -> None:
    rows = [
        Rated("p", "a", 1.0, "f:1"), Rated("q", "x", 1.0, "f:2"), Rated("p", "b", 3.0, "f:3"),
        Rated("p", "c", 1.0, "f:4"), Rated("q", "y", 1.0, "f:5"), Rated("r", "z", 0.0, "f:6"),
        Rated("p", "d", 1.0, "f:7"), Rated("p", "d", 2.0, "f:8"),
    ]  # fmt: skip
    rankings, left = rank_by_score(rows)
    assert rankings == [Ranking("p", ("a", "b", "c"), (1.0, 3.0, 1.0), "f:1 with 3, 4")]
    assert [(d.reason, d.where) for d in left] == [
        ("same completion, other score", "f:7"),
        ("same completion, other score", "f:8"),
        ("no other score at the same prompt", "f:2"),
        ("no other score at the same prompt", "f:5"),
        ("only one completion of its prompt", "f:6"),
    ]


# --- what an objective can use ---------------------------------------------------------------------------


def test_what_the_objective_cannot_use() -> None:
    plain = Comparison("q", "a", "b", "f:1")
    split = Comparison("q", "a", "b", "f:2", target=0.5)
    safe = Comparison("q", "a", "b", "f:3", safety=(True, False))
    against = Comparison("q", "a", "b", "f:4", safety=(False, True))
    both = Comparison("q", "a", "b", "f:5", safety=(False, False))
    items: list[Any] = [plain, split, safe, against, both]
    good, bad, left = parted(items, Wanted())
    assert good == [plain, safe, against, both]
    assert [(d.reason, d.where) for d in left] == [("neither completion is the better one (target 0.5)", "f:2")]
    assert bad == []
    assert list(suited(items, Wanted(("target",)))[0]) == items
    good, bad, left = parted(items, Wanted(("safety",)))
    assert good == [safe, both]
    assert [(d.reason, d.where) for d in bad] == [
        ("not said whether chosen and rejected are safe (chosen_safe, rejected_safe)", "f:1"),
        ("not said whether chosen and rejected are safe (chosen_safe, rejected_safe)", "f:2"),
        ("labels contradict safety: chosen is unsafe and rejected safe", "f:4"),
    ]


def test_rankings_without_an_order_are_left_out() -> None:
    tied = Ranking("q", ("a", "b"), (1.0, 1.0), "f:1")
    tops = Ranking("q", ("a", "b", "c"), (1.0, 1.0, 0.0), "f:2")
    clear = Ranking("q", ("a", "b", "c"), (1.0, 0.0, 0.0), "f:3")
    good, bad, left = parted([tied, tops, clear], Wanted())
    assert (good, bad) == ([tops, clear], [])
    assert [(d.reason, d.where) for d in left] == [("all completions have the same score", "f:1")]
    good, bad, left = parted([tied, tops, clear], Wanted(("best",)))
    assert (good, bad) == ([clear], [])
    assert left[1].reason == "several completions share the best score"
    strict = Ranking("q", ("a", "b", "c"), (1.0, 2.0, 0.0), "f:4")
    good, bad, left = parted([tied, tops, clear, strict], Wanted(("strict",)))
    assert (good, bad) == ([strict], [])
    assert [(d.reason, d.where) for d in left[1:]] == [
        ("two completions have the same score", "f:2"), ("two completions have the same score", "f:3")
    ]  # fmt: skip


# --- games -----------------------------------------------------------------------------------------------


def won(prompt: str, a: str, b: str, outcome: float = 1.0, where: str = W) -> Game:
    return Game(prompt, a, b, outcome, where)


def test_games_make_ratings() -> None:
    found = [won("q", "x", "y", where="f:1"), won("q", "z", "y", 0.5, "f:2"), won("q", "x", "z", where="f:3")]
    done = finish(found, method="elo", target="logit")
    assert [(r.prompt, r.completion, r.where) for r in done.items] == [
        ("q", "x", "f:1"), ("q", "y", "f:1"), ("q", "z", "f:2")
    ]  # fmt: skip
    # Elo from 1500: x beats y: 1516, 1484; z ties y: expected 1/(1 + 10^(-16/400)) = 0.5230 for z, so z loses
    # 32 * 0.0230 = 0.7363: z 1499.2637, y 1484.7363; x beats z: expected 1/(1 + 10^(-16.7363/400)) = 0.524064, x gains
    # 15.22996: x 1531.22996, z 1484.03371. Around their mean of 1500, over 400 / ln 10 = 173.71779:
    assert [r.score for r in done.items] == pytest.approx(
        [31.22996 / 173.71779, -15.2637 / 173.71779, -15.96629 / 173.71779], abs=1e-5
    )
    assert done.warnings == ()


def test_scaled_ratings() -> None:
    games = [won("q", "x", "y"), won("q", "y", "z")]
    scores = {t: [r.score for r in finish(games, target=t).items]
              for t in ("zscore", "minmax", "logit")}  # fmt: skip
    # The middle one lies in the middle: z-scores of (d, 0, -d) are +-sqrt(3/2).
    assert scores["zscore"] == pytest.approx([1.5**0.5, 0, -(1.5**0.5)])
    assert scores["minmax"] == pytest.approx([1, 0.5, 0])
    assert scores["logit"][0] == pytest.approx(-scores["logit"][2])


def test_games_that_never_met() -> None:
    games = [won("q", "x", "y"), won("r", "x", "y"), won("r", "x", "y")]
    done = finish(games)
    assert len(done.items) == 4
    assert done.warnings == (
        "the games fall into 2 groups of completions that never met, so ratings of different groups are on different "
        "scales; data.ratings.scope: prompt normalises each prompt by itself",
    )
    alone = finish(games, scope="prompt")
    assert alone.warnings == ()
    assert [r.score for r in alone.items] == pytest.approx([1, -1, 1, -1])
    assert finish([]).items == []
