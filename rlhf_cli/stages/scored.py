"""Scores of completions that are not learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_cli.catalog.entries import LARGEST
from rlhf_cli.data.completions import Candidate, plain_prompt
from rlhf_cli.errors import ModelError
from rlhf_cli.rollouts.rewards import Infer, Reward, Rollout, Scores, Totals, total


def judge(rewards: Sequence[Reward], rollout: Rollout, infer: Infer, at_once: int) -> Totals:
    """What ppo's evaluation says of the same completions, asked about so many at once. Raises ModelError and
    DivergedError."""
    count = len(rollout.completions)
    parts = [_judged(rewards, _some(rollout, n, min(n + at_once, count)), infer) for n in range(0, count, at_once)]
    if len(parts) == 1:
        return parts[0]
    costs = [part.cost for part in parts if part.cost is not None]
    return Totals(
        _joined([part.reward for part in parts]), _joined(costs) if costs else None, {},
        {name: _joined([part.parts[name] for part in parts]) for name in parts[0].parts},
    )  # fmt: skip


def _some(rollout: Rollout, start: int, stop: int) -> Rollout:
    """The completions from `start` on, before `stop`."""
    tasks, completions, samples, finished = rollout.tasks, rollout.completions, rollout.samples, rollout.finished
    return Rollout(tasks[start:stop], completions[start:stop], samples[start:stop], finished[start:stop])


def _joined(parts: Sequence[Scores]) -> Scores:
    """Scores of completions one after the other."""
    tokens = [row for part in parts for row in part.tokens or []] if parts[0].tokens is not None else None
    return Scores(np.concatenate([p.sequence for p in parts]), tokens, np.concatenate([p.valid for p in parts]))


def _judged(rewards: Sequence[Reward], rollout: Rollout, infer: Infer) -> Totals:
    totals = total(rewards, rollout, infer, learn=False, moving=False)
    for name, part in {**totals.parts, "the sum": totals.reward}.items():
        large = np.flatnonzero(np.abs(part.totals) > LARGEST)
        if len(large):
            raise ModelError(
                f"the score of {rollout.tasks[large[0]].where} is {part.totals[large[0]]:g}: too large to compute with",
                f"reward {name}", "rescale it",
            )  # fmt: skip
    return totals


def fields_of(totals: Totals, n: int) -> dict[str, Any]:
    """What is written beside a completion: its score, what each reward said, and its cost; null where it could not be
    scored."""
    known = bool(totals.reward.valid[n])
    found: dict[str, Any] = {"score": float(totals.reward.totals[n]) if known else None}
    found["scores"] = {name: float(p.totals[n]) if bool(p.valid[n]) else None for name, p in totals.parts.items()}
    if totals.cost is not None:
        found["cost"] = float(totals.cost.totals[n]) if known else None
    return found


def written(item: Candidate) -> dict[str, Any]:
    """A completion as it was read, without former scores."""
    row = {"prompt": None, "completion": item.completion, "finished": item.finished, **item.given}
    row |= {"prompt": plain_prompt(item.prompt), "completion": item.completion}
    return {key: value for key, value in row.items() if key not in ("completions", "score", "scores", "cost")}
