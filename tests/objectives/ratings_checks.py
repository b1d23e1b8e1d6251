"""Ratings from games."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import ratings
from tests.objectives.support import Check, checks_of, close, doubles, refuses

ELO: dict[str, Any] = {"k": 32.0, "start": 1500.0, "shuffles": 1, "seed": 0}
Games = tuple[Tensor, Tensor, Tensor]


def games(*played: tuple[int, int, float]) -> Games:
    """a, b and outcome."""
    a, b, outcome = zip(*played, strict=True)
    return torch.tensor(a), torch.tensor(b), torch.tensor(outcome, dtype=torch.float64)


CYCLE = games((0, 1, 1), (1, 2, 1), (2, 0, 0.5), (0, 1, 1), (0, 2, 1), (2, 1, 0.25))


def check_elo_by_hand(m: Any) -> None:
    # Equals: half of k. Then 1516 against 1484: E = 1 / (1 + 10^(-32 / 400)) = 0.5459223, the favourite loses.
    close(m.elo(*games((0, 1, 1)), 2, **ELO), [1516.0, 1484.0])
    both = m.elo(*games((0, 1, 1), (0, 1, 0)), 3, **ELO)
    close(both, [1516 - 32 * 0.5459223, 1484 + 32 * 0.5459223, 1500.0], 1e-7)
    close(m.elo(*games((0, 1, 0.5)), 2, **ELO), [1500.0, 1500.0])
    close(m.elo(*games((1, 0, 0.75)), 2, **(ELO | {"k": 8.0, "start": 0.0})), [-2.0, 2.0])
    # 400 points ahead means odds of 10: 1 / 11 of k for a win.
    close(m.elo(*games((0, 1, 1), (0, 1, 1)), 2, **(ELO | {"k": 400.0})), [1700 + 400 / 11, 1300 - 400 / 11])
    assert m.elo(*games((0, 1, 1)), 2, **ELO).dtype == torch.float64


def check_elo_orders(m: Any) -> None:
    # Ten wins, then ten losses: the last winner is ahead, unless orders are averaged.
    swing = games(*[(0, 1, 1)] * 10, *[(0, 1, 0)] * 10)
    forward, backward = m.elo(*swing, 2, **ELO), m.elo(*(x.flip(0) for x in swing), 2, **ELO)
    assert float(forward[1]) > 1550
    close(backward, forward.flip(0), 1e-12)
    close(m.elo(*swing, 2, **(ELO | {"seed": 5})), forward, 1e-12)  # as given: nothing is drawn
    many = ELO | {"shuffles": 300}
    one, again, other = (m.elo(*swing, 2, **(many | {"seed": s})) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    close(one.sum(), 3000.0)
    assert abs(float(one[0]) - 1500) < 10
    # Two orders are two different ones, so their average is not one of them.
    two = m.elo(*swing, 2, **(ELO | {"shuffles": 2}))
    first, second = (m.elo(*(x[order] for x in swing), 2, **ELO) for order in _orders(20, 2))
    close(two, (first + second) / 2, 1e-12)
    assert not torch.equal(first, second)


def _orders(size: int, count: int) -> list[Tensor]:
    """The random orders of seed 0."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(size, generator=generator) for _ in range(count)]


def check_ratings_refuse(m: Any) -> None:
    for wrong in (
        games((0, 1, 1.5)),
        games((0, 1, -0.5)),
        games((0, 1, math.nan)),
        games((1, 1, 1)),
        games((0, 1, 1), (2, 2, 0.5)),
    ):
        assert refuses(ValueError, m.elo, *wrong, 3, **ELO)
        assert refuses(ValueError, m.bradley_terry_mle, *wrong, 3, l2=0.1)
    for l2 in (0.0, -1.0):
        assert refuses(ValueError, m.bradley_terry_mle, *CYCLE, 3, l2=l2)


def check_components(m: Any) -> None:
    a, b, _ = games((0, 3, 1), (5, 1, 1), (3, 6, 1), (1, 5, 0))
    assert m.components(a, b, 8).tolist() == [0, 1, 2, 0, 4, 1, 0, 7]
    none = torch.zeros(0, dtype=torch.int64)
    assert m.components(none, none, 3).tolist() == [0, 1, 2]
    # A long chain in a bad order, and its ends swapped.
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    chain = order[:-1], order[1:]
    assert not m.components(*chain, 200).any()
    assert not m.components(*reversed(chain), 200).any()
    assert m.components(torch.arange(1, 3), torch.arange(2), 3).tolist() == [0, 0, 0]


