"""Two models on the same prompts: who wins how often, also at equal lengths.

A match is a completion of a and one of b for the same prompt: {"prompt": its number, "outcome": 1 a won, 0.5 tie, 0 b
won, "lengths": characters of both}. Prompts are the units of all intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from rlhf_cli.data import statistics as st

Match: TypeAlias = dict[str, Any]


def outcome(a: float, b: float) -> float:
    """1, 0.5 for a tie, 0."""
    return 0.5 if a == b else float(a > b)


def figures(matches: Sequence[Match], seed: int) -> dict[str, Any]:
    """Win rate of a with its interval, the same at equal lengths, and in words what that says."""
    prompts = {place: n for n, place in enumerate(dict.fromkeys(match["prompt"] for match in matches))}
    owner = np.array([prompts[match["prompt"]] for match in matches])
    won = np.array([match["outcome"] for match in matches], dtype=np.float64)
    gaps = np.array([match["lengths"][0] - match["lengths"][1] for match in matches], dtype=np.float64)
    interval = st.bootstrap(st.ratio(np.bincount(owner, won), np.bincount(owner)), len(prompts), seed)
    level = st.bootstrap(lambda w: st.length_controlled(won, gaps, w[owner]), len(prompts), seed)
    return {
        "prompts": len(prompts), "matches": len(matches), "win_rate": float(won.mean()), **interval._asdict(),
        "wins": int((won == 1).sum()), "ties": int((won == 0.5).sum()), "losses": int((won == 0).sum()),
        "verdict": verdict(interval), "length_controlled": st.length_controlled(won, gaps),
        "length_controlled_low": level.low, "length_controlled_high": level.high,
        "mean_lengths": [float(np.mean([match["lengths"][k] for match in matches])) for k in (0, 1)],
    }  # fmt: skip


def verdict(interval: st.Interval) -> str:
    """What the interval of a win rate says, in words."""
    return "no difference seen" if interval.holds(0.5) else "better" if interval.above(0.5) else "worse"


def asked(matches: Sequence[Match]) -> dict[str, Any]:
    """How a judge came to its opinions: the mean probability it gives a, the probability that it says one of its labels
    at all, how much it likes the first place, how often the winner changes with the order.

    Equal completions were not asked about. Of matches without `mass`, as older versions wrote them, that probability is
    not known: it is the mean over the others, None where there are none.
    """
    opinions = [match for match in matches if match["first"] is not None]
    both = [match for match in opinions if match["second"] is not None]
    first = [m["first"] for m in opinions] + [1 - m["second"] for m in both]
    flips = [(m["first"] > 0.5) != (m["second"] > 0.5) for m in both]
    masses = [match["mass"] for match in opinions if match.get("mass") is not None]
    return {
        "mean_probability": float(np.mean([match["probability"] for match in matches])),
        "label_probability": float(np.mean(masses)) if masses else None,
        "first_place": float(np.mean(first)) if first else None,
        "position_bias": float(np.mean(first)) - 0.5 if first else None,
        "flips": float(np.mean(flips)) if flips else None,
    }
