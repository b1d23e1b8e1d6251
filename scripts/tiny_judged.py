"""Judged reviews of the offline demo world: rankings, scores, games, steps, error spans, safety labels and votes.

`FILES` has a function for each file, from a subject to the rows about it: mostly one.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

from tiny_grammar import LEANINGS, Subject, W, request, review, spoilt

BLAME = re.compile(r"\b(?:" + "|".join(sorted(W.NEGATIVE)) + r")\b", re.IGNORECASE)
SPOILT_SHARE = 0.1
"""Share of ranked reviews that are spoilt in form."""
ROUND_PLAYERS = 4
"""Reviews of a subject that play against each other."""
SHARPNESS = 6.0
"""Log-odds of winning a game for each unit of true reward."""
NEARLY = 0.1
"""Differences in true reward that a judge calls a tie."""
NOISE = 0.3
"""Standard deviation of what a judge sees of a difference."""


def different(rng: random.Random, subject: Subject, count: int) -> list[str]:
    """So many reviews of a subject, no two alike."""
    made: dict[str, None] = {}
    while len(made) < count:
        made[review(rng, subject, rng.choice(LEANINGS))] = None
    return list(made)


def ranking(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Two to five reviews with their true rewards to one decimal place, which makes ties; not all are tied."""
    while True:
        texts = different(rng, subject, rng.randint(2, 5))
        texts = [spoilt(rng, text) if rng.random() < SPOILT_SHARE else text for text in texts]
        scores = [round(W.true_reward(text), 1) for text in texts]
        if len(set(texts)) == len(texts) and len(set(scores)) > 1:
            return [{"prompt": request(rng, subject), "completions": texts, "scores": scores}]


def strict_ranking(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Two to five reviews of different true rewards, with their ranks."""
    while True:
        texts = different(rng, subject, rng.randint(2, 5))
        rewards = [W.true_reward(text) for text in texts]
        if len(set(rewards)) == len(rewards):
            ranks = [1 + sum(other > reward for other in rewards) for reward in rewards]
            return [{"prompt": request(rng, subject), "completions": texts, "ranks": ranks}]


def choice(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Four reviews and the place of the one with the highest true reward."""
    while True:
        texts = different(rng, subject, 4)
        rewards = [W.true_reward(text) for text in texts]
        if rewards.count(max(rewards)) == 1:
            return [{"prompt": request(rng, subject), "completions": texts, "best": rewards.index(max(rewards))}]


def scored(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Three reviews, a row each, with their true rewards."""
    asked = request(rng, subject)
    return [
        {"prompt": asked, "completion": text, "score": round(W.true_reward(text), 4)}
        for text in different(rng, subject, 3)
    ]


def games(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Every pair of four reviews meets once; the better one mostly wins."""
    asked, texts = request(rng, subject), different(rng, subject, ROUND_PLAYERS)
    found = []
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            gap = W.true_reward(a) - W.true_reward(b)
            won = rng.random() < 1 / (1 + math.exp(-SHARPNESS * gap))
            outcome = 0.5 if abs(gap) < NEARLY else float(won)
            found.append({"prompt": asked, "a": a, "b": b, "outcome": outcome})
    return found


def steps(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """A review as steps, one a sentence: right up to the first that blames, which is wrong; the rest is not judged."""
    parts = re.split(r"(?<=\.) ", review(rng, subject, rng.choice(LEANINGS)))
    wrong = next((i for i, part in enumerate(parts) if BLAME.search(part)), len(parts))
    labels = [None if i > wrong else i < wrong for i in range(len(parts))]
    return [{"prompt": request(rng, subject), "steps": parts, "labels": labels}]


def spans(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """A review and the places of its words of blame, each with its category."""
    text = review(rng, subject, rng.choice(LEANINGS))
    errors = [
        {"start": m.start(), "end": m.end(), "category": "verb" if m[0].lower() in W.NEGATIVE_VERBS else "adjective"}
        for m in BLAME.finditer(text)
    ]
    return [{"prompt": request(rng, subject), "completion": text, "errors": errors}]


def safety(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Two reviews. Words of blame are the harm: none is safe, and fewer are safer."""
    while True:
        texts = different(rng, subject, 2)
        harm = [len(BLAME.findall(text)) for text in texts]
        if harm[0] != harm[1]:
            break
    row: dict[str, Any] = {"prompt": request(rng, subject), "safer_response_id": int(harm[1] < harm[0])}
    for i in (0, 1):
        row |= {f"response_{i}": texts[i], f"is_response_{i}_safe": harm[i] == 0}
    return [row]


def votes(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Two reviews and what three judges say who see their difference with noise: 1 the first, 2 the second, 0 a tie."""
    texts = different(rng, subject, 2)
    gap = W.true_reward(texts[0]) - W.true_reward(texts[1])
    seen = [gap + rng.gauss(0, NOISE) for _ in range(3)]
    cast = [0 if abs(one) < NEARLY else 1 if one > 0 else 2 for one in seen]
    return [{"prompt": request(rng, subject), "completions": texts, "votes": cast}]


def match(rng: random.Random, subject: Subject) -> list[dict[str, Any]]:
    """Two reviews in one question, and the place of the better one as its answer."""
    while True:
        texts = different(rng, subject, 2)
        gap = W.true_reward(texts[0]) - W.true_reward(texts[1])
        if abs(gap) >= NEARLY:
            break
    asked = W.MATCH.format(a=texts[0], b=texts[1], principle=rng.choice(W.PRINCIPLES))
    turns = ("user", asked), ("assistant", "A" if gap > 0 else "B")
    return [{"messages": [{"role": role, "content": content} for role, content in turns]}]


FILES: dict[str, Callable[[random.Random, Subject], list[dict[str, Any]]]] = {
    "rankings": ranking,
    "strict-rankings": strict_ranking,
    "choices": choice,
    "scored": scored,
    "games": games,
    "steps": steps,
    "spans": spans,
    "safety": safety,
    "votes": votes,
    "matches": match,
}
