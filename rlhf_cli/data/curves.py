"""What the best of n completions is worth, and what it costs: estimates from the scores of more than n."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def best_of_n(scores: Sequence[float], most: int) -> np.ndarray:
    """E[max of n scores] for n = 1 .. most, (most,), without bias, from the N >= most scores of a prompt.

    The mean of the maximum over all subsets of n: the sum over i of C(i - 1, n - 1) / C(N, n) times the i-th smallest
    score.

    Source: Nakano et al. 2021 (arXiv:2112.09332) appendix I.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    count = len(ordered)
    if not 1 <= most <= count:
        raise ValueError(f"the best of {most} cannot be estimated from {count} scores")
    curve = np.empty(most)
    for n in range(1, most + 1):
        weights = [math.comb(i - 1, n - 1) / math.comb(count, n) for i in range(1, count + 1)]
        curve[n - 1] = float(np.dot(weights, ordered))
    return curve


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: what the KL between best-of-n and the model itself cannot exceed, in nats.

    Source: Stiennon et al. 2020 (arXiv:2009.01325) appendix G.3; a bound: Beirami et al. 2024 (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def mean_curve(groups: Sequence[Sequence[float]]) -> list[dict[str, float | None]]:
    """The curve over prompts: n, the mean of the best of n, its standard error over prompts, the bound on the KL.

    It goes as far as the usual number of scores of a prompt. Prompts with fewer are left out, so that every n is over
    the same ones.
    """
    counts = Counter(len(group) for group in groups)
    most = max(counts, key=lambda count: (counts[count], count), default=0)
    if most < 2:
        return []
    usable = [group for group in groups if len(group) >= most]
    curves = np.stack([best_of_n(group, most) for group in usable])  # (prompts, most)
    error = curves.std(0, ddof=1) / math.sqrt(len(curves)) if len(curves) > 1 else None
    return [
        {
            "n": n + 1, "score": float(curves[:, n].mean()),
            "standard_error": None if error is None else float(error[n]), "kl_bound": kl_bound(n + 1),
        }
        for n in range(most)
    ]  # fmt: skip
