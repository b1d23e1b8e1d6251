"""Running statistics and scaling: against numpy over everything seen, clipped and counted, exact after a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.rollouts.normalise import Running, Scaling, scaling_of

ALL = np.ones(4, dtype=bool)


@pytest.mark.parametrize("sizes", [(1,), (5, 1, 7), (0, 3), (1, 1, 1, 1), (64, 64, 64)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batches_merge_to_the_statistics_of_all(sizes: tuple[int, ...], offset: float) -> None:
    random, running = np.random.default_rng(3), Running()
    batches = [random.normal(offset, 2.5, n) for n in sizes]
    for batch in batches:
        running.update(batch)
    seen = np.concatenate(batches)
    assert running.count == len(seen)
    assert running.mean == pytest.approx(seen.mean(), rel=1e-12)
    if len(seen) > 1:
        assert running.std == pytest.approx(seen.std(), rel=1e-9)


@pytest.mark.parametrize("values", [[], [3.0], [3.0] * 7, [0.1 + 0.2, 0.3]])
def test_there_is_no_scale_before_values_differ(values: list[float]) -> None:
    running = Running()
    running.update(np.array(values))
    assert running.std == 1.0


def test_a_checkpoint_goes_on_exactly() -> None:
    random, one, two = np.random.default_rng(5), Running(), Running()
    for n in range(6):
        batch = random.normal(1.0, 3.0, 9)
        one.update(batch)
        if n == 3:
            two = Running()
            two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        elif n > 3:
            two.update(batch)
    assert two == one


def test_stored_statistics() -> None:
    scores, tokens, figures = Scaling(2.0, 4.0)(np.array([2.0, 6.0, 0.0, 10.0]), None, ALL, learn=True)
    assert scores.tolist() == [0.0, 1.0, -0.5, 2.0]
    assert tokens is None
    assert figures == {}


def test_without_statistics_nothing_is_changed() -> None:
    given = np.array([0.1, -1e300, 5e-324, 0.0])
    scores, _, figures = Scaling()(given, None, ALL, learn=True)
    assert scores.tobytes() == given.tobytes()
    assert figures == {}


def test_running_learns_first_and_divides() -> None:
    """The first rollout is on its own scale already."""
    scaling = Scaling(running=Running())
    given = np.array([1.0, 2.0, 3.0, 6.0])
    scores, _, figures = scaling(given, None, ALL, learn=True)
    np.testing.assert_allclose(scores, given / given.std())
    assert figures == {"raw_mean": 3.0}
    later = np.array([5.0, -1.0, 0.0, 0.0])
    both = np.concatenate([given, later])
    scores, _, _ = scaling(later, None, ALL, learn=True)
    np.testing.assert_allclose(scores, later / both.std())


def test_shift_takes_the_mean_off_too() -> None:
    given = np.array([1.0, 2.0, 3.0, 6.0])
    scores, _, _ = Scaling(running=Running(), shift=True)(given, None, ALL, learn=True)
    np.testing.assert_allclose(scores, (given - 3.0) / given.std())
    assert scores.mean() == pytest.approx(0.0, abs=1e-12)


def test_evaluation_changes_nothing() -> None:
    scaling = Scaling(running=Running())
    scaling(np.array([1.0, 2.0, 3.0, 6.0]), None, ALL, learn=True)
    before = scaling.running.state_dict()  # type: ignore[union-attr]
    std = scaling.running.std  # type: ignore[union-attr]
    scores, _, _ = scaling(np.array([100.0, 0.0, 0.0, 0.0]), None, ALL, learn=False)
    assert scaling.running.state_dict() == before  # type: ignore[union-attr]
    assert scores[0] == 100.0 / std


def test_rows_that_are_not_valid_are_neither_learned_nor_scaled() -> None:
    scaling = Scaling(5.0, 2.0, clip=1.0)
    valid = np.array([True, False, True, True])
    scores, _, figures = scaling(np.array([5.0, 0.0, 9.0, 6.0]), None, valid, learn=True)
    assert scores.tolist() == [0.0, 0.0, 1.0, 0.5]
    assert figures == {"clipped": 1.0}, "the invalid row would be clipped at -2.5"
    running = Running()
    Scaling(running=running)(np.array([1.0, 0.0, 3.0, 5.0]), None, valid, learn=True)
    assert (running.count, running.mean) == (3, 3.0)


def test_rewards_inside_a_completion_share_the_scale_of_what_it_gets_in_all() -> None:
    """In all, (total - mean) / std; the mean leaves at the end."""
    sequence = np.array([1.0, 0.0, -2.0, 0.5])
    tokens = [np.array([0.0, 2.0, 1.0]), np.array([4.0]), np.array([0.0, 0.0]), np.array([-1.0, 1.0])]
    totals = np.array([4.0, 4.0, -2.0, 0.5])
    whole, dense, figures = Scaling(running=Running(), shift=True)(sequence, tokens, ALL, learn=True)
    assert dense is not None
    got = whole + np.array([row.sum() for row in dense])
    np.testing.assert_allclose(got, (totals - totals.mean()) / totals.std())
    np.testing.assert_allclose(dense[0], tokens[0] / totals.std())
    assert figures["raw_mean"] == totals.mean()


def test_each_reward_is_clipped_and_completions_counted_once() -> None:
    tokens = [np.array([0.0, 5.0, -5.0]), np.array([1.0]), np.array([0.5, 0.0]), np.array([0.0, 0.0])]
    whole, dense, figures = Scaling(clip=1.0)(np.array([3.0, 0.0, 0.0, -2.0]), tokens, ALL, learn=True)
    assert whole.tolist() == [1.0, 0.0, 0.0, -1.0]
    assert dense is not None
    assert [row.tolist() for row in dense] == [[0.0, 1.0, -1.0], [1.0], [0.5, 0.0], [0.0, 0.0]]
    assert figures == {"clipped": 2.0}
    assert tokens[0].tolist() == [0.0, 5.0, -5.0], "the input is left alone"


def test_what_a_recipe_asks_for() -> None:
    running = scaling_of(RewardSettings(run="rm", normalize="running", shift=True, clip=2.0))
    assert (running.running, running.shift, running.clip) == (Running(), True, 2.0)
    assert scaling_of(RewardSettings(run="rm"), 1.5, 0.5) == Scaling(1.5, 0.5)
    assert scaling_of(RewardSettings(function="a.py:f")) == Scaling()


def test_a_scale_that_does_not_move() -> None:
    """Running statistics and the clip in their units are left out; what is fixed stays."""
    moving = Scaling(running=Running(), shift=True, clip=0.5)
    moving(np.array([1.0, 2.0, 3.0, 6.0]), None, ALL, learn=True)
    given = np.array([7.0, -7.0, 0.0, 0.1])
    scores, _, figures = moving.still(given, None, ALL, learn=False)
    assert (scores.tolist(), figures) == (given.tolist(), {})
    fixed = Scaling(2.0, 4.0, clip=1.0)
    assert fixed.still is fixed
