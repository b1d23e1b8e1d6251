"""Work dealt out to processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.shares import shares


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 5)), max_size=40), st.integers(1, 5))
def test_every_piece_goes_to_one_process_and_none_has_far_more(pieces: list[tuple[int, int]], count: int) -> None:
    costs, families = [float(c) for c, _ in pieces], [f for _, f in pieces]
    dealt = shares(costs, families, count)
    assert sorted(i for share in dealt for i in share) == list(range(len(pieces)))
    assert all(share == sorted(share) for share in dealt)
    loads = [sum(costs[i] for i in share) for share in dealt]
    assert max(loads) <= sum(costs) / count + max([*costs, sum(costs) / count])
    assert dealt == shares(costs, families, count)


def test_a_family_stays_together_up_to_a_fair_share() -> None:
    assert shares([1.0] * 6, "aabbcc", 3) == [[0, 1], [2, 3], [4, 5]]
    assert shares([1.0] * 4, "aaaa", 2) == [[0, 1], [2, 3]]
    assert shares([5.0, 1.0, 1.0, 1.0], range(4), 2) == [[0], [1, 2, 3]]
    assert shares([3.0], "a", 2) == [[0], []]
