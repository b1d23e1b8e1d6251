"""The passes of a step over its micro-batches: sums, one division by the counts of the whole step, one application.

When the device runs out of memory, a pass is made again with less in memory at once and the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch, collate, micro_batches, size
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.models import checkpointing, memory
from rlhf_cli.models.roles import Role
from rlhf_cli.runs.display import Display
from rlhf_cli.train import checkpoint

if TYPE_CHECKING:
    from rlhf_cli.train.engine import Engine, Learner, Part, Prepare

T = TypeVar("T")


class Memory(Protocol):
    """Who decides how much is in memory at once."""

    display: Display
    budget: int
    """Tokens of a micro-batch."""
    packed: bool
    tokens: int
    """Seen in training so far."""

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Whoever is trained."""


OVERFLOWS = 20
"""Steps in a row that may overflow in float16, its loss scale falling, before training counts as diverged."""


def batches(engine: Memory, role: Role, samples: Sequence[Sample]) -> Iterator[tuple[list[int], Batch]]:
    """The micro-batches of some samples, each with the places of its own among them."""
    packed = engine.packed and role.base.packed
    for group in micro_batches(samples, engine.budget, packed=packed):
        yield group, collate([samples[i] for i in group], packed=packed).to(role.base.device)


def within_memory(engine: Memory, samples: Sequence[Sample], function: Callable[[], T], *, training: bool = False) -> T:
    """function(), again with less in memory when that runs out: in training first by recomputing more layers, where
    the recipe leaves that to us, then by half the budget."""
    generators, tokens = checkpoint.random_state(), engine.tokens
    while True:
        try:
            return function()
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            for learner in engine.learners.values():
                learner.role.abandon()
                learner.optimizer.zero_grad(set_to_none=True)
            less = _recompute_more(cast("Engine", engine)) if training else ""
            if not less:
                longest = max(len(s.prompt) + sum(len(c.ids) for c in s.completions) for s in samples)
                if engine.budget <= longest:
                    raise ModelError(
                        f"out of memory with a single example of {longest} tokens", "data.max_length",
                        "lower it, or set model.quantization: nf4, or a smaller lora.r",
                    ) from error  # fmt: skip
                engine.budget = max(engine.budget // 2, longest)
                less = f"going on with micro-batches of {engine.budget} tokens"
        torch.cuda.empty_cache()
        checkpoint.set_random_state(*generators)
        engine.tokens = tokens
        engine.display.warn(f"out of memory: {less} (same result)")


def infer(
    engine: Memory,
    role: Role,
    samples: Sequence[Sample],
    function: Callable[[Batch], Tensor],
    unit: Literal["token", "sequence"] = "token",
) -> list[Tensor]:
    """function(batch), a number for each scored token (T,) or sequence (N,), given back sample by sample."""

    def run() -> list[Tensor]:
        out: list[Tensor | None] = [None] * len(samples)
        for group, batch in batches(engine, role, samples):
            with role.active():
                result = function(batch)
            owner = batch.example if unit == "sequence" else batch.example[batch.owners]
            for place, i in enumerate(group):
                out[i] = result[owner == place]
        return [o for o in out if o is not None]

    return within_memory(engine, samples, run)


@dataclass
class Frozen:
    """Roles that are asked and not trained, as an engine would."""

    display: Display
    budget: int
    packed: bool = True
    tokens: int = 0
    learners: Mapping[str, Learner] = field(default_factory=dict)

    def infer(
        self,
        role: Role,
        samples: Sequence[Sample],
        function: Callable[[Batch], Tensor],
        unit: Literal["token", "sequence"] = "token",
    ) -> list[Tensor]:
        """As `infer`."""
        return infer(self, role, samples, function, unit)


def _recompute_more(engine: Engine) -> str:
    """Recompute the activations of more layers and say so; nothing when the recipe decides, or all are already."""
    if engine.recipe.model.gradient_checkpointing != "auto":
        return ""
    models = {id(learner.role.base): learner.role.base.model for learner in engine.learners.values()}
    counts = [checkpointing.recompute_more(model) for model in models.values()]
    return f"recomputing the activations of {max(counts)} layers" if any(counts) else ""


def run(
    engine: Engine, role: Role, work: Part, prepare: Prepare | None, scaler: torch.amp.GradScaler | None
) -> dict[str, float]:
    """Every micro-batch forward and, with a scaler, backward; the metrics summed, then divided."""
    sums: dict[str, float] = {"loss": 0.0}
    over: dict[str, float] = {"loss": 1.0}
    peaks: dict[str, float] = {}
    tokens, counts = 0, work.counts
    for group, raw in batches(engine, role, work.samples):
        batch = raw if prepare is None else prepare(raw, group)
        tokens += sum(size(work.samples[i], packed=batch.packed) for i in group)
        with role.active(train=scaler is not None):
            losses = work.loss(batch, group)
            parts = [value / max(counts[unit], 1) for unit, value in losses.sums.items()]
            part = torch.stack(parts).sum()
            if not bool(torch.isfinite(part)):
                role.abandon()
                _diverged(engine, "loss", float(part.detach()), batch.where, training=scaler is not None)
            if scaler is not None:
                role.backward(scaler.scale(part))
        sums["loss"] += float(part.detach())
        for name, (value, count) in losses.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
            over[name] = counts[count] if isinstance(count, str) else over.get(name, 0.0) + count
        for name, value in losses.peaks.items():
            peaks[name] = max(peaks.get(name, -math.inf), float(value))
    if scaler is not None:
        engine.tokens += tokens
    return {name: value / over[name] for name, value in sums.items() if over[name] > 0} | peaks


def apply(engine: Engine, learner: Learner, samples: Sequence[Sample]) -> float:
    """Clip, check, apply. The norm of the gradient before clipping."""
    learner.scaler.unscale_(learner.optimizer)
    parameters = [p for _, p in learner.role.parameters]
    limit = engine.recipe.training.max_grad_norm
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))
    learner.skipped = 0 if math.isfinite(norm) else learner.skipped + 1
    if learner.skipped > (OVERFLOWS if learner.scaler.is_enabled() else 0):
        _diverged(engine, "grad_norm", norm, tuple(s.where for s in samples))
    if learner.skipped == 0:
        refuse_spike(engine, learner, "grad_norm", norm, samples)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return norm


def refuse_spike(engine: Engine, learner: Learner, name: str, value: float, samples: Sequence[Sample]) -> None:
    """Raise a DivergedError when a number of this step trips its wire (train/spikes.py)."""
    if words := engine.spikes.judge(learner.role.name, name, value):
        _diverged(engine, name, value, tuple(s.where for s in samples), beyond=words)


def _diverged(
    engine: Engine, name: str, value: float, where: tuple[str, ...], *, training: bool = True, beyond: str = ""
) -> None:
    """Log the number as it is, name the rows and the last whole checkpoint, stop. beyond: what it is more than."""
    step = engine.step + 1 if training else engine.step
    engine.run.log({"step": step, name if training else f"eval/{name}": value})
    saved = checkpoint.newest(engine.run.checkpoints, engine.display)
    rows = ", ".join(where[:5]) + (f" and {len(where) - 5} more" if len(where) > 5 else "")
    happened = f"at step {step}; the step was not applied" if training else f"in the evaluation after step {step}"
    raise DivergedError(
        f"{name} is {value}{beyond} {happened}; rows: {rows}", str(engine.run.path),
        f"last whole checkpoint: {saved.path if saved else 'none'}; lower the learning rate or look at the rows",
    )  # fmt: skip
