"""From scored completions to training data: pure functions of groups of completions, one group a prompt.

Ties are broken by the order of the completions, so the same completions always give the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from rlhf_cli.data.completions import Candidate, plain_prompt
from rlhf_cli.data.grouping import Dropped

Group: TypeAlias = Sequence[Candidate]
"""The completions of a prompt, in their order."""

NOT_AMONG_BEST = "not among the best of its prompt"
BELOW_SHARE = "below the share that is kept"
BELOW = "score below min_score"
ENOUGH = "its prompt has enough"
ALONE = "the only completion of its prompt"
NO_GAP = "no other completion of its prompt with another text and a score far enough"
ALIKE = "the same completion again"
FEW = "too few different completions of its prompt"
CLOSE = "too close to the threshold"
SAME_AS_DATA = "the same as the completion of the data"
NO_RIVAL = "no completion of another model at its prompt"


@dataclass
class Selected:
    """What a selection comes to."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """In a format that the data gate reads."""
    dropped: list[Dropped] = field(default_factory=list)
    """Completions that are in no row."""
    again: list[dict[str, Any]] = field(default_factory=list)
    """Prompts that are to be sampled again."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What there is to say besides counts."""

    def leave_out(self, items: Sequence[Candidate], reason: str) -> None:
        """Some completions are in no row, for that reason."""
        self.dropped += [Dropped(reason, item.where) for item in items]


def score_of(item: Candidate) -> float:
    """Its score, which must be known."""
    assert item.score is not None
    return item.score


def ranked(group: Group) -> list[Candidate]:
    """The highest scores first."""
    return sorted(group, key=lambda item: -score_of(item))


def different(group: Group) -> tuple[list[Candidate], list[Candidate]]:
    """The first completion of each text, and the others."""
    first: dict[str, Candidate] = {}
    again = [item for item in group if first.setdefault(item.completion, item) is not item]
    return list(first.values()), again


def demonstration(item: Candidate) -> dict[str, Any]:
    """A completion to imitate."""
    return {"prompt": plain_prompt(item.prompt), "completion": item.completion, "score": item.score}


def pair(chosen: Candidate, rejected: Candidate) -> dict[str, Any]:
    """Two completions of a prompt, the better one first."""
    return {
        "prompt": plain_prompt(chosen.prompt), "chosen": chosen.completion, "rejected": rejected.completion,
        "chosen_score": chosen.score, "rejected_score": rejected.score,
    }  # fmt: skip


# --- demonstrations --------------------------------------------------------------------------------------


def best(groups: Sequence[Group], *, count: int, share: float) -> Selected:
    """The `count` highest scores of each prompt; of all those the given share, at least one.

    Source: best-of-n: Stiennon et al. 2020 (arXiv:2009.01325); RAFT: Dong et al. 2023 (arXiv:2304.06767) algorithm 1.
    """
    out = Selected()
    kept: list[Candidate] = []
    for group in groups:
        fresh, again = different(ranked(group))
        kept += fresh[:count]
        out.leave_out(fresh[count:], NOT_AMONG_BEST)
        out.leave_out(again, ALIKE)
    last = max(1, round(share * len(kept)))
    order = sorted(range(len(kept)), key=lambda i: (-score_of(kept[i]), i))
    inside = set(order[:last])
    out.rows = [demonstration(item) for i, item in enumerate(kept) if i in inside]
    out.leave_out([item for i, item in enumerate(kept) if i not in inside], BELOW_SHARE)
    return out


def threshold(groups: Sequence[Group], *, min_score: float, at_most: int | None) -> Selected:
    """Every completion with a score of at least `min_score`; prompts without one are to be sampled again.

    Source: rejection sampling as in Touvron et al. 2023 (arXiv:2307.09288) section 3.2.3; Zelikman et al. 2022
    (arXiv:2203.14465), STaR, where the score says whether the answer is right.
    """
    out = Selected()
    for group in groups:
        fresh, again = different(ranked(group))
        good = [item for item in fresh if score_of(item) >= min_score]
        out.rows += [demonstration(item) for item in good[:at_most]]
        out.leave_out(good[len(good) if at_most is None else at_most :], ENOUGH)
        out.leave_out(fresh[len(good) :], BELOW)
        out.leave_out(again, ALIKE)
        if not good:
            out.again.append({**group[0].facts, "prompt": plain_prompt(group[0].prompt)})
    out.figures = {"prompts_without_one": len(out.again)}
    return out


