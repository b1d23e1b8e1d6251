"""Ratings from games: who beat whom becomes one number a player, a target for regression. float64 throughout.

A player is a completion (or a model), a game a comparison of two. G games, P players. Ratings of players that no chain
of games connects cannot be compared: see `components`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

POINTS = 400 / math.log(10)
"""Elo points of a unit of log-odds, 173.7: odds of 10 are 400 points."""
AVERAGE = 1500.0
"""Elo of theta = 0."""


def to_elo(theta: Tensor) -> Tensor:
    """Log-odds strengths as Elo ratings around 1500, any shape."""
    return AVERAGE + POINTS * theta


def from_elo(ratings: Tensor) -> Tensor:
    """Elo ratings as log-odds strengths around 0, any shape."""
    return (ratings - AVERAGE) / POINTS


def _check(a: Tensor, b: Tensor, outcome: Tensor) -> None:
    if bool((a == b).any()):
        raise ValueError("a player cannot play against itself")
    if not bool(((outcome >= 0) & (outcome <= 1)).all()):
        raise ValueError("the outcome of a game is from 0 (b wins) to 1 (a wins)")


def elo(
    a: Tensor,  # (G,) int64 player
    b: Tensor,  # (G,) int64 player
    outcome: Tensor,  # (G,) 1 a wins, 0.5 draw, 0 b wins
    players: int,
    *,
    k: float,
    start: float,
    shuffles: int,
    seed: int,
) -> Tensor:
    """E = 1 / (1 + 10^((R_b - R_a) / 400)); R_a += k (outcome - E), R_b -= k (outcome - E), game by game: (P,).

    The result depends on the order: with shuffles = 1 games are taken as given, above that the ratings of that many
    random orders are averaged. Elo 1978; the order-free alternative is `bradley_terry_mle`.
    """
    _check(a, b, outcome)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(players, dtype=torch.float64)
    games = list(zip(a.tolist(), b.tolist(), outcome.tolist(), strict=True))
    for _ in range(shuffles):
        order = torch.randperm(len(games), generator=generator).tolist() if shuffles > 1 else range(len(games))
        ratings = [start] * players
        for game in order:
            first, second, score = games[game]
            gain = k * (score - 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400)))
            ratings[first] += gain
            ratings[second] -= gain
        total += torch.tensor(ratings, dtype=torch.float64)
    return total / shuffles


def components(a: Tensor, b: Tensor, players: int) -> Tensor:
    """Who is connected to whom by games: (G,), (G,) -> (P,) int64, the smallest player each one is connected to."""
    label = torch.arange(players)
    for _ in range(players):
        low = torch.minimum(label[a], label[b])
        joined = label.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        joined = joined[joined]
        if torch.equal(joined, label):
            break
        label = joined
    return label


def bradley_terry_mle(
    a: Tensor,  # (G,) int64 player
    b: Tensor,  # (G,) int64 player
    outcome: Tensor,  # (G,) 1 a wins, 0.5 draw, 0 b wins
    players: int,
    *,
    l2: float,
) -> Tensor:
    """theta (P,) that maximises sum log sigmoid(+-(theta_a - theta_b)) - l2/2 |theta|^2, whatever the order of games.

    Bradley and Terry 1952. The ridge keeps one who never loses finite and gives each component of connected players
    the mean 0; each component is solved alone.
    """
    _check(a, b, outcome)
    if not l2 > 0:
        raise ValueError("l2 must be above 0: without it one who never loses has no finite rating")
    theta = torch.zeros(players, dtype=torch.float64)
    _, group, size = components(a, b, players).unique(return_inverse=True, return_counts=True)
    sizes = size[group]  # (P,)
    place = torch.empty_like(group)
    for n in sizes[a].unique().tolist():
        members = (sizes == n).nonzero()[:, 0]
        members = members[group[members].argsort()]  # component after component
        place[members] = torch.arange(len(members))
        played = sizes[a] == n
        theta[members] = _newton(place[a[played]], place[b[played]], outcome[played].double(), len(members) // n, n, l2)
    return theta


def _newton(a: Tensor, b: Tensor, outcome: Tensor, count: int, n: int, l2: float) -> Tensor:
    """Newton's method on components of n players each: games (G,) -> theta (count n,), component after component.

    Along a step p the curvature of a game changes by at most e^(+-d), d the largest |p_a - p_b| of a component;
    log(1 + d) / d of the step is then sure to descend (Bach 2010, doi:10.1214/09-EJS521), and near the solution it is
    the whole step. Whole steps from the start can circle for ever.
    """
    theta = torch.zeros(count * n, dtype=torch.float64)
    own = a // n  # (G,) component of each game
    ridge = l2 * torch.eye(n, dtype=torch.float64)
    for _ in range(200):
        expected = torch.sigmoid(theta[a] - theta[b])
        surprise = outcome - expected
        weight = expected * torch.sigmoid(theta[b] - theta[a])  # (G,)
        gradient = (-l2 * theta).index_add(0, a, surprise).index_add(0, b, -surprise)
        hessian = ridge.repeat(count, 1, 1)  # (count, n, n)
        for first, second, sign in ((a, a, 1), (b, b, 1), (a, b, -1), (b, a, -1)):
            hessian.index_put_((own, first % n, second % n), sign * weight, accumulate=True)
        step = torch.linalg.solve(hessian, gradient.view(count, n, 1)).flatten()
        reach = theta.new_zeros(count).scatter_reduce(0, own, (step[a] - step[b]).abs(), "amax")
        if bool((reach < 1e-8).all()):
            return theta + step
        reach = reach.clamp(min=1e-12)
        theta = theta + step * (reach.log1p() / reach).repeat_interleave(n)
    raise RuntimeError("the ratings did not converge")


def normalise(
    ratings: Tensor,  # (P,)
    groups: Tensor,  # (P,) int64, what is normalised together: one group for a data set, or one a prompt
    *,
    target: Literal["zscore", "minmax", "logit"],
) -> Tensor:
    """Ratings (P,) as targets of a regression, by group. Normalised once, before training: never batch by batch.

    zscore: mean 0 and population deviation 1, 0 where all are equal. minmax: from 0 to 1, 0.5 where all are equal.
    logit: the mean taken off; of log-odds strengths, so that sigmoid of a difference is a win probability.
    """
    x = ratings.double()
    _, group, count = groups.unique(return_inverse=True, return_counts=True)
    zeros = x.new_zeros(len(count))
    low = zeros.scatter_reduce(0, group, x, "amin", include_self=False)[group]
    high = zeros.scatter_reduce(0, group, x, "amax", include_self=False)[group]
    centred = x - (zeros.index_add(0, group, x) / count)[group]
    if target == "logit":
        return centred
    if target == "minmax":
        return torch.where(high > low, (x - low) / (high - low), 0.5)
    variance = (zeros.index_add(0, group, centred.square()) / count)[group]
    return torch.where(high > low, centred / variance.sqrt(), 0.0)
