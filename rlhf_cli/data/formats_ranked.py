"""Formats of judged completions: rankings, votes of several judges, safety labels and games."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlhf_cli.catalog import Data
from rlhf_cli.data import rows
from rlhf_cli.data.examples import Comparison, Prompt, Ranking, Rated, Verdict
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.reading import Finished, Format, Reader, Wanted, as_task, columns
from rlhf_cli.data.rows import BadRow, Row
from rlhf_cli.recipe.settings.data import RatingSettings

SCORES = ("score", "reward", "rating", "overall_score", "is_correct")
"""Where an object may carry the score of a completion."""
TIED = "all completions have the same score"


# --- several completions of one prompt -------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    ranking: Ranking
    raw: list[Any] | None
    """The scores as they stand in the data, None when it only gives an order."""


def _judged(row: Row, where: str) -> _Judged:
    asked, completions = rows.several_answers(row)
    if len(completions) < 2:
        raise BadRow("a ranking needs two completions")
    given = [name for name in ("scores", *ORDERS) if row.get(name) is not None]
    if len(given) > 1:
        raise BadRow(f"give one of scores, {', '.join(ORDERS)}; found: {', '.join(given)}")
    raw = None
    if not given:
        raw = [_score_in(value) for value in row["completions"]]
    elif given == ["scores"]:
        raw = _as_many(rows.items(row, "scores"), len(completions), "scores")
    scores = ORDERS[given[0]](row, len(completions)) if raw is None else [_number(v, "score") for v in raw]
    for i, j in combinations(range(len(scores)), 2):
        if completions[i] == completions[j] and scores[i] != scores[j]:
            raise BadRow("the same completion with different scores")
    return _Judged(Ranking(asked, completions, tuple(scores), where, graded=raw is not None), raw)


def _score_in(value: Any) -> Any:
    if isinstance(value, dict):
        found = next((value[k] for k in SCORES if value.get(k) is not None), None)
        if found is not None:
            return found
    raise BadRow(
        f"a completion without a score: give {', '.join(('scores', *ORDERS))}, or objects with one of "
        f"{', '.join(SCORES)}"
    )


def _number(value: Any, what: str) -> float:
    if not isinstance(value, (int, float)):
        raise BadRow(f"a {what} is {rows.kind_of(value)}, not a number")
    return rows.finite(value, f"a {what}")


def _as_many(found: list[Any], count: int, what: str) -> list[Any]:
    if len(found) != count:
        raise BadRow(f"{count} completions but {len(found)} {what}")
    return found


def _from_ranks(row: Row, count: int) -> list[float]:
    return [-_number(rank, "rank") for rank in _as_many(rows.items(row, "ranks"), count, "ranks")]


def _from_preferences(row: Row, count: int) -> list[float]:
    """Wins and half the ties of each completion, from the outcomes of all pairs: 12 13 14 23 24 34 of four."""
    pairs, outcomes = list(combinations(range(count), 2)), rows.items(row, "preferences")
    if len(outcomes) != len(pairs):
        raise BadRow(f"{count} completions make {len(pairs)} pairs but there are {len(outcomes)} preferences")
    scores = [0.0] * count
    for pair, outcome in zip(pairs, outcomes, strict=True):
        for place, won in zip(pair, WON[_vote(outcome, "preference")], strict=True):
            scores[place] += won
    return scores


def _from_best(row: Row, count: int) -> list[float]:
    best = row["best"]
    if isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < count:
        raise BadRow(f"'best' is {best!r}, not the place of one of {count} completions, counted from 0")
    return [float(i == best) for i in range(count)]


ORDERS = {"ranks": _from_ranks, "preferences": _from_preferences, "best": _from_best}
WON = ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0))
"""What first and second get for the outcomes tie, first, second."""


def _vote(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1, 2):
        raise BadRow(f"a {what} is {value!r}, neither 0 (tie) nor 1 (first) nor 2 (second)")
    return value


def ranking(row: Row, where: str) -> list[Any]:
    return [_judged(row, where).ranking]


def best_and_worst(row: Row, where: str) -> list[Any]:
    judged = _judged(row, where)
    found = judged.ranking
    order = sorted(range(len(found.scores)), key=lambda i: -found.scores[i])
    high, low = found.scores[order[0]], found.scores[order[-1]]
    pair = Comparison(
        found.prompt, found.completions[order[0]], found.completions[order[-1]], where,
        scores=None if judged.raw is None else (high, low), target=1.0 if high > low else 0.5,
    )  # fmt: skip
    return [pair]


def each_rated(row: Row, where: str) -> list[Any]:
    judged = _judged(row, where)
    if judged.raw is None:
        raise BadRow(f"no scores: {', '.join(ORDERS)} only give an order")
    found = judged.ranking
    return [Rated(found.prompt, c, s, where) for c, s in zip(found.completions, found.scores, strict=True)]


def each_verdict(row: Row, where: str) -> list[Any]:
    judged = _judged(row, where)
    if judged.raw is None or not all(isinstance(v, bool) for v in judged.raw):
        raise BadRow("the scores are not true or false")
    found = judged.ranking
    return [Verdict(found.prompt, c, bool(v), where) for c, v in zip(found.completions, judged.raw, strict=True)]


def _untied(found: list[Comparison], wanted: Wanted) -> Finished:
    return Finished(
        [pair for pair in found if pair.target > 0.5], [Dropped(TIED, p.where) for p in found if p.target == 0.5]
    )


# --- two completions -------------------------------------------------------------------------------------


def votes(row: Row, where: str) -> list[Any]:
    asked, completions = rows.several_answers(row)
    if len(completions) != 2:
        raise BadRow(f"votes are between two completions, here are {len(completions)}")
    cast = [_vote(v, "vote") for v in rows.items(row, "votes")]
    if not cast:
        raise BadRow("no votes")
    if completions[0] == completions[1]:
        raise BadRow("both completions are the same")
    points = [sum(WON[v][i] for v in cast) for i in (0, 1)]
    first, second = completions if points[0] >= points[1] else completions[::-1]
    return [Comparison(asked, first, second, where, target=max(points) / len(cast))]


def safety(row: Row, where: str) -> list[Any]:
    asked, answers = rows.answers(row, "response_0", "response_1")
    if answers[0] == answers[1]:
        raise BadRow("both completions are the same")
    safer = int(rows.truth(row, "safer_response_id"))
    safe = [rows.truth(row, f"is_response_{i}_safe") for i in (0, 1)]
    return [Comparison(asked, answers[safer], answers[1 - safer], where, safety=(safe[safer], safe[1 - safer]))]


# --- games -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Game:
    """Two completions of a prompt that met."""

    prompt: Prompt
    a: str
    b: str
    outcome: float
    """1 when a won, 0.5 for a tie, 0 when b won."""
    where: str


def game(row: Row, where: str) -> list[Any]:
    asked, (a, b) = rows.answers(row, "a", "b")
    if a == b:
        raise BadRow("a and b are the same")
    outcome = rows.number(row, "outcome")
    if outcome is None:
        raise BadRow("no 'outcome'")
    if outcome not in (0, 0.5, 1):
        raise BadRow(f"'outcome' is {outcome:g}, neither 1 (a won) nor 0.5 (tie) nor 0 (b won)")
    return [Game(asked, a, b, outcome, where)]


def rate(found: list[Game], wanted: Wanted) -> Finished:
    """Each completion of the games once, with its rating as score."""
    if not found:
        return Finished([], [])
    players: dict[tuple[Prompt, str], str] = {}
    for one in found:
        for text in (one.a, one.b):
            players.setdefault((one.prompt, text), one.where)
    number = {player: i for i, player in enumerate(players)}
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in players))}
    targets, groups = _targets(
        [number[one.prompt, one.a] for one in found],
        [number[one.prompt, one.b] for one in found],
        [one.outcome for one in found],
        [prompts[prompt] for prompt, _ in players],
        wanted.ratings,
    )
    rated = [Rated(*player, t, where) for (player, where), t in zip(players.items(), targets, strict=True)]
    warnings: tuple[str, ...] = ()
    if groups > 1 and wanted.ratings.scope == "dataset":
        warnings = (
            f"the games fall into {groups} groups of completions that never met, so ratings of different groups are "
            "on different scales; data.ratings.scope: prompt normalises each prompt by itself",
        )
    return Finished(rated, [], warnings)


def _targets(
    a: list[int], b: list[int], outcome: list[float], prompts: list[int], settings: RatingSettings
) -> tuple[list[float], int]:
    """A target for each player, and the number of groups that never met. `prompts`: the prompt of each player."""
    import torch

    from rlhf_cli.objectives import ratings

    first, second, result = torch.tensor(a), torch.tensor(b), torch.tensor(outcome, dtype=torch.float64)
    count = len(prompts)
    if settings.method == "elo":
        points = ratings.elo(
            first, second, result, count,
            k=settings.k, start=settings.start, shuffles=settings.shuffles, seed=0,
        )  # fmt: skip
        strength = ratings.from_elo(points)
    else:
        strength = ratings.bradley_terry_mle(first, second, result, count, l2=settings.l2)
    together = torch.tensor(prompts) if settings.scope == "prompt" else torch.zeros(count, dtype=torch.int64)
    targets = ratings.normalise(strength, together, target=settings.target)
    return targets.tolist(), len(ratings.components(first, second, count).unique())


# --- the formats -----------------------------------------------------------------------------------------

_PROMPT = as_task(rows.prompt, "prompt")
_INSTRUCTION = as_task(rows.alpaca_messages, "instruction", "input", "system", "history")
_RANKED: dict[Data, Reader] = {
    "ranking": ranking,
    "comparison": best_and_worst,
    "rated": each_rated,
    "verdict": each_verdict,
}
(_ALPACA,) = columns("input system history")

FORMATS = (
    Format("ranking", columns("prompt completions", *(f"prompt completions {n}" for n in ("scores", *ORDERS))),
           {**_RANKED, "task": _PROMPT}, "several completions of a prompt with scores, ranks, preferences or the best",
           {"comparison": _untied}),
    Format("ultrafeedback",
           columns("instruction completions", *(f"instruction completions {n}" for n in ("scores", *ORDERS))),
           {**_RANKED, "task": _INSTRUCTION}, "the same with an instruction as prompt",
           {"comparison": _untied}, _ALPACA),
    Format("votes", columns("prompt completions votes", "instruction completions votes"), {"comparison": votes},
           "two completions and the votes of several judges", optional=_ALPACA),
    Format("safety", columns("prompt response_0 response_1 safer_response_id is_response_0_safe is_response_1_safe"),
           {"comparison": safety, "task": _PROMPT}, "two completions, whether each is safe and which is safer"),
    Format("games", columns("prompt a b outcome"), {"rated": game},
           "two completions and who won; all games make ratings", {"rated": rate}),
)  # fmt: skip
