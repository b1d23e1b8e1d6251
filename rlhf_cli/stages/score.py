"""Scores of completions by reward models, functions and rules; a judge has a module of its own (stages/judged.py).

1. Read the completions: by the tokens that were sampled, where `rlhf sample` wrote them with the same tokenizer and
   template, else by their text;
2. piece by piece: ask every reward, as ppo does, and write each completion again with its score.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf_cli.data.completions import Candidate, Completions, read_completions, token_ids
from rlhf_cli.data.examples import Task
from rlhf_cli.data.quarantine import refuse
from rlhf_cli.data.rows import BadRow
from rlhf_cli.data.tokens import Completion, Sample, length
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.device import micro_batch_range, pick_device
from rlhf_cli.models.levers import check_levers
from rlhf_cli.recipe.data_stages import ScoreRecipe
from rlhf_cli.rollouts.loading import check_rewards, open_rewards
from rlhf_cli.rollouts.places import retokenise
from rlhf_cli.rollouts.rewards import Rollout
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import judged, product
from rlhf_cli.stages.product import Piece
from rlhf_cli.stages.scored import fields_of, judge, written
from rlhf_cli.train.passes import Frozen

AT_ONCE = 256
"""Completions of a piece."""


def run(recipe: ScoreRecipe, run: Run, display: Display, options: Options) -> None:
    """Score completions. Raises RlhfError."""
    if recipe.judge is not None:
        judged.run(recipe, run, display, options)
        return
    assert recipe.model is not None
    text = load_text(recipe.model)
    if any(reward.run is not None for reward in recipe.rewards):
        check_levers(recipe.model, text.source)
    data = recipe.data
    found = read_completions(data.completions, data.on_bad_row, data.max_bad_rows, scored=False)
    if text.template.chat is None and any(not isinstance(item.prompt, str) for item in found.items):
        raise ModelError("the tokenizer has no chat template, and prompts are chat messages", text.path.name,
                         "give model.chat_template")  # fmt: skip
    found, samples, sampled = in_tokens(found, recipe, text)
    items = found.items
    product.tell(found.report, display)
    display.note(f"{len(items)} completions, {sum(sampled)} of them by the tokens that were sampled")
    edited = sum("completion_ids" in item.given and not by_ids for item, by_ids in zip(items, sampled, strict=True))
    if edited:
        display.warn(f"{edited} completions are read by their text: the tokens beside them do not spell it here")
    tasks = [task_of(item) for item in items]
    checked = check_rewards(recipe.rewards, recipe.model, text, tasks, max(map(length, samples)))
    if options.dry_run:
        display.note(f"dry run: {len(items)} completions, rewards: {', '.join(r.title() for r in recipe.rewards)}")
        return
    rewards = open_rewards(checked, recipe.model, None, text)
    asked = Frozen(display, micro_batch_range(pick_device()).usual)
    lineage = {"role": "data", "template": text.template.digest, "rewards": [reward.name for reward in rewards]}
    product.begin(run, display, lineage, found.report, found.bad)
    starts = range(0, len(items), AT_ONCE)

    def pieces(numbers: range) -> Piece:
        part = slice(starts[numbers.start], numbers.stop * AT_ONCE)
        rollout = Rollout(
            tasks[part], [item.completion for item in items[part]], samples[part],
            [item.finished for item in items[part]],
        )  # fmt: skip
        totals = judge(rewards, rollout, asked.infer, AT_ONCE)
        rows = [written(item) | fields_of(totals, n) for n, item in enumerate(items[part])]
        known = totals.reward.totals[totals.reward.valid]
        tokens = sum(map(length, samples[part]))
        sums = {"tokens": tokens, "scored": len(known), "score": known.sum(), "square": np.square(known).sum()}
        return Piece(rows, {name: float(value) for name, value in sums.items()})

    sums = product.make(run, display, len(starts), pieces)
    product.finish(run, display, product.made_rows(run), summary(len(items), sums))


def in_tokens(found: Completions, recipe: ScoreRecipe, text: Text) -> tuple[Completions, list[Sample], list[bool]]:
    """The completions that can be read, each as tokens, and whether by those that were sampled; what cannot is among
    the bad rows. Raises DataError."""
    samples, sampled, reasons = [], [], dict[int, str]()
    most = recipe.data.max_length
    for place, item in enumerate(found.items):
        try:
            ids = sample_ids(item, text)
            sample = sample_of(item, text, ids)
            if most is not None and length(sample) > most:
                raise BadRow(f"longer than data.max_length {most}")
        except BadRow as error:
            reasons[place] = str(error)
        except DataError as error:
            reasons[place] = error.problems[0].message
        else:
            samples.append(sample)
            sampled.append(ids is not None)
    if reasons:
        found = found.without(reasons)
        refuse(found.bad, 0 if recipe.data.on_bad_row == "error" else recipe.data.max_bad_rows)
        if not samples:
            raise DataError(f"none of the {len(reasons)} completions can be read", recipe.data.completions[0].path,
                            next(iter(reasons.values())))  # fmt: skip
    return found, samples, sampled


def sample_ids(item: Candidate, text: Text) -> tuple[list[int], list[int]] | None:
    """The tokens that were sampled, where they are those of this tokenizer and template and still spell the texts."""
    ids = token_ids(item) if item.by.get("template") == text.template.digest[:16] else None
    if ids is None or max(map(max, ids)) >= len(text.tokenizer):
        return None
    prompt, completion = ids
    template = text.template
    if template.decode(completion, after=prompt) != item.completion:
        return None
    whole, first = template.prompt_ids(item.prompt, item.where), template.first_length(prompt)
    cut = prompt[first:]  # a long prompt may have lost its start
    return ids if whole[len(whole) - len(cut) :] == cut else None


def sample_of(item: Candidate, text: Text, ids: tuple[list[int], list[int]] | None) -> Sample:
    """A completion in the model's tokens: those that were sampled, or those of its text. Raises DataError."""
    if ids is None:
        return retokenise(text.template, task_of(item), item.completion, finished=item.finished)
    prompt, completion = (np.array(part, dtype=np.int32) for part in ids)
    return Sample(prompt, (Completion(completion, np.ones(len(completion), dtype=bool)),), {}, item.where)


def task_of(item: Candidate) -> Task:
    """What was asked; the other columns of the prompt's row, or of a file that is not ours, go to the rewards."""
    facts = dict(item.facts)
    if not item.by:
        facts |= {k: v for k, v in item.given.items() if k not in ("prompt", "completion", "row", "score", "scores")}
    return Task(item.prompt, item.where, facts)


def summary(count: int, sums: dict[str, float]) -> dict[str, Any]:
    """The figures of the run."""
    known = sums.get("scored", 0.0)
    mean = sums["score"] / known if known else None
    std = None if mean is None else max(sums["square"] / known - mean * mean, 0.0) ** 0.5
    return {"rows": count, "scored": int(known), "mean_score": mean, "std_score": std}
