"""Scores of completions that are not learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_cli.catalog.entries import LARGEST
from rlhf_cli.data.completions import Candidate, plain_prompt
from rlhf_cli.errors import ModelError
from rlhf_cli.rollouts.rewards import Infer, Reward, Rollout, Totals, total


def judge(rewards: Sequence[Reward], rollout: Rollout, infer: Infer) -> Totals:
    """What ppo's evaluation says of the same completions. Raises ModelError and DivergedError."""
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
