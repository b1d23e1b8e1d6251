"""Advantage estimators: one signature for all. B completions, T token slots.

S_i is the sum of a completion's token rewards; G_t the sum of gamma^(u-t) r_u over its tokens u from t on. Masked slots
may hold anything, completions without a token change nothing for the others, and nothing takes a gradient.

Estimators that read no values give the undiscounted rewards to go as returns: what a critic would be trained on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_cli.objectives.judged import full_precision
from rlhf_cli.objectives.masked import whiten


class Estimate(NamedTuple):
    """Advantages and the critic's targets."""

    advantages: Tensor  # (B, T), 0 where masked
    returns: Tensor  # (B, T), 0 where masked


def gae(
    rewards: Tensor,  # (B, T) reward of each token
    values: Tensor | None,  # (B, T) value of the state before each token
    mask: Tensor,  # (B, T) tokens that count
    group: Tensor | None,  # (B,) prompt of each completion; not used here
    greedy: Tensor | None,  # (B,) score of the greedy completion of the prompt; not used here
    *,
    gamma: float,
    lam: float,
    lam_critic: float | None,
    length_adaptive: float | None,
) -> Estimate:
    """delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; R_t = A_t + V_t.

    Each row ends at its own last token, after which value and advantage are 0. Masked slots inside a row are skipped:
    the result is as if those tokens were deleted. lam_critic: R takes its own lambda. length_adaptive alpha: lam =
    1 - 1 / (alpha L) for a row of L tokens, never below 0. Raises ValueError without values.

    Symbols: V_t: value of the state before token t; R: target of the critic; L: tokens of the completion
    Source: Schulman et al. 2016 (arXiv:1506.02438) eq. 11-16; lam_critic: Yuan et al. 2025 (arXiv:2503.01491);
    length_adaptive: Yue et al. 2025 (arXiv:2504.05118)
    Step 0: with V = 0 and gamma = lam = 1, A_t = R_t = the rewards to go
    Traps: values read one token late; returns made from whitened advantages; rows that end at T instead of their own
    last token
    """
    if values is None:
        raise ValueError("gae needs a critic's values")
    rewards, values = _counted(rewards, mask), _counted(values, mask)
    own: float | Tensor = lam
    if length_adaptive is not None:
        length = mask.sum(1).to(rewards.dtype)
        own = (1.0 - 1.0 / (length_adaptive * length)).clamp(min=0.0)  # (B,)
    advantages, _ = _carried(rewards, values, mask, gamma, own)
    wide = advantages if lam_critic is None else _carried(rewards, values, mask, gamma, lam_critic)[0]
    return Estimate(advantages, torch.where(mask, wide + values, torch.zeros_like(values)))


def reinforce(
    rewards: Tensor,  # (B, T)
    values: Tensor | None,  # (B, T); not used here
    mask: Tensor,  # (B, T)
    group: Tensor | None,  # (B,); not used here
    greedy: Tensor | None,  # (B,); not used here
    *,
    gamma: float,
    credit: str,
    baseline: str,
) -> Estimate:
    """to_go: A_t = G_t - b; full: A_t = S - b.

    b is 0, or with `batch` the mean over the completions of what they are credited with at their first token (G_1, or
    S). to_go leaves out the rewards before a token, whose expectation is zero: the same gradient, less noise.
    Whitened, as it is unless whiten_advantages is false, to_go is reinforce_pp whatever b is.

    Symbols: b: the baseline, one number for the rollout
    Source: Williams 1992 (Machine Learning 8:229-256); to_go: Sutton et al. 1999 (NeurIPS 12)
    Step 0: to_go with b = 0 and gamma = 1 is gae with V = 0 and gamma = lam = 1
    Traps: a baseline over tokens, which long completions dominate; the baseline of a rollout of one, which is its own
    reward; rewards before the token credited to it
    """
    to_go, whole = _to_go(rewards, mask, gamma if credit == "to_go" else 1.0)
    credited = to_go if credit == "to_go" else whole[:, None].expand_as(to_go)
    if baseline == "batch":
        credited = credited - whole.sum() / mask.any(1).sum()
    return Estimate(torch.where(mask, credited, torch.zeros_like(to_go)), _to_go(rewards, mask, 1.0)[0])


