"""The statistics of evaluations against values worked by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data import bench, duel
from rlhf_cli.data import statistics as st


def test_wilson() -> None:
    assert st.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)  # (0.8 + 0.19207 -+ 0.31359) / 1.38415
    assert st.wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)  # z^2 / (n + z^2)
    assert st.wilson(10, 10).high == pytest.approx(1.0)
    assert st.wilson(0, 0) == (None, None)
    assert st.UNKNOWN.holds(0.5)
    assert not st.UNKNOWN.above(0.5)


def test_means_and_correlations() -> None:
    found = st.mean_of([1.0, 2.0, 3.0, 6.0])  # mean 3, variance 14 / 3
    assert found["standard_error"] == pytest.approx(math.sqrt(14 / 3 / 4))
    assert found["high"] == pytest.approx(3 + 1.959964 * math.sqrt(14 / 12))
    assert st.mean_of([4.0])["standard_error"] is None
    assert st.correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert st.correlation([1, 1, 1], [1, 3, 2]) is None
    assert st.fisher(0.5, 28) == pytest.approx((0.156028, 0.735818), abs=1e-5)  # tanh(0.549306 -+ 0.391993)
    assert st.fisher(1.0, 28) == st.fisher(0.3, 3) == (None, None)
    assert st.ranks([3.0, 1.0, 3.0, 0.0]).tolist() == [3.5, 2.0, 3.5, 1.0]
    assert st.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert st.kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert st.kendall([1, 1], [1, 2]) is None
    assert st.sigmoid([-1000.0, 0.0, 1000.0]).tolist() == [0.0, 0.5, 1.0]


def test_calibration() -> None:
    """Bins of 0.5: two at 0.1 and 0.3 with one hit, two at 0.9 and 1.0 with two."""
    found = st.calibration([0.1, 0.3, 0.9, 1.0], [1, 0, 1, 1], bins=2)
    assert found["ece"] == pytest.approx(0.5 * abs(0.5 - 0.2) + 0.5 * abs(1 - 0.95))
    assert [row["count"] for row in found["table"]] == [2, 2]
    assert st.histogram([0, 1, 1, 2], 2) == {"edges": [0.0, 1.0, 2.0], "counts": [1, 3]}


def test_the_bootstrap_agrees_with_the_normal_interval_and_repeats() -> None:
    values = np.random.default_rng(1).normal(2, 1, 400)
    found = st.bootstrap(st.ratio(values, np.ones(400)), 400, seed=7)
    plain = st.mean_of(values)
    assert found == pytest.approx((plain["low"], plain["high"]), abs=0.02)
    assert found == st.bootstrap(st.ratio(values, np.ones(400)), 400, seed=7)
    assert found != st.bootstrap(st.ratio(values, np.ones(400)), 400, seed=8)
    assert st.bootstrap(lambda w: 1.0, 1, seed=0) == (None, None)
    assert st.bootstrap(lambda w: math.nan, 5, seed=0) == (None, None)


def test_the_win_rate_at_equal_lengths() -> None:
    draw = np.random.default_rng(0)
    gap = draw.normal(30, 40, 20000)  # longer by 30 on average
    chance = st.sigmoid(0.3 + 2.0 * np.tanh(gap / gap.std()))
    won = (draw.random(20000) < chance).astype(float)
    level = st.length_controlled(won, gap)
    assert level == pytest.approx(float(st.sigmoid(0.3)), abs=0.02)
    assert won.mean() > 0.7
    assert st.length_controlled(1 - won, -gap) == pytest.approx(1 - level, abs=1e-9)
    twice = st.length_controlled(won[:50], gap[:50], np.full(50, 2.0))
    assert twice == pytest.approx(st.length_controlled(np.tile(won[:50], 2), np.tile(gap[:50], 2)), abs=1e-9)
    # no gap: 4 (0.75 - p) = 0.01 a
    p = st.length_controlled([1, 1, 1, 0], [0, 0, 0, 0])
    assert 4 * (0.75 - p) == pytest.approx(0.01 * math.log(p / (1 - p)), abs=1e-9)
    assert 0.99 < st.length_controlled(np.ones(50), np.arange(50)) < 1  # always won: finite by the ridge


def pair(
    a: float, b: float, lengths: tuple[int, int] = (3, 3), target: float = 1.0, source: str = "s", prompt: int = -1
) -> bench.Row:
    """Of a prompt of its own, unless one is given."""
    name = str(next(NUMBERS) if prompt < 0 else prompt)
    return {"kind": "pairs", "source": source, "scores": [a, b], "lengths": list(lengths), "target": target,
            "prompt": name}  # fmt: skip


NUMBERS = itertools.count(1000)


def test_pairs() -> None:
    rows = [pair(2, 1, (2, 5)), pair(1, 1, (5, 2)), pair(0, 3, (4, 1), source="t"), pair(5, 0, target=0.5)]
    found: dict[str, Any] = bench.figures(rows, seed=0)["pairs"]
    assert (found["accuracy"], found["count"], found["ties"], found["undecided"]) == (0.5, 3, 1, 1)
    assert found["verdict"] == bench.CHANCE
    assert found["chosen_shorter"]["accuracy"] == 1.0
    assert found["chosen_longer"]["accuracy"] == 0.25
    assert found["longer_is_chosen"]["accuracy"] == pytest.approx(2 / 3)
    assert found["by_source"]["t"]["accuracy"] == 0.0
    sure = [pair(n < 80, n >= 80) for n in range(100)]  # sigmoid(1) = 0.731 said, 0.8 found
    found = bench.pairs(sure, 0)
    assert found["calibration"]["ece"] == pytest.approx(0.8 - 0.731059, abs=1e-6)
    assert found["verdict"] == bench.ABOVE
    assert (found["low"], found["high"]) == st.wilson(80, 100)
    assert bench.pairs([pair(0, 1) for _ in range(20)], 0)["verdict"] == bench.BELOW
    alike = bench.pairs([pair(n < 15, n >= 15, prompt=n) for n in range(20) for _ in range(10)], 0)
    assert (alike["accuracy"], alike["pairs"], alike["prompts"]) == (0.75, 200, 20)
    assert alike["low"] < 0.6, "that of 200 pairs would be 0.686"


def test_rankings_and_scores() -> None:
    rows = [
        {"kind": "rankings", "source": "s", "scores": [3, 2, 1], "gold": [3, 2, 1], "lengths": [1, 1, 1]},
        {"kind": "rankings", "source": "s", "scores": [1, 1, 2], "gold": [3, 1, 1], "lengths": [1, 1, 1]},
    ]
    found = bench.figures(rows, 0)["rankings"]
    assert (found["accuracy"], found["pairs"]) == (3.5 / 5, 5)
    assert found["kendall_tau"]["mean"] == pytest.approx((1 - 1 / 2) / 2)  # of the second: -1 / sqrt(2 * 2)
    assert found["top_1"]["mean"] == 0.5
    assert found["top_1_by_chance"] == pytest.approx(1 / 3)
    rated = [{"kind": "scored", "source": "s", "scores": [x], "gold": [x * x], "lengths": [1]} for x in range(1, 9)]
    found = bench.scored(rated, 0)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["verdict"] == bench.ABOVE
    assert bench.scored([row | {"scores": [1]} for row in rated], 0)["verdict"] == bench.CHANCE


def test_steps_are_balanced() -> None:
    same = {"kind": "steps", "source": "s", "probabilities": [0.9, 0.9, 0.9], "score": 0.7}
    always: list[bench.Row] = [same | {"right": [True, None, n > 2]} for n in range(12)]
    found = bench.figures(always, 0)["steps"]
    assert (found["accuracy"], found["balanced_accuracy"], found["steps"]) == (21 / 24, 0.5, 24)
    assert found["verdict"] == bench.CHANCE
    assert found["solution_accuracy"]["accuracy"] == 0.75
    assert "nothing to tell apart" in bench.steps([row for row in always if row["right"][2]], 0)["verdict"]


def test_duels_count_prompts_not_matches() -> None:
    many = [{"prompt": n, "outcome": float(n < 15), "lengths": [9, 9]} for n in range(20) for _ in range(4)]
    once = many[::4]
    found, single = duel.figures(many, 0), duel.figures(once, 0)
    assert (found["win_rate"], found["wins"], found["matches"], found["prompts"]) == (0.75, 60, 80, 20)
    assert (found["low"], found["high"]) == (single["low"], single["high"])
    assert found["verdict"] == "better"
    assert found["length_controlled_low"] < found["length_controlled"] - 0.05 < found["length_controlled_high"] - 0.1
    assert duel.verdict(st.Interval(0.1, 0.4)) == "worse"
    assert duel.verdict(st.Interval(0.4, 0.6)) == "no difference seen"
    asked = duel.asked([
        {"probability": 0.6, "first": 0.9, "second": 0.3, "mass": 0.25},
        {"probability": 0.5, "first": None, "second": None},
    ])  # fmt: skip
    assert asked["mean_probability"] == pytest.approx(0.55)
    assert asked["label_probability"] == 0.25
    assert duel.asked([{"probability": 0.6, "first": 0.9, "second": 0.3}])["label_probability"] is None, "not known"
    assert asked["first_place"] == pytest.approx((0.9 + 0.7) / 2)
    assert (asked["position_bias"], asked["flips"]) == (pytest.approx(0.3), 1.0)
