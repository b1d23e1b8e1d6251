"""Token rewards. N completions, T slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cli.rollouts import experience as code
from tests.objectives.support import INF, NAN, Check, checks_of, close, refuses


def experience(m: Any, logp: Tensor, reference: Tensor, mask: Tensor) -> Any:
    """An experience with these log-probabilities, all (N, T)."""
    rows = torch.arange(len(mask))
    return m.Experience(
        rollout=m.Rollout([], [], []), finished=rows >= 0, group=rows, mask=mask, sampled_logp=logp, logp=logp,
        reference_logp=reference, entropy=torch.zeros_like(logp),
    )  # fmt: skip


LOGP = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 7.0, 7.0], [-1.0, -1.0, 7.0]])
REFERENCE = torch.tensor([[-2.0, -2.0, -1.0], [-1.5, 9.0, 9.0], [-1.0, -3.0, 9.0]])
MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
SCORES = torch.tensor([10.0, 20.0, -30.0])


def check_token_rewards_by_hand(m: Any) -> None:
    # log-ratios 1, 0, -2 | 1 | 0, 2; each token pays 0.1 of it, the last real token also gets the score.
    rewards = m.token_rewards(experience(m, LOGP, REFERENCE, MASK), SCORES, 0.1)
    close(rewards, [[-0.1, 0.0, 10.2], [19.9, 0.0, 0.0], [0.0, -30.2, 0.0]], 1e-6)


def check_token_rewards_sum(m: Any) -> None:
    for coef in (0.0, 0.05, 2.0):
        rewards = m.token_rewards(experience(m, LOGP, REFERENCE, MASK), SCORES, coef)
        kl = torch.tensor([-1.0, 1.0, 2.0])
        close(rewards.sum(1), SCORES - coef * kl, 1e-5)


def check_token_rewards_garbage(m: Any) -> None:
    clean = m.token_rewards(experience(m, LOGP, REFERENCE, MASK), SCORES, 0.1)
    for junk in (NAN, INF, -INF):
        logp, reference = torch.where(MASK, LOGP, junk), torch.where(MASK, REFERENCE, -junk)
        close(m.token_rewards(experience(m, logp, reference, MASK), SCORES, 0.1), clean)


def check_token_rewards_equal_models(m: Any) -> None:
    rewards = m.token_rewards(experience(m, LOGP, LOGP, MASK), SCORES, 0.1)
    close(rewards, [[0.0, 0.0, 10.0], [20.0, 0.0, 0.0], [0.0, -30.0, 0.0]])


def check_token_rewards_empty_row(m: Any) -> None:
    mask = MASK.clone()
    mask[1] = False
    assert refuses(AssertionError, m.token_rewards, experience(m, LOGP, REFERENCE, mask), SCORES, 0.1)


def check_pad(m: Any) -> None:
    rows, mask = m.pad([torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0, 6.0])])
    close(rows, [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [4.0, 5.0, 6.0]])
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    half, _ = m.pad([torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True)])
    assert half.dtype == torch.float32
    assert not half.requires_grad


MODULE = code
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("rewards: KL added", check_token_rewards_by_hand, "rewards = -kl_coef *", "rewards = kl_coef *"),
    ("rewards: score at the end of the row", check_token_rewards_by_hand, "rewards[rows, experience.lengths - 1]",
     "rewards[rows, -1]"),
    ("rewards: score one late", check_token_rewards_by_hand, "experience.lengths - 1]",
     "(experience.lengths).clamp(max=rewards.shape[1] - 1)]"),
    ("rewards: coefficient on the score", check_token_rewards_by_hand, "+= scores.to(rewards.dtype)",
     "+= kl_coef * scores.to(rewards.dtype)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "pad: dropped: part.detach().float() -> _same(part.detach())": "assigning to a float32 tensor converts",
    "draw": "needs a model: tests/rollouts",
    "measure": "needs a model: tests/rollouts",
}  # fmt: skip
