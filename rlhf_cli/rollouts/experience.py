"""From prompts to what PPO learns from: completions, log-probabilities, values, token rewards.

N completions, T token slots; everything per token is right-padded, its mask made from known lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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

    @property
    def lengths(self) -> Tensor:
        """(N,)."""
        return self.mask.sum(1)


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
) -> Drawn:
    """Sample completions of each prompt."""
    drawn = sample(policy, prompts, completions_per_prompt, stop_ids, sampling, seed)
    rows = [(g, c) for g, group in enumerate(drawn) for c in group]
    rollout = Rollout(
        [tasks[g] for g, _ in rows],
        [template.decode(c.ids, after=prompts[g]) for g, c in rows],
        [_as_sample(prompts[g], c, tasks[g].where) for g, c in rows],
        [c.finished for _, c in rows],
    )
    return Drawn(rollout, torch.tensor([g for g, _ in rows]), [torch.from_numpy(c.logp) for _, c in rows])


def measure(
    infer: Infer, policy: Role, reference: Role, critic: Role | None, drawn: Drawn, temperature: float
) -> Experience:
    """What policy, reference and critic say of sampled completions."""
    samples = drawn.rollout.samples
    own = infer(policy, samples, lambda b: torch.stack(policy.logp(b, temperature)[:2], dim=1))
    frozen = infer(reference, samples, lambda b: reference.logp(b, temperature, statistics="none").logp)
    values = None if critic is None else infer(critic, samples, critic.values)
    sampled, mask = pad(drawn.logp)
    return Experience(
        rollout=drawn.rollout,
        finished=torch.tensor(list(drawn.rollout.finished)),
        group=drawn.group,
        mask=mask,
        sampled_logp=sampled,
        logp=pad([o[:, 0] for o in own])[0],
        reference_logp=pad(frozen)[0],
        entropy=pad([o[:, 1] for o in own])[0],
        values=None if values is None else pad(values)[0],
    )


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
