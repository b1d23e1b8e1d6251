"""What a token weighs that another program sampled than the one that is trained. Shapes are those of `logp`."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_importance(logp: Tensor, sampled_logp: Tensor, *, cap: float) -> tuple[Tensor, Tensor]:
    """min(p / q, cap) of each token and whether the cap decided (bool), p = exp(logp) under the policy as it is trained
    before its updates, q = exp(sampled_logp) under the engine that drew it; without gradient.

    The expectation over q of this weight times a token's loss is that over p, but for what the cap cuts, which bounds
    its variance. Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", truncated
    importance sampling; Ionides 2008 for the truncation.
    """
    ratio = torch.exp(torch.clamp(logp.detach() - sampled_logp.detach(), -20.0, 20.0))
    return ratio.clamp(max=cap), ratio > cap
