"""Several processes in step: with layers held in parts, each forward and backward is made by all of them together; with
rows that several share, by those.

So all make as many micro-batches of a pass, and who has fewer makes up others whose gradient is zero. One that fails
ends at once, as the others could not go on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_cli.data.batch import micro_batches, size
from rlhf_cli.data.shares import shares
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models import checkpointing, memory, processes, sequence, sharding
from rlhf_cli.models.base import Base
from rlhf_cli.models.roles import Role

TRAINING = ("training.micro_batch_tokens", "lower it, or set model.gradient_checkpointing: true")
NO_TRAINING = ("data.max_length", "lower it, or start more processes")
"""What to do when memory runs out."""
SHORT = 4
"""Tokens of what is made up."""


def every_share(samples: Sequence[Sample], *, packed: bool, count: int | None = None) -> list[Sequence[int]]:
    """Which of some samples each group of processes (of so many) computes: all of them when it is the only one."""
    count = sequence.groups() if count is None else count
    if count == 1:
        return [range(len(samples))]
    prompts = [s.prompt.tobytes() if packed and len(s.prompt) else i for i, s in enumerate(samples)]
    costs = [float(size(s, packed=packed)) for s in samples]
    return list(shares(costs, prompts, count))


def together(base: Base, work: Callable[[], Any], doing: str, *, trains: bool = True) -> list[Any]:
    """As `processes.together`. Of a base whose layers are held in parts, and of rows that several share, what fails on
    one process ends that process: the others wait for it inside `work`, and learn that it is gone. trains: whether the
    recipe is one of training. Raises ModelError when memory ran out."""
    if not base.shards and sequence.size() == 1:
        return processes.together(work, doing)
    processes.gather(None, doing)  # all are here, and what they do is known to who looks for the missing
    try:
        with sharding.collective(doing):
            said = work()
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        why = "no process can repeat alone what several compute together"
        why = why if processes.count() > 1 else "a pass through layers that lie in main memory cannot be repeated"
        raise ModelError(
            f"out of memory while {doing}, and {why}",
            *(TRAINING if trains else NO_TRAINING),
        ) from error  # fmt: skip
    return processes.gather(said, doing)


def rest(role: Role, samples: Sequence[Sample], budget: int, *, packed: bool, train: bool, backward: bool) -> None:
    """The forwards, and with `backward` also the backward passes, that this process makes less than the one with the
    most micro-batches."""
    if not role.base.shards:
        return
    groups = [
        sum(1 for _ in micro_batches([samples[i] for i in share], budget, packed=packed))
        for share in every_share(samples, packed=packed)
    ]
    for _ in range(max(groups) - groups[sequence.group()]):
        batch = checkpointing.made_up(role, SHORT)
        with role.active(train=train), torch.set_grad_enabled(backward):
            hidden = role.hidden(batch)
            if backward:
                role.backward(0.0 * hidden.float().sum())