def reinforce_pp(
    rewards: Tensor,  # (B, T)
    values: Tensor | None,  # (B, T); not used here
    mask: Tensor,  # (B, T)
    group: Tensor | None,  # (B,); not used here
    greedy: Tensor | None,  # (B,); not used here
    *,
    gamma: float,
) -> Estimate:
    """A_t = (G_t - mean G) / sqrt(var G + 1e-8), mean and variance over all tokens of the rollout.

    The variance is the population's. Whitening once more (`whiten_advantages`) changes nothing. The same as reinforce
    with its defaults.

    Source: Hu et al. 2025 (arXiv:2501.03262), REINFORCE++
    Step 0: the advantages of a rollout have mean 0 and variance 1
    Traps: statistics over padding; statistics of a mini-batch; a mean for each completion
    """
    to_go, _ = _to_go(rewards, mask, gamma)
    return Estimate(whiten(to_go, mask), _to_go(rewards, mask, 1.0)[0])


def rloo(
    rewards: Tensor,  # (B, T)
    values: Tensor | None,  # (B, T); not used here
    mask: Tensor,  # (B, T)
    group: Tensor | None,  # (B,) prompt of each completion
    greedy: Tensor | None,  # (B,); not used here
) -> Estimate:
    """A_i = S_i - mean of S over the other completions of the prompt = n / (n - 1) (S_i - mean S), at every token.

    A group of one and a group of equal S give exactly 0. Raises ValueError without groups.

    Symbols: n: completions of the prompt
    Source: Ahmadian et al. 2024 (arXiv:2402.14740); Kool et al. 2019
    Step 0: the advantages of a prompt's completions sum to 0
    Traps: the own reward left in the mean; neighbouring rows taken for a group; a group of one credited with its reward
    """
    same, whole = _groups(rewards, mask, group)
    others = same.sum(1) - 1
    return _spread(_centred(same, whole) * (others + 1) / others.clamp(min=1), rewards, mask)


def grpo(
    rewards: Tensor,  # (B, T)
    values: Tensor | None,  # (B, T); not used here
    mask: Tensor,  # (B, T)
    group: Tensor | None,  # (B,) prompt of each completion
    greedy: Tensor | None,  # (B,); not used here
    *,
    epsilon: float,
) -> Estimate:
    """A_i = (S_i - mean S) / (std S + epsilon), mean and deviation over the completions of the prompt, at every token.

    The deviation is the sample's (n - 1). A group of one and a group of equal S give exactly 0. Raises ValueError
    without groups.

    Source: Shao et al. 2024 (arXiv:2402.03300) section 4.1.2, outcome supervision
    Step 0: the advantages of a prompt's completions sum to 0
    Traps: a deviation over the rollout; epsilon inside a root; the raw reward for a group of one
    """
    same, whole = _groups(rewards, mask, group)
    centred = _centred(same, whole)
    squares = torch.where(same, centred.square()[None], torch.zeros_like(centred)).sum(1)
    deviation = (squares / (same.sum(1) - 1).clamp(min=1)).sqrt()  # (B,)
    return _spread(centred / (deviation + epsilon), rewards, mask)


def dr_grpo(
    rewards: Tensor,  # (B, T)
    values: Tensor | None,  # (B, T); not used here
    mask: Tensor,  # (B, T)
    group: Tensor | None,  # (B,) prompt of each completion
    greedy: Tensor | None,  # (B,); not used here
) -> Estimate:
    """A_i = S_i - mean of S over the completions of the prompt, at every token.

    Belongs with `aggregate: constant`. A group of one and a group of equal S give exactly 0. Raises ValueError without
    groups.

    Source: Liu et al. 2025 (arXiv:2503.20783)
    Step 0: the advantages of a prompt's completions sum to 0
    Traps: a division by the deviation, which favours prompts that are too easy or too hard; a division by the length
    """
    same, whole = _groups(rewards, mask, group)
    return _spread(_centred(same, whole), rewards, mask)


