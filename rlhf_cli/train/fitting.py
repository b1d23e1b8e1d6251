"""How much is in memory at once, decided before the first step: layers that are recomputed, tokens of a micro-batch.

What is decided changes no result beyond rounding. It is a function of a few measured numbers (bytes a token, bytes
free), rounded down to powers of two, so that the same machine decides the same; a resumed run keeps what its checkpoint
says.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch

from rlhf_cli.errors import ModelError
from rlhf_cli.models import checkpointing, memory, processes, sequence, sharding
from rlhf_cli.models.checkpointing import Footprint
from rlhf_cli.models.device import Tokens, micro_batch_range
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.runs import manifest
from rlhf_cli.runs.directory import Run
from rlhf_cli.train import checkpoint, states
from rlhf_cli.train.engine import Engine
from rlhf_cli.train.optim import state_bytes

SHARE = {"cuda": 0.85, "cpu": 0.5}
"""Of the free memory, what is planned with. A card says when it is full, and we go on with less; a machine without
memory kills the run instead."""


def layers_to_recompute(needs: Footprint, tokens: int, free: float) -> int:
    """The fewest layers whose activations must be recomputed for a micro-batch of so many tokens to fit; all when that
    is not enough either."""
    fits = (k for k in range(needs.layers) if tokens * needs.each(k) + needs.fixed(k) <= free)
    return next(fits, needs.layers)


def tokens_that_fit(each: float, fixed: float, free: float, allowed: Tokens) -> int:
    """The largest power of two of tokens, `each` bytes a token and `fixed` bytes besides, within what is allowed."""
    fit = int(min(max((free - fixed) / max(each, 1.0), allowed.least), allowed.most))
    return 1 << (fit.bit_length() - 1)


def owed(role: Role, engine: Engine) -> int:
    """Bytes that will be taken on the device beside the activations: gradients and optimiser of all that is trained,
    and where a whole model is trained a frozen copy to compare it with."""
    training, base = engine.recipe.training, role.base
    trained = [p for learner in engine.learners.values() for _, p in learner.role.parameters]
    parts = [torch.nn.Parameter(own) for own in map(sharding.held, trained) if own.device.type == base.device.type]
    total = sum(p.numel() * p.element_size() + state_bytes(p, training) for p in parts)
    if role.adapter is None:
        every = [own for own in map(sharding.held, base.model.parameters()) if own.device.type == base.device.type]
        total += sum(own.numel() for own in every) * base.dtype.itemsize
    return total


def settle(engine: Engine) -> None:
    """Decide for the first learner, told once; what the recipe gives as a number stays."""
    recipe, role = engine.recipe, next(iter(engine.learners.values())).role
    selective, automatic = recipe.model.gradient_checkpointing == "auto", recipe.training.micro_batch_tokens == "auto"
    if not selective and not automatic:
        return
    generators = states.random_state()
    device, longest = role.base.device, recipe.data.max_length
    allowed = micro_batch_range(device)
    free = memory.room(device) * SHARE[device.type] - owed(role, engine)
    free = min(processes.gather(free, "comparing free memory"))
    wanted = max(longest, allowed.usual if automatic else engine.budget) // sequence.size()
    needs = checkpointing.bound(role)
    if not role.base.packed or wanted * needs.each(0) > free:
        needs = checkpointing.footprint(role, longest)
    if selective:
        for learner in engine.learners.values():
            checkpointing.recompute(learner.role.base.model, layers_to_recompute(needs, wanted, free))
    if automatic:
        engine.budget = _resumed(engine.run) or _fitting(engine, role, needs, free, allowed)
        engine.budget = min(processes.gather(engine.budget, "agreeing on micro-batches"))
    states.set_random_state(*generators)
    engine.display.note(
        f"micro-batches of {engine.budget} tokens, activations of {checkpointing.recomputed(role.base.model)} of "
        f"{needs.layers} layers recomputed"
    )


def _fitting(engine: Engine, role: Role, needs: Footprint, free: float, allowed: Tokens) -> int:
    """Tokens that fit all who share them."""
    return tokens_that_fit(*_measured(engine, role, needs), free, allowed) * sequence.size()


def _measured(engine: Engine, role: Role, needs: Footprint) -> tuple[float, float]:
    """Bytes a token, and bytes besides: the peaks of forward and backward over one example and over two of the longest
    kind; where the device does not count, or has no room for that, by what a forward keeps."""
    longest = engine.recipe.data.max_length
    peaks: list[int] = []
    try:
        for count in () if role.base.shards else (1, 2):  # memory that runs out on one process would stop them all
            peak = memory.peak(role.base.device, partial(_forward_and_backward, role, longest, count))
            peaks += [] if peak is None else [peak]
    except RuntimeError as error:
        if not memory.ran_out(error):
            raise
        role.abandon()
        torch.cuda.empty_cache()
    for _, parameter in role.parameters:
        parameter.grad = None
    if len(peaks) < 2:
        count = checkpointing.recomputed(role.base.model)
        return needs.each(count), needs.fixed(count)
    each = (peaks[1] - peaks[0]) / longest
    gradients = sum(p.numel() * p.element_size() for _, p in role.parameters)  # owed, and so not counted twice
    return each, max(peaks[0] - each * longest - gradients, 0.0)


def _forward_and_backward(role: Role, length: int, count: int) -> None:
    for _, parameter in role.parameters:
        parameter.grad = None
    with role.active(train=True):
        role.backward(checkpointing.passed(role, checkpointing.made_up(role, length, count)))


def _resumed(run: Run) -> int | None:
    """The budget that the checkpoint says with which a run goes on; its content is checked when it is restored."""
    if run.status != "resume":
        return None
    folders = [run.resume_from] if run.resume_from else manifest.listed(run.checkpoints)
    for folder in folders:
        if not manifest.fault(folder, content=False):
            with suppress(ModelError, KeyError, TypeError, ValueError):  # damaged: passed over when it is restored
                return int(read_json(folder / checkpoint.STATE)["budget"])
    return None
