"""`rlhf plan` on the terminal and as JSON."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import ModelError, RecipeError, counted

if TYPE_CHECKING:
    from rlhf_cli.stages.plan import Plan
    from rlhf_cli.stages.plan_advice import Change
    from rlhf_cli.stages.plan_model import Target
    from rlhf_cli.stages.plan_roles import Part
    from rlhf_cli.stages.plan_rows import Rows
    from rlhf_cli.stages.plan_traffic import Traffic

MIB = 2**20
GIB = 2**30
CPU = "this CPU"


def make(
    path: str,
    overrides: Sequence[str],
    vram: float | None,
    *,
    timed: bool,
    as_json: bool,
    world: int = 1,
    beside: int | None = None,
) -> tuple[list[str], ModelError | None]:
    """The lines of the plan, or its JSON as one; and that it does not fit, where it does not. Raises RlhfError."""
    from rlhf_cli.recipe.inherit import inherit_adapter
    from rlhf_cli.recipe.reader import read_recipe
    from rlhf_cli.recipe.schema import Recipe

    if vram is not None and not (vram > 0 and math.isfinite(vram)):
        raise RecipeError(f"{vram:g} is no size of a card", "--vram", "give GiB above 0, for instance --vram 12")
    if world < 1:
        raise RecipeError(f"{world} is no number of processes", "--world-size", "give 1 or more")
    if beside is not None and not 1 <= beside <= world:
        raise RecipeError(f"{beside} processes on each machine, and {world} in all", "--processes-per-machine",
                          "give 1 or more, and --world-size with those of all machines")  # fmt: skip
    recipe = read_recipe(path, overrides, None)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"plans what a command trains, and rlhf {recipe.stage} trains nothing", "rlhf plan",
                          f"rlhf {recipe.stage} {path} --dry-run tells of its data")  # fmt: skip

    def reread(more: Sequence[str]) -> Any:
        return inherit_adapter(read_recipe(path, [*overrides, *more], None))

    recipe = inherit_adapter(recipe)
    from rlhf_cli.stages.plan import plan
    from rlhf_cli.stages.plan_advice import advice, headroom

    found = plan(recipe, vram, timed=timed, world=world, beside=beside)
    fits = found.estimate.peak <= found.target.room
    changes = advice(found, reread) if not fits else []
    largest = headroom(found, reread) if fits and found.target.kind == "cuda" else None
    unfit = None if fits else _unfit(found, path, changes)
    if as_json:
        return [json.dumps(plain(found, changes, largest), indent=2, ensure_ascii=False)], unfit
    lines = [
        *_what(found),
        "",
        *_data(found),
        "",
        *_memory(found),
        *_traffic(found),
        *_time(found),
        "",
        *_fit(found, changes, largest),
    ]
    return lines, unfit


def _what(plan: Plan) -> list[str]:
    stand, recipe = plan.model.standing, plan.recipe
    total = stand.weights.numbers + stand.adapters
    how = "all weights" if recipe.lora is None else f"{recipe.lora.kind} r {recipe.lora.r}"
    lines = [
        f"rlhf {recipe.stage}: {recipe.model.name_or_path}, {how}",
        f"parameters: {stand.weights.numbers:,} of the base ({stand.weights.quantised:,} of them quantised), "
        f"{stand.trained:,} trained ({100 * stand.trained / total:.2f} %)",
    ]
    if plan.weightless:
        lines.append(f"{plan.text.path.name} holds no weights yet: planned from its config.json")
    return lines


def _data(plan: Plan) -> list[str]:
    data = plan.data
    lines = plan.data.prepared.report.lines()
    steps = counted(data.steps, _unit(plan))
    if data.updates != data.steps:
        steps += f" with {counted(data.updates, 'update')}"
    words = " if every completion is as long as it may be" if plan.recipe.stage == "ppo" else ""
    return [*lines, f"{steps}, {data.tokens:,} tokens in all{words}"]


def _memory(plan: Plan) -> list[str]:
    estimate, away = plan.estimate, plan.model.standing.away
    worst = max(estimate.moments, key=lambda name: estimate.moments[name])
    lines = [f"memory in MiB, at the moment that takes most ({worst}):"]
    lines += _table(estimate.parts, "peak", estimate.peak)
    others = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in sorted(estimate.moments.items(), key=_by_size))
    lines.append(f"by moment: {others}")
    lines.append(
        f"micro-batches of {estimate.budget:,} tokens, activations of {estimate.recomputed} of {plan.model.layers} "
        f"layers recomputed; measured on {plan.model.measured.tokens} tokens"
    )
    if plan.target.kind == "cuda" and _device() == CPU:
        lines.append("(micro-batches are those of a card, which takes larger ones than a run on this CPU would)")
    if away:
        each = " of each process" if plan.target.world > 1 else ""
        lines.append(f"of main memory{each}, in MiB (what a card reads by itself takes a power of two):")
        lines += _table(away, "in all", sum(p.bytes for p in away))
    if plan.target.kind == "cpu":
        lines.append("(holes that the C library leaves between tensors come on top: up to a third more was seen, "
                     "docs/BENCHMARKS.md)")  # fmt: skip
    elif together := plan.model.standing.together:
        lines.append(f"process 0 writes the trained model: {_size(together)} of main memory, where its weights are "
                     "brought together")  # fmt: skip
    return [*lines, *_server(plan)]


def _table(parts: Sequence[Part], name: str, total: int) -> list[str]:
    rows = [(p.role, p.what, f"{p.bytes / MIB:,.1f}", p.how) for p in parts]
    rows.append(("", name, f"{total / MIB:,.1f}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        f"  {role:<{widths[0]}}  {what:<{widths[1]}}  {size:>{widths[2]}}  {how}".rstrip()
        for role, what, size, how in rows
    ]


def _server(plan: Plan) -> list[str]:
    """What is not planned where a server samples."""
    rollout = getattr(plan.recipe, "rollout", None)
    if rollout is None or rollout.engine != "vllm":
        return []
    return [
        f"the vLLM server {rollout.server} samples: its weights, its cache and its time are its own and "
        "not in this plan; on the same card it takes the share that rlhf serve-rollouts gives it"
    ]


def _traffic(plan: Plan) -> list[str]:
    """What processes send one another, with the terms of the formula."""
    of = plan.traffic
    if of is None:
        return []
    share, parted = (f"{n - 1}/{n}" for n in (of.world, of.parts))
    times = f"{of.updates:g} updates x " if of.updates != 1 else ""
    lines = [
        f"each of {of.world} processes sends {_size(of.sent)} a {_unit(plan)} for what is trained:",
        f"  gradients added up: {times}4 bytes x {of.replicated:,} numbers = {_size(of.handed)} "
        f"(distributed/gradient_bytes), on a ring x 2 x {share} = {_size(of.ring)}",
    ]
    if of.matrices:
        often = f"{times}{of.micro_batches:.3g} micro-batches x"
        lines.append(f"  layers gathered: {often} 2 (forward, backward) x {_size(of.matrices)} x {parted} = "
                     f"{_size(of.gathered)}; a forward without gradient gathers them once more")  # fmt: skip
    if of.spread:
        size = f"4 bytes x {of.spread:,} numbers"
        lines.append(f"  gradients of parts: {often} {size} x {parted} = {_size(of.scattered)}")
        if of.copies > 1:
            ring = f"2 x {of.copies - 1}/{of.copies}"
            once = f"{times}{size} / {of.parts} x {ring} = {_size(of.copied)}"
            lines.append(f"  between {of.copies} machines: {once}")
    if of.rows is not None:
        lines += _rows(of, of.rows, times)
    return lines


def _rows(of: Traffic, rows: Rows, times: str) -> list[str]:
    """What those send one another who share each row."""
    again = f" and {rows.again:.2g} of the forward again" if rows.again else ""
    of_all = f"{rows.own:,.0f} of {rows.tokens:,.0f} tokens"
    return [
        f"  rows shared by {rows.members}: {times}({_size(rows.forward)} forward, with {of_all}, "
        f"about as much backward{again}, {_size(rows.read)} of what is read) = {_size(of.exchanged)} "
        "(distributed/exchanged_bytes); a forward without gradient exchanges once more"
    ]


def _size(count: float) -> str:
    """Bytes in words."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} B"


