"""The value after a completion that was cut stands for what would have followed. B rows, T slots."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_cli.objectives import advantage
from tests.objectives.advantage_checks import example, gae
from tests.objectives.support import NAN, Check, checks_of, close, leaf, untouched

CUT = torch.tensor([True, False, True, True, True])


def check_bootstrapped_by_hand(m: Any) -> None:
    rewards, mask = torch.ones(3, 3), torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    found = m.bootstrapped(rewards, mask, torch.tensor([10.0, 20.0, 30.0]), torch.tensor([True, True, False]), 0.5)
    close(found, [[1.0, 1.0, 6.0], [11.0, 1.0, 1.0], [1.0, 1.0, 1.0]])


def check_bootstrapped_is_a_further_value(m: Any) -> None:
    """gae over the row with one more token, worth nothing and valued at its own reward to go, says the same."""
    rewards, values, mask = example()
    last = torch.tensor([2.0, -1.0, 0.5, 3.0, -4.0], dtype=torch.float64)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0)):
        out = gae(m, m.bootstrapped(rewards, mask, last, CUT, gamma), values, mask, gamma, lam)
        for row in range(5):
            own = mask[row]
            if not bool(own.any()):
                continue
            r, v = rewards[row, own].tolist(), values[row, own].tolist()
            after = [*v[1:], float(last[row]) if bool(CUT[row]) else 0.0]
            delta = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
            wanted = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
            close(out.advantages[row, own], wanted, 1e-9)


def check_bootstrapped_constant_values(m: Any) -> None:
    # Nothing is paid and every state is worth c: nothing was better or worse than expected.
    mask = torch.arange(6)[None] < torch.tensor([6, 3, 1])[:, None]
    values, nothing = torch.full((3, 6), 1.7), torch.zeros(3, 6)
    for lam in (0.0, 0.95, 1.0):
        rewards = m.bootstrapped(nothing, mask, torch.full((3,), 1.7), torch.ones(3, dtype=torch.bool), 1.0)
        close(gae(m, rewards, values, mask, 1.0, lam).advantages, torch.zeros(3, 6), 1e-6)


def check_bootstrapped_finished_rows(m: Any) -> None:
    rewards, _, mask = example()
    for junk in (NAN, 1e30):
        found = m.bootstrapped(rewards, mask, torch.full((5,), junk).double(), torch.zeros(5, dtype=torch.bool), 1.0)
        close(found, rewards)


def check_bootstrapped_is_a_constant(m: Any) -> None:
    last = leaf(torch.tensor([1.0, 2.0]))
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert untouched(m.bootstrapped(torch.ones(2, 2), mask, last, mask[:, 0], 1.0), last)
    half = last.detach().bfloat16() + 256.0
    assert m.bootstrapped(torch.zeros(2, 2, dtype=torch.bfloat16), mask, half, mask[:, 0], 1.0).dtype == torch.float32


MODULE = advantage
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("bootstrap: finished rows too", check_bootstrapped_by_hand, "last & cut[:, None]", "last"),
    ("bootstrap: at the end of the slots", check_bootstrapped_by_hand,
     "last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))",
     "last = torch.zeros_like(mask).index_fill(1, torch.tensor([mask.shape[1] - 1]), True)"),
    ("bootstrap: not discounted", check_bootstrapped_by_hand, "rewards + gamma * values[:, None]",
     "rewards + values[:, None]"),
    ("bootstrap: missing detach", check_bootstrapped_is_a_constant, "full_precision(last_values.detach())",
     "full_precision(last_values)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
