"""What the roles take of this process's memory, told before the first step. Activations, caches and logits are not in
it; of a base that is held in parts, only the part that lies here is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rlhf_cli.models import processes
from rlhf_cli.models.adapters import adapter_parameters
from rlhf_cli.models.roles import Role
from rlhf_cli.models.sharding import held
from rlhf_cli.recipe.settings.training import TrainingSettings
from rlhf_cli.train.optim import state_bytes

MIB = 2**20


def memory_lines(roles: Sequence[Role], trained: Sequence[Role], training: TrainingSettings) -> list[str]:
    """A line for each base and each role: weights, and of those that are trained gradient and optimiser."""
    lines, total, bases = [], 0.0, {id(role.base): role.base for role in roles}
    for base in bases.values():
        weights = _bytes(p for n, p in base.model.named_parameters() if "lora_" not in n)
        users = ", ".join(role.name for role in roles if role.base is base)
        lines.append(f"memory: base {base.source} of {users}: {_mib(weights)}")
        total += weights
    for role in roles:
        own = own_bytes(role)
        parts = [f"adapter {_mib(own)}"] if role.adapter is not None else ["no adapter" if not own else _mib(own)]
        total += own
        if role in trained:
            parameters = [p for _, p in role.parameters]
            gradient, state = _bytes(parameters), sum(state_bytes(held(p), training) for p in parameters)
            parts += [f"gradient {_mib(gradient)}", f"{training.optimizer} {_mib(state)}"]
            total += gradient + state
        lines.append(f"memory: {role.name}: {', '.join(parts)}")
    where = " on each process" if processes.count() > 1 else ""
    return [*lines, f"memory: {_mib(total)} in all{where}, activations and caches not counted"]


def own_bytes(role: Role) -> int:
    """Of what a role has on top of its base: adapter and heads."""
    heads = [head for head in (role.head, role.value_head) if head is not None]
    mine = [] if role.adapter is None else [p for _, p in adapter_parameters(role.base, role.adapter)]
    return _bytes([*mine, *(p for head in heads for p in head.parameters())])


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in map(held, parameters))


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f} MiB"
