"""From prompts to scored experience: what one rollout of PPO brings home. N completions, T token slots, P prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models.base import Text
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.rollouts.experience import Experience, draw, measure, pad, settled
from rlhf_cli.rollouts.figures import Clock
from rlhf_cli.rollouts.rewards import Rollout, Scores, Totals, total
from rlhf_cli.rollouts.sampling import Sampling
from rlhf_cli.stages.ppo_roles import Roles
from rlhf_cli.train.engine import Engine


@dataclass(frozen=True)
class Stream:
    """One kind of score of a rollout, reward or cost, and what its critic expects of it."""

    raw: Tensor  # (N,) all that a completion gets, as scored
    last: Tensor  # (N,) what stands at its last token, after the rule for completions that were cut
    tokens: Tensor  # (N, T) scores of single tokens
    values: Tensor | None  # (N, T)
    last_values: Tensor | None  # (N,)
    greedy: Tensor | None = None  # (N,) score of the greedy completion of the same prompt

    @property
    def scores(self) -> Tensor:
        """All that a completion gets, after that rule: (N,)."""
        return self.last + self.tokens.sum(1)

    def only(self, keep: Tensor) -> Stream:
        """Of some of the completions: keep (N,) bool."""
        return Stream(*(None if x is None else x[keep] for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rolled:
    """A rollout, measured and scored; completions without a score are not in it."""

    experience: Experience
    reward: Stream
    cost: Stream | None
    metrics: dict[str, float]

    def only(self, keep: Tensor) -> Rolled:
        """Some of the completions: keep (N,) bool."""
        cost = None if self.cost is None else self.cost.only(keep)
        return Rolled(self.experience.only(keep), self.reward.only(keep), cost, self.metrics)


class Roller:
    """Rolls out: samples, measures, scores."""

    def __init__(
        self, engine: Engine, recipe: PPORecipe, roles: Roles, text: Text, sampling: Sampling, *, greedy: bool
    ) -> None:
        self.engine, self.roles, self.settings, self.sampling = engine, roles, recipe.ppo, sampling
        self.template, self.stop_ids, self.wants_greedy = text.template, text.template.stop_ids, greedy
        self.clock = Clock()
        sampling.stats.heard = engine.display.advance

    def roll_out(self, tasks: list[Task], samples: list[Sample], each: int, seed: int, *, train: bool) -> Rolled:
        """`each` completions of the prompts; without `train`, their scores are on a scale that does not move. Raises
        ModelError when none of them has a score."""
        roles, sampling, infer = self.roles, self.sampling, self.engine.infer
        prompts = [s.prompt for s in samples]
        critic, cost_critic = (roles.critic, roles.cost_critic) if train else (None, None)
        with self.phase("rollout", len(prompts) * each):
            drawn = draw(roles.policy, tasks, prompts, self.template, self.stop_ids, each, sampling, seed)
        asked = [role for role in (roles.policy, roles.reference, critic, cost_critic) if role is not None]
        with self.phase("measure", len(prompts) * each * len(asked)):
            experience = measure(
                infer, roles.policy, roles.reference, critic, drawn, sampling.temperature,
                cost_critic=cost_critic, around=train and self.settings.truncation == "bootstrap",
            )  # fmt: skip
        with self.phase("score"):
            totals = total(roles.rewards, experience.rollout, infer, learn=train, moving=train)
        rolled = self._rolled(experience, totals)
        valid = torch.from_numpy(totals.reward.valid)  # the same for the cost
        if train and self.wants_greedy:
            rolled, scored = self._against_greedy(rolled, tasks, prompts)
            valid = valid & scored
        if not bool(valid.any()):
            raise ModelError("no completion has a score of its own and one of the greedy completion", "rewards",
                             "look at what the reward returns for them")  # fmt: skip
        taken = sampling.stats.take()
        rolled.metrics.update(taken if train else {})
        rolled.metrics["rollout/unscorable"] = 1.0 - float(valid.float().mean())
        return rolled.only(valid)

    @contextmanager
    def phase(self, name: str, total: float = 0) -> Iterator[None]:
        """A part of the iteration: timed, and shown while it lasts."""
        with self.clock(name), self.engine.display.phase(name, total):
            yield

    def _rolled(self, experience: Experience, totals: Totals) -> Rolled:
        reward = self._stream(experience, totals.reward, experience.values, experience.last_values, whole=True)
        cost = None
        if totals.cost is not None:
            values, last = experience.cost_values, experience.last_cost_values
            cost = self._stream(experience, totals.cost, values, last, whole=False)
        return Rolled(experience, reward, cost, dict(totals.metrics))

    def _stream(
        self, experience: Experience, found: Scores, values: Tensor | None, last_values: Tensor | None, *, whole: bool
    ) -> Stream:
        """whole: penalties and replacements for completions that were cut are the reward's, not the cost's."""
        last = torch.from_numpy(found.sequence).float()
        tokens = torch.zeros_like(experience.logp)
        if found.tokens is not None:
            tokens = pad([torch.from_numpy(t) for t in found.tokens])[0]
        if whole and self.settings.truncation == "replace":
            tokens = torch.where(experience.finished[:, None], tokens, torch.zeros_like(tokens))
        if whole or self.settings.truncation not in ("penalty", "replace"):
            last = self.settle(last, experience.finished)
        return Stream(torch.from_numpy(found.totals).float(), last, tokens, values, last_values)

    def settle(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Scores (N,) under the rule for completions that were cut."""
        rules = self.settings
        return settled(
            scores, finished, rules.truncation, penalty=rules.missing_eos_penalty, replacement=rules.truncated_score
        )

    def _against_greedy(self, rolled: Rolled, tasks: list[Task], prompts: list[np.ndarray]) -> tuple[Rolled, Tensor]:
        """With the scores of the greedy completion of each prompt, by the same rules; which rows have one (N,)."""
        sampling, group = replace(self.sampling, greedy=True), rolled.experience.group
        rollout: Rollout = draw(self.roles.policy, tasks, prompts, self.template, self.stop_ids, 1, sampling, 0).rollout
        totals = total(self.roles.rewards, rollout, self.engine.infer, learn=False)
        finished = torch.tensor(list(rollout.finished))
        inside = torch.from_numpy(totals.reward.totals - totals.reward.sequence).float()
        if self.settings.truncation == "replace":
            inside = torch.where(finished, inside, torch.zeros_like(inside))
        scores = self.settle(torch.from_numpy(totals.reward.sequence).float(), finished) + inside
        valid = torch.from_numpy(totals.reward.valid)
        rolled.metrics.update({
            "greedy/scores": float(scores[valid].mean()), "greedy/eos_rate": float(finished.float().mean()),
            "greedy/completions": float(len(scores)),
        })  # fmt: skip
        reward, cost = replace(rolled.reward, greedy=scores[group]), rolled.cost
        if cost is not None and totals.cost is not None:
            cost = replace(cost, greedy=torch.from_numpy(totals.cost.totals).float()[group])
        return replace(rolled, reward=reward, cost=cost), valid[group]
