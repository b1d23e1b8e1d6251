"""The training atom: forward and backward over micro-batches, one optimiser step. And what surrounds every step.

Losses return sums, one for each unit they are averaged over ("example", "token", ...); the engine divides once, by the
unit's count in the whole step. So neither the micro-batch size nor the layout changes the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_cli.data.batch import Batch
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DivergedError
from rlhf_cli.models import memory, processes, sequence, sharding, traffic
from rlhf_cli.models.device import micro_batch_range
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.signals import Signals
from rlhf_cli.runs.trackers import Trackers
from rlhf_cli.train import parts, passes, snapshot
from rlhf_cli.train.optim import make_optimizer, make_scheduler
from rlhf_cli.train.parts import Lent
from rlhf_cli.train.spikes import Spikes


class Losses(NamedTuple):
    """What a loss says of one micro-batch."""

    sums: dict[str, Tensor]
    """By unit: a scalar, summed over the micro-batch, with gradient."""
    metrics: Mapping[str, tuple[Tensor, float | str]]
    """By name: a sum without gradient and what it is divided by, over the step: a count, or a unit of the sums."""
    peaks: Mapping[str, Tensor] = {}
    """By name: a scalar without gradient of which the step's largest counts."""


Loss = Callable[[Batch, list[int]], Losses]
"""Of a micro-batch and the indices, within the step, of its examples."""
Prepare = Callable[[Batch, list[int]], Batch]
"""Runs before the role is active, for instance to ask a frozen role."""


class Part(NamedTuple):
    """Further samples with a loss of their own in an optimiser step."""

    samples: Sequence[Sample]
    loss: Loss
    counts: dict[str, float]
    still: bool = False
    """Whether the loss leaves the trunk without gradient."""


