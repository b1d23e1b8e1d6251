"""The passes over a rollout: mini-batches, one optimiser step of each role that learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from rlhf_cli.data.tokens import Sample
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.kl import FixedKL, PolicyPenalty, k3
from rlhf_cli.objectives.masked import masked_mean
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.rollouts.experience import pad
from rlhf_cli.stages.ppo_losses import (
    VALUE_METRICS,
    Coefficients,
    Lesson,
    counts,
    head_loss,
    joint_loss,
    policy_loss,
    value_loss,
)
from rlhf_cli.stages.ppo_roles import Roles
from rlhf_cli.stages.ppo_setup import Ptx
from rlhf_cli.train.engine import Engine, Learner


class Updates:
    """How policy and critics learn from a rollout."""

    def __init__(self, engine: Engine, recipe: PPORecipe, roles: Roles, kl: FixedKL, ptx: Ptx | None) -> None:
        self.engine, self.settings, self.critic_settings = engine, recipe.ppo, recipe.critic
        self.policy, self.kl, self.ptx = roles.policy, kl, ptx
        self.critics: list[Role] = [r for r in (roles.critic, roles.cost_critic) if r is not None]
        self.room = recipe.rollout.max_new_tokens
        self.penalty: PolicyPenalty | None = None
        if self.settings.penalty is not None:
            self.penalty = PolicyPenalty(**self.settings.penalty.model_dump())
            engine.kept["penalty"] = self.penalty
        if ptx is not None:
            engine.kept["ptx"] = ptx.loader

    def examples(self, completions: int, *, warming: bool) -> int:
        """How many the passes over so many completions take, those of all roles added up."""
        passes = len(self.critics) or 1 if warming else 1 + len(self.critics)
        once = completions if self.penalty is not None and not warming else 0
        return self.settings.epochs * completions * passes + once

    def learn(self, lesson: Lesson, seed: int) -> dict[str, float]:
        """A few passes; means of the figures over the updates."""
        history = []
        for chunk in self._chunks(lesson, seed):
            history.append(self._update(lesson, chunk))
            if history[-1]["policy/approxkl"] > 1.5 * (self.settings.target_kl or np.inf):
                break
        means = _means(history)
        means["policy/updates"] = float(len(history))
        means["policy/ratio_first"] = history[0]["val/ratio"]
        if self.penalty is not None:
            means["policy/penalty_coef"] = self.penalty.coef
            means["policy/kl_after"] = self._moved(lesson)
            self.penalty.follow(means["policy/kl_after"])
        return means

    def pretrain(self, lesson: Lesson, seed: int) -> dict[str, float]:
        """The same passes for the critics alone, their change not clipped. The schedule of the policy has not begun: a
        value head on its trunk learns at the peak rate."""
        history = []
        for chunk in self._chunks(lesson, seed):
            if self.critics:
                history.append(self._criticise(lesson, chunk, None))
                continue
            samples, divisors = self._taken(lesson, chunk)
            with _at_peak(self.engine.learners[self.policy.name]):
                loss = head_loss(self.policy, lesson, chunk)
                out = self.engine.update(self.policy, samples, loss, divisors, still=True)
            history.append({k: v for k, v in out.items() if k not in ("loss", "grad_norm")})
        return _means(history)

    def _chunks(self, lesson: Lesson, seed: int) -> list[np.ndarray]:
        random = np.random.Generator(np.random.Philox(key=[seed, 2**32]))
        rows = len(lesson.advantages)
        parts = min(self.settings.mini_batches, rows)
        return [c for _ in range(self.settings.epochs) for c in np.array_split(random.permutation(rows), parts)]

    def _taken(self, lesson: Lesson, chunk: np.ndarray) -> tuple[list[Sample], dict[str, float]]:
        return [lesson.experience.rollout.samples[i] for i in chunk], counts(lesson, chunk, self.room)

    def _update(self, lesson: Lesson, chunk: np.ndarray) -> dict[str, float]:
        """One optimiser step of the policy and one of each critic on the completions `chunk` (n,)."""
        samples, divisors = self._taken(lesson, chunk)
        coefficients = Coefficients(self.kl.coef, self.penalty.coef if self.penalty else None)
        shared = self.policy.value_head is not None
        loss = (
            joint_loss(self.policy, self.settings, self.critic_settings, lesson, chunk, coefficients)
            if shared
            else policy_loss(self.policy, self.settings, lesson, chunk, coefficients)
        )
        also = self.ptx.next(self.policy) if self.ptx else None
        metrics = self.engine.update(self.policy, samples, loss, divisors, also=also)
        return metrics | self._criticise(lesson, chunk, self.settings.value_clip)

    def _criticise(self, lesson: Lesson, chunk: np.ndarray, value_clip: float | None) -> dict[str, float]:
        """One optimiser step of each critic that has a trunk of its own."""
        samples, divisors = self._taken(lesson, chunk)
        metrics: dict[str, float] = {}
        for critic, target, (error, clipped) in zip(self.critics, lesson.targets, VALUE_METRICS, strict=False):
            loss = value_loss(critic, target, value_clip, lesson, chunk)
            out = self.engine.update(critic, samples, loss, divisors)
            norm = clipped.replace("clipfrac", "grad_norm")
            metrics |= {error: out["loss"], clipped: out["val/clipfrac"], norm: out["grad_norm"]}
        return metrics

    def _moved(self, lesson: Lesson) -> float:
        """KL per token from the policy of the rollout to the policy after its updates, on all of the rollout."""
        experience, policy = lesson.experience, self.policy
        now: list[Tensor] = self.engine.infer(
            policy, experience.rollout.samples, lambda b: policy.logp(b, lesson.temperature, statistics="none").logp
        )
        return float(masked_mean(k3(experience.logp, pad(now)[0]), experience.mask))


@contextmanager
def _at_peak(learner: Learner) -> Iterator[None]:
    """The peak learning rates inside, those of the schedule again afterwards."""
    groups = learner.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group, peak in zip(groups, learner.scheduler.base_lrs, strict=True):
        group["lr"] = peak
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _means(history: list[dict[str, float]]) -> dict[str, float]:
    """Of the figures of several updates; of a largest value the largest."""
    return {k: float((np.max if k.endswith("_max") else np.mean)([h[k] for h in history])) for k in history[0]}
