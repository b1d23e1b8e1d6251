"""The passes of a step over its micro-batches: sums, one division by the counts of the whole step, one application.

When the device runs out of memory, a pass is made again with less in memory at once and the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch, collate, micro_batches, size
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.models import checkpointing, memory, processes, sequence, sharding, traffic
from rlhf_cli.models.roles import Role
from rlhf_cli.runs.display import Display
from rlhf_cli.train import checkpoint, lockstep, parts, states

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
    """The micro-batches of some samples, each with the places of its own among them: those of this process's share, or
    of its group's, whose processes each compute a part of the tokens."""
    packed = engine.packed and role.base.packed
    share = own_share(samples, packed=packed)
    chosen = [samples[i] for i in share]
    for group in micro_batches(chosen, engine.budget, packed=packed):
        batch = collate([chosen[i] for i in group], packed=packed).to(role.base.device)
        yield [share[i] for i in group], replace(batch, dealt=packed and sequence.size() > 1)


def own_share(samples: Sequence[Sample], *, packed: bool) -> Sequence[int]:
    """Which of some samples this process, or its group, computes: all when there is no other."""
    return lockstep.every_share(samples, packed=packed)[sequence.group()]


def within_memory(engine: Memory, samples: Sequence[Sample], function: Callable[[], T], *, training: bool = False) -> T:
    """function(), again with less in memory when that runs out: in training first by recomputing more layers, where
    the recipe leaves that to us, then by half the budget."""
    generators, tokens = states.random_state(), engine.tokens
    while True:
        try:
            return function()
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            for learner in engine.learners.values():
                learner.role.abandon()
                parts.forget(learner.optimizer, learner.lent)
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
        states.set_random_state(*generators)
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
        found: dict[int, Tensor] = {}

        def own() -> None:
            for group, batch in batches(engine, role, samples):
                with role.active():
                    result = function(batch)
                owner = batch.example if unit == "sequence" else batch.example[batch.owners]
                found.update({i: result[owner == place] for place, i in enumerate(group)})
                engine.display.advance(len(group))
            packed = engine.packed and role.base.packed
            lockstep.rest(role, samples, engine.budget, packed=packed, train=False, backward=False)

        lockstep.together(role.base, own, f"asking the {role.name}", trains=bool(engine.learners))
        return _everyones(found, role) if processes.count() > 1 else [found[i] for i in range(len(samples))]

    return within_memory(engine, samples, run)


def _everyones(found: Mapping[int, Tensor], role: Role) -> list[Tensor]:
    """What all processes found, by its place."""
    doing = f"putting together what the {role.name} said"
    places = processes.gather([[i, len(rows)] for i, rows in found.items()], doing)
    parts = processes.gather_rows(torch.cat(list(found.values())) if found else None, doing)
    every: dict[int, Tensor] = {}
    for marks, part in zip(places, parts, strict=True):
        rows = part.to(role.base.device).split([count for _, count in marks]) if marks else ()
        every.update({i: own for (i, _), own in zip(marks, rows, strict=True)})
    return [every[i] for i in range(len(every))]


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
    """Every micro-batch forward and, with a scaler, backward; the metrics summed over all processes, then divided."""
    training = scaler is not None
    with _own_draws(engine, training=training):
        every = lockstep.together(
            role.base, lambda: _share(engine, role, work, prepare, scaler), f"computing {_moment(engine)}"
        )
    for said in every:
        if said["odd"] is not None:
            value, where = said["odd"]
            _diverged(engine, "loss", value, tuple(where), training=training)
    sums: dict[str, float] = {}
    over: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for said in every:
        for name, (value, count) in said["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
            over[name] = work.counts[count] if isinstance(count, str) else over.get(name, 0.0) + count
        for name, value in said["peaks"].items():
            peaks[name] = max(peaks.get(name, -math.inf), value)
    over["loss"] = 1.0
    if training:
        engine.tokens += sum(said["tokens"] for said in every)
    return {name: value / over[name] for name, value in sums.items() if over[name] > 0} | peaks


def _share(
    engine: Engine, role: Role, work: Part, prepare: Prepare | None, scaler: torch.amp.GradScaler | None
) -> dict[str, Any]:
    """What the micro-batches of this process come to, as JSON. sums: by name, with a count or the unit it is over; odd:
    a loss that is not finite and the rows it is of; what is computed after it counts for nothing."""
    counts, tokens = work.counts, 0
    sums: dict[str, list[Any]] = {"loss": [0.0, 1.0]}
    peaks: dict[str, float] = {}
    odd: list[Any] | None = None
    for group, raw in batches(engine, role, work.samples):
        batch = raw if prepare is None else prepare(raw, group)
        tokens += sum(size(work.samples[i], packed=batch.packed) for i in group)
        with role.active(train=scaler is not None):
            losses = work.loss(batch, group)
            parts = [value / max(counts[unit], 1) for unit, value in losses.sums.items()]
            part = torch.stack(parts).sum()
            if not bool(torch.isfinite(part)):
                odd = odd or [float(part.detach()), batch.where]
                if not role.base.shards:
                    role.abandon()
                    break
            if scaler is not None:
                role.backward(scaler.scale(part))
        sums["loss"][0] += float(part.detach())
        for name, (value, count) in losses.metrics.items():
            known = sums.setdefault(name, [0.0, count if isinstance(count, str) else 0.0])
            known[0] += float(value)
            if not isinstance(count, str):
                known[1] += count
        for name, value in losses.peaks.items():
            peaks[name] = max(peaks.get(name, -math.inf), float(value))
        engine.display.advance(len(group))
    train, packed = scaler is not None, engine.packed and role.base.packed
    lockstep.rest(role, work.samples, engine.budget, packed=packed, train=train, backward=train and not work.still)
    if sequence.member():  # the first of its group tells what all of it found
        return {"odd": odd, "sums": {"loss": [0.0, 1.0]}, "peaks": peaks, "tokens": 0}
    return {"odd": odd, "sums": sums, "peaks": peaks, "tokens": tokens}


@contextmanager
def _own_draws(engine: Engine, *, training: bool) -> Iterator[None]:
    """Each of several processes drops other things out, as a function of seed, step, pass and process; outside, their
    generators stay the same."""
    if processes.count() == 1 or not training:
        yield
        return
    engine.passes += 1
    mixed = np.random.SeedSequence([engine.recipe.seed, engine.step, engine.passes, processes.rank()])
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
        yield


def _moment(engine: Engine) -> str:
    return f"step {engine.step + 1}"


def apply(engine: Engine, learner: Learner, samples: Sequence[Sample]) -> float:
    """Add up over the processes, clip, check, apply. The norm of the gradient before clipping."""
    parameters = [p for _, p in learner.role.parameters]
    doing = f"adding up the gradients of {_moment(engine)}"
    traffic.add("gradient", processes.add([p for p in parameters if not sharding.split(p)], doing))
    parts.hand_over(learner.lent, doing)
    learner.scaler.unscale_(learner.optimizer)
    limit = engine.recipe.training.max_grad_norm
    norm = parts.clip(parameters, learner.lent, math.inf if limit is None else limit, doing)
    learner.skipped = 0 if math.isfinite(norm) else learner.skipped + 1
    if learner.skipped > (OVERFLOWS if learner.scaler.is_enabled() else 0):
        _diverged(engine, "grad_norm", norm, tuple(s.where for s in samples))
    if learner.skipped == 0:
        refuse_spike(engine, learner, "grad_norm", norm, samples)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    parts.forget(learner.optimizer, learner.lent)
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
