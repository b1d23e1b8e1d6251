"""From the samples of a step to the loss of a preference objective.

B examples, W completions of an example (1 of a verdict, 2 of a pair, the most of a ranking, padded), N completions in a
micro-batch, C numbers of a completion: the sum of its log-probabilities, then what the objective needs besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.catalog import OBJECTIVES, Objective
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.tokens import Sample, score_all
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.judged import Judged, Pair, Ranked
from rlhf_cli.objectives.masked import lengths, sum_by_sequence
from rlhf_cli.objectives.running import RunningRewards
from rlhf_cli.recipe.settings.blocks import terms_of
from rlhf_cli.stages.common import settings_of
from rlhf_cli.stages.facts import FIGURES, Facts, facts
from rlhf_cli.stages.remembered import Reference, strangers_of
from rlhf_cli.train.engine import Engine, Losses, Part, Prepare


@dataclass(frozen=True)
class Term:
    """One objective of a recipe, and its weight in the sum."""

    weight: float
    entry: Objective
    settings: dict[str, Any]

    def judge(self, *arguments: Any) -> Judged:
        """What the objective says."""
        judged: Judged = self.entry.load()(*arguments, **self.settings)
        return judged


def terms(recipe: Any) -> list[Term]:
    """The objectives of a recipe: one, or those of a mix."""
    return [
        Term(weight, OBJECTIVES[block.name], {k: v for k, v in settings_of(block).items() if k != "weight"})
        for weight, block in terms_of(recipe.objective)
    ]


class Whole(NamedTuple):
    """A loss that mixes the examples of a step, taken apart: the same value and gradient, example by example."""

    judged: Judged
    slope: Tensor  # (B, W, C) gradient of the summed loss by each number
    running: dict[int, Tensor]
    """Rewards (B, W) of the terms that have running means."""


class Judge:
    """The objectives of a recipe with the roles they ask."""

    def __init__(self, engine: Engine, objectives: Sequence[Term], policy: Role, reference: Reference) -> None:
        self.engine, self.terms, self.policy, self.reference = engine, objectives, policy, reference
        self.kind = objectives[0].entry.data
        self.needs = {need for term in objectives for need in term.entry.needs}
        self.on_prompt = any(term.settings.get("sft_scope") == "all" for term in objectives)
        self.running = {i: RunningRewards() for i, t in enumerate(objectives) if "running" in t.entry.needs}
        engine.kept |= {f"running-{i}": state for i, state in self.running.items()}

    # --- one step ------------------------------------------------------------------------------------------------

    def arguments(
        self, split: str, samples: Sequence[Sample], rows: np.ndarray
    ) -> tuple[Callable[[Batch, list[int]], Losses], dict[str, float], Prepare | None]:
        """(loss, counts, prepare) of `Engine.update` for these rows of a split."""
        known = facts(samples)
        best = known.length.gather(1, known.best[:, None])
        counts = {"example": float(len(samples)), "chosen_token": float(best.sum())}
        kl = self._kl_point(split, rows) if "kl_point" in self.needs else None
        whole = self._whole_step(split, samples, rows, known) if "whole_step" in self.needs else None
        if self.policy.base.shards and self.reference.memory:
            self._ask_ahead(split, samples, rows)

        def prepare(batch: Batch, group: list[int]) -> Batch:
            return batch.with_numbers(reference=self._remembered(split, batch, rows[group]))

        def loss(batch: Batch, group: list[int]) -> Losses:
            own = known.take(group, batch.ids.device)
            numbers = _laid_out(self._ask(self.policy, batch), own.present)
            if whole is None:
                judged, rewards = self._judge(numbers, batch.numbers.get("reference"), own, kl)
            else:
                judged = _example_by_example(whole, numbers, group)
                rewards = {i: of[group].to(numbers) for i, of in whole.running.items()}
            return self._losses(judged, rewards, numbers, own, kl)

        return loss, counts, prepare if self.reference.memory else None

    def likelihood(self, samples: Sequence[Sample]) -> Part | None:
        """The likelihood of the chosen completions with their prompts, where an objective asks for that: a part of the
        step with samples of its own."""
        if not self.on_prompt:
            return None
        whole = [score_all(sample) for sample in samples]

        def loss(batch: Batch, group: list[int]) -> Losses:
            nll = -self.policy.logp(batch, statistics="none").logp.sum()
            return Losses({"token": nll}, {"nll": (nll.detach(), float(len(batch.owners)))})

        return Part(whole, loss, {"token": float(sum(s.completions[0].scored.sum() for s in whole))})

    def settle(self, metrics: dict[str, float], samples: Sequence[Sample], *, trained: bool) -> dict[str, float]:
        """After a step or an evaluation: its figures for people; running means move when it was trained."""
        self.reference.exchange()
        shown = {k: v for k, v in metrics.items() if not k.startswith("running-")}
        good = float(sum(s.numbers.get("desirable", 1.0) for s in samples))
        bad = len(samples) - good if self.kind == "verdict" else float(len(samples))
        for i, state in self.running.items() if trained else ():
            chosen, rejected = (
                metrics[f"running-{i}/{side}"] if count else 0.0
                for side, count in (("chosen", good), ("rejected", bad))
            )
            state.update(chosen, good, rejected, bad)
        if self.kind == "verdict" and {"rewards/chosen", "rewards/rejected"} <= set(shown):
            shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
        return shown

    # --- what the roles say --------------------------------------------------------------------------------------

    def _ask(self, role: Role, batch: Batch) -> Tensor:
        """The numbers of each completion: (N, C)."""
        certain = "certainty" in self.needs and role is self.policy
        of = role.logp(batch, statistics="collision" if certain else "none")
        n, owners = batch.sequences, batch.owners
        columns = [sum_by_sequence(of.logp, owners, n)]
        length = lengths(owners, n)
        if "common" in self.needs:
            place = torch.arange(len(owners), device=owners.device) - (length.cumsum(0) - length)[owners]
            shorter = length.view(-1, 2).amin(1).repeat_interleave(2)
            inside = place < shorter[owners]
            columns.append(sum_by_sequence(torch.where(inside, of.logp, torch.zeros_like(of.logp)), owners, n))
        if certain:
            sure = sum_by_sequence(of.logp.detach() - of.collision, owners, n)
            columns.append(sure / length.clamp(min=1))
        return torch.stack(columns, dim=1)

    def _ask_ahead(self, split: str, samples: Sequence[Sample], rows: np.ndarray) -> None:
        """Ask the reference for all rows of a step that are not known: of layers that are held in parts it is asked by
        all processes in step, and not by each in its own micro-batches."""
        memory, frozen = self.reference.memory[split], self.reference.role
        new = [i for i, row in enumerate(rows) if not memory.knows(torch.tensor([int(row)]))]
        if new:
            assert frozen is not None
            parts = self.engine.infer(frozen, [samples[i] for i in new], partial(self._ask, frozen), "sequence")
            self.reference.keep(split, torch.from_numpy(rows[new]), torch.stack(parts))

    def _remembered(self, split: str, batch: Batch, rows: np.ndarray) -> Tensor:
        """The reference's numbers (B, W, C), asked for at the first visit in the policy's own micro-batch."""
        memory, index = self.reference.memory[split], torch.from_numpy(rows)
        if not memory.knows(index):
            assert self.reference.role is not None
            with self.reference.role.active():
                fresh = self._ask(self.reference.role, batch)
            self.reference.keep(split, index, fresh.view(len(rows), *memory.logp.shape[1:]))
        return memory.logp[index].to(batch.ids.device)

    def _kl_point(self, split: str, rows: np.ndarray) -> Tensor:
        """KTO's estimate of KL(policy || reference) over a whole step: the mean log-ratio of the rows' strangers, not
        below zero; 0 when no row has one."""
        has, mismatched = self.reference.strangers[split].of(rows)
        if not mismatched:
            return torch.zeros(())
        memory, index = self.reference.memory[strangers_of(split)], torch.from_numpy(rows[has])
        if not memory.knows(index):
            frozen = self.reference.role
            assert frozen is not None
            parts = self.engine.infer(frozen, mismatched, partial(self._ask, frozen), "sequence")
            self.reference.keep(strangers_of(split), index, torch.stack(parts))
        parts = self.engine.infer(self.policy, mismatched, partial(self._ask, self.policy), "sequence")
        return (torch.cat(parts)[:, 0].mean().cpu() - memory.logp[index, 0, 0].mean()).clamp(min=0)

    def _whole_step(self, split: str, samples: Sequence[Sample], rows: np.ndarray, known: Facts) -> Whole:
        """All numbers of the step without gradient, the loss of them, and its gradient by each number."""
        memory, index, frozen = self.reference.memory[split], torch.from_numpy(rows), self.reference.role
        if not memory.knows(index):
            assert frozen is not None
            parts = self.engine.infer(frozen, samples, partial(self._ask, frozen), "sequence")
            self.reference.keep(split, index, torch.stack(parts))
        parts = self.engine.infer(self.policy, samples, partial(self._ask, self.policy), "sequence")
        numbers = torch.stack(parts).cpu().requires_grad_()
        with torch.enable_grad():
            judged, running = self._judge(numbers, memory.logp[index], known, None)
            (slope,) = torch.autograd.grad(judged.loss.sum(), numbers)
        return Whole(judged._replace(loss=judged.loss.detach()), slope, running)

    # --- what the objectives say ---------------------------------------------------------------------------------

    def _judge(
        self, numbers: Tensor, reference: Tensor | None, known: Facts, kl: Tensor | None
    ) -> tuple[Judged, dict[int, Tensor]]:
        """The weighted sum over the terms (rewards: the first one's), and the rewards of terms with running means."""
        said = [t.judge(*self._given(t, i, numbers, reference, known, kl)) for i, t in enumerate(self.terms)]
        weights = [term.weight for term in self.terms]
        judged = Judged(
            torch.stack([w * j.loss.to(numbers.dtype) for w, j in zip(weights, said, strict=True)]).sum(0),
            said[0].rewards,
            sum(w * j.likelihood for w, j in zip(weights, said, strict=True)),
        )
        return judged, {i: said[i].rewards for i in self.running}

    def _given(
        self, term: Term, place: int, numbers: Tensor, reference: Tensor | None, known: Facts, kl: Tensor | None
    ) -> list[Any]:
        """The arguments of an objective, in the order of the catalogue's needs."""
        entry, device = term.entry, numbers.device
        shape = {"comparison": self._pair, "ranking": _ranked, "verdict": _single}[entry.data]
        given: list[Any] = [shape(numbers, known)]
        if "reference" in entry.needs:
            assert reference is not None
            given.append(shape(reference, known))
        if entry.data == "verdict":
            given.append(known.desirable)
        if "scores" in entry.needs:
            given.append(known.scores)
        if "kl_point" in entry.needs:
            assert kl is not None
            given.append(kl.to(device))
        if "running" in entry.needs:
            given.append(self.running[place].tensor().to(device, numbers.dtype))
        return given

    def _pair(self, numbers: Tensor, known: Facts) -> Pair:
        common = numbers[:, :, 1] if "common" in self.needs else None
        last = 2 if "common" in self.needs else 1
        certainty = numbers[:, :, last] if "certainty" in self.needs and numbers.shape[2] > last else None
        (chosen, rejected), (of_chosen, of_rejected) = numbers[:, :, 0].unbind(1), known.length.unbind(1)
        return Pair(chosen, rejected, of_chosen, of_rejected, common, certainty)

    def _losses(
        self, judged: Judged, running: dict[int, Tensor], numbers: Tensor, known: Facts, kl: Tensor | None
    ) -> Losses:
        """Sums for the engine, and the figures of the objective."""
        sums = {"example": judged.loss.sum()}
        chosen = numbers[:, :, 0].gather(1, known.best[:, None]).squeeze(1)
        tokens = float(known.length.gather(1, known.best[:, None]).sum())
        metrics = FIGURES[self.kind](judged.rewards, numbers[:, :, 0].detach(), known)
        if judged.likelihood and not self.on_prompt:
            sums["chosen_token"] = -judged.likelihood * chosen.sum()
            metrics["nll"] = (-chosen.detach().sum(), tokens)
        if kl is not None:
            metrics["kl"] = (kl * len(numbers), float(len(numbers)))
        for i, rewards in running.items():
            found = FIGURES[self.kind](rewards, numbers[:, :, 0].detach(), known)
            metrics |= {f"running-{i}/{side}": found[f"rewards/{side}"] for side in ("chosen", "rejected")}
        return Losses(sums, metrics)


def _laid_out(numbers: Tensor, present: Tensor) -> Tensor:
    """(N, C) by completion -> (B, W, C), zeros where there is no completion."""
    out = numbers.new_zeros(*present.shape, numbers.shape[1])
    out[present] = numbers
    return out


def _single(numbers: Tensor, known: Facts) -> Tensor:
    return numbers[:, 0, 0]


def _ranked(numbers: Tensor, known: Facts) -> Ranked:
    return Ranked(numbers[:, :, 0], known.length, known.gold, known.present)


def _example_by_example(whole: Whole, numbers: Tensor, group: Sequence[int]) -> Judged:
    """The part of a whole step's loss that belongs to some of its examples: its value, and its gradient through their
    numbers. The sum over all micro-batches has the gradient of the loss of the whole step."""
    slope, loss = whole.slope[list(group)].to(numbers), whole.judged.loss[list(group)].to(numbers)
    moving = ((numbers - numbers.detach()) * slope).sum((1, 2))
    return Judged(loss + moving, whole.judged.rewards[list(group)].to(numbers), whole.judged.likelihood)
