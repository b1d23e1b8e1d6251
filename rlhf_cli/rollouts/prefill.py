"""What sampling takes, measured on a shortened model: reading the prompts, and a decode step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_cli.models.counting import Ledger
from rlhf_cli.models.roles import Role
from rlhf_cli.models.shortened import clock
from rlhf_cli.models.sizing import cache_bytes
from rlhf_cli.rollouts.generate import by_own_loop
from rlhf_cli.rollouts.sampling import Sampling


@dataclass(frozen=True)
class Prefill:
    """What sampling takes while prompts are read."""

    prompt: int
    """Tokens of a prompt as it was measured."""
    wanted: int
    """Tokens that it will have."""
    each: float
    """Bytes of a prompt beyond its keys and values."""
    fixed: float
    seconds: float
    """Of a decode step in one layer, a row."""

    def scratch(self, prompts: int) -> float:
        return prompts * self.each * self.wanted / self.prompt + self.fixed


ROWS, NEW = (2, 4), 6
"""Prompts that are read at once, and tokens that are sampled, when that is measured."""


def prefill(role: Role, prompt: int, wanted: int) -> Prefill:
    """Read a few made-up prompts of so many tokens and sample a little. Call before `measure`, which drops layers."""
    config, dtype = role.base.model.config, role.base.dtype
    layers = config.get_text_config().num_hidden_layers
    seen = []
    for rows in ROWS:
        ledger = Ledger()
        with ledger:
            _sampled(role, rows, prompt, 1)
        seen.append(ledger.peak - rows * cache_bytes(config, prompt, dtype))
    each = max((seen[1] - seen[0]) / (ROWS[1] - ROWS[0]), 0.0)
    spent = []
    for new in (1, NEW):
        began = clock(role.base.device)
        _sampled(role, ROWS[1], prompt, new)
        spent.append(clock(role.base.device) - began)
    step = max(spent[1] - spent[0], 0.0) / (NEW - 1)
    return Prefill(prompt, wanted, each, max(seen[0] - each * ROWS[0], 0.0), step / ROWS[1] / layers)


def _sampled(role: Role, rows: int, prompt: int, new: int) -> None:
    """Distinct prompts, left-padded as those of a batch are, one completion each that does not end."""
    rng = np.random.Generator(np.random.Philox(key=[7, 7]))
    lengths = [prompt] + [max(1, prompt - 1)] * (rows - 1)
    prompts = [rng.integers(0, role.base.vocabulary, n, dtype=np.int32) for n in lengths]
    by_own_loop(role, prompts, list(range(rows)), 1, (), Sampling(new), 0)
