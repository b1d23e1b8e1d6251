"""What the data says of the examples of a step, and the figures that people read beside it.

B examples, W completions of an example (1 of a verdict, 2 of a pair, the most of a ranking, padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf_cli.data.tokens import Sample
from rlhf_cli.objectives.ranking import best_of


@dataclass(frozen=True)
class Facts:
    """What the data says of the B examples of a step."""

    length: Tensor  # (B, W) scored tokens
    present: Tensor  # (B, W) bool
    gold: Tensor  # (B, W) how good a completion is known to be
    best: Tensor  # (B,) which completion is the chosen or the best one
    scores: Tensor  # (B, 2) of chosen and rejected, nan where unknown
    desirable: Tensor  # (B,) bool

    def take(self, group: Sequence[int], device: torch.device) -> Facts:
        """Some of the examples."""
        return Facts(**{f.name: getattr(self, f.name)[list(group)].to(device) for f in fields(self)})


def facts(samples: Sequence[Sample]) -> Facts:
    """Of the samples of a step."""
    width = max(len(s.completions) for s in samples)
    length = torch.zeros(len(samples), width, dtype=torch.int64)
    gold = torch.zeros(len(samples), width, dtype=torch.float64)
    present = torch.zeros(len(samples), width, dtype=torch.bool)
    for i, sample in enumerate(samples):
        for k, completion in enumerate(sample.completions):
            length[i, k], gold[i, k], present[i, k] = int(completion.scored.sum()), completion.gold, True
    known = bool(torch.isfinite(gold).all())
    return Facts(
        length, present, gold,
        best=best_of(gold, present) if known else torch.zeros(len(samples), dtype=torch.int64),
        scores=_numbers(samples, "chosen_score", "rejected_score"),
        desirable=_numbers(samples, "desirable")[:, 0] > 0.5,
    )  # fmt: skip


def _numbers(samples: Sequence[Sample], *names: str) -> Tensor:
    return torch.tensor([[s.numbers.get(n, float("nan")) for n in names] for s in samples], dtype=torch.float64)


Figures = dict[str, tuple[Tensor, float]]


def _pair_figures(rewards: Tensor, logp: Tensor, known: Facts) -> Figures:
    """rewards (B, 2), logp (B, 2)."""
    (chosen, rejected), pairs = rewards.unbind(1), float(len(rewards))
    return {
        "rewards/chosen": (chosen.sum(), pairs),
        "rewards/rejected": (rejected.sum(), pairs),
        "rewards/margins": ((chosen - rejected).sum(), pairs),
        "rewards/accuracies": ((chosen > rejected).sum(), pairs),
        "logps/chosen": (logp[:, 0].sum(), pairs),
        "logps/rejected": (logp[:, 1].sum(), pairs),
    }


def _verdict_figures(rewards: Tensor, logp: Tensor, known: Facts) -> Figures:
    """rewards (B, 1), logp (B, 1)."""
    good, (reward, said) = known.desirable, (rewards.squeeze(1), logp.squeeze(1))
    return {
        f"{name}/{side}": (values[rows].sum(), float(rows.sum()))
        for name, values in (("rewards", reward), ("logps", said))
        for side, rows in (("chosen", good), ("rejected", ~good))
    }


def _ranking_figures(rewards: Tensor, logp: Tensor, known: Facts) -> Figures:
    """rewards (B, K), logp (B, K)."""
    right, pairs = ordered_pairs(rewards, known)
    share, prompts = right / pairs.clamp(min=1), float(len(rewards))
    hidden = rewards.masked_fill(~known.present, float("-inf"))
    best = known.best[:, None]
    return {
        "rewards/chosen": (rewards.gather(1, best).sum(), prompts),
        "rewards/accuracies": (share.sum(), prompts),
        "rewards/best": ((hidden.argmax(1) == known.best).sum(), prompts),
        "logps/chosen": (logp.gather(1, best).sum(), prompts),
    }


def ordered_pairs(rewards: Tensor, known: Facts) -> tuple[Tensor, Tensor]:
    """Pairs of each ranking whose better one has the strictly higher reward, and all its pairs: two (B,)."""
    both = known.present[:, :, None] & known.present[:, None, :]
    better = both & (known.gold[:, :, None] > known.gold[:, None, :])
    right = better & (rewards[:, :, None] > rewards[:, None, :])
    return right.sum((1, 2)), better.sum((1, 2))


FIGURES: dict[str, Callable[[Tensor, Tensor, Facts], Figures]] = {
    "comparison": _pair_figures, "verdict": _verdict_figures, "ranking": _ranking_figures,
}  # fmt: skip
