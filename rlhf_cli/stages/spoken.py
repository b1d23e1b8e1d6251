"""The figures of language models, from the rows that their evaluation wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from rlhf_cli.data import duel
from rlhf_cli.data import statistics as st
from rlhf_cli.data.selection import ratings
from rlhf_cli.recipe.evaluation import EvalRecipe
from rlhf_cli.runs.directory import Run
from rlhf_cli.stages import product

Row: TypeAlias = dict[str, Any]
NEVER = "no prompt has a score of both"
RATING_SAMPLES = 200
"""Draws of the bootstrap behind the intervals of ratings."""


def figures(recipe: EvalRecipe, names: Sequence[str], run: Run, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of each model, of each two that met, and the ratings of several."""
    rows, more = list(product.made_rows(run)), list(product.made_rows(run, "more"))
    said = [[row for row in rows if row["by"]["model"] == name] for name in names]
    losses = [[row for row in more if row["what"] == "loss" and row["model"] == name] for name in names]
    found: dict[str, Any] = {"models": {
        name: ({"perplexity": perplexity(loss, recipe.seed)} if loss else {}) | (spoken(own) if own else {})
        for name, own, loss in zip(names, said, losses, strict=True)
    }}  # fmt: skip
    if len(names) > 1:
        judged = [row for row in more if row["what"] == "match"]
        met = [matches(said[a], said[b], judged if recipe.judge else None, n) for n, (a, b) in enumerate(pairs)]
        found |= compared(recipe, names, pairs, met)
    return found


# --- one model -------------------------------------------------------------------------------------------


def perplexity(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """exp of the mean loss of a token, with its interval over examples; comparable only between models of the same
    tokenizer and template."""
    found = _perplexity(rows, seed)
    sources = list(dict.fromkeys(row["source"] for row in rows))
    by = {source: _perplexity([row for row in rows if row["source"] == source], seed) for source in sources}
    return found | {"by_source": by}


def _perplexity(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    nats, tokens = [row["nats"] for row in rows], [row["tokens"] for row in rows]
    low, high = st.bootstrap(st.ratio(nats, tokens), len(rows), seed)
    mean = sum(nats) / sum(tokens)
    return {
        "examples": len(rows), "tokens": sum(tokens), "nats_per_token": mean, "perplexity": _exp(mean),
        "low": None if low is None else _exp(low), "high": None if high is None else _exp(high),
    }  # fmt: skip


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def spoken(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the completions of a model: length, how many ended, scores, KL. Prompts are the units."""
    prompts = [row["number"] for row in rows]
    found: dict[str, Any] = {
        "completions": len(rows), "prompts": len(set(prompts)),
        "mean_length": float(np.mean([row["length"] for row in rows])),
        "eos_rate": float(np.mean([row["finished"] for row in rows])),
    }  # fmt: skip
    if "scores" in rows[0]:
        names = list(rows[0]["scores"])
        found["scores"] = {name: score_of(prompts, [row["scores"][name] for row in rows]) for name in names}
        found["score"] = score_of(prompts, [row["score"] for row in rows])
    if "k1" in rows[0]:
        other = over_prompts(prompts, [row["k3"] for row in rows])
        found["kl"] = over_prompts(prompts, [row["k1"] for row in rows]) | {
            "k3": other["mean"], "k3_standard_error": other["standard_error"],
        }  # fmt: skip
    return found


def over_prompts(prompts: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    """Mean and interval of the means of the prompts."""
    places = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    owner = np.array([places[prompt] for prompt in prompts])
    return st.mean_of(np.bincount(owner, np.asarray(values, dtype=np.float64)) / np.bincount(owner))


def score_of(prompts: Sequence[int], values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and interval of the scores; of scores that are 0 or 1, one a prompt, the interval is Wilson's."""
    known = [(prompt, value) for prompt, value in zip(prompts, values, strict=True) if value is not None]
    if not known:
        return {"mean": None, "standard_error": None, "low": None, "high": None, "accuracy": False,
                "unscored": len(values)}  # fmt: skip
    asked, scores = [prompt for prompt, _ in known], [value for _, value in known]
    found, share = over_prompts(asked, scores), set(scores) <= {0.0, 1.0}
    if share and len(set(asked)) == len(asked):
        found |= st.wilson(sum(scores), len(scores))._asdict()
    return found | {"accuracy": share, "unscored": len(values) - len(known)}


# --- several ---------------------------------------------------------------------------------------------


def matches(mine: Sequence[Row], theirs: Sequence[Row], judged: Sequence[Row] | None, pair: int) -> list[duel.Match]:
    """The completions of two models that met; by the scores, where a judge has not decided. Those without a score did
    not meet."""
    opinions = [row for row in judged or [] if row["pair"] == pair]
    out = []
    for n, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        lengths = [len(a["completion"]), len(b["completion"])]
        if judged is not None:
            p = opinions[n]["probability"]
            out.append(opinions[n] | {"outcome": duel.outcome(p, 1 - p), "lengths": lengths})
        elif a["score"] is not None and b["score"] is not None:
            out.append({"prompt": a["number"], "outcome": duel.outcome(a["score"], b["score"]), "lengths": lengths})
    return out


def compared(
    recipe: EvalRecipe, names: Sequence[str], pairs: Sequence[tuple[int, int]], met: Sequence[list[duel.Match]]
) -> dict[str, Any]:
    """`model` against each of the others; of three models and more their ratings."""
    by = "judge" if recipe.judge else "rewards"
    found: list[dict[str, Any]] = []
    for (a, b), own in zip(pairs, met, strict=True):
        if a == 0:
            more = duel.asked(own) if recipe.judge and own else {}
            head = {"model": names[a], "against": names[b], "by": by}
            found.append(head | (duel.figures(own, recipe.seed) if own else {"matches": 0, "verdict": NEVER}) | more)
    if len(names) < 3:
        return {"against": found}
    played: dict[int, list[tuple[int, int, float]]] = {}
    for (a, b), own in zip(pairs, met, strict=True):
        for match in own:
            played.setdefault(match["prompt"], []).append((a, b, match["outcome"]))
    rated = ratings(names, list(played.values()), RATING_SAMPLES) if played else []
    return {"against": found, "ratings": rated}
