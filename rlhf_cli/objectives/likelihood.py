"""Maximum likelihood on demonstrations."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(
    logp: Tensor,  # (T,) log-probability of each scored token
    mean: Tensor,  # (T,) mean over the vocabulary of the log-probabilities
    *,
    label_smoothing: float,
) -> Tensor:
    """Cross-entropy of each scored token (T,) against a target that gives (1 - eps) to the token and spreads eps.

    The mean is over the scored tokens of the whole optimiser step, taken by the engine. Label smoothing: Szegedy et al.
    2016, arXiv:1512.00567, section 7.
    """
    if label_smoothing == 0:
        return -logp
    return -(1 - label_smoothing) * logp - label_smoothing * mean
