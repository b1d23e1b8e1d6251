"""Rows that belong together: scored completions of one prompt become pairs or a ranking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_cli.data.examples import Comparison, Prompt, Ranking, Rated, Task

NO_OTHER_SCORE = "no other score at the same prompt"
SAME_COMPLETION = "same completion, other score"


@dataclass(frozen=True)
class Dropped:
    """A row or an example that is left out, and why."""

    reason: str
    where: str


def pair_by_score(found: list[Rated]) -> tuple[list[Comparison], list[Dropped]]:
    """Within each prompt the best completion against the worst, the second best against the second worst, and so on;
    only where the scores differ. The rows left over are returned too."""
    pairs, left = [], []
    for group in _by_prompt(found):
        ranked = sorted(group, key=lambda s: -s.score)
        for high, low in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            where = f"{high.where} with {low.where.rpartition(':')[2]}"
            if high.score == low.score:
                left += [Dropped(NO_OTHER_SCORE, s.where) for s in (high, low)]
            elif high.completion == low.completion:
                left += [Dropped(SAME_COMPLETION, s.where) for s in (high, low)]
            else:
                pairs.append(
                    Comparison(high.prompt, high.completion, low.completion, where, scores=(high.score, low.score))
                )
        if len(ranked) % 2:
            left.append(Dropped("no partner to pair with", ranked[len(ranked) // 2].where))
    return pairs, left


def rank_by_score(found: list[Rated]) -> tuple[list[Ranking], list[Dropped]]:
    """All completions of a prompt as one ranking, where at least two scores differ. The rows left over are returned
    too."""
    rankings, left = [], []
    for group in _by_prompt(found):
        scores: dict[str, set[float]] = {}
        for one in group:
            scores.setdefault(one.completion, set()).add(one.score)
        left += [Dropped(SAME_COMPLETION, one.where) for one in group if len(scores[one.completion]) > 1]
        clear = [one for one in group if len(scores[one.completion]) == 1]
        if len({one.score for one in clear}) < 2:
            reason = "only one completion of its prompt" if len(clear) == 1 else NO_OTHER_SCORE
            left += [Dropped(reason, one.where) for one in clear]
            continue
        rest = ", ".join(one.where.rpartition(":")[2] for one in clear[1:])
        rankings.append(
            Ranking(
                clear[0].prompt,
                tuple(one.completion for one in clear),
                tuple(one.score for one in clear),
                f"{clear[0].where} with {rest}",
            )
        )
    return rankings, left


def _by_prompt(found: list[Rated]) -> Iterable[list[Rated]]:
    groups: dict[Prompt, list[Rated]] = {}
    for one in found:
        groups.setdefault(one.prompt, []).append(one)
    return groups.values()


def one_task_a_prompt(found: list[Task]) -> tuple[list[Task], list[Dropped]]:
    """The first task of each prompt."""
    first: dict[Prompt, Task] = {}
    repeated = [Dropped("prompt seen before", t.where) for t in found if first.setdefault(t.prompt, t) is not t]
    return list(first.values()), repeated
