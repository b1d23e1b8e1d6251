"""What a checkpoint holds of an engine, and how an engine goes on from one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rlhf_cli.errors import DivergedError
from rlhf_cli.models import sharding
from rlhf_cli.runs.files import disk_error
from rlhf_cli.runs.metrics import HINT
from rlhf_cli.train import checkpoint, parts

if TYPE_CHECKING:
    from rlhf_cli.train.engine import Engine


STEADY = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that do not depend on how long a run is to be."""


def seed_generators(seed: int) -> None:
    """All generators that a checkpoint keeps: those of Python and numpy too, which a reward function may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


Gathered = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]
"""Groups of tensors, and the settings of the optimisers by learner."""


def gather(engine: Engine) -> Gathered:
    """The tensors of this moment: trained ones, optimisers, and all that is kept. All processes ask together, and those
    that are held in parts are whole in process 0."""
    tensors: dict[str, dict[str, Tensor]] = {}
    optimizers: dict[str, Any] = {}
    for name, learner in engine.learners.items():
        tensors[name] = _whole(learner.role.tensors())
        tensors[f"{name}-optimizer"], optimizers[name] = parts.save(learner.optimizer, learner.lent)
    return tensors | {name: _whole(kept) for name, kept in engine.kept_tensors.items()}, optimizers


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: sharding.whole(tensor) for name, tensor in tensors.items()}


def save(engine: Engine, found: Gathered, sizes: dict[str, int] | None = None) -> None:
    """A whole checkpoint of this moment: what was gathered, schedules, generators, and all that is kept.

    sizes: of the metric files, where they are about to be cut back; None: as they are. Raises DivergedError instead of
    saving numbers that are not finite.
    """
    tensors, optimizers = found
    state: dict[str, Any] = {
        "step": engine.step,
        "total_steps": engine.total_steps,
        "tokens": engine.tokens,
        "budget": engine.budget,
        "sizes": engine.run.sizes() if sizes is None else sizes,
        "learners": {},
        "spikes": engine.spikes.state_dict(),
        "kept": {name: thing.state_dict() for name, thing in engine.kept.items()},
    }
    for name, learner in engine.learners.items():
        _require_finite(engine, name, tensors[name])
        _require_finite(engine, f"{name}'s optimiser", tensors[f"{name}-optimizer"])
        state["learners"][name] = {
            "optimizer": optimizers[name],
            "scheduler": {k: v for k, v in learner.scheduler.state_dict().items() if k != "lr_lambdas"},
            "scaler": learner.scaler.state_dict(),
        }
    random_tensors, state["random"] = checkpoint.random_state()
    tensors = tensors | {"random": random_tensors}
    keep = engine.recipe.checkpoint.keep
    checkpoint.save(engine.run.checkpoints, f"step-{engine.step:06d}", tensors, state, keep, engine.spare)


def _require_finite(engine: Engine, whose: str, tensors: dict[str, Tensor]) -> None:
    """Raise a DivergedError for a number that no later step could mend: it is not saved over those before it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            saved = checkpoint.newest(engine.run.checkpoints, engine.display)
            raise DivergedError(
                f"tensor {name} of the {whose} holds NaN or infinite numbers after step {engine.step}",
                str(engine.run.path),
                f"last whole checkpoint: {saved.path if saved else 'none'}; lower the learning rate",
            )


def tidy(engine: Engine) -> None:
    """Delete what a death after the last save left undeleted. Raises ModelError when the disk refuses."""
    last = engine.run.checkpoints / f"step-{engine.step:06d}"
    try:
        checkpoint.retire(last.parent, last, engine.recipe.checkpoint.keep, engine.spare)
    except OSError as error:
        raise disk_error(error, "old checkpoints cannot be deleted", last.parent, HINT) from error


def restore(engine: Engine, saved: checkpoint.Checkpoint) -> None:
    """Go on exactly where the checkpoint was written; metric lines after it are cut off."""
    load(engine, saved)
    planned = saved.state.get("total_steps", engine.total_steps)  # absent in checkpoints of older versions
    settings = engine.recipe.training
    steady = settings.lr_scheduler in STEADY and not settings.warmup_ratio
    if planned != engine.total_steps and not steady:
        engine.display.warn(
            f"the learning rate goes on as in a run of {engine.total_steps} steps; so far it was that of {planned}"
        )
    for warning in engine.run.rewind(saved.state["sizes"]):
        engine.display.warn(warning)
    engine.display.note(f"resumed from {saved.path}")


def load(engine: Engine, saved: checkpoint.Checkpoint) -> None:
    """Put everything a checkpoint holds into the engine; the run's files stay as they are."""
    state = saved.state
    engine.step, engine.tokens = state["step"], state["tokens"]
    if engine.recipe.training.micro_batch_tokens == "auto":
        engine.budget = state["budget"]
    for name, learner in engine.learners.items():
        learner.role.load_tensors(saved.tensors(name))
        kept = state["learners"][name]
        parts.load(learner.optimizer, learner.lent, saved.tensors(f"{name}-optimizer"), kept["optimizer"])
        _resume_schedule(learner.scheduler, kept["scheduler"])
        if kept["scaler"]:
            learner.scaler.load_state_dict(kept["scaler"])
    engine.spikes.load_state_dict(state.get("spikes", {}))  # absent in checkpoints of older versions
    for name, thing in engine.kept.items():
        thing.load_state_dict(state["kept"][name])
    for name, own in engine.kept_tensors.items():
        for key, tensor in saved.tensors(name).items():
            sharding.fill(own[key], tensor)
    checkpoint.set_random_state(saved.tensors("random"), state["random"])


def _resume_schedule(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Go on with the schedule of the present recipe: its shape is not stored, and max_steps may have changed since."""
    assert isinstance(scheduler, LambdaLR)
    scheduler.load_state_dict(state | {"lr_lambdas": [None] * len(scheduler.optimizer.param_groups)})
    for group, base, shape in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * shape(scheduler.last_epoch)


def scale_rates(engine: Engine, factor: float) -> None:
    """All learning rates times a factor, from here to the end of their schedules."""
    for learner in engine.learners.values():
        scheduler = learner.scheduler
        scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]
        _resume_schedule(scheduler, {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"})
