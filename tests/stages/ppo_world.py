"""What the tests of `ppo` share: recipes on the true reward, and a look at the roles of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rlhf_cli.models.roles import Role
from rlhf_cli.stages.ppo import PPO
from tests.stages import world as w

Toy = Callable[..., dict[str, Any]]
COST = '''
def cost(completions):
    """Share of words that are `good` or `sweet`, which is praise all the same."""
    said = [c.split() for c in completions]
    return [sum(word in ("good", "sweet") for word in words) / max(len(words), 1) for words in said]


def some(completions):
    """No score for every third."""
    return [None if i % 3 == 2 else float(len(c)) for i, c in enumerate(completions)]
'''


def content(toy: Toy, world: Path, ppo: dict[str, Any], name: str = "run", **more: Any) -> dict[str, Any]:
    """A recipe on the true reward: rollouts of 32 completions, 2 to a prompt."""
    (world / "cost.py").write_text(COST)
    settings = {
        "rewards": [true_reward(world)],
        "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2},
        "ppo": {"mini_batches": 2, **ppo},
        "training": {"max_steps": 3, "learning_rate": 5e-3},
    }
    return toy("ppo", "prompts", name, **w.merged(settings, more))


def true_reward(world: Path) -> dict[str, Any]:
    """Praise less blame."""
    return {"function": f"{world / 'reward.py'}:true_reward"}


def cost_of(world: Path, **more: Any) -> dict[str, Any]:
    """The price of two of the four words of praise."""
    return {"function": f"{world / 'cost.py'}:cost", "role": "cost", **more}


def watch(monkeypatch: pytest.MonkeyPatch) -> list[PPO]:
    """Filled with the algorithm's state of each run from now on, as it is before the first step."""
    seen: list[PPO] = []
    make = PPO.__init__

    def made(self: PPO, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        seen.append(self)

    monkeypatch.setattr(PPO, "__init__", made)
    return seen


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As they are now."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def everything(roles: list[Role]) -> dict[str, Tensor]:
    """All tensors of some roles and of their bases, adapters of others included, by role and name."""
    found: dict[str, Tensor] = {}
    for role in roles:
        base = f"base {id(role.base)}"
        found |= {f"{base} {name}": p for name, p in role.base.model.named_parameters()}
        found |= {f"{base} {name}": b for name, b in role.base.model.named_buffers()}
        for kind, head in (("head", role.head), ("value_head", role.value_head)):
            found |= {} if head is None else {f"{role.name} {kind}.{n}": p for n, p in head.named_parameters()}
    return found
