"""What a checkpoint holds of an engine, and how an engine goes on from one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from rlhf_cli.errors import DivergedError
from rlhf_cli.models import mesh, processes, sharding
from rlhf_cli.runs.files import disk_error, remove_quietly
from rlhf_cli.runs.metrics import HINT
from rlhf_cli.train import checkpoint, parts, states
from rlhf_cli.train.encode import safetensors_size

if TYPE_CHECKING:
    from rlhf_cli.train.engine import Engine


STEADY = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that do not depend on how long a run is to be."""


def seed_generators(seed: int) -> None:
    """All generators that a checkpoint keeps: those of Python and numpy too, which a reward function may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _Found(NamedTuple):
    """The tensors of this moment by group: trained ones, optimisers, and all that is kept."""

    whole: checkpoint.Tensors
    """Those that every process has."""
    own: checkpoint.Tensors
    """This process's parts of the others."""
    optimizers: dict[str, Any]
    """Settings of the optimisers by learner."""


def _found(engine: Engine) -> _Found:
    whole: checkpoint.Tensors = {}
    own: checkpoint.Tensors = {}
    optimizers: dict[str, Any] = {}
    groups = {name: learner.role.tensors() for name, learner in engine.learners.items()} | engine.kept_tensors
    for name, tensors in groups.items():
        whole[name] = {key: sharding.held(tensor) for key, tensor in tensors.items() if not sharding.shared(tensor)}
        own[name] = {key: sharding.held(tensor) for key, tensor in tensors.items() if sharding.shared(tensor)}
    for name, learner in engine.learners.items():
        of = f"{name}-optimizer"
        whole[of], own[of], optimizers[name] = parts.save(learner.optimizer, learner.lent)
    return _Found(whole, {name: tensors for name, tensors in own.items() if tensors}, optimizers)


def save(engine: Engine, sizes: dict[str, int] | None = None) -> None:
    """A whole checkpoint of this moment, of all processes together: what is held in parts each writes itself, the first
    one the rest: schedules, generators, and all that is kept.

    sizes: of the metric files, where they are about to be cut back; None: as they are. Raises DivergedError instead of
    saving numbers that are not finite.
    """
    found, doing = _found(engine), f"saving step {engine.step}"
    processes.first(lambda: _require_finite(engine, found.whole), doing)  # before anything is written
    written = _write_parts(engine, found.own, doing) if found.own else None
    processes.first(lambda: _finish(engine, found, sizes, written), doing)


def _write_parts(engine: Engine, own: checkpoint.Tensors, doing: str) -> checkpoint.Parts:
    """By the processes that hold a copy of the layers among them, which are the first ones."""
    folder, name, count = engine.run.checkpoints, _name(engine), mesh.count()
    size = count * sum(safetensors_size(tensors) for tensors in own.values())
    place = Path(processes.first(lambda: str(checkpoint.begin(folder, name, size)), doing))

    def work() -> checkpoint.Files:
        if processes.rank() >= count:
            return {}
        _require_finite(engine, own)
        return checkpoint.write_parts(place, own, processes.rank() + 1, count)

    try:
        every = processes.together(work, doing)
    except Exception:
        if processes.rank() == 0:
            remove_quietly(place)
        raise
    return checkpoint.Parts(place, {file: tuple(about) for files in every for file, about in files.items()})


def _name(engine: Engine) -> str:
    return f"step-{engine.step:06d}"


def _finish(engine: Engine, found: _Found, sizes: dict[str, int] | None, written: checkpoint.Parts | None) -> None:
    tensors, optimizers = found.whole, found.optimizers
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
        state["learners"][name] = {
            "optimizer": optimizers[name],
            "scheduler": {k: v for k, v in learner.scheduler.state_dict().items() if k != "lr_lambdas"},
            "scaler": learner.scaler.state_dict(),
        }
    random_tensors, state["random"] = states.random_state()
    tensors = tensors | {"random": random_tensors}
    keep = engine.recipe.checkpoint.keep
    checkpoint.save(engine.run.checkpoints, _name(engine), tensors, state, keep, engine.spare, written)


def _require_finite(engine: Engine, tensors: checkpoint.Tensors) -> None:
    """Raise a DivergedError for a number that no later step could mend: it is not saved over those before it."""
    whose = {group: words for name in engine.learners
             for group, words in ((name, name), (f"{name}-optimizer", f"{name}'s optimiser"))}  # fmt: skip
    for group, words in whose.items():
        for name, tensor in tensors.get(group, {}).items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                saved = checkpoint.newest(engine.run.checkpoints, engine.display)
                raise DivergedError(
                    f"tensor {name} of the {words} holds NaN or infinite numbers after step {engine.step}",
                    str(engine.run.path),
                    f"last whole checkpoint: {saved.path if saved else 'none'}; lower the learning rate",
                )


def tidy(engine: Engine) -> None:
    """Delete what a death after the last save left undeleted. Raises ModelError when the disk refuses."""
    last = engine.run.checkpoints / _name(engine)
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
    states.set_random_state(saved.tensors("random"), state["random"])


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
