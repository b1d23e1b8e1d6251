"""Completions of prompts, as data.

1. Render each prompt with the model's own template, as ppo does;
2. piece by piece: sample completions with the engine of ppo, each drawn from uniforms that only depend on the seed and
   its number, so that neither batches nor interruptions change it;
3. with best_of: score them, and keep the best one of each prompt;
4. with revise: have the model criticise each by a principle, and write it anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_cli.data.completions import plain_prompt
from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models import processes
from rlhf_cli.models.base import Text, check_length, load_text
from rlhf_cli.models.build import load_frozen, quantization_of
from rlhf_cli.models.device import micro_batch_range
from rlhf_cli.models.levers import check_levers
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.data_stages import SampleRecipe
from rlhf_cli.recipe.principles import read_principles
from rlhf_cli.recipe.settings.rollout import OF_A_SERVER
from rlhf_cli.rollouts.experience import draw
from rlhf_cli.rollouts.generate import mixed
from rlhf_cli.rollouts.loading import check_rewards, open_rewards
from rlhf_cli.rollouts.rewards import Reward, Rollout
from rlhf_cli.rollouts.sampling import Sampling
from rlhf_cli.rollouts.vllm import served, serving
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import product
from rlhf_cli.stages.company import tell_shares
from rlhf_cli.stages.product import Piece
from rlhf_cli.stages.prompts import read_prompts
from rlhf_cli.stages.revising import Draft, Reviser
from rlhf_cli.stages.scored import fields_of, judge
from rlhf_cli.train.passes import Frozen

AT_ONCE = 256
"""Completions of a piece, about: what a kill can cost."""


def run(recipe: SampleRecipe, run: Run, display: Display, options: Options) -> None:
    """Sample completions of prompts. Raises RlhfError."""
    text = load_text(recipe.model)
    check_length(text, recipe.data.max_length, "data.max_length")
    if recipe.rollout.engine != "vllm":
        check_levers(recipe.model, text.source)
    server = None if options.dry_run else serving(recipe.rollout, text.source, longest(recipe, text), run.path)
    data = read_prompts(recipe, text, display)
    sampling = Sampling.of(recipe.rollout, text.template)
    checked = check_rewards(recipe.rewards, recipe.model, text, data.tasks_train, recipe.data.max_length)
    each = recipe.best_of or recipe.rollout.completions_per_prompt
    if recipe.revise is not None:
        read_principles(recipe.revise.principles, "revise.principles")
        if text.template.chat is None:
            raise ModelError("revise needs a chat template, and the tokenizer has none", recipe.model.name_or_path,
                             "give model.chat_template")  # fmt: skip
    if options.dry_run:
        display.note(f"dry run: {each} completions of each of {len(data.train)} prompts")
        return
    sampling = served(sampling, server)
    policy = load_frozen(recipe.model, text)
    known = quantization_of(text)
    if known != recipe.model.quantization:
        display.warn(
            f"model: {text.path.name} was trained on {known} weights and is read on {recipe.model.quantization} ones, "
            f"so it writes a little otherwise (model.quantization: {known} reads it as it was trained)"
        )
    display.note(f"model: {text.path.name}, {str(policy.base.dtype)[6:]}, on {policy.base.device}")
    tell_shares(recipe.distributed, policy.base, display)
    asked = Frozen(display, micro_batch_range(policy.base.device).usual)
    rewards = open_rewards(checked, recipe.model, policy.base, text)
    reviser = None
    if recipe.revise is not None:
        reviser = Reviser(recipe.revise, policy, text, sampling, recipe.seed)
    prompts = max(1, AT_ONCE // each)
    writer = Writer(recipe, policy, text, sampling, each, rewards, asked, reviser, prompts * each)
    by = {"base": {"name": policy.base.source, "fingerprint": policy.base.fingerprint}, "role": "data",
          "template": text.template.digest, "model": text.path.name}  # fmt: skip
    product.begin(run, display, by, data.report, data.bad)
    starts = range(0, len(data.train), prompts)

    def pieces(numbers: range) -> Piece:
        places = range(starts[numbers.start], min(numbers.stop * prompts, len(data.train)))
        return writer.pieces([data.tasks_train[i] for i in places], [data.train[i] for i in places], places.start)

    sums = product.make(run, display, len(starts), pieces, at_once=processes.count())
    if server is not None:
        server.close(display.warn)
    product.finish(run, display, product.made_rows(run), summary(len(data.train), sums, recipe.best_of is not None))


def longest(recipe: SampleRecipe, text: Text) -> int:
    """Tokens that a prompt with its completion may have; the conversation of a revision fills the model's context."""
    context = getattr(text.config.get_text_config(), "max_position_embeddings", None)
    return recipe.data.max_length if recipe.revise is None else context or recipe.data.max_length