# --- comparisons -----------------------------------------------------------------------------------------


def pairs(groups: Sequence[Group], *, which: str, min_gap: float) -> Selected:
    """Pairs of different texts whose scores differ, by `min_gap` at least: the best and the worst completion of each
    prompt, or every two. The scores go with them (ODPO reads their gap).

    Source: Yuan et al. 2024 (arXiv:2401.10020), best and worst; Amini et al. 2024 (arXiv:2402.10571), the gap.
    """
    out, gaps = Selected(), []
    for group in groups:
        fresh, again = different(ranked(group))
        ends = [(fresh[0], fresh[-1])] if len(fresh) > 1 else []
        wanted = ends if which == "best_worst" else list(combinations(fresh, 2))
        made = [(a, b) for a, b in wanted if _apart(a, b, min_gap)]
        used = {id(item) for two in made for item in two}
        out.rows += [pair(a, b) for a, b in made]
        gaps += [score_of(a) - score_of(b) for a, b in made]
        rest = [item for item in fresh if id(item) not in used]
        middle = bool(made) and which == "best_worst"
        out.leave_out(rest, ALONE if len(group) == 1 else "neither the best nor the worst" if middle else NO_GAP)
        out.leave_out(again, ALIKE)
    if gaps:
        out.figures = {"mean_gap": float(np.mean(gaps)), "smallest_gap": float(np.min(gaps))}
    return out


def _apart(a: Candidate, b: Candidate, min_gap: float) -> bool:
    gap = score_of(a) - score_of(b)
    return gap > 0 and gap >= min_gap


def spin(groups: Sequence[Group], *, column: str) -> Selected:
    """The completion of the data, in that column of the prompt's own row, against each of the model's.

    Source: Chen et al. 2024 (arXiv:2401.01335) algorithm 1.
    """
    out = Selected()
    for group in groups:
        fresh, again = different(group)
        out.leave_out(again, ALIKE)
        for item in fresh:
            gold = item.facts.get(column)
            if not isinstance(gold, str) or not gold.strip():
                out.leave_out([item], f"its prompt's row has no text in '{column}'")
            elif gold.strip() == item.completion.strip():
                out.leave_out([item], SAME_AS_DATA)
            else:
                row = pair(item, item) | {"chosen": gold}
                out.rows.append({key: value for key, value in row.items() if not key.endswith("_score")})
    return out


# --- rankings and verdicts -------------------------------------------------------------------------------


def ranking(groups: Sequence[Group], *, min_completions: int) -> Selected:
    """All different completions of a prompt with their scores, where these are not all equal.

    Source: RRHF: Yuan et al. 2023 (arXiv:2304.05302); K-wise rewards: Zhu et al. 2023 (arXiv:2301.11270).
    """
    out = Selected()
    for group in groups:
        fresh, again = different(group)
        out.leave_out(again, ALIKE)
        scores = [score_of(item) for item in fresh]
        if len(fresh) < min_completions or len(set(scores)) < 2:
            out.leave_out(fresh, FEW if len(fresh) < min_completions else NO_GAP)
            continue
        texts = [item.completion for item in fresh]
        out.rows.append({"prompt": plain_prompt(group[0].prompt), "completions": texts, "scores": scores})
    return out


def verdict(groups: Sequence[Group], *, threshold: float | None, margin: float) -> Selected:
    """Whether a completion lies above a threshold or below.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), which needs one verdict a completion.
    """
    out = Selected()
    for group in groups:
        middle = float(np.mean([score_of(item) for item in group])) if threshold is None else threshold
        fresh, again = different(group)
        out.leave_out(again, ALIKE)
        for item in fresh:
            away = score_of(item) - middle
            if abs(away) <= margin:
                out.leave_out([item], CLOSE)
                continue
            row = demonstration(item) | {"label": away > 0}
            out.rows.append({key: row[key] for key in ("prompt", "completion", "label")})
    wanted = sum(row["label"] for row in out.rows)
    out.figures = {"desirable": wanted, "undesirable": len(out.rows) - wanted}
    return out


