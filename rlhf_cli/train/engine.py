"""The training atom: forward and backward over micro-batches, one optimiser step. And what surrounds every step.

Losses return sums, one for each unit they are averaged over ("example", "token", ...); the engine divides once, by the
unit's count in the whole step. So neither the micro-batch size nor the layout changes the result.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_cli.data.batch import Batch, collate, micro_batches
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DivergedError, Interrupted, ModelError
from rlhf_cli.models.device import default_micro_batch_tokens
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.trackers import Trackers
from rlhf_cli.train import checkpoint, snapshot
from rlhf_cli.train.optim import make_optimizer, make_scheduler

T = TypeVar("T")
OVERFLOWS = 20
"""Steps in a row that may overflow in float16, its loss scale falling, before training counts as diverged."""


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
    """Tokens passed through training forwards so far."""
    learners: dict[str, Learner] = field(default_factory=dict)
    kept: dict[str, Stateful] = field(default_factory=dict)
    kept_tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    evaluate: Callable[[], dict[str, float]] | None = None
    budget: int = 0
    """Tokens of a micro-batch."""
    trackers: Trackers = field(default_factory=Trackers)
    spare: int | None = None
    """Step of a checkpoint that stays, however old."""
    halt: Callable[[], NoReturn] | None = None
    """Ends the run once the step under way is logged and in a checkpoint."""
    _signal: int | None = None
    _clock: float = 0.0
    _clock_tokens: int = 0

    def add(self, role: Role, learning_rate: float, *, idle: int = 0) -> None:
        """Train this role; its schedule starts after `idle` steps."""
        settings = self.recipe.training
        optimizer = make_optimizer(role.parameters, settings, learning_rate)
        scheduler = make_scheduler(optimizer, settings, self.total_steps - idle)
        scaler = torch.amp.GradScaler(role.base.device.type, enabled=role.base.dtype == torch.float16)
        self.learners[role.name] = Learner(role, optimizer, scheduler, scaler, idle=idle)
        if not self.budget:
            wanted = settings.micro_batch_tokens
            self.budget = default_micro_batch_tokens(role.base.device) if wanted == "auto" else wanted

    # --- one step ----------------------------------------------------------------------------------------------------

    def update(
        self,
        role: Role,
        samples: Sequence[Sample],
        loss: Loss,
        counts: dict[str, float],
        prepare: Prepare | None = None,
        also: Part | None = None,
    ) -> dict[str, float]:
        """Forward, backward and one optimiser step over the samples of a step; the metrics of the step.

        counts: how many of each unit the step holds. also: another part with counts of its own; the losses add up.
        Raises DivergedError before the step is applied when the loss or the gradient is not finite; ModelError when one
        sample alone does not fit the memory.
        """
        learner = self.learners[role.name]
        every = [*samples, *(also.samples if also else ())]
        own = Part(samples, loss, counts)
        totals = self._within_memory(every, lambda: self._accumulate(learner, own, prepare, also))
        norm = self._step(learner, every)
        return totals | {"grad_norm": norm}

    def measure(
        self,
        role: Role,
        samples: Sequence[Sample],
        loss: Loss,
        counts: dict[str, float],
        prepare: Prepare | None = None,
    ) -> dict[str, float]:
        """The metrics of `update` without gradient and without a step."""
        return self._within_memory(samples, lambda: self._passes(role, samples, loss, counts, prepare, None))

    def infer(
        self,
        role: Role,
        samples: Sequence[Sample],
        function: Callable[[Batch], Tensor],
        unit: Literal["token", "sequence"] = "token",
    ) -> list[Tensor]:
        """function(batch), a number for each scored token (T,) or sequence (N,), given back sample by sample."""

        def run() -> list[Tensor]:
            out: list[Tensor | None] = [None] * len(samples)
            for group, batch in self._batches(role, samples):
                with role.active():
                    result = function(batch)
                owner = batch.example if unit == "sequence" else batch.example[batch.owners]
                for place, i in enumerate(group):
                    out[i] = result[owner == place]
            return [o for o in out if o is not None]

        return self._within_memory(samples, run)

    def _batches(self, role: Role, samples: Sequence[Sample]) -> Iterator[tuple[list[int], Batch]]:
        packed = self.packed and role.base.packed
        for group in micro_batches(samples, self.budget, packed=packed):
            yield group, collate([samples[i] for i in group], packed=packed).to(role.base.device)

    def _within_memory(self, samples: Sequence[Sample], function: Callable[[], T]) -> T:
        """function(), again with half the budget when the device runs out of memory."""
        generators, tokens = checkpoint.random_state(), self.tokens
        while True:
            try:
                return function()
            except torch.OutOfMemoryError as error:
                for learner in self.learners.values():
                    learner.role.abandon()
                    learner.optimizer.zero_grad(set_to_none=True)
                longest = max(len(s.prompt) + sum(len(c.ids) for c in s.completions) for s in samples)
                if self.budget <= longest:
                    raise ModelError(
                        f"out of memory with a single example of {longest} tokens", "data.max_length",
                        "lower it, or set model.quantization: nf4, or a smaller lora.r",
                    ) from error  # fmt: skip
            self.budget = max(self.budget // 2, longest)
            torch.cuda.empty_cache()
            checkpoint.set_random_state(*generators)
            self.tokens = tokens
            self.display.warn(f"out of memory: going on with micro-batches of {self.budget} tokens (same result)")

    def _accumulate(self, learner: Learner, own: Part, prepare: Prepare | None, also: Part | None) -> dict[str, float]:
        learner.optimizer.zero_grad(set_to_none=True)
        totals = self._passes(learner.role, *own, prepare, learner.scaler)
        if also is not None:
            more = self._passes(learner.role, *also, None, learner.scaler)
            totals = totals | more | {"loss": totals["loss"] + more["loss"]}
        return totals

    def _passes(
        self,
        role: Role,
        samples: Sequence[Sample],
        loss: Loss,
        counts: dict[str, float],
        prepare: Prepare | None,
        scaler: torch.amp.GradScaler | None,
    ) -> dict[str, float]:
        """Every micro-batch forward and, with a scaler, backward; the metrics summed, then divided."""
        sums: dict[str, float] = {"loss": 0.0}
        over: dict[str, float] = {"loss": 1.0}
        peaks: dict[str, float] = {}
        tokens = 0
        for group, raw in self._batches(role, samples):
            batch = raw if prepare is None else prepare(raw, group)
            tokens += batch.tokens
            with role.active(train=scaler is not None):
                losses = loss(batch, group)
                parts = [value / max(counts[unit], 1) for unit, value in losses.sums.items()]
                part = torch.stack(parts).sum()
                if not bool(torch.isfinite(part)):
                    role.abandon()
                    self._diverged("loss", float(part.detach()), batch.where, training=scaler is not None)
                if scaler is not None:
                    role.backward(scaler.scale(part))
            sums["loss"] += float(part.detach())
            for name, (value, count) in losses.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
                over[name] = counts[count] if isinstance(count, str) else over.get(name, 0.0) + count
            for name, value in losses.peaks.items():
                peaks[name] = max(peaks.get(name, -math.inf), float(value))
        if scaler is not None:
            self.tokens += tokens
        return {name: value / over[name] for name, value in sums.items() if over[name] > 0} | peaks

    def _step(self, learner: Learner, samples: Sequence[Sample]) -> float:
        """Clip, check, apply. The norm of the gradient before clipping."""
        learner.scaler.unscale_(learner.optimizer)
        parameters = [p for _, p in learner.role.parameters]
        limit = self.recipe.training.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))
        learner.skipped = 0 if math.isfinite(norm) else learner.skipped + 1
        if learner.skipped > (OVERFLOWS if learner.scaler.is_enabled() else 0):
            self._diverged("grad_norm", norm, tuple(s.where for s in samples))
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)
        return norm

    def _diverged(self, name: str, value: float, where: tuple[str, ...], *, training: bool = True) -> None:
        """Log the number as it is, name the rows and the last whole checkpoint, stop."""
        step = self.step + 1 if training else self.step
        self.run.log({"step": step, name if training else f"eval/{name}": value})
        saved = checkpoint.newest(self.run.checkpoints, self.display)
        rows = ", ".join(where[:5]) + (f" and {len(where) - 5} more" if len(where) > 5 else "")
        happened = f"at step {step}; the step was not applied" if training else f"in the evaluation after step {step}"
        raise DivergedError(
            f"{name} is {value} {happened}; rows: {rows}", str(self.run.path),
            f"last whole checkpoint: {saved.path if saved else 'none'}; lower the learning rate or look at the rows",
        )  # fmt: skip

    # --- what surrounds a step ---------------------------------------------------------------------------------------

    def tick(self, metrics: dict[str, float]) -> None:
        """A step is over: schedules, evaluation, log, checkpoint, and obedience to a stop signal."""
        self.step += 1
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
        self._clock, self._clock_tokens = now, self.tokens
        done = self.step >= self.total_steps
        if self.evaluate is not None and (done or self._due(self.recipe.evaluation.every)):
            try:
                metrics |= self.evaluate()
            except DivergedError:
                self.run.log(metrics)
                raise
            self._clock = time.monotonic()
        self.run.log(metrics)
        show = done or self.step % self.recipe.logging.every == 0 or self.step == 1
        self.display.step(self.step, metrics, show)
        if show:
            self.trackers.log(self.step, metrics)
        stopped = self._signal is not None or self.halt is not None
        if done or stopped or self._due(self.recipe.checkpoint.every):
            self.save()
        if self.halt is not None:
            self.halt()
        if self._signal is not None and not done:
            name = signal.Signals(self._signal).name
            raise Interrupted(self._signal, f"{name}: stopped after step {self.step}, checkpoint written; the same "
                                            f"command goes on from here")  # fmt: skip

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def save(self) -> None:
        """A whole checkpoint of this moment."""
        snapshot.save(self)

    def fit(self, step: Callable[[], dict[str, float]]) -> None:
        """Steps until the end, or until a signal: the first one is obeyed after the step, with a checkpoint."""
        self.set_out()
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.step < self.total_steps:
                self.tick(step())
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.trackers.close()
            self.display.stop()

    def set_out(self) -> None:
        """From here on: the evaluation of step 0 where that is the start, the progress, the clock."""
        if self.step == 0 and self.evaluate is not None and (first := self.evaluate()):
            self.run.log({"step": 0, **first})
        self.display.start(self.total_steps, self.step)
        self._clock, self._clock_tokens = time.monotonic(), self.tokens

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        self.display.warn(
            f"{signal.Signals(number).name}: finishing this step, then saving; once more to leave at once"
        )
