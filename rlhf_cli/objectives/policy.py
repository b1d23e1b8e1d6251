"""PPO's losses, a number for each token, and how tokens make one number. All shapes are those of `logp`: (T,) flat or
(B, T); owners (T,) are the completions of flat tokens, `count` of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.objectives.masked import lengths, sum_by_sequence


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """pi / pi_old of each token, the log-ratio kept within +-20."""
    return torch.exp(torch.clamp(logp - old_logp, -20.0, 20.0))


def completion_means(x: Tensor, owners: Tensor, count: int) -> Tensor:
    """x (T,) averaged over the tokens of each completion, owners (T,) int64 -> (count,); 0 without a token."""
    return sum_by_sequence(x, owners, count) / lengths(owners, count).clamp(min=1)


def sequence_log_ratio(logp: Tensor, old_logp: Tensor, owners: Tensor, count: int) -> Tensor:
    """log rho of a completion, the mean over its tokens of logp - old_logp, at each of its tokens: (T,).

    rho = (pi / pi_old)^(1/L). Its gradient reaches every token of the completion. In `clipped_policy` it stands for
    logp, with zeros for old_logp. Zheng et al. 2025 (arXiv:2507.18071), GSPO.
    """
    return completion_means(logp - old_logp.detach(), owners, count)[owners]


def total(x: Tensor, owners: Tensor, count: int) -> Tensor:
    """Sum of x (T,) over the tokens."""
    return x.sum()


def total_of_means(x: Tensor, owners: Tensor, count: int) -> Tensor:
    """Sum over the completions of the mean of x (T,) over a completion's tokens."""
    return completion_means(x, owners, count).sum()


def clipped_policy(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) and whether the clip decided (bool), for each token.

    Schulman et al. 2017 (arXiv:1707.06347) eq. 7. dual_clip c bounds the loss of a token with A < 0 at -c A
    (Ye et al. 2020, arXiv:1912.09729, eq. 3). No gradient reaches old_logp and advantages.
    """
    advantages = advantages.detach()
    rho = ratio(logp, old_logp.detach())
    plain = rho * advantages
    clipped = torch.clamp(rho, 1.0 - clip_low, 1.0 + clip_high) * advantages
    surrogate = torch.minimum(plain, clipped)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return -surrogate, clipped < plain


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the value, or of the value clipped around the old one if that is larger; and whether
    the clip decided (bool). Ziegler et al. 2019 (arXiv:1909.08593), their code. value_clip None: plain error.
    """
    returns = returns.detach()
    plain = (values - returns).square()
    if value_clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    old_values = old_values.detach()
    near = old_values + torch.clamp(values - old_values, -value_clip, value_clip)
    clipped = (near - returns).square()
    outside = (values - old_values).abs() > value_clip  # inside, near and values differ by rounding alone
    return 0.5 * torch.maximum(plain, clipped), outside & (clipped > plain)
