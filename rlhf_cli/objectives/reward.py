"""Reward and cost models: objectives of scores. B examples; a score is one number for a completion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.judged import Judged, full_precision, rewards_of


def bradley_terry(
    chosen: Tensor,  # (B,) score
    rejected: Tensor,  # (B,) score
    margin: Tensor,  # (B,) how much better chosen is known to be, >= 0
    target: Tensor,  # (B,) probability that chosen is the better one; 1: sure
    *,
    centring: float,
) -> Judged:
    """-q log sigmoid(d) - (1 - q) log sigmoid(-d) + centring (chosen + rejected)^2, d = chosen - rejected - margin.

    The margin is taken from the difference inside the sigmoid, unscaled. A target below 1 is a soft label: the share of
    annotators, or the belief of an AI judge, that prefers the chosen completion.

    Symbols: chosen, rejected: scores; q: target; margin: how far apart the two are asked to be.
    Source: Ziegler et al. 2019 (arXiv:1909.08593) eq. 1 for two completions; margin: Touvron et al. 2023
    (arXiv:2307.09288) eq. 2; centring: Eisenstein et al. 2023 (arXiv:2312.09244) eq. 2.
    Step 0: log 2 = 0.693147 at equal scores without margins; log(1 + e^margin) with one
    Traps: the margin added instead of taken off; centring of the difference instead of the sum; log(1 + exp(x)), which
    overflows at a gap of 89.
    """
    chosen, rejected, margin, target = full_precision(chosen, rejected, margin, target)
    d = chosen - rejected - margin
    loss = -target * F.logsigmoid(d) - (1 - target) * F.logsigmoid(-d)
    return Judged(loss + centring * (chosen + rejected).square(), rewards_of(chosen, rejected))


def regression(
    score: Tensor,  # (B,)
    target: Tensor,  # (B,) the known score, on the scale to be learned
    *,
    loss: str,
    delta: float,
) -> Judged:
    """mse: e^2. huber: e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2). e = score - target.

    Symbols: e: error; delta: where huber turns linear, read by huber only.
    Source: squared error on ratings: Wang et al. 2024 (arXiv:2406.08673); huber: Huber 1964
    (doi:10.1214/aoms/1177703732).
    Step 0: mean target^2 with scores of zero and mse, which is the population variance of centred targets
    Traps: targets normalised batch by batch, so that they drift; huber has half the gradient of mse near the target.
    """
    score, target = full_precision(score, target)
    error = score - target.detach()
    size = error.abs()
    inside = size.clamp(max=delta)
    shapes = {"mse": error.square(), "huber": inside * (size - inside / 2)}
    return Judged(shapes[loss], score[:, None].detach())


def cost(
    chosen: Tensor,  # (B,) cost of the safer completion
    rejected: Tensor,  # (B,) cost of the more harmful completion
    safety: Tensor,  # (B, 2) bool: is chosen safe, is rejected safe
    *,
    l2: float,
) -> Judged:
    """-log sigmoid(C_r - C_c) - log sigmoid(h_c C_c) - log sigmoid(h_r C_r) + l2 (C_c^2 + C_r^2) / 2.

    Orders the two by harm and puts their signs: above 0 is harmful. Chosen means the safer one, whatever is more
    helpful. The rewards it reports are the costs themselves, so the chosen one should be the lower.

    Symbols: C_c, C_r: costs of chosen and rejected; h: +1 for an unsafe completion, -1 for a safe one.
    Source: Dai et al. 2023 (arXiv:2310.12773), the cost model; l2: their code.
    Step 0: 3 log 2 = 2.079442 at zero costs
    Traps: the data say +1 for safe, the formula -1; chosen taken by helpfulness; the order turned round, as costs fall
    where rewards rise.
    """
    chosen, rejected = full_precision(chosen, rejected)
    costs = torch.stack([chosen, rejected], dim=1)  # (B, 2)
    order = -F.logsigmoid(rejected - chosen)
    signs = -F.logsigmoid(torch.where(safety, -costs, costs)).sum(dim=1)
    return Judged(order + signs + l2 * costs.square().mean(dim=1), costs.detach())
