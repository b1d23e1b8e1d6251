"""From scored completions to rows: worked by hand, and read back by the data gate."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.catalog import SELECTIONS
from rlhf_cli.data.completions import Candidate, by_prompt, read_completions
from rlhf_cli.data.curves import best_of_n, kl_bound, mean_curve
from rlhf_cli.data.prepare import load_examples
from rlhf_cli.data.selection import Selected, best, games, pairs, ranking, spin, threshold, verdict
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import SourceSettings


def group(prompt: str, *scores: float, texts: str = "abcdefgh", **more: Any) -> list[Candidate]:
    """Completions a, b, ... of a prompt."""
    return [
        Candidate(prompt, text, f"f:{prompt}{n}", score=score, **more)
        for n, (text, score) in enumerate(zip(texts, scores, strict=False))
    ]


def reasons(found: Selected) -> dict[str, int]:
    out: dict[str, int] = {}
    for one in found.dropped:
        out[one.reason] = out.get(one.reason, 0) + 1
    return out


def test_best_keeps_the_highest_of_each_prompt_and_the_share_over_all() -> None:
    groups = [group("p", 1, 3, 2), group("q", 5, 4, 0), group("r", -1, -2, -3)]
    found = best(groups, count=1, share=1.0)
    assert [(r["prompt"], r["completion"], r["score"]) for r in found.rows] == [
        ("p", "b", 3), ("q", "a", 5), ("r", "a", -1),
    ]  # fmt: skip
    assert len(found.dropped) == 6
    two = best(groups, count=2, share=0.5)
    assert [(r["prompt"], r["completion"]) for r in two.rows] == [("p", "b"), ("q", "a"), ("q", "b")]
    assert reasons(two) == {"not among the best of its prompt": 3, "below the share that is kept": 3}


def test_ties_go_to_the_first_and_a_text_is_kept_once() -> None:
    found = best([group("p", 2, 2, 2, texts="aba")], count=3, share=1.0)
    assert [r["completion"] for r in found.rows] == ["a", "b"]
    assert reasons(found) == {"the same completion again": 1}


def test_threshold_names_the_prompts_to_sample_again_with_their_columns() -> None:
    groups = [group("p", 1, 0.4, 0.5), group("q", 0.1, 0.2, facts={"answer": 7})]
    found = threshold(groups, min_score=0.5, at_most=None)
    assert [r["completion"] for r in found.rows] == ["a", "c"]
    assert found.again == [{"answer": 7, "prompt": "q"}]
    assert found.figures == {"prompts_without_one": 1}
    one = threshold(groups, min_score=0.5, at_most=1)
    assert [r["completion"] for r in one.rows] == ["a"]
    assert reasons(one) == {"its prompt has enough": 1, "score below min_score": 3}


def test_pairs_best_with_worst_or_all() -> None:
    found = pairs([group("p", 1, 3, 2)], which="best_worst", min_gap=0.0)
    assert found.rows == [
        {"prompt": "p", "chosen": "b", "rejected": "a", "chosen_score": 3, "rejected_score": 1}
    ]  # fmt: skip
    assert reasons(found) == {"neither the best nor the worst": 1}
    every = pairs([group("p", 1, 3, 2)], which="all", min_gap=0.0)
    assert [(r["chosen"], r["rejected"]) for r in every.rows] == [("b", "c"), ("b", "a"), ("c", "a")]
    assert (every.figures["mean_gap"], every.figures["smallest_gap"]) == (pytest.approx(4 / 3), 1)


@pytest.mark.parametrize("scores", [(1.0, 1.0), (1.0, 1.4)])
def test_no_pair_of_equal_scores_or_of_too_small_a_gap(scores: tuple[float, float]) -> None:
    found = pairs([group("p", *scores)], which="best_worst", min_gap=0.5)
    assert found.rows == []
    assert len(found.dropped) == 2
    alone = pairs([group("p", 1)], which="all", min_gap=0.0)
    assert reasons(alone) == {"the only completion of its prompt": 1}


def test_ranking_wants_different_texts_and_scores() -> None:
    groups = [group("p", 1, 2, 3), group("q", 1, 1), group("r", 1, 2, texts="aa")]
    found = ranking(groups, min_completions=2)
    assert found.rows == [{"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 2, 3]}]
    assert sum(reasons(found).values()) == 4


def test_verdicts_around_the_mean_of_the_prompt_or_a_threshold() -> None:
    groups = [group("p", 1, 2, 3)]
    own = verdict(groups, threshold=None, margin=0.0)
    assert [(r["completion"], r["label"]) for r in own.rows] == [("a", False), ("c", True)]
    fixed = verdict(groups, threshold=1.5, margin=0.6)
    assert [(r["completion"], r["label"]) for r in fixed.rows] == [("c", True)]
    assert fixed.figures == {"desirable": 1, "undesirable": 0}


def test_spin_sets_the_data_against_the_model() -> None:
    facts = {"completion": "gold"}
    items = [Candidate("p", "own", "f:1", facts=facts), Candidate("p", "gold ", "f:2", facts=facts),
             Candidate("q", "own", "f:3")]  # fmt: skip
    found = spin([items[:2], items[2:]], column="completion")
    assert found.rows == [{"prompt": "p", "chosen": "gold", "rejected": "own"}]
    assert reasons(found) == {
        "the same as the completion of the data": 1, "its prompt's row has no text in 'completion'": 1,
    }  # fmt: skip


def test_games_rate_the_models_of_all_prompts() -> None:
    """A beats B three times of four: log(3) log-odds, 191 points apart."""
    won = (1, 1, 1, 0)
    groups = [
        [*group(f"p{n}", float(x), by={"model": "A"}), *group(f"p{n}", 0.5, texts="z", by={"model": "B"})]
        for n, x in enumerate(won)
    ]
    found = games(groups, between="models", tie=0.0, samples=50)
    assert [r["outcome"] for r in found.rows] == [1.0, 1.0, 1.0, 0.0]
    first, second = found.figures["ratings"]
    assert (first["model"], first["games"], first["won"]) == ("A", 4, 0.75)
    assert first["rating"] - second["rating"] == pytest.approx(400 * math.log10(3), abs=1)
    assert first["low"] < first["rating"] < first["high"]
    drawn = games(groups, between="models", tie=1.0, samples=0)
    assert {r["outcome"] for r in drawn.rows} == {0.5}
    again = [
        [
            *group("p", 1.0, by={"model": "A", "weights": "1"}),
            *group("p", 0.0, texts="z", by={"model": "A", "weights": "2"}),
        ]
    ]
    found = games(again, between="models", tie=0.0, samples=0)
    assert [entry["model"] for entry in found.figures["ratings"]] == ["A (1)", "A (2)"], "trained again in its place"
    alone = [group("p", 1, 2, by={"model": "A"})]
    assert games(alone, between="models", tie=0.0, samples=0).rows == []
    (row,) = games(alone, between="completions", tie=0.0, samples=0).rows
    assert (row["a"], row["b"], row["outcome"]) == ("a", "b", 0.0)


# --- what comes out is data ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_the_gate_reads_what_is_selected(name: str, tmp_path: Path) -> None:
    entry = SELECTIONS[name]
    prompt = ({"role": "user", "content": "say"},)
    rows = [
        {"prompt": [dict(prompt[0], content=f"say {p}")], "completion": f"text {k}", "score": float(k),
         "row": {"completion": "gold"}, "by": {"model": f"m{k % 2}"}}
        for p in range(3) for k in range(4)
    ]  # fmt: skip
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read_completions([SourceSettings(path=str(path))], "error", None, scored=entry.scored)
    selected = entry.load()(by_prompt(found.items), **entry.settings().model_dump())
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps(r) + "\n" for r in selected.rows))
    examples, report = load_examples([SourceSettings(path=str(out))], entry.gives)
    assert report.bad_rows == 0
    assert len(examples.items) >= 3
    assert all(isinstance(item.prompt, tuple) for item in examples.items)


@given(st.data())
def test_every_completion_is_in_a_row_or_left_out_with_a_reason(data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6))
    texts = data.draw(st.lists(st.sampled_from("abc"), min_size=len(scores), max_size=len(scores)))
    groups = [group("p", *scores, texts="".join(texts))]
    kept = best(groups, count=2, share=1.0), threshold(groups, min_score=0.0, at_most=1)
    for found in (*kept, verdict(groups, threshold=None, margin=0.5)):
        assert len(found.rows) + len(found.dropped) == len(scores)
    made = pairs(groups, which="best_worst", min_gap=0.0)
    assert 2 * len(made.rows) + len(made.dropped) == len(scores)


# --- the best of n ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7))
def test_the_best_of_n_is_the_mean_over_all_subsets(scores: list[float]) -> None:
    curve = best_of_n(scores, len(scores))
    for n in range(1, len(scores) + 1):
        expected = np.mean([max(subset) for subset in combinations(scores, n)])
        assert curve[n - 1] == pytest.approx(expected, abs=1e-9)


def test_the_bound_on_the_divergence_of_the_best_of_n() -> None:
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_the_curve_goes_as_far_as_the_usual_number_of_scores() -> None:
    curve = mean_curve([[0.0, 1.0], [2.0, 4.0, 6.0], [2.0, 4.0], [9.0]])
    assert [point["n"] for point in curve] == [1, 2]
    assert curve[0]["score"] == pytest.approx((0.5 + 4 + 3) / 3)
    assert curve[1]["score"] == pytest.approx((1 + 16 / 3 + 4) / 3)
    assert mean_curve([[1.0]]) == mean_curve([]) == []
    assert mean_curve([[1.0, 2.0]])[0]["standard_error"] is None


# --- reading completions ---------------------------------------------------------------------------------

ROW = {"prompt": "say", "completion": "this", "score": 1.0}
WRONG: list[tuple[list[dict[str, Any]], str]] = [
    ([{"prompt": "say", "completion": "this"}], "no column 'score'; found: completion, prompt"),
    ([{"prompt": "say", "score": 1}], "no column 'completion'; found: prompt, score"),
    ([{"completion": "this", "score": 1}], "no column 'prompt'; found: completion, score"),
    ([{"prompt": "say", "completions": ["a", "b"]}], "no column 'scores'; found: completions, prompt"),
    ([ROW, ROW | {"score": math.nan}], "'score' is not a finite number"),
    ([ROW, ROW | {"score": "high"}], "'score' is text, not a number"),
    ([ROW, {"prompt": "say", "completion": "this"}], "no 'score'"),
    ([ROW, ROW | {"finished": 1}], "'finished' is neither true nor false"),
    ([ROW, ROW | {"row": [1]}], "'row' is a list, not an object"),
    ([ROW, ROW | {"completion": ""}], "empty completion"),
    ([{"prompt": "p", "completions": ["a", "b"], "scores": [1]}], "2 completions and 1 scores"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_completions_are_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError) as caught:
        read_completions([SourceSettings(path=str(path))], "error", None, scored=True)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_score_that_is_null_is_read_and_not_usable(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(ROW | {"score": None}) + "\n" + json.dumps(ROW) + "\n")
    found = read_completions([SourceSettings(path=str(path))], "error", None, scored=True)
    assert [item.score for item in found.items] == [None, 1.0]


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"prompt": "say", "text": "this", "reward": 2.5}) + "\n")
    source = SourceSettings(path=str(path), columns={"completion": "text", "score": "reward"})
    (item,) = read_completions([source], "error", None, scored=True).items
    assert (item.completion, item.score, item.where) == ("this", 2.5, f"{path}:1")
