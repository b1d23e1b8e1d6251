"""What a reward model's scores of judged completions come to. A row is what the model said of one example.

Scores are the higher the better here: those of a cost model come with their sign changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from rlhf_cli.data import statistics as st
from rlhf_cli.data.statistics import Interval

Row: TypeAlias = dict[str, Any]
CHANCE = "chance level"
ABOVE, BELOW = "above chance", "below chance: it is wrong more often than a coin"


def verdict(interval: Interval, chance: float = 0.5) -> str:
    """What an interval says of the model, in words."""
    return CHANCE if interval.holds(chance) else ABOVE if interval.above(chance) else BELOW


def figures(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """All figures of the rows, by kind: pairs, rankings, scored, steps; each with those of every source."""
    found: dict[str, Any] = {}
    for kind, measure in KINDS.items():
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        found[kind] = measure(own, seed)
        sources = list(dict.fromkeys(row["source"] for row in own))
        found[kind]["by_source"] = {
            source: _headline(measure([row for row in own if row["source"] == source], seed)) for source in sources
        }
    return found


def _headline(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if not isinstance(value, dict | list)}


def _share(hits: Sequence[float]) -> dict[str, Any]:
    """A share with its interval and its count."""
    interval = st.wilson(sum(hits), len(hits))
    return {"accuracy": float(np.mean(hits)) if hits else None, **interval._asdict(), "count": len(hits)}


def _won(margin: float) -> float:
    """1, 0.5 for a tie, 0."""
    return 0.5 if margin == 0 else float(margin > 0)


# --- pairs -----------------------------------------------------------------------------------------------


def pairs(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Rows of two scores, of chosen and rejected, with their lengths in tokens and the data's probability that
    chosen is the better one; a tie counts half. Pairs with the probability 0.5 have no right answer."""
    firm = [row for row in rows if row["target"] > 0.5]
    margins = np.array([row["scores"][0] - row["scores"][1] for row in rows])
    hits = [_won(row["scores"][0] - row["scores"][1]) for row in firm]
    interval = _interval(hits, [row["prompt"] for row in firm], seed)
    shorter = [row["lengths"][0] < row["lengths"][1] for row in firm]
    longer = [row["lengths"][0] > row["lengths"][1] for row in firm]
    return {
        "pairs": len(rows), "undecided": len(rows) - len(firm), **_share(hits), **interval._asdict(),
        "prompts": len({row["prompt"] for row in firm}), "verdict": verdict(interval),
        "ties": sum(hit == 0.5 for hit in hits), "mean_margin": float(margins.mean()),
        "length_correlation": _length_correlation(rows),
        "chosen_shorter": _share([h for h, s in zip(hits, shorter, strict=True) if s]),
        "chosen_longer": _share([h for h, s in zip(hits, longer, strict=True) if s]),
        "longer_is_chosen": _share([_won(row["lengths"][0] - row["lengths"][1]) for row in firm]),
        "margins": st.histogram(margins),
        "calibration": _calibration(margins, np.array([row["target"] for row in rows])),
    }  # fmt: skip


def _interval(hits: Sequence[float], prompts: Sequence[str], seed: int) -> Interval:
    """Wilson's for pairs of as many prompts; pairs of one prompt are not independent: then prompts are drawn."""
    places = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    if len(places) == len(hits):
        return st.wilson(sum(hits), len(hits))
    owner = np.array([places[prompt] for prompt in prompts])
    return st.bootstrap(st.ratio(np.bincount(owner, hits), np.bincount(owner)), len(places), seed)


def _calibration(margins: st.Numbers, target: st.Numbers) -> dict[str, Any]:
    """Of sigmoid(margin) as the probability that the first one is better: each pair is counted from both sides, since
    chosen always stands first."""
    probability = np.concatenate([st.sigmoid(margins), st.sigmoid(-margins)])
    return st.calibration(probability, np.concatenate([target, 1 - target]))


def _length_correlation(rows: Sequence[Row]) -> float | None:
    """Of the scores and the lengths of all completions."""
    return st.correlation([s for row in rows for s in row["scores"]], [n for row in rows for n in row["lengths"]])


# --- rankings and single scores --------------------------------------------------------------------------


