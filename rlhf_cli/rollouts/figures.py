"""What a rollout tells, under the names of the field's dashboards. N completions, T token slots.

Everything is masked: what lies past a completion counts nowhere, nor does a completion whose mask is empty.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.models import memory
from rlhf_cli.objectives.importance import truncated_importance
from rlhf_cli.objectives.kl import k1, k3
from rlhf_cli.objectives.masked import masked_mean
from rlhf_cli.rollouts.experience import Experience

GRAM = 4
"""Tokens of what counts as repeated."""


def figures(
    experience: Experience, raw: Tensor, scores: Tensor, returns: Tensor | None, kl_coef: float
) -> dict[str, float]:
    """Means over a rollout, of which at least one completion has a mask. raw, scores (N,): before and after the rule
    for completions that were cut; returns (N, T): the critic's targets; kl_coef: wherever the KL stands.

    KL and entropy in nats; explained variance is 1 - Var(returns - values) / Var(returns).
    """
    rows = experience.mask.any(1)  # (N,)
    kl = kl_of(experience)[rows]
    raw, scores, mask = raw[rows], scores[rows], experience.mask
    out = {
        "objective/scores": float(raw.mean()),
        "objective/scores_std": float(raw.std(correction=0)),
        "objective/kl": float(kl.mean()),
        "objective/kl_k3_per_token": float(masked_mean(k3(experience.logp, experience.reference_logp), mask)),
        "objective/entropy": float(masked_mean(experience.entropy, mask)),
        "objective/non_score_reward": 0.0 - kl_coef * float(kl.mean()),
        "objective/truncation_reward": float((scores - raw).mean()),
        "kl_coef": float(kl_coef),
    }
    parts = ("scores", "truncation_reward", "non_score_reward")
    out["objective/rlhf_reward"] = sum(out[f"objective/{part}"] for part in parts)
    out |= _endings(experience.lengths[rows].float(), experience.finished[rows])
    out |= _words([s.completions[0].ids for s, kept in zip(experience.rollout.samples, rows, strict=True) if kept])
    gaps = (experience.sampled_logp - experience.logp).abs()[mask]
    out |= {"rollout/logprob_gap_mean": float(gaps.mean()), "rollout/logprob_gap_max": float(gaps.max())}
    out["rollout/reward_length_correlation"] = correlation(raw, experience.lengths[rows].float())
    out |= _contrast(scores, experience.group[rows])
    if returns is not None and experience.values is not None:
        target, error = returns[mask], (returns - experience.values)[mask]
        spread = float(target.var(correction=0))
        out["val/explained_variance"] = 1.0 - float(error.var(correction=0)) / spread if spread > 0 else 0.0
        out["val/mean"] = float(masked_mean(experience.values, mask))
        out["val/returns_mean"] = float(target.mean())
    return out


def advantage_figures(advantages: Tensor, mask: Tensor) -> dict[str, float]:
    """Of the advantages (N, T) before they are whitened."""
    found = advantages[mask]
    return {
        "advantages/mean": float(found.mean()),
        "advantages/std": float(found.std(correction=0)),
        "advantages/abs_max": float(found.abs().max()),
    }


def importance(experience: Experience, cap: float) -> tuple[Tensor, dict[str, float]]:
    """Weights of the tokens (N, T) for what another program than the policy as trained has sampled, and their figures:
    `max` is before the cap."""
    weights, cut = truncated_importance(experience.logp, experience.sampled_logp, cap=cap)
    gap, mask = (experience.logp - experience.sampled_logp)[experience.mask], experience.mask
    return weights, {
        "rollout/importance_mean": float(weights[mask].mean()),
        "rollout/importance_max": float(gap.clamp(-20.0, 20.0).max().exp()),
        "rollout/importance_truncated": float(cut[mask].float().mean()),
    }


def kl_of(experience: Experience) -> Tensor:
    """KL to the reference of each completion in nats, k1 summed over its tokens (N,)."""
    return torch.where(experience.mask, k1(experience.logp, experience.reference_logp), 0.0).sum(1)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of (N,) and (N,); 0 where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def said(experience: Experience, scores: Tensor, prompts: Sequence[str], count: int = 4) -> list[dict[str, Any]]:
    """A few completions of a rollout for people to read, of different prompts as far as there are. scores (N,);
    prompts: of each of the N."""
    kl, lengths, groups = kl_of(experience), experience.lengths, experience.group.tolist()
    firsts = [groups.index(g) for g in dict.fromkeys(groups)]
    rest = [i for i in range(len(groups)) if i not in set(firsts)]
    return [
        {
            "prompt": prompts[i], "completion": experience.rollout.completions[i], "score": float(scores[i]),
            "kl": float(kl[i]), "length": int(lengths[i]), "finished": bool(experience.finished[i]),
        }
        for i in (firsts + rest)[:count]
    ]  # fmt: skip


def _endings(lengths: Tensor, finished: Tensor) -> dict[str, float]:
    """Of lengths (n,) and whether a completion ended by itself (n,)."""
    rate = float(finished.float().mean())
    out = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/eos_rate": rate,
        "completions/truncated": 1.0 - rate,
    }
    if rate > 0:
        out["completions/finished_length_mean"] = float(lengths[finished].mean())
    return out


def _words(completions: Sequence[np.ndarray]) -> dict[str, float]:
    """Of token ids (L_n,) each: the share of completions that are distinct, and that of repeated 4-grams."""
    distinct = len({ids.tobytes() for ids in completions})
    grams, repeated = 0, 0
    for ids in completions:
        found = _grams(ids)
        grams += len(found)
        repeated += len(found) - len(np.unique(found))
    return {"rollout/unique_share": distinct / len(completions), "rollout/repetition": repeated / max(grams, 1)}


def _grams(ids: np.ndarray) -> np.ndarray:
    """A number for each run of 4 tokens, equal for equal runs: (max(L - 3, 0),)."""
    if len(ids) < GRAM:
        return np.zeros(0, dtype=np.int64)
    ranks = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    pairs = np.unique(ranks[:-1] * len(ids) + ranks[1:], return_inverse=True)[1].astype(np.int64)  # (L - 1,)
    found: np.ndarray = pairs[:-2] * len(ids) + pairs[2:]
    return found


def _contrast(scores: Tensor, group: Tensor) -> dict[str, float]:
    """Of scores (n,) within their prompts (n,): the mean deviation, and the share of prompts where all are equal."""
    groups = [scores[group == g] for g in group.unique()]
    compared = [members for members in groups if len(members) > 1]
    if not compared:
        return {}
    return {
        "frac_reward_zero_std": sum(bool((g == g[0]).all()) for g in compared) / len(compared),
        "reward/group_std": sum(float(g.std(correction=0)) for g in compared) / len(compared),
    }


class Clock:
    """Where the time of an iteration goes, and the most memory it took."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside under this name."""
        start = _now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + _now() - start

    def figures(self) -> dict[str, float]:
        """time/NAME_s since the last call, and mem/peak_gib: of the GPU, else of the process so far."""
        out = {f"time/{name}_s": round(seconds, 4) for name, seconds in self._seconds.items()}
        self._seconds = {}
        return out | {"mem/peak_gib": round(memory.most() / 2**30, 4)}


def _now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