class Stateful(Protocol):
    """Something a checkpoint keeps, as JSON."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Learner:
    """A role that is trained."""

    role: Role
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    skipped: int = 0
    """Steps in a row that float16 overflowed and were not applied."""
    idle: int = 0
    """Steps at the start of the run in which it is not trained."""
    lent: Lent = field(default_factory=list)
    """Parameters that are held in parts, each behind what the optimiser steps in its place."""


@dataclass
class Engine:
    """The state of a run in progress."""

    recipe: Recipe
    run: Run
    display: Display
    total_steps: int
    packed: bool
    step: int = 0
    tokens: int = 0
    """Tokens of the samples trained on so far, a prompt once a sample."""
    learners: dict[str, Learner] = field(default_factory=dict)
    kept: dict[str, Stateful] = field(default_factory=dict)
    kept_tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] | None = None
    budget: int = 0
    """Tokens of a micro-batch; train/fitting.py measures what fits."""
    trackers: Trackers = field(default_factory=Trackers)
    spare: int | None = None
    """Step of a checkpoint that stays, however old."""
    passes: int = 0
    """Passes with gradient in the step under way; counted where several processes compute them."""
    halt: Callable[[], NoReturn] | None = None
    """Ends the run once the step under way is logged and in a checkpoint."""
    spikes: Spikes = field(init=False)
    signals: Signals = field(init=False)
    _clock: float = 0.0
    _clock_tokens: int = 0
    _saving: float = 0.0
    """Seconds that the checkpoint after the last step took."""

    def __post_init__(self) -> None:
        self.spikes = Spikes(self.recipe.training)
        self.signals = Signals(self.display.warn, "this step, then saving")

    def add(self, role: Role, learning_rate: float, *, idle: int = 0) -> None:
        """Train this role; its schedule starts after `idle` steps. Raises ModelError for one whose rows cannot be
        shared, where the recipe asks several processes to share each."""
        settings, base = self.recipe.training, role.base
        sequence.check(base.model.config, base.source, packed=self.packed and base.packed)
        own, lent = parts.lend(role.parameters)
        optimizer = make_optimizer(own, settings, learning_rate)
        scheduler = make_scheduler(optimizer, settings, self.total_steps - idle)
        scaler = torch.amp.GradScaler(role.base.device.type, enabled=role.base.dtype == torch.float16)
        self.learners[role.name] = Learner(role, optimizer, scheduler, scaler, idle=idle, lent=lent)
        if not self.budget:
            wanted = settings.micro_batch_tokens
            self.budget = micro_batch_range(role.base.device).usual if wanted == "auto" else wanted

    # --- one step ----------------------------------------------------------------------------------------------------

    def update(
        self,
        role: Role,
        samples: Sequence[Sample],
        loss: Loss,
        counts: dict[str, float],
        prepare: Prepare | None = None,
        also: Part | None = None,
        *,
        still: bool = False,
    ) -> dict[str, float]:
        """Forward, backward and one optimiser step over the samples of a step; the metrics of the step.

        counts: how many of each unit the step holds. also: another part with counts of its own; the losses add up.
        still: whether the loss leaves the trunk without gradient.
        Raises DivergedError before the step is applied when the loss or the gradient is not finite or trips a wire;
        ModelError when one sample alone does not fit the memory.
        """
        learner = self.learners[role.name]
        own, every = Part(samples, loss, counts, still), [*samples, *(also.samples if also else ())]

        def accumulate() -> dict[str, float]:
            parts.forget(learner.optimizer, learner.lent)
            totals = passes.run(self, role, own, prepare, learner.scaler)
            if also is None:
                return totals
            more = passes.run(self, role, also, None, learner.scaler)
            return totals | more | {"loss": totals["loss"] + more["loss"]}

        totals = passes.within_memory(self, every, accumulate, training=True)
        passes.refuse_spike(self, learner, "loss", totals["loss"], every)
        return totals | {"grad_norm": passes.apply(self, learner, every)}

    def measure(
        self,
        role: Role,
        samples: Sequence[Sample],
        loss: Loss,
        counts: dict[str, float],
        prepare: Prepare | None = None,
    ) -> dict[str, float]:
        """The metrics of `update` without gradient and without a step."""
        own = Part(samples, loss, counts)
        return passes.within_memory(self, samples, lambda: passes.run(self, role, own, prepare, None))

    def infer(
        self,
        role: Role,
        samples: Sequence[Sample],
        function: Callable[[Batch], Tensor],
        unit: Literal["token", "sequence"] = "token",
    ) -> list[Tensor]:
        """As `passes.infer`."""
        return passes.infer(self, role, samples, function, unit)

    # --- what surrounds a step ---------------------------------------------------------------------------------------

    def tick(self, metrics: dict[str, float]) -> None:
        """A step is over: schedules, evaluation, log, checkpoint, and obedience to a stop signal."""
        self.step, self.passes = self.step + 1, 0
        rates = {name: learner.optimizer.param_groups[0]["lr"] for name, learner in self.learners.items()}
        for learner in self.learners.values():
            if self.step > learner.idle:
                learner.scheduler.step()
        first = next(iter(rates.values()))
        metrics = {"step": self.step, **metrics, "learning_rate": first, "num_tokens": self.tokens}
        for name, rate in list(rates.items())[1:]:
            metrics[f"{name}/learning_rate"] = rate
        now = time.monotonic()
        metrics["tokens_per_second"] = round((self.tokens - self._clock_tokens) / max(now - self._clock, 1e-9), 1)
        metrics = {**self._spent(now), **metrics}
        self._clock, self._clock_tokens = now, self.tokens
        done = self.step >= self.total_steps
        if self.evaluate is not None and (done or self._due(self.recipe.evaluation.every)):
            try:
                with self.display.phase("evaluation"):
                    metrics |= self.evaluate()
            except DivergedError:
                self.run.log(metrics)
                raise
            self._clock = time.monotonic()
            metrics["time/evaluation_s"] = round(self._clock - now, 4)
        metrics |= traffic.take() if processes.met() else {}
        self.run.log(metrics)
        show = done or self.step % self.recipe.logging.every == 0 or self.step == 1
        self.display.step(self.step, metrics, show)
        if show:
            self.trackers.log(self.step, metrics)
        self._hear()
        stopped = self.signals.caught is not None or self.halt is not None
        if done or stopped or self._due(self.recipe.checkpoint.every):
            self._save()
        if self.halt is not None:
            self.halt()
        if self.signals.caught is not None and not done:
            raise self.signals.interrupted(f"step {self.step}, checkpoint written")
        traffic.take()  # what is told between two steps is of none, so that a resumed run counts alike

    def _hear(self) -> None:
        """A signal that one of several processes caught is meant for all."""
        if processes.count() > 1:
            caught = processes.gather(self.signals.caught, f"ending step {self.step}")
            self.signals.caught = next((number for number in caught if number is not None), None)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _spent(self, now: float) -> dict[str, float]:
        """Where the time since the last step went, and the most memory, as far as the stage does not say it itself."""
        found = {"time/update_s": round(max(0.0, now - self._clock - self._saving), 4)}
        if self._saving:
            found["time/checkpoint_s"] = round(self._saving, 4)
        return found | {"mem/peak_gib": round(memory.most() / 2**30, 4)}

    def _save(self) -> None:
        began = time.monotonic()
        with self.display.phase("checkpoint"):
            self.save()
        self._saving = time.monotonic() - began

    def save(self) -> None:
        """A whole checkpoint of this moment, of all processes."""
        processes.same(self._weights(), f"comparing weights after step {self.step}")
        snapshot.save(self)

    def _weights(self) -> list[float]:
        """A number of each thing that is trained, which is another when its weights are."""
        if processes.count() == 1:
            return []
        trained = [[p for _, p in one.role.parameters if not sharding.split(p)] for one in self.learners.values()]
        return [float(sum(float(p.detach().double().sum()) for p in whole)) for whole in trained]

    def fit(self, step: Callable[[], dict[str, float]]) -> None:
        """Steps until the end, or until a signal: the first one is obeyed after the step, with a checkpoint."""
        self.set_out()
        try:
            with self.signals:
                while self.step < self.total_steps:
                    self.tick(step())
        finally:
            self.trackers.close()
            self.display.stop()

    def set_out(self) -> None:
        """From here on: the evaluation of step 0 where that is the start, the progress, the clock."""
        self.display.start(self.total_steps, self.step)
        if self.step == 0 and self.evaluate is not None:
            with self.display.phase("evaluation"):
                first = self.evaluate()
            if first:
                self.run.log({"step": 0, **first})
        self._clock, self._clock_tokens = time.monotonic(), self.tokens
        traffic.take()  # of what came before the first step
