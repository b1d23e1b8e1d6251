"""What a step of a recipe computes: which examples are in memory at once, how they use the model. For `rlhf plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.data.batch import Batch, micro_batches, size
from rlhf_cli.data.prepare import Prepared, data_needs, prepare
from rlhf_cli.data.tokens import Completion, Sample, length
from rlhf_cli.models.base import Text, check_length
from rlhf_cli.models.roles import SAID, Role
from rlhf_cli.models.scratch import HeadUse
from rlhf_cli.models.shortened import Work
from rlhf_cli.objectives.logprob import Statistics
from rlhf_cli.recipe.schema import PPORecipe, Recipe, RewardRecipe, SFTRecipe
from rlhf_cli.stages import common
from rlhf_cli.stages.scoring import labels_of
from rlhf_cli.train.lockstep import every_share

LOOKED_AT = 64
"""Steps whose micro-batches are formed; fewer when the run has fewer."""


@dataclass(frozen=True)
class Data:
    """The examples of a run, and how they are dealt."""

    prepared: Prepared
    deals: list[list[Sample]]
    """What the first optimiser steps are made of."""
    updates: int
    """Optimiser steps of the policy in the whole run."""
    steps: int
    """As the run counts them; of ppo: rollouts."""
    tokens: int
    """Of all steps together, a prompt once a sample."""


@dataclass(frozen=True)
class Demand:
    """What the micro-batches of a step are."""

    largest: list[Sample]
    tokens: int
    """In the largest one."""
    scored: int
    """Its scored tokens."""
    rounds: float
    """Micro-batches of a step, of the process that has most; the mean over the steps looked at."""

    @property
    def several(self) -> bool:
        """Whether a step has more than one."""
        return self.rounds > 1.0


@dataclass(frozen=True)
class Use:
    """How a step uses the trained role."""

    work: Work
    head: HeadUse
    outputs: int = 0
    """Of a head of its own."""
    columns: int = 1
    """Numbers that are read of a place."""
    at: Literal["predictors", "targets", "last"] = "predictors"
    """The places: before each scored token, at it, or at the end of each sequence."""
    dropout: bool = False


def read(recipe: Recipe, text: Text) -> Data:
    """All rows, read and tokenised as the stage would. Raises DataError, RecipeError."""
    check_length(text, recipe.data.max_length, "data.max_length")
    kind, needs = data_needs(recipe)
    limit = recipe.data.max_length
    if isinstance(recipe, PPORecipe):
        limit -= recipe.rollout.max_new_tokens
    return dealt(recipe, prepare(recipe.data, kind, text.template, needs=needs, max_length=limit))


def dealt(recipe: Recipe, prepared: Prepared) -> Data:
    """The order of the run, and what it adds up to."""
    count = recipe.training.batch_size
    if isinstance(recipe, PPORecipe):
        count = max(1, count * recipe.ppo.mini_batches // recipe.rollout.completions_per_prompt)
    loader = common.make_loader(recipe, prepared, count)
    steps = common.total_steps(recipe, loader)
    rounds = [common.select(prepared.train, loader.next()) for _ in range(min(steps, LOOKED_AT))]
    seen = sum(size(s, packed=True) for one in rounds for s in one) / len(rounds)
    if not isinstance(recipe, PPORecipe):
        return Data(prepared, rounds, steps, steps, round(seen * steps))
    each, new = recipe.rollout.completions_per_prompt, recipe.rollout.max_new_tokens
    batch = recipe.training.batch_size
    said = [[_completed(s, new) for s in one for _ in range(each)] for one in rounds]
    deals = [one[i : i + batch] for one in said for i in range(0, len(one), batch)]
    updates = steps * recipe.ppo.mini_batches * recipe.ppo.epochs
    whole = sum(size(s, packed=True) for one in said for s in one) / len(rounds)
    return Data(prepared, deals, updates, steps, round(whole * steps))


def _completed(prompt: Sample, new: int) -> Sample:
    """A prompt with a completion of the greatest length."""
    return replace(prompt, completions=(Completion(np.zeros(new, dtype=np.int32), np.ones(new, dtype=bool)),))


def shorter(data: Data, recipe: Recipe) -> Data | None:
    """The same under a lower max_length, longer examples left out; None when nothing is left."""
    limit = recipe.data.max_length
    if isinstance(recipe, PPORecipe):
        limit -= recipe.rollout.max_new_tokens
    train = data.prepared.train
    kept = np.array([length(train[i]) <= limit for i in range(len(train))], dtype=bool)
    if limit < 1 or not kept.any():
        return None
    chosen = [train[int(i)] for i in kept.nonzero()[0]]
    return dealt(recipe, replace(data.prepared, train=chosen, source=data.prepared.source[kept]))


def demand(data: Data, budget: int, *, packed: bool, world: int = 1) -> Demand:
    """The largest micro-batch of the steps that were looked at, each shared out among so many processes."""
    best: list[Sample] = []
    most = rounds = 0
    for samples in data.deals:
        counts = []
        for share in every_share(samples, packed=packed, count=world):
            chosen = [samples[i] for i in share]
            groups = [[chosen[i] for i in group] for group in micro_batches(chosen, budget, packed=packed)]
            counts.append(len(groups))
            for group in groups:
                tokens = tokens_of(group, packed=packed)
                if tokens > most:
                    most, best = tokens, group
        rounds += max(counts)
    scored = sum(int(c.scored.sum()) for s in best for c in s.completions)
    return Demand(best, most, scored, rounds / max(len(data.deals), 1))


def tokens_of(samples: Sequence[Sample], *, packed: bool) -> int:
    """Slots of a micro-batch: of one prompt once where rows are packed, of padding too where they are padded."""
    if packed:
        prompts = {s.prompt.tobytes(): len(s.prompt) for s in samples}
        return sum(prompts.values()) + sum(len(c.ids) for s in samples for c in s.completions)
    rows = [len(s.prompt) + len(c.ids) for s in samples for c in s.completions]
    return max(rows) * len(rows)


def use(recipe: Recipe) -> Use:
    """How the stage of this recipe does."""
    trained = recipe.lora is None
    if isinstance(recipe, SFTRecipe):
        smooth = recipe.objective.label_smoothing > 0
        said: Statistics = "usual" if smooth else "entropy"
        head = HeadUse(said, trained, known=not smooth)
        return Use(_likelihood(said, known=not smooth), head, dropout=True, columns=len(SAID[said]))
    if isinstance(recipe, RewardRecipe):
        return _scores(recipe)
    if isinstance(recipe, PPORecipe):
        said = "bonus" if recipe.ppo.entropy_coef > 0 else "entropy"
    else:
        said = "collision" if "certainty" in data_needs(recipe)[1] else "none"
    return Use(_likelihood(said), HeadUse(said, trained), columns=len(SAID[said]))


def _scores(recipe: RewardRecipe) -> Use:
    entry = OBJECTIVES[recipe.objective.name]
    labels = labels_of(common.settings_of(recipe.objective))
    none = HeadUse(None, False)
    if entry.head == "language":
        return Use(lambda role, batch: role.followed_by(batch, (0, 1)).sum(), none, columns=2, at="targets")
    if labels:
        count = len(labels)
        return Use(lambda role, batch: role.classes(batch).sum(), none, outputs=count, columns=count, at="targets")
    return Use(lambda role, batch: role.score(batch).sum(), none, outputs=1, at="last")


def _likelihood(statistics: Statistics, *, known: bool = False) -> Work:
    def work(role: Role, batch: Batch) -> Tensor:
        count = len(batch.owners)
        upstream = -1.0 / count if known else None
        of = role.logp(batch, statistics=statistics, upstream=upstream)
        total = -of.logp.sum() / count
        return total + of.entropy.sum() if statistics == "bonus" else total

    return work


def values(role: Role, batch: Batch) -> Tensor:
    """The work of a critic."""
    return role.values(batch).sum()