def check_bradley_terry_mle_by_hand(m: Any) -> None:
    # Of 4 games 0 wins 3. At theta = (t, -t): 3 - 4 sigma(2 t) = l2 t.
    four = games((0, 1, 1), (0, 1, 1), (1, 0, 0), (1, 0, 1))
    theta = m.bradley_terry_mle(*four, 2, l2=0.1)
    t = float(theta[0])
    assert math.isclose(3 - 4 / (1 + math.exp(-2 * t)), 0.1 * t, abs_tol=1e-12)
    close(theta, [t, -t], 1e-12)
    # With hardly a ridge the odds are those of the games: difference log 3.
    thin = m.bradley_terry_mle(*four, 2, l2=1e-6)
    close(thin[0] - thin[1], math.log(3), 1e-5)
    close(m.bradley_terry_mle(*games((0, 1, 0.5)), 3, l2=0.1), [0.0, 0.0, 0.0])
    close(m.bradley_terry_mle(*games((0, 1, 0.75)), 2, l2=1e-8).diff(), [-math.log(3)], 1e-6)
    assert theta.dtype == torch.float64


def check_bradley_terry_mle_is_the_maximum(m: Any) -> None:
    a, b, outcome = CYCLE
    theta = m.bradley_terry_mle(*CYCLE, 3, l2=0.3)
    surprise = outcome - torch.sigmoid(theta[a] - theta[b])
    # The wins above what is expected pay for the ridge.
    close(torch.zeros(3, dtype=torch.float64).index_add(0, a, surprise).index_add(0, b, -surprise), 0.3 * theta, 1e-12)
    close(theta.sum(), 0.0, 1e-12)
    # Twins that always beat a third: (t, t, -2 t) with sigma(-3 t) = l2 t.
    twins = m.bradley_terry_mle(*games((0, 1, 0.5), (0, 2, 1), (1, 2, 1)), 3, l2=0.3)
    close(torch.sigmoid(-3 * twins[:2]), 0.3 * twins[:2], 1e-12)
    close(twins[2], -2 * twins[0], 1e-12)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    close(m.bradley_terry_mle(*(x[order] for x in CYCLE), 3, l2=0.3), theta, 1e-12)
    close(m.bradley_terry_mle(b, a, 1 - outcome, 3, l2=0.3), theta, 1e-12)


def check_bradley_terry_mle_of_one_sided_games(m: Any) -> None:
    # A ladder in which the higher always wins, many times over: finite, in order, at the maximum.
    a, b = torch.arange(1, 12).repeat(500), torch.arange(11).repeat(500)
    theta = m.bradley_terry_mle(a, b, torch.ones(len(a)), 12, l2=0.01)
    assert bool((theta.diff() > 0).all())
    surprise = 1 - torch.sigmoid(theta[a] - theta[b])
    gradient = torch.zeros(12, dtype=torch.float64).index_add(0, a, surprise).index_add(0, b, -surprise)
    close(gradient, 0.01 * theta, 1e-9)
    # Plain Newton steps never settle on these games.
    wins = ((5, 0, 30), (5, 1, 3), (4, 3, 1), (2, 1, 30), (3, 2, 30))
    a, b, outcome = games(*((i, j, 1.0) for i, j, times in wins for _ in range(times)), (4, 0, 0.57))
    theta = m.bradley_terry_mle(a, b, outcome, 6, l2=0.01)
    surprise = outcome - torch.sigmoid(theta[a] - theta[b])
    gradient = torch.zeros(6, dtype=torch.float64).index_add(0, a, surprise).index_add(0, b, -surprise)
    close(gradient, 0.01 * theta, 1e-9)


def check_bradley_terry_mle_of_an_upset(m: Any) -> None:
    a, b = torch.arange(1, 12).repeat(500), torch.arange(11).repeat(500)
    theta = m.bradley_terry_mle(a, b, torch.ones(len(a)).index_fill(0, torch.tensor([7]), 0.0), 12, l2=0.01)
    assert bool((theta.diff() > 0).all())


def check_bradley_terry_mle_by_component(m: Any) -> None:
    a, b, outcome = CYCLE
    alone = m.bradley_terry_mle(*CYCLE, 3, l2=0.1)
    # The same three twice, interleaved, the second time turned, and one who never plays.
    theta = m.bradley_terry_mle(
        torch.cat([2 * a, 2 * b + 1]), torch.cat([2 * b, 2 * a + 1]), torch.cat([outcome, outcome]), 7, l2=0.1
    )
    close(theta[[0, 2, 4]], alone, 1e-12)
    close(theta[[1, 3, 5]], -alone, 1e-12)
    assert float(theta[6]) == 0.0
    # One component settled from the start beside one that is not: a draw, and a win.
    mixed = m.bradley_terry_mle(*games((0, 1, 0.5), (2, 3, 1)), 4, l2=0.1)
    close(mixed[:2], [0.0, 0.0])
    close(torch.sigmoid(mixed[3] - mixed[2]), 0.1 * mixed[2], 1e-12)
    none = torch.zeros(0, dtype=torch.int64)
    assert m.bradley_terry_mle(none, none, doubles(), 2, l2=0.1).tolist() == [0.0, 0.0]


