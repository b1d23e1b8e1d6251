"""The statistics of an evaluation: estimates with their intervals. numpy only, float64, the same for the same input.

Intervals are of 95 %. A weight vector says how often each unit (a prompt, a completion) was drawn by the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]
Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
RESAMPLES = 1000
"""Draws of a bootstrap."""


class Interval(NamedTuple):
    """Where the true value lies in 95 of 100 such experiments; None where too little is known."""

    low: float | None
    high: float | None

    def holds(self, value: float) -> bool:
        """Whether a value lies inside; everything does when nothing is known."""
        return self.low is None or self.high is None or self.low <= value <= self.high

    def above(self, value: float) -> bool:
        """Whether all of it lies above a value."""
        return self.low is not None and self.low > value


UNKNOWN = Interval(None, None)


def wilson(hits: float, count: int) -> Interval:
    """Of a share of `hits` in `count`: (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n).

    Source: Wilson 1927, Journal of the American Statistical Association 22, p. 209; Brown, Cai and DasGupta 2001,
    Statistical Science 16(2), eq. 4.
    """
    if not count:
        return UNKNOWN
    p, square = hits / count, Z * Z
    middle = p + square / (2 * count)
    reach = Z * math.sqrt(p * (1 - p) / count + square / (4 * count * count))
    return Interval(
        max(0.0, (middle - reach) / (1 + square / count)), min(1.0, (middle + reach) / (1 + square / count))
    )


def mean_of(values: ArrayLike) -> dict[str, Any]:
    """Mean, its standard error s / sqrt(n) (s with n - 1), and the interval mean -+ z times it; of values (n,)."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return {"mean": mean, "standard_error": None, "low": None, "high": None}
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    return {"mean": mean, "standard_error": error, "low": mean - Z * error, "high": mean + Z * error}


def bootstrap(statistic: Callable[[Numbers], float], count: int, seed: int, samples: int = RESAMPLES) -> Interval:
    """The 2.5 % and 97.5 % percentiles of a statistic over draws of `count` units with replacement.

    statistic: a function of the weights (count,) of the units; a draw for which it is not finite is left out.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if count < 2:
        return UNKNOWN
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(samples):
        weights = np.bincount(draw.integers(count, size=count), minlength=count).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(statistic(weights))
    finite = np.array([value for value in found if math.isfinite(value)])
    if not len(finite):
        return UNKNOWN
    low, high = np.percentile(finite, [2.5, 97.5])
    return Interval(float(low), float(high))


def ratio(top: ArrayLike, below: ArrayLike) -> Callable[[Numbers], float]:
    """sum w top / sum w below as a statistic of the weights; top and below (n,)."""
    a, b = np.asarray(top, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return lambda weights: float(np.dot(weights, a) / np.float64(np.dot(weights, b)))


# --- probabilities ---------------------------------------------------------------------------------------


def sigmoid(x: ArrayLike) -> Numbers:
    """1 / (1 + exp(-x)), of any shape, without overflow."""
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(np.where(x >= 0, 1.0, np.exp(np.minimum(x, 0))) / (1.0 + np.exp(-np.abs(x))))


def calibration(probability: ArrayLike, outcome: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """Expected calibration error and the reliability table: probabilities (n,) in bins of equal width against what
    happened (n,), each between 0 and 1.

    ece = sum over bins of (count / n) |mean outcome - mean probability|.
    Source: Naeini, Cooper and Hauskrecht 2015, AAAI; Guo et al. 2017 (arXiv:1706.04599) eq. 3.
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    place = np.minimum((p * bins).astype(int), bins - 1)
    table = []
    for k in range(bins):
        inside = place == k
        if inside.any():
            table.append({"low": k / bins, "high": (k + 1) / bins, "count": int(inside.sum()),
                          "probability": float(p[inside].mean()), "outcome": float(y[inside].mean())})  # fmt: skip
    error = sum(row["count"] * abs(row["outcome"] - row["probability"]) for row in table) / len(p)
    return {"ece": float(error), "table": table}


def histogram(values: ArrayLike, bins: int = 20) -> dict[str, list[float]]:
    """Counts in bins of equal width, and the edges of the bins."""
    counts, edges = np.histogram(np.asarray(values, dtype=np.float64), bins)
    return {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]}


# --- association -----------------------------------------------------------------------------------------


def correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's r of (n,) and (n,); None where one of them does not vary.

    Source: Pearson 1896, Philosophical Transactions of the Royal Society A 187, p. 253.
    """
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)), -1, 1))


def fisher(r: float | None, count: int) -> Interval:
    """Of a correlation: tanh(artanh r -+ z / sqrt(n - 3)).

    Source: Fisher 1921, Metron 1, p. 3.
    """
    if r is None or count < 4 or abs(r) == 1:
        return UNKNOWN
    middle, reach = math.atanh(r), Z / math.sqrt(count - 3)
    return Interval(math.tanh(middle - reach), math.tanh(middle + reach))


def ranks(values: ArrayLike) -> Numbers:
    """The rank of each value from 1, ties at the mean of their ranks: (n,)."""
    x = np.asarray(values, dtype=np.float64)
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2.0)[place])


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """tau-b = (concordant - discordant) / sqrt((n0 - ties in x) (n0 - ties in y)), n0 = n (n - 1) / 2 pairs; None where
    one of them is all ties.

    Source: Kendall 1945, Biometrika 33(3), p. 239.
    """
    first, second = np.triu_indices(len(x), 1)
    a, b = (np.sign(np.asarray(v, dtype=np.float64)[first] - np.asarray(v, dtype=np.float64)[second]) for v in (x, y))
    free = float((a != 0).sum()) * float((b != 0).sum())
    return float(np.dot(a, b)) / math.sqrt(free) if free else None


# --- who wins --------------------------------------------------------------------------------------------

PULL = 1e-2
"""Ridge on both coefficients; without it one who always wins has no finite intercept."""


def length_controlled(outcome: ArrayLike, gap: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The win rate at equal lengths: sigmoid(a) of the logistic regression logit P(win) = a + b tanh(gap / s).

    outcome (n,): 1 won, 0.5 tie, 0 lost; gap (n,): own length less the opponent's, s its standard deviation.
    Newton's method on the weighted log-likelihood less PULL / 2 (a^2 + b^2).

    Source: Dubois et al. 2024 (arXiv:2404.04475) section 3, their length term; the term of the instruction's
    difficulty, which is fitted over many models, is left out.
    """
    y, d = np.asarray(outcome, dtype=np.float64), np.asarray(gap, dtype=np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    spread = float(d.std())
    x = np.stack([np.ones(len(y)), np.tanh(d / spread) if spread > 0 else np.zeros(len(y))], axis=1)  # (n, 2)
    theta = np.zeros(2)
    value = _likelihood(theta, x, y, w)
    for _ in range(100):
        p = sigmoid(x @ theta)
        gradient = x.T @ (w * (y - p)) - PULL * theta
        step = np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x + PULL * np.eye(2), gradient)
        size = 1.0
        while size > 1e-8 and (new := _likelihood(theta + size * step, x, y, w)) < value - 1e-12:
            size /= 2
        theta, value = theta + size * step, new
        if float(np.abs(size * step).max()) < 1e-10:
            break
    return float(sigmoid(theta[0]))


def _likelihood(theta: Numbers, x: Numbers, y: Numbers, w: Numbers) -> float:
    logit = x @ theta
    fit = -y * np.logaddexp(0, -logit) - (1 - y) * np.logaddexp(0, logit)
    return float(np.dot(w, fit) - PULL / 2 * np.dot(theta, theta))
