"""Training data of scored completions.

1. Read the completions of all sources as one pool, grouped by prompt;
2. leave out those without a score, and empty ones (or, as the recipe says, those that were cut);
3. select, by the entry of the catalogue that the recipe names;
4. write the rows in a format that the data gate reads, and a summary: what was left out and why, the scores before and
   after, and what the best of n is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_cli.catalog import SELECTIONS
from rlhf_cli.data import selection
from rlhf_cli.data.completions import Candidate, by_prompt, read_completions
from rlhf_cli.data.curves import mean_curve
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.report import tally
from rlhf_cli.data.selection import Selected
from rlhf_cli.errors import DataError
from rlhf_cli.models import processes
from rlhf_cli.recipe.data_stages import SelectRecipe
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import product

NO_SCORE = "no score"
EMPTY = "empty completion"
CUT = "cut by the length limit"
AGAIN = "again.jsonl"
"""Prompts that are to be sampled again."""
CURVE = (1, 2, 4, 8, 16, 32, 64)
"""Values of n that are told."""


def run(recipe: SelectRecipe, run: Run, display: Display, options: Options) -> None:
    """Make training data of scored completions; of several processes the first one does. Raises RlhfError."""
    processes.first(lambda: _run(recipe, run, display, options), "selecting")


def _run(recipe: SelectRecipe, run: Run, display: Display, options: Options) -> None:
    data, entry = recipe.data, SELECTIONS[recipe.selection.name]
    found = read_completions(data.completions, data.on_bad_row, data.max_bad_rows, scored=entry.scored)
    product.tell(found.report, display)
    items, dropped = usable(found.items, scored=entry.scored, finished_only=data.finished_only)
    groups = by_prompt(items)
    settings = recipe.selection.model_dump(exclude={"name"})
    chosen: Selected = entry.load()(groups, **settings)
    chosen.dropped += dropped
    facts = summary(groups, chosen, scored=entry.scored)
    for line in lines(facts):
        display.note(line)
    if not chosen.rows:
        reasons = "; ".join(str(reason) for reason in tally(chosen.dropped))
        raise DataError(f"nothing is selected by {entry.name}: {reasons}", data.completions[0].path, hint(entry.name))
    if options.dry_run:
        display.note(f"dry run: {len(chosen.rows)} rows ({entry.gives})")
        return
    lineage = {"role": "data", "selection": entry.name, "gives": entry.gives}
    product.begin(run, display, lineage, found.report, found.bad)
    if chosen.again:
        display.note(f"{len(chosen.again)} prompts have none: {run.path / AGAIN}")
    product.finish(run, display, chosen.rows, facts, {AGAIN: chosen.again} if chosen.again else {})


def usable(items: Sequence[Candidate], *, scored: bool, finished_only: bool) -> tuple[list[Candidate], list[Dropped]]:
    """The completions that may be selected, and the others."""
    kept, dropped = [], []
    for item in items:
        if scored and item.score is None:
            dropped.append(Dropped(NO_SCORE, item.where))
        elif not item.completion.strip():
            dropped.append(Dropped(EMPTY, item.where))
        elif finished_only and not item.finished:
            dropped.append(Dropped(CUT, item.where))
        else:
            kept.append(item)
    return kept, dropped


def hint(name: str) -> str:
    """What to do when nothing is left."""
    return {
        "threshold": "lower selection.min_score, or sample more completions of each prompt",
        "pairs": "sample several completions of each prompt, or lower selection.min_gap",
        "ranking": "sample several completions of each prompt",
        "games": "give the completions of two models on the same prompts",
        "spin": "sample from prompts whose rows hold the data's completion, and name its column: selection.column",
    }.get(name, "look at the scores")


def summary(groups: Sequence[Sequence[Candidate]], chosen: Selected, *, scored: bool) -> dict[str, Any]:
    """The figures of the run."""
    count = sum(len(group) for group in groups)
    facts: dict[str, Any] = {
        "rows": len(chosen.rows), "prompts": len(groups), "completions": count,
        "left_out": {reason.reason: reason.count for reason in tally(chosen.dropped)}, **chosen.figures,
    }  # fmt: skip
    if scored and count:
        scores = [selection.score_of(item) for group in groups for item in group]
        facts |= {"mean_score": float(np.mean(scores)), "std_score": float(np.std(scores))}
        kept = [row["score"] for row in chosen.rows if isinstance(row.get("score"), int | float)]
        facts |= {"mean_score_kept": float(np.mean(kept))} if kept else {}
        if len({item.model for group in groups for item in group}) == 1:  # of a mixture it would be of no model
            facts["best_of_n"] = mean_curve([[selection.score_of(item) for item in group] for group in groups])
    return facts


def lines(facts: dict[str, Any]) -> list[str]:
    """The figures for people."""
    found = [f"{facts['completions']} completions of {facts['prompts']} prompts: {facts['rows']} rows selected"]
    found += [f"left out, {reason}: {count}" for reason, count in facts["left_out"].items()]
    if "mean_score" in facts:
        after = f", of those kept {facts['mean_score_kept']:.4g}" if "mean_score_kept" in facts else ""
        found.append(f"score: mean {facts['mean_score']:.4g}, deviation {facts['std_score']:.4g}{after}")
    for point in facts.get("best_of_n", []):
        if point["n"] in CURVE or point is facts["best_of_n"][-1]:
            error = point["standard_error"]
            spread = "" if error is None else f" +- {error:.2g}"
            found.append(
                f"best of {point['n']}: {point['score']:.4g}{spread} (KL at most {point['kl_bound']:.3g} nats)"
            )
    for entry in facts.get("ratings", []):
        interval = f" ({entry['low']:.0f} to {entry['high']:.0f})" if "low" in entry else ""
        found.append(
            f"rating of {entry['model'] or 'no model'}: {entry['rating']:.0f}{interval}, {entry['games']} games"
        )
    return found
