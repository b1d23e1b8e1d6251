"""What a rollout tells, under the names of the field's dashboards."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.objectives.kl import k1, k3
from rlhf_cli.objectives.masked import masked_mean
from rlhf_cli.rollouts.experience import Experience


def figures(
    experience: Experience, raw: Tensor, scores: Tensor, returns: Tensor | None, kl_coef: float
) -> dict[str, float]:
    """Means over a rollout. raw, scores (N,): before and after penalties; returns (N, T): the critic's targets.

    KL and entropy in nats; explained variance is 1 - Var(returns - values) / Var(returns); frac_reward_zero_std is the
    share of prompts whose completions all have the same score.
    """
    kl = torch.where(experience.mask, k1(experience.logp, experience.reference_logp), 0.0).sum(1)  # (N,)
    out = {
        "objective/scores": float(raw.mean()),
        "objective/scores_std": float(raw.std(correction=0)),
        "objective/kl": float(kl.mean()),
        "objective/kl_k3_per_token": float(
            masked_mean(k3(experience.logp, experience.reference_logp), experience.mask)
        ),
        "objective/entropy": float(masked_mean(experience.entropy, experience.mask)),
        "objective/non_score_reward": float(-kl_coef * kl.mean()),
        "objective/rlhf_reward": float(scores.mean() - kl_coef * kl.mean()),
        "kl_coef": float(kl_coef),
        "completions/mean_length": float(experience.lengths.float().mean()),
        "completions/eos_rate": float(experience.finished.float().mean()),
        "rollout/logprob_gap_max": float((experience.sampled_logp - experience.logp).abs().max()),
    }
    groups = [scores[experience.group == g] for g in experience.group.unique()]
    compared = [group for group in groups if len(group) > 1]
    if compared:
        out["frac_reward_zero_std"] = sum(bool((g == g[0]).all()) for g in compared) / len(compared)
    if returns is not None and experience.values is not None:
        target, error = returns[experience.mask], (returns - experience.values)[experience.mask]
        spread = float(target.var(correction=0))
        out["val/explained_variance"] = 1.0 - float(error.var(correction=0)) / spread if spread > 0 else 0.0
        out["val/mean"] = float(masked_mean(experience.values, experience.mask))
    return out
