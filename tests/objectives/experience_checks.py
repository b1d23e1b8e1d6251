"""Token rewards. N completions, T slots."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
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


DONE = torch.tensor([True, False, False])


def check_settled_by_hand(m: Any) -> None:
    wanted = {"score": [10.0, 20.0, -30.0], "penalty": [10.0, 18.5, -31.5], "replace": [10.0, -0.5, -0.5],
              "bootstrap": [10.0, 0.0, 0.0], "drop": [10.0, 20.0, -30.0]}  # fmt: skip
    for rule, scores in wanted.items():
        close(m.settled(SCORES, DONE, rule, penalty=1.5, replacement=-0.5), scores)


def check_only(m: Any) -> None:
    tasks = [SimpleNamespace(where=name) for name in "abc"]
    rollout = m.Rollout(tasks, ["x", "y", "z"], [], [True, False, True])
    made = replace(experience(m, LOGP, REFERENCE, MASK), rollout=rollout, values=LOGP + 1, last_values=SCORES)
    assert made.only(torch.tensor([True, True, True])) is made
    some = made.only(torch.tensor([True, False, True]))
    assert [t.where for t in some.rollout.tasks] == ["a", "c"]
    assert (some.rollout.completions, some.rollout.samples, some.rollout.finished) == (["x", "z"], [], [True, True])
    assert (some.group.tolist(), some.last_values.tolist()) == ([0, 2], [10.0, -30.0])
    assert torch.equal(some.values, LOGP[[0, 2]] + 1)
    assert torch.equal(some.mask, MASK[[0, 2]])
    assert some.cost_values is None
    none = made.only(torch.zeros(3, dtype=torch.bool))
    assert (none.rollout.completions, none.logp.shape) == ([], (0, 3))


def check_columns(m: Any) -> None:
    parts = [torch.tensor(rows, dtype=torch.bfloat16, requires_grad=True) for rows in ([[1, 2], [3, 4]], [[5, 6]])]
    before, after = m.columns(parts, 0, 1)
    close(before, [[1.0, 3.0], [5.0, 0.0]])
    close(after, [4.0, 6.0])
    assert not before.requires_grad
    assert (before.dtype, after.dtype) == (torch.float32, torch.float32)
    assert not after.requires_grad
    assert m.columns(parts, 1, None)[1] is None


MODULE = code
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("rewards: KL added", check_token_rewards_by_hand, "rewards = -kl_coef *", "rewards = kl_coef *"),
    ("rewards: score at the end of the row", check_token_rewards_by_hand, "rewards[rows, experience.lengths - 1]",
     "rewards[rows, -1]"),
    ("settled: finished ones pay", check_settled_by_hand, "torch.where(finished, scores, cut)",
     "torch.where(finished, cut, scores)"),
    ("settled: bootstrap keeps the score", check_settled_by_hand, '"bootstrap": torch.zeros_like(scores)',
     '"bootstrap": scores'),
    ("rewards: score one late", check_token_rewards_by_hand, "experience.lengths - 1]",
     "(experience.lengths).clamp(max=rewards.shape[1] - 1)]"),
    ("rewards: coefficient on the score", check_token_rewards_by_hand, "+= scores.to(rewards.dtype)",
     "+= kl_coef * scores.to(rewards.dtype)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "pad: dropped: part.detach().float() -> _same(part.detach())": "assigning to a float32 tensor converts",
    "draw": "needs a model: tests/rollouts",
    "measure": "needs a model: tests/rollouts",
    "_spoken": "needs a model: tests/rollouts",
    "_judged": "needs a model: tests/rollouts",
}  # fmt: skip
