"""Scores of completions by a judge: the completions of a prompt two by two.

1. Every two completions of a prompt (or each and the next) are a match, asked about in both orders;
2. the score of a completion is the mean probability that it is the better one of its matches;
3. the matches are written too, as pairs with soft labels; how much the judge goes by the place of an answer is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_cli.data.completions import Candidate, by_prompt, plain_prompt, read_completions
from rlhf_cli.errors import DataError
from rlhf_cli.models.base import check_length, load_text
from rlhf_cli.models.levers import check_levers
from rlhf_cli.recipe.data_stages import ScoreRecipe
from rlhf_cli.report.referee import told
from rlhf_cli.rollouts.referee import Match, Opinion, Referee, load_referee
from rlhf_cli.rollouts.voices import Voice
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import product
from rlhf_cli.stages.product import Piece
from rlhf_cli.stages.scored import written
from rlhf_cli.stages.voice import close_voice, open_voice

AT_ONCE = 64
"""Matches of a piece, about."""
COMPARISONS = "comparisons.jsonl"
"""The matches, in the run directory: a source of pairs with soft labels."""

Group = Sequence[Candidate]


def run(recipe: ScoreRecipe, run: Run, display: Display, options: Options) -> None:
    """Have a judge compare completions. Raises RlhfError."""
    assert recipe.judge is not None
    text = load_text(recipe.judge.model)
    if recipe.judge.engine != "vllm":
        check_levers(recipe.judge.model, text.source)
    referee = load_referee(recipe.judge, text)
    data = recipe.data
    found = read_completions(data.completions, data.on_bad_row, data.max_bad_rows, scored=False)
    product.tell(found.report, display)
    groups = by_prompt(found.items)
    if all(len(group) < 2 for group in groups):
        raise DataError("no prompt has two completions to compare", data.completions[0].path,
                        "sample several: rollout.completions_per_prompt")  # fmt: skip
    matches, number = [], 0
    for group in groups:
        matches.append(matched(group, referee, recipe.seed, number))
        number += len(matches[-1])
    longest = max(len(referee.question(one[2], swapped=False).prompt) for met in matches for one in met)
    longest += max(map(len, referee.labels))
    check_length(text, longest, "the longest question to the judge")
    display.note(f"{number} matches of {len(found.items)} completions, {len(referee.principles) or 'no'} principles")
    if options.dry_run:
        display.note(f"dry run: {number * (2 if recipe.judge.both_orders else 1)} questions")
        return
    voice, fingerprint = open_voice(recipe.judge, referee, longest, recipe.distributed, run, display)
    lineage = {"role": "data", "template": text.template.digest, "judge": text.path.name,
               "base": {"name": text.source, "fingerprint": fingerprint}}  # fmt: skip
    product.begin(run, display, lineage, found.report, found.bad)
    pieces = cut([len(met) for met in matches])

    def some(numbers: range) -> Piece:
        part = slice(pieces[numbers.start][0], pieces[numbers.stop - 1][1])
        return judged(groups[part], matches[part], referee, voice)

    sums = product.make(run, display, len(pieces), some)
    close_voice(voice, display)
    facts = summary(len(found.items), sums)
    for line, bad in told(facts):
        (display.warn if bad else display.note)(line)
    product.finish(run, display, product.made_rows(run), facts, {COMPARISONS: product.made_rows(run, "more")})


def matched(group: Group, referee: Referee, seed: int, first: int) -> list[tuple[int, int, Match]]:
    """The matches of a prompt: places of the two completions, and what is asked. first: the number of the first."""
    count = len(group)
    pairs = list(combinations(range(count), 2))
    if referee.settings.opponents == "next" and count > 2:
        pairs = [(i, (i + 1) % count) for i in range(count)]
    return [
        (i, j, Match(group[i].prompt, group[i].completion, group[j].completion, group[i].where,
                     referee.principle(seed, first + n)))
        for n, (i, j) in enumerate(pairs)
    ]  # fmt: skip


def cut(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Prompts in a row, AT_ONCE matches together unless one has more: start and stop of each piece."""
    out, start, held = [], 0, 0
    for i, size in enumerate(sizes):
        if held and held + size > AT_ONCE:
            out.append((start, i))
            start, held = i, 0
        held += size
    return [*out, (start, len(sizes))]


def judged(
    groups: Sequence[Group], matches: Sequence[list[tuple[int, int, Match]]], referee: Referee, voice: Voice
) -> Piece:
    """Scores and comparisons of some prompts."""
    every = [match for met in matches for _, _, match in met]
    opinions = iter(referee(every, voice) if every else [])
    rows: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    figures = {"matches": float(len(every)), "first": 0.0, "flips": 0.0, "scored": 0.0, "questions": 0.0, "mass": 0.0}
    for group, met in zip(groups, matches, strict=True):
        won: list[list[float]] = [[] for _ in group]
        for i, j, match in met:
            opinion = next(opinions)
            won[i].append(opinion.probability)
            won[j].append(1 - opinion.probability)
            more.append(comparison(match, opinion))
            _count(figures, opinion)
        for item, shares in zip(group, won, strict=True):
            rows.append(written(item) | {"score": float(np.mean(shares)) if shares else None})
            figures["scored"] += bool(shares)
    return Piece(rows, figures, [row for row in more if row["chosen"] != row["rejected"]])


def _count(figures: dict[str, float], opinion: Opinion) -> None:
    """How often the first place wins, and whether the winner changes with the order."""
    figures["mass"] += opinion.mass
    figures["first"] += opinion.first
    figures["questions"] += 1
    if opinion.second is not None:
        figures["first"] += 1 - opinion.second
        figures["questions"] += 1
        figures["flips"] += (opinion.first > 0.5) != (opinion.second > 0.5)


def comparison(match: Match, opinion: Opinion) -> dict[str, Any]:
    """A match as a pair with a soft label: what both orders say is beside it."""
    better = opinion.probability >= 0.5
    chosen, rejected = (match.a, match.b) if better else (match.b, match.a)
    row = {
        "prompt": plain_prompt(match.prompt), "chosen": chosen, "rejected": rejected,
        "target": opinion.probability if better else 1 - opinion.probability,
        "asked_first": opinion.first if better else 1 - opinion.first,
    }  # fmt: skip
    if opinion.second is not None:
        row["asked_second"] = opinion.second if better else 1 - opinion.second
    return row | ({"principle": match.principle} if match.principle else {})


def summary(count: int, sums: dict[str, float]) -> dict[str, Any]:
    """The figures of the run."""
    questions, matches = max(sums["questions"], 1.0), max(sums["matches"], 1.0)
    first = sums["first"] / questions
    return {
        "rows": count, "scored": int(sums["scored"]), "matches": int(sums["matches"]),
        "label_probability": sums["mass"] / matches, "first_place": first, "position_bias": first - 0.5,
        "flips": sums["flips"] / matches if sums["questions"] > sums["matches"] else None,
    }  # fmt: skip
