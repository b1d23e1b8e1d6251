"""Rows that belong together: scored completions of one prompt become pairs."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.data.examples import Comparison, Prompt, Task


@dataclass(frozen=True)
class Dropped:
    """A row or an example that is left out, and why."""

    reason: str
    where: str


@dataclass(frozen=True)
class Scored:
    """A completion with its score, before it is paired with others of its prompt."""

    prompt: Prompt
    completion: str
    score: float
    where: str


def pair_by_score(found: list[Scored]) -> tuple[list[Comparison], list[Dropped]]:
    """Within each prompt the best completion against the worst, the second best against the second worst, and so on;
    only where the scores differ. The rows left over are returned too."""
    groups: dict[Prompt, list[Scored]] = {}
    for one in found:
        groups.setdefault(one.prompt, []).append(one)
    pairs, left = [], []
    for group in groups.values():
        ranked = sorted(group, key=lambda s: -s.score)
        for high, low in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            where = f"{high.where} with {low.where.rpartition(':')[2]}"
            if high.score == low.score:
                left += [Dropped("no other score at the same prompt", s.where) for s in (high, low)]
            elif high.completion == low.completion:
                left += [Dropped("same completion, other score", s.where) for s in (high, low)]
            else:
                pairs.append(
                    Comparison(high.prompt, high.completion, low.completion, where, scores=(high.score, low.score))
                )
        if len(ranked) % 2:
            left.append(Dropped("no partner to pair with", ranked[len(ranked) // 2].where))
    return pairs, left


def one_task_a_prompt(found: list[Task]) -> tuple[list[Task], list[Dropped]]:
    """The first task of each prompt."""
    first: dict[Prompt, Task] = {}
    repeated = [Dropped("prompt seen before", t.where) for t in found if first.setdefault(t.prompt, t) is not t]
    return list(first.values()), repeated