def remax(
    rewards: Tensor,  # (B, T)
    values: Tensor | None,  # (B, T); not used here
    mask: Tensor,  # (B, T)
    group: Tensor | None,  # (B,); not used here
    greedy: Tensor | None,  # (B,) score of the greedy completion of each row's prompt
    *,
    gamma: float,
) -> Estimate:
    """A_t = G_t - score of the greedy completion of the prompt.

    The greedy score carries the penalty of a missing end token, as all scores do, and no KL. Raises ValueError without
    greedy scores.

    Source: Li et al. 2024 (arXiv:2310.10505)
    Step 0: a completion that scores as the greedy one has A_1 = 0 with gamma 1
    Traps: a greedy completion of another prompt; one that is scored by other rules; a sampled one in its place
    """
    if greedy is None:
        raise ValueError("remax needs the scores of greedy completions")
    to_go, _ = _to_go(rewards, mask, gamma)
    advantages = to_go - greedy.detach().to(to_go.dtype)[:, None]
    return Estimate(torch.where(mask, advantages, torch.zeros_like(to_go)), _to_go(rewards, mask, 1.0)[0])


def bootstrapped(
    rewards: Tensor,  # (B, T)
    mask: Tensor,  # (B, T)
    last_values: Tensor,  # (B,) value of the state after each row's last token
    cut: Tensor,  # (B,) bool: rows that the length limit ended, not a stop token
    gamma: float,
) -> Tensor:
    """The rewards with gamma V added at the last token of each row that was cut: (B, T).

    For `gae` that is the same as letting V follow the row: delta_L = r_L + gamma V_{L+1} - V_L. A row that was cut must
    then carry no score, which already judges what is missing.

    Sutton & Barto 2018, section 3.3: a time limit that the state does not show is no end of the episode; Pardo et al.
    2018 (arXiv:1712.00378).
    """
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # (B, T)
    (values,) = full_precision(last_values.detach())
    return torch.where(last & cut[:, None], rewards + gamma * values[:, None], rewards)


def _counted(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, T) in float32 or better, without gradient, zeros where masked."""
    (x,) = full_precision(x.detach())
    return torch.where(mask, x, torch.zeros_like(x))


def _carried(
    rewards: Tensor,  # (B, T), zeros where masked
    values: Tensor,  # (B, T), zeros where masked
    mask: Tensor,  # (B, T)
    gamma: float,
    lam: float | Tensor,  # a number, or one a row (B,)
) -> tuple[Tensor, Tensor]:
    """A_t (B, T) of the recursion of `gae`, 0 where masked, and that of each row's first token (B,)."""
    next_value = values.new_zeros(len(values))  # (B,)
    carried = values.new_zeros(len(values))
    columns = []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        next_value = torch.where(here, values[:, t], next_value)
        columns.append(torch.where(here, carried, torch.zeros_like(carried)))
    return torch.stack(columns[::-1], dim=1) if columns else values, carried


def _to_go(rewards: Tensor, mask: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """G_t (B, T), 0 where masked, and G of each row's first token (B,); rewards, mask (B, T)."""
    counted = _counted(rewards, mask)
    return _carried(counted, torch.zeros_like(counted), mask, gamma, 1.0)


def _groups(rewards: Tensor, mask: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows share a prompt, those without a token with none (B, B) bool; S (B,). rewards, mask (B, T), group (B,).

    Raises ValueError without groups.
    """
    if group is None:
        raise ValueError("the estimator needs to know which completions share a prompt")
    present = mask.any(1)
    return (group[:, None] == group) & present[:, None] & present, _counted(rewards, mask).sum(1)


def _centred(same: Tensor, whole: Tensor) -> Tensor:
    """S - mean S of the row's group (B,), exactly 0 in a group without contrast; same (B, B), whole S (B,)."""
    rows = whole.expand_as(same)  # (B, B)
    mean = torch.where(same, rows, torch.zeros_like(rows)).sum(1) / same.sum(1)
    differs = (same & (rows != whole[:, None])).any(1)
    return torch.where(differs, whole - mean, torch.zeros_like(whole))


def _spread(advantage: Tensor, rewards: Tensor, mask: Tensor) -> Estimate:
    """One advantage (B,) at every token of its row; rewards, mask (B, T)."""
    to_go, _ = _to_go(rewards, mask, 1.0)
    return Estimate(torch.where(mask, advantage[:, None].expand_as(to_go), torch.zeros_like(to_go)), to_go)