def _unit(plan: Plan) -> str:
    return "rollout" if plan.recipe.stage == "ppo" else "step"


def _by_size(item: tuple[str, int]) -> int:
    return -item[1]


def _time(plan: Plan) -> list[str]:
    if plan.seconds is None:
        return []
    unit, where = _unit(plan), _device()
    spread = plan.model.measured.spread
    turns = "measured once" if spread is None else f"its measurements lie {100 * spread:.0f} % apart"
    long = f"{plan.seconds:.3g} s a {unit}, {_long(plan.seconds * plan.data.steps)}"
    lines = [f"time, estimated from two layers on {where}, as busy as it is now ({turns}): {long} for the run "
             "without evaluations and checkpoints"]  # fmt: skip
    if plan.traffic is not None:
        lines.append(f"(shared evenly among {plan.target.world} processes; what they send one another is not in it)")
    if plan.target.given and where == CPU:
        lines.append("(of a card that is not here nothing is known but its memory)")
    return lines


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else CPU


def _long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _fit(plan: Plan, changes: Sequence[Change], largest: int | None) -> list[str]:
    estimate, target = plan.estimate, plan.target
    spare = target.room - estimate.peak
    if spare >= 0:
        line = (f"fits: {estimate.peak / GIB:.2f} of {target.room / GIB:.2f} GiB of {_place(target)}, "
                f"{spare / GIB:.2f} to spare")  # fmt: skip
        more = [f"micro-batches of up to {largest:,} tokens would fit"] if largest is not None else []
        return [line, *more]
    makes = any(change.fits for change in changes)
    lines = ["with changes that make it fit:" if makes else "nothing that is known here makes it fit; the least:"]
    for change in changes:
        words = " ".join(f"--set {shlex.quote(one)}" for one in change.sets)
        lines.append(f"  {change.peak / GIB:.2f} GiB with {words}   ({change.words})")
    return lines