# --- games -----------------------------------------------------------------------------------------------


def games(groups: Sequence[Group], *, between: str, tie: float, samples: int) -> Selected:
    """At each prompt every two completions (of different models, or all) meet, and the higher score wins; several
    models are rated by their games against each other, with intervals by the bootstrap over prompts.

    Source: Bradley and Terry 1952; on the scale of Elo 1978, 400 points for odds of ten to one.
    """
    out = Selected()
    name = _named({(item.model, str(item.by.get("weights", ""))) for group in groups for item in group})
    models = sorted(set(name.values()))
    number = {model: i for i, model in enumerate(models)}
    played: list[list[tuple[int, int, float]]] = []  # by prompt
    for group in groups:
        by = [name[item.model, str(item.by.get("weights", ""))] for item in group]
        every = combinations(range(len(group)), 2)
        met = [(i, j) for i, j in every if between == "completions" or by[i] != by[j]]
        won = {(i, j): _outcome(group[i], group[j], tie) for i, j in met}
        played.append([(number[by[i]], number[by[j]], won[i, j]) for i, j in met if by[i] != by[j]])
        out.rows += [
            {"prompt": plain_prompt(group[i].prompt), "a": group[i].completion, "b": group[j].completion,
             "outcome": won[i, j], "model_a": by[i], "model_b": by[j]}
            for i, j in met if group[i].completion != group[j].completion
        ]  # fmt: skip
        if not met:
            out.leave_out(group, NO_RIVAL if between == "models" else ALONE)
    if any(played):
        out.figures = {"ratings": ratings(models, played, samples)}
    return out


def _named(players: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Model and weights of each player -> its name: the model's, with its weights where it played with several."""
    models = [model for model, _ in players]
    return {(model, own): model if models.count(model) == 1 else f"{model} ({own})" for model, own in players}


def _outcome(a: Candidate, b: Candidate, tie: float) -> float:
    """1 when a wins, 0.5 for a tie, 0 when b wins."""
    gap = score_of(a) - score_of(b)
    return 0.5 if abs(gap) <= tie else float(gap > 0)


RIDGE = 1e-3
"""Pull of the ratings to their mean; without it a model that never loses has none."""


def ratings(
    models: Sequence[str], played: Sequence[Sequence[tuple[int, int, float]]], samples: int
) -> list[dict[str, Any]]:
    """Each model with its rating and its 95 % interval, the highest first. played: the games of each prompt."""
    import torch

    from rlhf_cli.objectives.ratings import bradley_terry_mle, to_elo

    def rate(chosen: Sequence[int]) -> np.ndarray:
        a, b, outcome = zip(*(game for i in chosen for game in played[i]), strict=True)
        theta = bradley_terry_mle(torch.tensor(a), torch.tensor(b), torch.tensor(outcome), len(models), l2=RIDGE)
        return np.asarray(to_elo(theta))

    at = [i for i, met in enumerate(played) if met]
    found, draw = rate(at), np.random.default_rng(0)
    drawn = np.array([rate(draw.choice(at, len(at)).tolist()) for _ in range(samples)])  # (samples, models)
    out = []
    for i, model in enumerate(models):
        met = [(a, b, o) for games_ in played for a, b, o in games_ if i in (a, b)]
        won = sum(o if a == i else 1 - o for a, b, o in met)
        entry: dict[str, Any] = {"model": model, "rating": float(found[i]), "games": len(met),
                                 "won": won / len(met) if met else None}  # fmt: skip
        if samples:
            low, high = np.percentile(drawn[:, i], [2.5, 97.5])
            entry |= {"low": float(low), "high": float(high)}
        out.append(entry)
    return sorted(out, key=lambda entry: -entry["rating"])