def check_to_elo(m: Any) -> None:
    # Odds of 10 are 400 points; 1 is 400 / log 10 = 173.7178.
    close(m.to_elo(doubles(0, math.log(10), 1)), [1500.0, 1900.0, 1673.7178], 1e-7)
    close(m.from_elo(doubles(1500, 1900, 1100)), [0.0, math.log(10), -math.log(10)])
    # sigma(theta_a - theta_b) is Elo's win probability.
    one, two = 1580.0, 1420.0
    theta = m.from_elo(doubles(one, two))
    close(torch.sigmoid(theta[0] - theta[1]), 1 / (1 + 10 ** ((two - one) / 400)))


def check_normalise_by_hand(m: Any) -> None:
    x, group = doubles(1, 4, 10, 7, 3, 2), torch.tensor([5, 0, 5, 0, 9, 0])
    # Group 5: 1, 10; group 0: 4, 7, 2 with mean 13 / 3; group 9: 3 alone.
    deviation = math.sqrt((16 + 49 + 4) / 3 - (13 / 3) ** 2)
    scores = [(v - 13 / 3) / deviation for v in (4, 7, 2)]
    close(m.normalise(x, group, target="zscore"), [-1.0, scores[0], 1.0, scores[1], 0.0, scores[2]])
    close(m.normalise(x, group, target="minmax"), [0.0, 0.4, 1.0, 1.0, 0.5, 0.0])
    close(m.normalise(x, group, target="logit"), [-4.5, -1 / 3, 4.5, 8 / 3, 0.0, -7 / 3])
    for target in ("zscore", "minmax", "logit"):
        whole = m.normalise(x.float(), torch.zeros(6, dtype=torch.int64), target=target)
        assert whole.dtype == torch.float64
    close(m.normalise(x, torch.full((6,), 3), target="zscore").square().mean(), 1.0)


def check_normalise_of_equals(m: Any) -> None:
    # The mean of three times 0.1 is not 0.1 in floating point: rounding must not become a target.
    for value in (0.1, 0.7, -1e9 / 3):
        same, group = torch.full((7,), value, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)
        assert m.normalise(same, group, target="zscore").tolist() == [0.0] * 7
        assert m.normalise(same, group, target="minmax").tolist() == [0.5] * 7


MODULE = ratings
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("elo: natural exponential", check_elo_by_hand, "(1 + 10 **", "(1 + math.e **"),
    ("elo: expectation turned", check_elo_by_hand, "ratings[second] - ratings[first]",
     "ratings[first] - ratings[second]"),
    ("elo: a moved before b is rated", check_elo_by_hand, "            ratings[second] -= gain\n",
     "            ratings[second] -= k * (score - 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400)))\n"),
    ("elo: only the winner moves", check_elo_by_hand, "            ratings[second] -= gain\n", ""),
    ("elo: one order for all shuffles", check_elo_orders, "        ratings = [start] * players\n",
     "        ratings = [start] * players\n        generator.manual_seed(0)\n"),
    ("mle: no ridge in the gradient", check_bradley_terry_mle_by_hand, "(-l2 * theta).index_add",
     "(0 * theta).index_add"),
    ("mle: draws lost", check_bradley_terry_mle_is_the_maximum, "surprise = outcome - expected",
     "surprise = (outcome > 0.5).double() - expected"),
    ("mle: winner and loser exchanged", check_bradley_terry_mle_by_hand, "place[a[played]], place[b[played]], outcome",
     "place[b[played]], place[a[played]], outcome"),
    ("to_elo: 400 points for odds of e", check_to_elo, "POINTS = 400 / math.log(10)", "POINTS = 400"),
    ("mle: whole Newton steps", check_bradley_terry_mle_of_one_sided_games,
     " * (reach.log1p() / reach).repeat_interleave(n)", ""),
    ("normalise: sample deviation", check_normalise_by_hand, "centred.square()) / count)",
     "centred.square()) / (count - 1).clamp(min=1))"),
    ("normalise: one mean for all groups", check_normalise_by_hand,
     "centred = x - (zeros.index_add(0, group, x) / count)[group]", "centred = x - x.mean()"),
    ("normalise: rounding made a target", check_normalise_of_equals,
     "torch.where(high > low, centred / variance.sqrt(), 0.0)",
     "torch.where(variance > 0, centred / variance.sqrt(), 0.0)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "elo: constant: True -> False": "zip(strict=) of three columns of one table",
    "_newton: constant: 200 -> 201": "a bound that is never met",
    "_newton: boundary: reach < 1e-08 -> reach <= 1e-08": "when to stop, far below what is asked",
    "_newton: constant: 1e-12 -> 1.25e-12": "what stands in for a step of 0",
    "_newton: constant: 1e-08 -> 1.25e-08": "the same",
}
