"""Maximum likelihood on demonstrations."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(
    logp: Tensor,  # (T,) log-probability of each scored token
    mean: Tensor,  # (T,) mean over the vocabulary of the log-probabilities
    *,
    label_smoothing: float,
) -> Tensor:
    """-(1 - eps) log p(token) - eps mean_v log p(v).

    Cross-entropy of each scored token (T,) against a target that gives 1 - eps to the token and spreads eps evenly over
    the vocabulary. The mean is over the scored tokens of the whole optimiser step, taken by the engine.

    Symbols: p: the model's distribution at the token; eps: label_smoothing; v: a token of the vocabulary
    Source: Szegedy et al. 2016 (arXiv:1512.00567) section 7; with eps = 0 maximum likelihood
    Step 0: the model's own loss on the data, log V for a model that knows nothing (V: size of the vocabulary)
    Traps: a mean of the means of micro-batches, in which tokens of short rows count more; a log-softmax in bfloat16;
    prompt, header or padding scored with the answer
    """
    if label_smoothing == 0:
        return -logp
    return -(1 - label_smoothing) * logp - label_smoothing * mean
