"""Language models on demonstrations and prompts, alone or against others.

1. Every model reads the same examples with its own tokenizer and template; they must be able to read the same prompts;
2. model by model, piece by piece: perplexity of the demonstrations; completions, each drawn as `rlhf sample` draws it,
   with what the rewards and the reference say of it;
3. with a judge, piece by piece: the completions of `model` against those of the others, in both orders;
4. the figures, of each model and of each match-up. The draws of two models are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.data.completions import plain_prompt
from rlhf_cli.data.prepare import Prepared
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DataError, ModelError, RecipeError
from rlhf_cli.models import processes
from rlhf_cli.models.base import Text, check_length, load_text
from rlhf_cli.models.build import frozen_role, load_frozen
from rlhf_cli.models.device import micro_batch_range
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.kl import k1, k3
from rlhf_cli.recipe.evaluation import EvalRecipe
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.experience import draw
from rlhf_cli.rollouts.generate import Sampling, mixed
from rlhf_cli.rollouts.loading import Checked, check_rewards, open_rewards
from rlhf_cli.rollouts.rewards import Reward, Rollout
from rlhf_cli.rollouts.vllm import Server, served, serving
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import evaluated, product, spoken
from rlhf_cli.stages.company import tell_shares
from rlhf_cli.stages.evaluated import finite
from rlhf_cli.stages.matches import Matches, open_matches
from rlhf_cli.stages.product import Piece
from rlhf_cli.stages.scored import fields_of, judge
from rlhf_cli.train.passes import Frozen


@dataclass(frozen=True)
class Contender:
    """A model that is evaluated, without its weights."""

    number: int
    settings: ModelSettings
    text: Text
    demonstrations: Prepared | None
    prompts: Prepared | None
    rewards: list[Checked]
    reference: Text | None

    @property
    def name(self) -> str:
        """As the recipe says it."""
        return self.text.path.name


@dataclass(frozen=True)
class Opened:
    """The same with everything in memory."""

    policy: Role
    reference: Role | None
    rewards: list[Reward]
    asked: Frozen


def run(recipe: EvalRecipe, text: Text, run: Run, display: Display, options: Options) -> None:
    """Measure language models. Raises RlhfError."""
    contenders = [contender(recipe, 0, text)]
    read = [one for one in (contenders[0].demonstrations, contenders[0].prompts) if one is not None]
    report, bad = evaluated.together(read)
    product.tell(report, display)
    for number in range(1, 1 + len(recipe.against)):
        contenders.append(contender(recipe, number, rival(recipe, number, contenders)))
        check_alike(contenders[0], contenders[-1])
    matches = open_matches(recipe, [one.name for one in contenders], contenders[0].prompts, display)
    if options.dry_run:
        display.note(f"dry run: {', '.join(one.name for one in contenders)}; {len(report.sources)} sources")
        return
    matches.look(run)
    servers = [open_server(recipe, one, run) for one in contenders]
    lineage = {"role": "data", "models": [
        {"name": one.name, "template": one.text.template.digest, "digest": (one.text.path.run or {}).get("digest")}
        for one in contenders
    ]}  # fmt: skip
    product.begin(run, display, lineage, report, bad)
    work = Work(recipe, contenders, servers, matches, run, display)
    product.make(run, display, len(work.pieces), work.make, at_once=processes.count(), borders=work.borders)
    matches.close()
    if servers[0] is not None:  # one mark for the adapters of all
        servers[0].close(display.warn)
    evaluated.finish(run, display, lambda: {
        "kind": "language", "model": text.path.name, **spoken.figures(recipe, work.names, run, matches.pairs)
    })  # fmt: skip


def open_server(recipe: EvalRecipe, one: Contender, run: Run) -> Server | None:
    """The server that samples for a model; None when it samples here, or nothing. Raises ModelError."""
    if one.prompts is None:
        return None
    return serving(recipe.rollout, one.text.source, recipe.data.max_length, run.path)


def contender(recipe: EvalRecipe, number: int, text: Text) -> Contender:
    """A model with its examples, rewards and reference checked. Raises RecipeError, DataError and ModelError."""
    settings = recipe.model if number == 0 else named(recipe, recipe.against[number - 1])
    check_length(text, recipe.data.max_length, f"data.max_length ({text.path.name})")
    demonstrations = prompts = None
    rewards: list[Checked] = []
    if recipe.data.demonstrations is not None:
        demonstrations = evaluated.read(recipe, "demonstrations", text)
    if recipe.data.prompts is not None:
        room = recipe.data.max_length - recipe.rollout.max_new_tokens
        prompts = evaluated.read(recipe, "prompts", text, room=room)
        rewards = check_rewards(recipe.rewards, settings, text, prompts.tasks_train, recipe.data.max_length)
    reference = None if recipe.reference is None else speaker(recipe, recipe.reference)
    if reference is not None and reference.template.digest != text.template.digest:
        raise ModelError(
            f"has another tokenizer or chat template than {text.path.name}", f"reference {recipe.reference}",
            "the KL is between distributions over the same tokens",
        )  # fmt: skip
    if reference is not None:
        check_length(reference, recipe.data.max_length, f"data.max_length (reference {recipe.reference})")
    return Contender(number, settings, text, demonstrations, prompts, rewards, reference)


def named(recipe: EvalRecipe, name: str) -> ModelSettings:
    """How another model is loaded: as `model` is."""
    return recipe.model.model_copy(update={"name_or_path": name, "revision": None})


def speaker(recipe: EvalRecipe, name: str) -> Text:
    """What is known of another language model. RecipeError or ModelError when it is none."""
    text = load_text(named(recipe, name))
    if (text.path.run or {}).get("stage") == "train-rm":
        raise ModelError("was trained to judge (rlhf train-rm), not to write", name, "name a language model")
    return text


def rival(recipe: EvalRecipe, number: int, before: Sequence[Contender]) -> Text:
    """What is known of a model of `against`. RecipeError when it is one of those before under another name."""
    text = speaker(recipe, recipe.against[number - 1])
    for other in before:
        one, same = text.path.weights, other.text.path.weights
        if one is not None and same is not None and one.resolve() == same.resolve():
            raise RecipeError(f"is the same model as {other.name}", f"against {text.path.name}", "name another one")
    return text


def check_alike(first: Contender, other: Contender) -> None:
    """DataError unless two models were given the same prompts."""
    if first.prompts is None or other.prompts is None:
        return
    mine, theirs = ({task.where for task in one.prompts.tasks_train} for one in (first, other) if one.prompts)
    odd = sorted(mine ^ theirs)
    if odd:
        raise DataError(
            f"{len(odd)} prompts fit only one of {first.name} and {other.name} in their own tokens", odd[0],
            "raise data.max_length, or set data.truncation: left",
        )  # fmt: skip


class Work:
    """What is to be done, in pieces: of one model after the other, then the matches that a judge decides."""

    def __init__(
        self, recipe: EvalRecipe, contenders: list[Contender], servers: list[Server | None], matches: Matches,
        run: Run, display: Display,
    ) -> None:  # fmt: skip
        self.recipe, self.contenders, self.matches, self.run, self.display = recipe, contenders, matches, run, display
        self.servers = servers
        self.names = [one.name for one in contenders]
        self.each = recipe.rollout.completions_per_prompt
        self._open: tuple[int, Opened] | None = None
        self.pieces: list[tuple[str, int, int]] = []  # what, of which model, from where on
        for one in contenders:
            if one.demonstrations is not None:
                starts = range(0, len(one.demonstrations.train), evaluated.AT_ONCE)
                self.pieces += [("losses", one.number, start) for start in starts]
            if one.prompts is not None:
                starts = range(0, len(one.prompts.train), max(1, evaluated.AT_ONCE // self.each))
                self.pieces += [("completions", one.number, start) for start in starts]
        self.pieces += [("matches", 0, start) for start in matches.starts]
        kinds = [piece[:2] for piece in self.pieces]
        self.borders = [n for n, (before, kind) in enumerate(pairwise(kinds), start=1) if kind != before]

    def make(self, numbers: range) -> Piece:
        """A part of the work, the same whatever came before: pieces of one kind, of one model."""
        what, of, start = self.pieces[numbers.start]
        if what == "matches":
            self._open = None
            return self.matches.pieces(start, len(numbers), self.run)
        one = self.contenders[of]
        if self._open is None or self._open[0] != of:
            self._open = None  # the weights of the one before go first
            self._open = (of, self._opened(one))
        return (self._losses if what == "losses" else self._completions)(one, self._open[1], start, len(numbers))

    def _opened(self, one: Contender) -> Opened:
        policy = load_frozen(one.settings, one.text)
        reference = None
        if one.reference is not None:
            reference = frozen_role(
                "reference", named(self.recipe, one.reference.path.name), one.reference, policy.base
            )
        rewards = open_rewards(one.rewards, one.settings, policy.base, one.text)
        self.display.note(f"model: {one.name}, {str(policy.base.dtype)[6:]}, on {policy.base.device}")
        tell_shares(self.recipe.distributed, policy.base, self.display)
        return Opened(policy, reference, rewards, Frozen(self.display, micro_batch_range(policy.base.device).usual))

    def _losses(self, one: Contender, opened: Opened, start: int, count: int) -> Piece:
        assert one.demonstrations is not None
        data, stop = one.demonstrations, start + count * evaluated.AT_ONCE
        samples = [data.train[n] for n in range(start, min(stop, len(data.train)))]
        policy, sources = opened.policy, self.recipe.data.demonstrations or []
        parts = opened.asked.infer(policy, samples, lambda b: policy.logp(b, statistics="none").logp, "token")
        more: list[dict[str, Any]] = [
            {"what": "loss", "model": one.name, "where": sample.where,
             "source": sources[int(data.source[start + n])].path,
             "nats": finite(-float(part.double().sum()), sample.where, "the log-probability"), "tokens": len(part)}
            for n, (sample, part) in enumerate(zip(samples, parts, strict=True))
        ]  # fmt: skip
        return Piece([], {"tokens": float(sum(row["tokens"] for row in more))}, more)

    def _completions(self, one: Contender, opened: Opened, start: int, count: int) -> Piece:
        assert one.prompts is not None
        prompts_of_a_piece = max(1, evaluated.AT_ONCE // self.each)
        stop = min(start + count * prompts_of_a_piece, len(one.prompts.train))
        tasks, template = one.prompts.tasks_train[start:stop], one.text.template
        prompts = [one.prompts.train[n].prompt for n in range(start, stop)]
        sampling = served(Sampling.of(self.recipe.rollout, template), self.servers[one.number])
        rollout = draw(opened.policy, tasks, prompts, template, template.stop_ids, self.each, sampling,
                       mixed(self.recipe.seed, one.number), range(start, stop)).rollout  # fmt: skip
        rows = [self._row(one, rollout, n, start + n // self.each) for n in range(len(rollout.completions))]
        sums = {"tokens": float(sum(row["length"] for row in rows))}
        if opened.rewards:
            totals = judge(opened.rewards, rollout, opened.asked.infer, prompts_of_a_piece * self.each)
            rows = [row | fields_of(totals, n) for n, row in enumerate(rows)]
            known = totals.reward.totals[totals.reward.valid]
            sums |= {"scored": float(len(known)), "score": float(known.sum())}
        if opened.reference is not None:
            kl = divergence(opened, opened.reference, rollout.samples, sampling.temperature)
            rows = [row | {"k1": a, "k3": b} for row, (a, b) in zip(rows, kl, strict=True)]
        return Piece(rows, sums)

    def _row(self, one: Contender, rollout: Rollout, n: int, prompt: int) -> dict[str, Any]:
        task, made = rollout.tasks[n], rollout.samples[n].completions[0]
        return {
            "prompt": plain_prompt(task.prompt), "completion": rollout.completions[n], "index": n % self.each,
            "finished": bool(rollout.finished[n]), "row": task.facts, "where": task.where, "number": prompt,
            "length": len(made.ids),
            "by": {"model": one.name, "template": one.text.template.digest[:16], "seed": self.recipe.seed,
                   "temperature": self.recipe.rollout.temperature},
        }  # fmt: skip


def divergence(
    opened: Opened, reference: Role, samples: Sequence[Sample], temperature: float
) -> list[tuple[float, float]]:
    """k1 and k3 of each completion, summed over its tokens, at the temperature of the sampling."""

    def said(role: Role) -> list[Tensor]:
        found = opened.asked.infer(role, samples, lambda b: role.logp(b, temperature, statistics="none").logp, "token")
        return [part.double().cpu() for part in found]

    with torch.no_grad():
        return [
            (finite(float(k1(own, other).sum()), sample.where, "the KL"), float(k3(own, other).sum()))
            for own, other, sample in zip(said(opened.policy), said(reference), samples, strict=True)
        ]
