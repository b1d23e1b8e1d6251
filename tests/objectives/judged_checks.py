"""What preference objectives are built from. B examples."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_cli.objectives import judged
from tests.objectives.support import Check, checks_of, close, doubles, gradients, leaf, untouched


def check_average(m: Any) -> None:
    lengths = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0])
    chosen, rejected = m.Pair(doubles(-6, 0, -5), doubles(-6, -1, -4), *lengths).average()
    close(chosen, [-3.0, 0.0, -5.0])
    close(rejected, [-2.0, -1.0, -4.0])
    # -1040 / 3 has too many digits for bfloat16
    half = torch.tensor([-1040.0, -5.0], dtype=torch.bfloat16)
    chosen, rejected = m.Pair(half, half, torch.tensor([3, 7]), torch.tensor([7, 3])).average()
    assert chosen.dtype == rejected.dtype == torch.float32
    close(chosen, torch.tensor([-1040 / 3, -5 / 7]), 1e-6)
    close(rejected, torch.tensor([-1040 / 7, -5 / 3]), 1e-6)


def check_full_precision(m: Any) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    raised = m.full_precision(*(torch.ones(2, dtype=kind) for kind in kinds))
    assert [t.dtype for t in raised] == [torch.float32, torch.float32, torch.float32, torch.float64]


def check_log_ratios(m: Any) -> None:
    ones = torch.ones(2, dtype=torch.int64)
    leaves = [leaf(doubles(*v)) for v in ((-10, -20), (-14, -17), (-11, -21), (-13, -19))]
    policy, reference = m.Pair(*leaves[:2], ones, ones), m.Pair(*leaves[2:], ones, ones)
    chosen, rejected = m.log_ratios(policy, reference)
    close(chosen, [1.0, 1.0])
    close(rejected, [-1.0, 2.0])
    for u, own in ((chosen, leaves[0]), (rejected, leaves[1])):
        assert untouched(u, *leaves[2:])
        close(gradients(u, own)[0], [1.0, 1.0])
    # 1040 - 1000.5 in float32, not in half precision
    low = [torch.tensor([v], dtype=torch.bfloat16) for v in (-1040.0, -5.0, -1000.0, -0.0390625)]
    chosen, rejected = m.log_ratios(m.Pair(*low[:2], ones, ones), m.Pair(*low[2:], ones, ones))
    assert chosen.dtype == torch.float32
    close(rejected, torch.tensor([-4.9609375]))


def check_rewards_of(m: Any) -> None:
    rewards = m.rewards_of(leaf(doubles(1, 2)), leaf(doubles(3, 4)))
    close(rewards, [[1.0, 3.0], [2.0, 4.0]])
    assert not rewards.requires_grad


MODULE = judged
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("reference forgotten", check_log_ratios, "return pc - rc.detach(), pr - rr.detach()", "return pc, pr"),
    ("reference takes gradients", check_log_ratios, "return pc - rc.detach(), pr - rr.detach()",
     "return pc - rc, pr - rr"),
    ("reference swapped", check_log_ratios, "return pc - rc.detach(), pr - rr.detach()",
     "return pc - rr.detach(), pr - rc.detach()"),
    ("average in half precision", check_average, "chosen, rejected = full_precision(self.chosen, self.rejected)",
     "chosen, rejected = self.chosen, self.rejected"),
    ("average of an empty completion", check_average, "chosen / self.chosen_length.clamp(min=1)",
     "chosen / self.chosen_length"),
    ("rewards take gradients", check_rewards_of, "dim=1).detach()", "dim=1)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
