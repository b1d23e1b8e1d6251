"""Advantage estimators without a critic. B rows, T slots."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import advantage
from tests.objectives.support import INF, NAN, Check, checks_of, close, doubles, leaf, refuses

BITS = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
MASK = torch.tensor(BITS, dtype=torch.bool)
REWARDS = torch.tensor([[1, 0, 2], [0, 4, 90], [5, 90, 90], [0, 0, 2], [6, 90, 90], [90, 90, 90]], dtype=torch.float64)
"""Summed over the mask: 3, 4, 5, 2, 6, and a completion without a token."""
GROUP = torch.tensor([7, 3, 7, 3, 9, 7])
"""Prompts: 3 and 5 belong together, 4 and 2, and 6 is alone."""
GREEDY = doubles(1, 2, 1, 2, 6, 1)
SETTINGS: dict[str, dict[str, Any]] = {
    "reinforce": {"gamma": 1.0, "credit": "to_go", "baseline": "batch"},
    "reinforce_pp": {"gamma": 1.0},
    "rloo": {},
    "grpo": {"epsilon": 0.5},
    "dr_grpo": {},
    "remax": {"gamma": 1.0},
}
GROUPED = ("rloo", "grpo", "dr_grpo")


def estimate(m: Any, name: str, rewards: Tensor = REWARDS, mask: Tensor = MASK, group: Tensor | None = GROUP,
             greedy: Tensor | None = GREEDY, **more: Any) -> Any:  # fmt: skip
    """What an estimator says of the example, or of something else."""
    return getattr(m, name)(rewards, None, mask, group, greedy, **(SETTINGS[name] | more))


def scores(*values: float) -> tuple[Tensor, Tensor]:
    """Completions of one token with these rewards: rewards, mask (B, 1)."""
    return doubles(*values)[:, None], torch.ones(len(values), 1, dtype=torch.bool)


def check_reinforce_by_hand(m: Any) -> None:
    plain = {"baseline": "none"}
    to_go = [[3, 2, 2], [4, 4, 0], [5, 0, 0], [2, 2, 2], [6, 0, 0], [0, 0, 0]]
    close(estimate(m, "reinforce", **plain).advantages, to_go)
    full = [[3, 3, 3], [4, 4, 0], [5, 0, 0], [2, 2, 2], [6, 0, 0], [0, 0, 0]]
    close(estimate(m, "reinforce", **plain, credit="full").advantages, full)
    close(estimate(m, "reinforce", **plain, credit="full", gamma=0.5).advantages, full)  # not discounted
    # G_3 = 2, G_2 = 0 + 2 / 2, G_1 = 1 + 1 / 2; 0 + 4 / 2
    half = [[1.5, 1, 2], [2, 4, 0], [5, 0, 0], [0.5, 1, 2], [6, 0, 0], [0, 0, 0]]
    close(estimate(m, "reinforce", **plain, gamma=0.5).advantages, half)


def check_reinforce_baseline(m: Any) -> None:
    # (3 + 4 + 5 + 2 + 6) / 5 completions = 4; with gamma 0.5 (1.5 + 2 + 5 + 0.5 + 6) / 5 = 3
    to_go = [[-1, -2, -2], [0, 0, 0], [1, 0, 0], [-2, -2, -2], [2, 0, 0], [0, 0, 0]]
    close(estimate(m, "reinforce").advantages, to_go)
    full = [[-1, -1, -1], [0, 0, 0], [1, 0, 0], [-2, -2, -2], [2, 0, 0], [0, 0, 0]]
    close(estimate(m, "reinforce", credit="full").advantages, full)
    half = [[-1.5, -2, -1], [-1, 1, 0], [2, 0, 0], [-2.5, -2, -1], [3, 0, 0], [0, 0, 0]]
    close(estimate(m, "reinforce", gamma=0.5).advantages, half)
    none = torch.zeros(2, 3, dtype=torch.bool)
    close(estimate(m, "reinforce", REWARDS[:2], none).advantages, torch.zeros(2, 3))


def check_reinforce_to_go_is_gae(m: Any) -> None:
    holes = MASK.clone()
    holes[0, 1] = holes[3, 0] = False
    for gamma in (1.0, 0.9):
        one = estimate(m, "reinforce", mask=holes, gamma=gamma, baseline="none")
        settings = {"gamma": gamma, "lam": 1.0, "lam_critic": None, "length_adaptive": None}
        other = m.gae(REWARDS, torch.zeros_like(REWARDS), holes, None, None, **settings)
        assert torch.equal(one.advantages, other.advantages)
    # The first token that counts decides what a completion is credited with: (3 + 4 + 5 + 2 + 6) / 5 again.
    close(estimate(m, "reinforce", mask=holes).advantages[3], [0, -2, -2])


def check_reinforce_pp_by_hand(m: Any) -> None:
    # G = 2, 2, 4: mean 8/3, variance (4/9 + 4/9 + 16/9) / 3 = 8/9, so -1/sqrt(2), -1/sqrt(2), sqrt(2).
    rewards, mask = doubles(0, 2, 4, 90).view(2, 2), torch.tensor([[True, True], [True, False]])
    out = estimate(m, "reinforce_pp", rewards, mask)
    low, high = -math.sqrt(0.5), math.sqrt(2)
    close(out.advantages, [[low, low], [high, 0.0]], 1e-6)
    # gamma 0.5: G = 1, 2, 4: mean 7/3, variance (16 + 1 + 25) / 27 = 14/9
    out = estimate(m, "reinforce_pp", rewards, mask, gamma=0.5)
    root = math.sqrt(14 / 9)
    close(out.advantages, [[-4 / 3 / root, -1 / 3 / root], [5 / 3 / root, 0.0]], 1e-6)


def check_rloo_by_hand(m: Any) -> None:
    rows = [[-2, -2, -2], [2, 2, 0], [2, 0, 0], [-2, -2, -2], [0, 0, 0], [0, 0, 0]]  # two: plus and minus the gap
    close(estimate(m, "rloo").advantages, rows)
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    out = estimate(m, "rloo", *scores(1, 2, 6), torch.tensor([4, 4, 4]))
    close(out.advantages, [[-3.0], [-1.5], [4.5]])


def check_grpo_by_hand(m: Any) -> None:
    # Two with a gap of 2: mean between them, deviation sqrt(2); +-1 / (sqrt(2) + 0.5)
    a = 1 / (math.sqrt(2) + 0.5)
    rows = [[-a, -a, -a], [a, a, 0], [a, 0, 0], [-a, -a, -a], [0, 0, 0], [0, 0, 0]]
    close(estimate(m, "grpo").advantages, rows)
    # mean 3, deviation sqrt((4 + 1 + 9) / 2) = sqrt(7)
    out = estimate(m, "grpo", *scores(1, 2, 6), torch.tensor([4, 4, 4]), epsilon=1e-4)
    root = math.sqrt(7) + 1e-4
    close(out.advantages, [[-2 / root], [-1 / root], [3 / root]])


def check_dr_grpo_by_hand(m: Any) -> None:
    rows = [[-1, -1, -1], [1, 1, 0], [1, 0, 0], [-1, -1, -1], [0, 0, 0], [0, 0, 0]]
    close(estimate(m, "dr_grpo").advantages, rows)
    close(estimate(m, "dr_grpo", *scores(1, 2, 6), torch.tensor([4, 4, 4])).advantages, [[-2.0], [-1.0], [3.0]])


def check_remax_by_hand(m: Any) -> None:
    rows = [[2, 1, 1], [2, 2, 0], [4, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    close(estimate(m, "remax").advantages, rows)
    half = [[0.5, 0, 1], [0, 2, 0], [4, 0, 0], [-1.5, -1, 0], [0, 0, 0], [0, 0, 0]]
    close(estimate(m, "remax", gamma=0.5).advantages, half)
    assert refuses(ValueError, estimate, m, "remax", greedy=None)


def check_groups_without_contrast(m: Any) -> None:
    # The mean of three times 0.1 is not 0.1 in floats: exactly 0 all the same, as for a group of one.
    rewards, mask = scores(0.1, 0.1, 0.1, 5.0, 0.7, 0.7, 0.7)
    group = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    for kind in (torch.float32, torch.float64):
        for name in GROUPED:
            out = estimate(m, name, rewards.to(kind), mask, group)
            assert bool((out.advantages == 0).all()), name
    # One completion of a prompt beside one without a token is alone too.
    for name in GROUPED:
        out = estimate(m, name, REWARDS[[0, 5]], MASK[[0, 5]], GROUP[[0, 5]])
        assert bool((out.advantages == 0).all()), name


def check_groups_sum_to_zero(m: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, mask = scores(*torch.randn(12, generator=generator).tolist())
    group = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0, 2, 2, 2])
    for name in GROUPED:
        advantages = estimate(m, name, rewards, mask, group).advantages[:, 0]
        for g in range(3):
            assert abs(float(advantages[group == g].sum())) < 1e-9, name
    plain = estimate(m, "rloo", rewards, mask, group).advantages
    close(estimate(m, "rloo", rewards + 7, mask, group).advantages, plain, 1e-9)
    scaled = estimate(m, "grpo", 3 * rewards + 7, mask, group, epsilon=1e-9).advantages
    close(scaled, estimate(m, "grpo", rewards, mask, group, epsilon=1e-9).advantages, 1e-6)


def check_groups_are_named(m: Any) -> None:
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    names = torch.tensor([0, 100, 0, 100, -5, 0])  # 7, 3, 9 called otherwise
    for name in SETTINGS:
        plain = estimate(m, name).advantages
        turned = estimate(m, name, REWARDS[order], MASK[order], GROUP[order], GREEDY[order]).advantages
        close(turned, plain[order], 1e-12)
        close(estimate(m, name, group=names).advantages, plain, 1e-12)
    for name in GROUPED:
        assert refuses(ValueError, estimate, m, name, group=None)


def check_estimators_garbage(m: Any) -> None:
    for name in SETTINGS:
        plain = estimate(m, name)
        for junk in (NAN, INF, -INF, 1e30):
            dirty = estimate(m, name, torch.where(MASK, REWARDS, junk))
            close(dirty.advantages, plain.advantages)
            close(dirty.returns, plain.returns)
        without = estimate(m, name, REWARDS[:5], MASK[:5], GROUP[:5], GREEDY[:5])
        close(without.advantages, plain.advantages[:5], 1e-12)
        assert bool((plain.advantages[~MASK] == 0).all()), name


def check_estimators_returns(m: Any) -> None:
    to_go = [[3, 2, 2], [4, 4, 0], [5, 0, 0], [2, 2, 2], [6, 0, 0], [0, 0, 0]]
    for name in SETTINGS:
        close(estimate(m, name).returns, to_go)
    for name in ("reinforce", "reinforce_pp", "remax"):
        close(estimate(m, name, gamma=0.5).returns, to_go)


def check_estimators_are_constants(m: Any) -> None:
    for name in SETTINGS:
        out = estimate(m, name, leaf(REWARDS), greedy=leaf(GREEDY))
        assert not out.advantages.requires_grad, name
        assert not out.returns.requires_grad, name


def check_estimators_half_precision(m: Any) -> None:
    # 300 tokens of reward 1 against 299: bfloat16 would see no difference.
    rewards, mask = torch.ones(2, 300, dtype=torch.bfloat16), torch.arange(300) < torch.tensor([[300], [299]])
    for name in SETTINGS:
        out = estimate(
            m, name, rewards, mask, torch.zeros(2), torch.zeros(2), **({"epsilon": 0.0} if name == "grpo" else {})
        )
        assert out.advantages.dtype == out.returns.dtype == torch.float32, name
        assert out.returns[:, 0].tolist() == [300.0, 299.0], name
    close(estimate(m, "rloo", rewards, mask, torch.zeros(2)).advantages[:, 0], [1.0, -1.0])


def check_estimators_edges(m: Any) -> None:
    for name in SETTINGS:
        for rows in (2, 0):
            empty = torch.zeros(rows, 0)
            out = estimate(m, name, empty, empty.bool(), torch.zeros(rows), torch.zeros(rows))
            assert out.advantages.shape == out.returns.shape == (rows, 0), name
        far = estimate(m, name, *scores(-1e4, 1e4, 0.0), torch.zeros(3), torch.zeros(3))
        assert bool(torch.isfinite(far.advantages).all()), name


MODULE = advantage
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("reinforce: rewards before the token", check_reinforce_by_hand,
     'credited = to_go if credit == "to_go" else', 'credited = to_go if credit == "always" else'),
    ("reinforce: baseline over tokens", check_reinforce_baseline, "whole.sum() / mask.any(1).sum()",
     "credited.sum() / mask.sum().clamp(min=1)"),
    ("reinforce: completions without tokens in the mean", check_reinforce_baseline, "mask.any(1).sum()",
     "len(mask)"),
    ("reinforce: baseline added", check_reinforce_baseline, "credited = credited - whole",
     "credited = credited + whole"),
    ("reinforce: whole discounted", check_reinforce_by_hand, 'gamma if credit == "to_go" else 1.0', "gamma"),
    ("reinforce_pp: a mean of each completion", check_reinforce_pp_by_hand, "Estimate(whiten(to_go, mask),",
     "Estimate(torch.cat([whiten(to_go[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]),"),
    ("reinforce_pp: rewards, not rewards to go", check_reinforce_pp_by_hand, "whiten(to_go, mask)",
     "whiten(rewards, mask)"),
    ("rloo: the own reward in the mean", check_rloo_by_hand, " * (others + 1) / others.clamp(min=1)", ""),
    ("rloo: the factor upside down", check_rloo_by_hand, "(others + 1) / others.clamp(min=1)",
     "others / (others + 1).clamp(min=1)"),
    ("grpo: population deviation", check_grpo_by_hand, "(squares / (same.sum(1) - 1).clamp(min=1)).sqrt()",
     "(squares / same.sum(1).clamp(min=1)).sqrt()"),
    ("grpo: variance for deviation", check_grpo_by_hand, "(squares / (same.sum(1) - 1).clamp(min=1)).sqrt()",
     "(squares / (same.sum(1) - 1).clamp(min=1))"),
    ("grpo: epsilon in the root", check_grpo_by_hand, "centred / (deviation + epsilon)",
     "centred / (deviation.square() + epsilon).sqrt()"),
    ("grpo: deviation of the rollout", check_grpo_by_hand, "    deviation = (squares",
     "    squares, same = centred.square().sum(), torch.ones_like(same)\n    deviation = (squares"),
    ("dr_grpo: divided by the length", check_dr_grpo_by_hand, "return _spread(_centred(same, whole), rewards, mask)",
     "return _spread(_centred(same, whole) / mask.sum(1).clamp(min=1), rewards, mask)"),
    ("groups: neighbours", check_groups_are_named, "(group[:, None] == group)",
     "(torch.arange(len(group))[:, None] // 2 == torch.arange(len(group)) // 2)"),
    ("groups: rounding taken for contrast", check_groups_without_contrast,
     "torch.where(differs, whole - mean, torch.zeros_like(whole))", "whole - mean"),
    ("groups: raw reward for a group of one", check_groups_without_contrast,
     "torch.where(differs, whole - mean, torch.zeros_like(whole))",
     "torch.where(same.sum(1) > 1, whole - mean, whole)"),
    ("groups: completions without tokens count", check_rloo_by_hand, " & present[:, None] & present", ""),
    ("remax: the greedy score forgotten", check_remax_by_hand, "to_go - greedy.detach().to(to_go.dtype)[:, None]",
     "to_go"),
    ("remax: against the mean of the greedy scores", check_remax_by_hand, "greedy.detach().to(to_go.dtype)[:, None]",
     "greedy.detach().mean()"),
    ("remax: missing detach", check_estimators_are_constants, "greedy.detach()", "greedy"),
    ("estimators: padding summed", check_estimators_garbage, "return torch.where(mask, x, torch.zeros_like(x))",
     "return x"),
    ("estimators: padding multiplied away", check_estimators_garbage,
     "return torch.where(mask, x, torch.zeros_like(x))", "return x * mask"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