def rankings(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Rows of K scores and the K known ones (gold). Prompts are the units: the pairs of one are not independent."""
    right, total, taus, tops, chances = [], [], [], [], []
    for row in rows:
        gold = row["gold"]
        unlike = [(i, j) for i, j in combinations(range(len(gold)), 2) if gold[i] != gold[j]]
        ordered = [(i, j) if gold[i] > gold[j] else (j, i) for i, j in unlike]
        right.append(sum(_won(row["scores"][i] - row["scores"][j]) for i, j in ordered))
        total.append(len(ordered))
        taus.append(st.kendall(row["scores"], gold) or 0.0)
        first = [i for i, s in enumerate(row["scores"]) if s == max(row["scores"])]
        best = {i for i, g in enumerate(gold) if g == max(gold)}
        tops.append(len(best.intersection(first)) / len(first))
        chances.append(len(best) / len(row["scores"]))
    interval = st.bootstrap(st.ratio(right, total), len(rows), seed)
    return {
        "prompts": len(rows), "pairs": sum(total), "accuracy": sum(right) / sum(total), **interval._asdict(),
        "verdict": verdict(interval), "kendall_tau": st.mean_of(taus), "top_1": st.mean_of(tops),
        "top_1_by_chance": float(np.mean(chances)), "length_correlation": _length_correlation(rows),
    }  # fmt: skip


def scored(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Rows of one score and the known one (gold)."""
    said, gold = [row["scores"][0] for row in rows], [row["gold"][0] for row in rows]
    r = st.correlation(said, gold)
    interval = st.fisher(r, len(rows))
    return {
        "completions": len(rows), "correlation": r, **interval._asdict(),
        "verdict": CHANCE if r is None else verdict(interval, 0.0),
        "rank_correlation": st.correlation(st.ranks(said), st.ranks(gold)),
        "mean_squared_error": float(np.mean(np.square(np.subtract(said, gold)))),
        "length_correlation": _length_correlation(rows),
    }  # fmt: skip


# --- steps -----------------------------------------------------------------------------------------------


def steps(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Rows of the probability that each step is right, whether it is (null: neutral, not counted), and the score of the
    whole solution. Solutions are the units: the steps of one are not independent.

    The balanced accuracy is the mean of the shares of right and of wrong steps that are found (Brodersen et al. 2010,
    ICPR): 0.5 for whoever always says right.
    """
    found = np.zeros((len(rows), 4))  # right ones found, right ones, wrong ones found, wrong ones
    whole = []
    for n, row in enumerate(rows):
        for p, label in zip(row["probabilities"], row["right"], strict=True):
            if label is not None:
                found[n, 0 if label else 2] += (p > 0.5) == label
                found[n, 1 if label else 3] += 1
        whole.append(float((row["score"] > 0.5) == (False not in row["right"])))
    sums = found.sum(0)
    accuracy = st.bootstrap(st.ratio(found[:, 0] + found[:, 2], found[:, 1] + found[:, 3]), len(rows), seed)

    def balanced(weights: st.Numbers) -> float:
        a, b, c, d = weights @ found
        return float((a / b + c / d) / 2)

    both = bool(sums[1] and sums[3])
    interval = st.bootstrap(balanced, len(rows), seed) if both else st.UNKNOWN
    return {
        "solutions": len(rows), "steps": int(sums[1] + sums[3]), "wrong_steps": int(sums[3]),
        "accuracy": float((sums[0] + sums[2]) / max(sums[1] + sums[3], 1)), **accuracy._asdict(),
        "balanced_accuracy": balanced(np.ones(len(rows))) if both else None,
        "balanced_low": interval.low, "balanced_high": interval.high,
        "verdict": verdict(interval) if both else "only right steps, or only wrong ones: nothing to tell apart",
        "right_found": float(sums[0] / sums[1]) if sums[1] else None,
        "wrong_found": float(sums[2] / sums[3]) if sums[3] else None,
        "solution_accuracy": _share(whole),
    }  # fmt: skip


KINDS: dict[str, Callable[[Sequence[Row], int], dict[str, Any]]] = {
    "pairs": pairs, "rankings": rankings, "scored": scored, "steps": steps,
}  # fmt: skip