class Writer:
    """Writes the completions of some prompts."""

    def __init__(
        self, recipe: SampleRecipe, policy: Role, text: Text, sampling: Sampling, each: int, rewards: list[Reward],
        asked: Frozen, reviser: Reviser | None, at_once: int,
    ) -> None:  # fmt: skip
        """at_once: completions that rewards are asked about together."""
        self.reviser, self.at_once = reviser, at_once
        self.recipe, self.policy, self.template, self.each = recipe, policy, text.template, each
        self.sampling, self.rewards, self.asked = sampling, rewards, asked
        left_out = {"max_batch", "completions_per_prompt", *OF_A_SERVER}
        settings = recipe.rollout.model_dump(exclude=left_out, exclude_defaults=True)
        self.by = {
            "model": text.path.name, "weights": str((text.path.run or {}).get("digest", policy.base.fingerprint))[-16:],
            "template": text.template.digest[:16], "seed": recipe.seed, "temperature": recipe.rollout.temperature,
            "max_new_tokens": recipe.rollout.max_new_tokens, **settings,
        }  # fmt: skip

    def pieces(self, tasks: list[Task], samples: list[Sample], first: int) -> Piece:
        """All completions of some prompts; first: the number of the first of these."""
        prompts = [sample.prompt for sample in samples]
        seed = mixed(self.recipe.seed, 0)
        numbers = range(first, first + len(prompts))
        rollout = draw(self.policy, tasks, prompts, self.template, self.template.stop_ids, self.each, self.sampling,
                       seed, numbers).rollout  # fmt: skip
        rows = [self._row(rollout, n) for n in range(len(rollout.completions))]
        tokens = sum(len(sample.completions[0].ids) for sample in rollout.samples)
        figures: dict[str, float] = {"completions": len(rows), "tokens": tokens, "finished": sum(rollout.finished)}
        if self.recipe.best_of is not None:
            rows, more = self._best(rollout, rows)
            figures |= more
        if self.reviser is not None:
            drafts = self.reviser(rollout, first * self.each)
            rows = [row | revised(draft, row) for row, draft in zip(rows, drafts, strict=True)]
            figures["revised"] = sum(bool(draft.critiques) for draft in drafts)
        return Piece(rows, {name: float(value) for name, value in figures.items()})

    def _row(self, rollout: Rollout, n: int) -> dict[str, Any]:
        task, sample = rollout.tasks[n], rollout.samples[n]
        ids = {"prompt_ids": sample.prompt.tolist(), "completion_ids": sample.completions[0].ids.tolist()}
        return {
            "prompt": plain_prompt(task.prompt), "completion": rollout.completions[n], "index": n % self.each,
            "finished": bool(rollout.finished[n]), "row": task.facts, "where": task.where, "by": self.by,
            **(ids if self.recipe.token_ids and self.reviser is None else {}),
        }  # fmt: skip

    def _best(self, rollout: Rollout, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The row of each prompt with the highest score, and the scores of all; prompts of which no completion could be
        scored have none."""
        judged = judge(self.rewards, rollout, self.asked.infer, self.at_once)
        scores = np.where(judged.reward.valid, judged.reward.totals, -np.inf).reshape(-1, self.each)
        kept = [p * self.each + int(n) for p, n in enumerate(scores.argmax(1)) if np.isfinite(scores[p, n])]
        known = judged.reward.totals[judged.reward.valid]
        best = [rows[n] | fields_of(judged, n) | {"of": self.each} for n in kept]
        figures = {"kept": float(len(best)), "scored": float(len(known)), "score": float(known.sum()),
                   "best": float(sum(row["score"] for row in best))}  # fmt: skip
        return best, figures


def revised(draft: Draft, row: dict[str, Any]) -> dict[str, Any]:
    """What a revision changes in a row: the first text stays beside it."""
    return {
        "completion": draft.text, "finished": draft.finished, "draft": row["completion"],
        "critiques": draft.critiques, "principles": draft.principles,
    }  # fmt: skip


def summary(prompts: int, sums: dict[str, float], best: bool) -> dict[str, Any]:
    """The figures of the run."""
    count = max(sums.get("completions", 0.0), 1.0)
    found: dict[str, Any] = {
        "rows": int(sums.get("kept", 0) if best else sums.get("completions", 0)),
        "prompts": prompts, "completions": int(sums.get("completions", 0)), "tokens": int(sums.get("tokens", 0)),
        "mean_length": sums.get("tokens", 0.0) / count, "eos_rate": sums.get("finished", 0.0) / count,
    }  # fmt: skip
    if "revised" in sums:
        found["revised"] = int(sums["revised"])
    if sums.get("scored"):
        found |= {"mean_score": sums["score"] / sums["scored"], "mean_best": sums["best"] / max(sums["kept"], 1.0)}
    return found
