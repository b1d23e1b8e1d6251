"""Preference tuning: dpo, ipo, kto, odpo, orpo, simpo.

1. Tokenise each prompt with its completions; the prompt is computed once for all of them.
2. For each micro-batch: log-probabilities of the frozen reference, if the objective needs one (remembered afterwards);
3. log-probabilities of the policy, summed over each completion;
4. the objective, a loss for each example; divided once by the examples of the whole step;
5. one optimiser step.
6. Held-out: the same figures, and a few completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.catalog import OBJECTIVES, Objective
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import RecipeError
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import lineage, load_policy
from rlhf_cli.models.roles import Role
from rlhf_cli.models.save import save_policy
from rlhf_cli.objectives.masked import lengths, sum_by_sequence
from rlhf_cli.objectives.preference import Pair
from rlhf_cli.recipe.schema import DPORecipe, ORPORecipe, SimPORecipe
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common
from rlhf_cli.stages import preference_setup as setup
from rlhf_cli.train.engine import Engine, Losses, Prepare


def run(recipe: DPORecipe | ORPORecipe | SimPORecipe, run: Run, display: Display, options: Options) -> None:
    """Tune a language model on preferences. Raises RlhfError."""
    entry = OBJECTIVES[recipe.objective.name]
    text = load_text(recipe.model)
    data = common.read_data(recipe, entry.data, text, display, needs_scores="scores" in entry.needs)
    if "kl_point" in entry.needs and min(recipe.training.batch_size, len(data.train)) < 2:
        raise RecipeError(
            f"{entry.name} compares the rows of a step, so it needs two", "training.batch_size", "raise it"
        )
    if "scores" in entry.needs:
        setup.check_scores(entry, common.settings_of(recipe.objective), [*data.train, *(data.eval or [])])
    named = setup.named_reference(recipe, text)
    loader = common.make_loader(recipe, data, recipe.training.batch_size)
    if options.dry_run:
        display.note(f"dry run: {len(data.train)} examples, {common.total_steps(recipe, loader)} steps")
        return
    policy = load_policy(recipe, text, display)
    engine = common.open_engine(recipe, run, display, loader, [(policy, recipe.training.learning_rate)])
    reference = setup.open_reference(entry, recipe, policy, text, named, engine, data.train)
    tuning = Tuning(engine, entry, common.settings_of(recipe.objective), policy, reference)
    tuning.remember("train", data.train)
    tuning.remember("eval", data.eval or [])

    def step() -> dict[str, float]:
        chosen = loader.next()
        samples = common.select(data.train, chosen)
        metrics = engine.update(policy, samples, *tuning.arguments("train", samples, chosen))
        return setup.with_margin(metrics) | {"epoch": loader.position}

    def evaluate() -> dict[str, float]:
        common.show_samples(engine, policy, text, data.eval or data.train)
        if not data.eval:
            return {}
        everything = np.arange(len(data.eval))
        metrics = engine.measure(policy, data.eval, *tuning.arguments("eval", data.eval, everything))
        return {f"eval/{k}": v for k, v in setup.with_margin(metrics).items()}

    engine.evaluate = evaluate
    common.begin(engine, data, lineage(policy, text, role="policy"))
    engine.fit(step)
    common.finish(engine, lambda folder: save_policy(policy, text, folder))


class Tuning:
    """Turns samples into the arguments of an update: the loss, its divisors, the reference's say."""

    def __init__(
        self, engine: Engine, entry: Objective, settings: dict[str, Any], policy: Role, reference: Role | None
    ) -> None:
        self.engine, self.policy, self.reference = engine, policy, reference
        self.entry, self.settings = entry, settings
        self.objective: Callable[..., Any] = entry.load()
        self.width = 1 if entry.data == "verdict" else 2
        self.memory: dict[str, dict[str, Tensor]] = {}

    def remember(self, split: str, samples: Sequence[Sample]) -> None:
        """Make room for the reference's log-probabilities of a split; a checkpoint keeps those that are known."""
        if self.reference is None:
            return
        self.memory[split] = {
            "logp": torch.zeros(len(samples), self.width),
            "known": torch.zeros(len(samples), dtype=torch.uint8),
        }
        self.engine.kept_tensors[f"reference-{split}"] = self.memory[split]

    def arguments(
        self, split: str, samples: Sequence[Sample], rows: np.ndarray
    ) -> tuple[Callable[[Batch, list[int]], Losses], dict[str, float], Prepare | None]:
        """(loss, counts, prepare) of `Engine.update` for these rows of a split."""
        chosen_tokens = float(sum(s.completions[0].scored.sum() for s in samples))
        counts = {"example": float(len(samples)), "chosen_token": chosen_tokens}
        if self.reference is None:
            return self._pair_loss, counts, None

        def prepare(batch: Batch, group: list[int]) -> Batch:
            return batch.with_numbers(reference=self._reference(split, batch, rows[group]))

        if self.entry.data == "verdict":
            kl = self._kl_point(samples)
            return (lambda batch, group: self._verdict_loss(batch, kl)), counts, prepare
        return self._pair_loss, counts, prepare

    def _reference(self, split: str, batch: Batch, rows: np.ndarray) -> Tensor:
        """Summed log-probabilities under the reference: (B, width). Computed in the policy's own micro-batch."""
        assert self.reference is not None
        memory, index = self.memory[split], torch.from_numpy(rows)
        if not bool(memory["known"][index].all()):
            with self.reference.active():
                sums = self._sums(self.reference, batch).view(-1, self.width).float().cpu()
            fresh = memory["known"][index] == 0
            memory["logp"][index[fresh]] = sums[fresh]
            memory["known"][index[fresh]] = 1
        return memory["logp"][index].to(batch.ids.device)

    @staticmethod
    def _sums(role: Role, batch: Batch) -> Tensor:
        """Summed log-probability of each completion: (N,)."""
        return sum_by_sequence(role.logp(batch, statistics=False).logp, batch.owners, batch.sequences)

    def _pair_loss(self, batch: Batch, group: list[int]) -> Losses:
        length = lengths(batch.owners, batch.sequences).view(-1, 2)  # (B, 2)
        policy = Pair(*self._sums(self.policy, batch).view(-1, 2).unbind(1), *length.unbind(1))
        arguments: dict[str, Any] = {}
        if self.reference is not None:
            arguments["reference"] = Pair(*batch.numbers["reference"].unbind(1), *length.unbind(1))
        if "scores" in self.entry.needs:
            scores = torch.stack([batch.numbers["chosen_score"], batch.numbers["rejected_score"]], dim=1)
            arguments["scores"] = scores.to(policy.chosen.dtype)
        judged = self.objective(policy, **arguments, **self.settings)
        sums = {"example": judged.loss.sum()}
        chosen, rejected = judged.rewards.unbind(1)
        pairs, tokens = float(len(chosen)), float(length[:, 0].sum())
        metrics = {
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/margins": ((chosen - rejected).sum(), pairs),
            "rewards/accuracies": ((chosen > rejected).sum(), pairs),
            "logps/chosen": (policy.chosen.detach().sum(), pairs),
            "logps/rejected": (policy.rejected.detach().sum(), pairs),
        }
        if judged.likelihood:
            nll = -policy.chosen.sum()
            sums["chosen_token"] = judged.likelihood * nll
            metrics["nll"] = (nll.detach(), tokens)
        return Losses(sums, metrics)

    def _verdict_loss(self, batch: Batch, kl: Tensor) -> Losses:
        sums = self._sums(self.policy, batch)
        desirable = batch.numbers["desirable"] > 0.5
        reference = batch.numbers["reference"].squeeze(1)
        judged = self.objective(sums, reference, desirable, kl.to(sums.device), **self.settings)
        reward, rows = judged.rewards.squeeze(1), float(len(sums))
        good, bad = float(desirable.sum()), float((~desirable).sum())
        metrics = {
            "rewards/chosen": (reward[desirable].sum(), good),
            "rewards/rejected": (reward[~desirable].sum(), bad),
            "logps/chosen": (sums.detach()[desirable].sum(), good),
            "logps/rejected": (sums.detach()[~desirable].sum(), bad),
            "kl": (kl * rows, rows),
        }
        return Losses({"example": judged.loss.sum()}, metrics)

    def _kl_point(self, samples: Sequence[Sample]) -> Tensor:
        """KTO's estimate of KL(policy || reference) over a whole step: the mean log-ratio of completions set under
        another row's prompt (its end, where both are too long), not below zero. A step of one row has no other: 0."""
        if len(samples) < 2:
            return torch.zeros(())
        assert self.reference is not None
        turned, longest = [*samples[1:], samples[0]], self.engine.recipe.data.max_length
        mismatched = [
            Sample(own.prompt[-(longest - len(other.completions[0].ids)) :], other.completions, {}, own.where)
            for own, other in zip(samples, turned, strict=True)
        ]
        means = []
        for role in (self.policy, self.reference):
            parts = self.engine.infer(role, mismatched, partial(self._sums, role), "sequence")
            means.append(torch.cat(parts).mean().cpu())
        return (means[0] - means[1]).clamp(min=0)
