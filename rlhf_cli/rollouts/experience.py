"""From prompts to what PPO learns from: completions, log-probabilities, values, token rewards.

N completions, T token slots; everything per token is right-padded, its mask made from known lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch
from rlhf_cli.data.examples import Task
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.kl import k1
from rlhf_cli.rollouts.generate import Completed, Sampling, sample
from rlhf_cli.rollouts.rewards import Infer, Rollout


@dataclass(frozen=True)
class Experience:
    """What a rollout left behind. Log-probabilities are at the sampling temperature, float32."""

    rollout: Rollout
    finished: Tensor  # (N,) bool: ended by a stop token
    group: Tensor  # (N,) int64: which prompt
    mask: Tensor  # (N, T) bool: sampled tokens, the stop token included
    sampled_logp: Tensor  # (N, T) as the sampler saw them
    logp: Tensor  # (N, T) under the policy of the rollout, recomputed
    reference_logp: Tensor  # (N, T)
    entropy: Tensor  # (N, T)
    values: Tensor | None = None  # (N, T)
    last_values: Tensor | None = None  # (N,) of the state after the last token
    cost_values: Tensor | None = None  # (N, T) of the cost's critic
    last_cost_values: Tensor | None = None  # (N,)

    @property
    def lengths(self) -> Tensor:
        """(N,)."""
        return self.mask.sum(1)

    def only(self, keep: Tensor) -> Experience:
        """Some of the completions, as if the others had not been sampled: keep (N,) bool."""
        if bool(keep.all()):
            return self
        n, rows = len(keep), keep.nonzero().squeeze(1).tolist()
        given = {f.name: getattr(self.rollout, f.name) for f in fields(self.rollout)}
        kept: dict[str, Any] = {name: [c[i] for i in rows] for name, c in given.items() if len(c) == n}
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rollout"}
        chosen: dict[str, Any] = {name: t[keep] for name, t in tensors.items() if t is not None}
        return replace(self, rollout=replace(self.rollout, **kept), **chosen)


class Drawn(NamedTuple):
    """Sampled completions, not measured yet."""

    rollout: Rollout
    group: Tensor  # (N,) int64: which prompt
    logp: list[Tensor]  # N, (L,) each, as the sampler saw them


def draw(
    policy: Role,
    tasks: Sequence[Task],
    prompts: Sequence[np.ndarray],
    template: Template,
    stop_ids: Sequence[int],
    completions_per_prompt: int,
    sampling: Sampling,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> Drawn:
    """Sample completions of each prompt, as `generate.sample`."""
    drawn = sample(policy, prompts, completions_per_prompt, stop_ids, sampling, seed, numbers)
    rows = [(g, c) for g, group in enumerate(drawn) for c in group]
    rollout = Rollout(
        [tasks[g] for g, _ in rows],
        [template.decode(c.ids, after=prompts[g]) for g, c in rows],
        [_as_sample(prompts[g], c, tasks[g].where) for g, c in rows],
        [c.finished for _, c in rows],
    )
    return Drawn(rollout, torch.tensor([g for g, _ in rows]), [torch.from_numpy(c.logp) for _, c in rows])


def measure(
    infer: Infer,
    policy: Role,
    reference: Role,
    critic: Role | None,
    drawn: Drawn,
    temperature: float,
    *,
    cost_critic: Role | None = None,
    around: bool = False,
) -> Experience:
    """What policy, reference and critics say of sampled completions. A policy with a value head is its own critic: one
    forward for both. around: also the values after the last token."""
    samples = drawn.rollout.samples
    own = infer(policy, samples, lambda b: _spoken(policy, b, temperature, around))
    frozen = infer(reference, samples, lambda b: reference.logp(b, temperature, statistics="none").logp)
    sampled, mask = pad(drawn.logp)
    values, last = _judged(infer, critic, samples, around)
    cost_values, last_cost = _judged(infer, cost_critic, samples, around)
    if policy.value_head is not None:
        outputs = policy.value_head.out_features
        streams = [columns(own, 2 + k, 2 + outputs + k if around else None) for k in range(outputs)]
        (values, last), (cost_values, last_cost) = [*streams, (None, None)][:2]
    return Experience(
        rollout=drawn.rollout,
        finished=torch.tensor(list(drawn.rollout.finished)),
        group=drawn.group,
        mask=mask,
        sampled_logp=sampled,
        logp=pad([o[:, 0] for o in own])[0],
        reference_logp=pad(frozen)[0],
        entropy=pad([o[:, 1] for o in own])[0],
        values=values,
        last_values=last,
        cost_values=cost_values,
        last_cost_values=last_cost,
    )


def _spoken(policy: Role, batch: Batch, temperature: float, around: bool) -> Tensor:
    """Log-probability and entropy of each scored token (T, 2), and the values of a value head behind them."""
    if policy.value_head is None:
        return torch.stack(policy.logp(batch, temperature, statistics="entropy")[:2], dim=1)
    said, values = policy.logp_and_values(batch, temperature, statistics="entropy", around=around)
    return torch.cat([torch.stack(said[:2], dim=1), values], dim=1)


def _judged(
    infer: Infer, critic: Role | None, samples: Sequence[Sample], around: bool
) -> tuple[Tensor | None, Tensor | None]:
    """A critic's values (N, T) and, with `around`, those after the last token (N,)."""
    if critic is None:
        return None, None
    if not around:
        return pad(infer(critic, samples, critic.values))[0], None
    return columns(infer(critic, samples, critic.values_around), 0, 1)