def _place(target: Target) -> str:
    each = f"1/{target.beside or target.world} of " if (target.beside or target.world) > 1 else ""
    return {"cpu": f"{each}this machine's free memory"}.get(target.kind, "the card")


def _unfit(plan: Plan, path: str, changes: Sequence[Change]) -> ModelError:
    """That it does not fit: the error with which the command ends."""
    peak, room = plan.estimate.peak / GIB, plan.target.room / GIB
    known = "take a change from above" if any(change.fits for change in changes) else "choose a smaller model"
    hint = f"{known}, or a larger card" if plan.target.kind == "cuda" else f"{known}, or --vram GIB for a card"
    return ModelError(f"does not fit: {peak:.2f} GiB, {peak - room:.2f} more than the {room:.2f} of "
                      f"{_place(plan.target)}", path, hint)  # fmt: skip


def plain(plan: Plan, changes: Sequence[Change], largest: int | None) -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes."""
    stand, estimate, data = plan.model.standing, plan.estimate, plan.data
    return {
        "stage": plan.recipe.stage,
        "model": plan.recipe.model.name_or_path,
        "weights_present": not plan.weightless,
        "parameters": {"base": stand.weights.numbers, "quantised": stand.weights.quantised, "trained": stand.trained,
                       "adapters": stand.adapters},
        "data": {"report": data.prepared.report.to_json(), "steps": data.steps, "updates": data.updates,
                 "tokens": data.tokens},
        "memory": {
            "device": plan.target.kind, "room": plan.target.room, "given": plan.target.given, "peak": estimate.peak,
            "idle": plan.model.idle, "moments": estimate.moments,
            "parts": [part._asdict() for part in estimate.parts],
            "main": [part._asdict() for part in stand.away], "together": stand.together,
            "gradients": stand.gradients, "optimiser": stand.optimiser,
            "micro_batch_tokens": estimate.budget, "recomputed_layers": estimate.recomputed,
            "layers": plan.model.layers, "measured_tokens": plan.model.measured.tokens,
        },
        "time": None if plan.seconds is None else {
            "device": _device(), "seconds_per_step": plan.seconds, "seconds": plan.seconds * data.steps,
            "spread": plan.model.measured.spread},
        "world_size": plan.target.world,
        "communication": None if plan.traffic is None else asdict(plan.traffic) | {
            name: getattr(plan.traffic, name)
            for name in ("handed", "ring", "gathered", "scattered", "copied", "exchanged", "sent")},
        "fits": estimate.peak <= plan.target.room,
        "largest_micro_batch_tokens": largest,
        "changes": [change._asdict() for change in changes],
    }  # fmt: skip