def columns(parts: Sequence[Tensor], before: int, after: int | None) -> tuple[Tensor, Tensor | None]:
    """Columns of (L_n, C) each: values (N, T) of the states before the tokens, and after the last one (N,)."""
    last = None if after is None else torch.stack([p[-1, after].detach().float().cpu() for p in parts])
    return pad([p[:, before] for p in parts])[0], last


def _as_sample(prompt: np.ndarray, completed: Completed, where: str) -> Sample:
    scored = np.ones(len(completed.ids), dtype=bool)
    return Sample(prompt, (Completion(completed.ids, scored),), {}, where)


def pad(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors (L_n,) -> (N, T) padded with zeros on the CPU, and the mask (N, T)."""
    width = max(len(p) for p in parts)
    out = torch.zeros(len(parts), width, dtype=torch.float32)
    mask = torch.zeros(len(parts), width, dtype=torch.bool)
    for i, part in enumerate(parts):
        out[i, : len(part)] = part.detach().float().cpu()
        mask[i, : len(part)] = True
    return out, mask


def settled(
    scores: Tensor,  # (N,)
    finished: Tensor,  # (N,) bool
    rule: str,
    *,
    penalty: float,
    replacement: float,
) -> Tensor:
    """What stands at the last token (N,) when completions that were cut by the length limit follow a truncation rule.

    penalty: their score less `penalty`; replace: `replacement`; bootstrap: nothing; score and drop: their score.
    """
    cut = {"penalty": scores - penalty, "replace": torch.full_like(scores, replacement),
           "bootstrap": torch.zeros_like(scores)}.get(rule, scores)  # fmt: skip
    return torch.where(finished, scores, cut)


def token_rewards(
    experience: Experience,
    scores: Tensor,  # (N,)
    kl_coef: float,
) -> Tensor:
    """-kl_coef x (logp - reference logp) at every token, plus the score at the last one: (N, T).

    Ziegler et al. 2019 (arXiv:1909.08593) eq. 2; Stiennon et al. 2020 for the placement.
    """
    assert bool((experience.lengths > 0).all()), "a completion has at least its stop token"
    rewards = -kl_coef * k1(experience.logp, experience.reference_logp)
    rewards = torch.where(experience.mask, rewards, torch.zeros_like(rewards))
    rows = torch.arange(len(scores))
    rewards[rows, experience.lengths - 1] += scores.to(rewards.dtype)
    return rewards
