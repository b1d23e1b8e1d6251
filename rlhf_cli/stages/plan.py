"""`rlhf plan`: what a run will take, before anything is spent. No weights are read.

1. Read and tokenise the data; deal them as the run would.
2. Count: an outline of the model without numbers gives weights, adapters, gradients, optimiser and cache.
3. Measure: two layers and one of the architecture, random, on a micro-batch: activations, scratch, seconds.
4. Add up the moments of the run (loading, sampling, training, saving); the largest is the peak.
5. With a card in mind: whether it fits, and what to change when it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlhf_cli.models import checkpointing, memory, sizing
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.checkpointing import Footprint
from rlhf_cli.models.device import micro_batch_range, pick_device
from rlhf_cli.models.roles import Role
from rlhf_cli.models.scratch import HeadUse, draw_bytes, head_bytes
from rlhf_cli.models.sizing import gathered_bytes
from rlhf_cli.recipe.schema import PPORecipe, Recipe
from rlhf_cli.stages import plan_rows
from rlhf_cli.stages.plan_model import Model, Target, look_at
from rlhf_cli.stages.plan_roles import Part, Standing, cut_of
from rlhf_cli.stages.plan_traffic import AT_ONCE, GRADIENT, Traffic
from rlhf_cli.stages.plan_work import Data, Demand, Use, demand, read, tokens_of, use
from rlhf_cli.train.fitting import SHARE, layers_to_recompute, tokens_that_fit

MAPPED = 32 * 2**20
"""Tensors beyond this size glibc maps by themselves: they do not take the place of freed activations in its heap."""
KEPT = 64 * 2**20
"""Freed memory that glibc keeps at the top of its heap: twice the largest size from which it maps a block by itself."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes at most."""

    parts: tuple[Part, ...]
    """At the moment that takes most."""
    moments: dict[str, int]
    budget: int
    """Tokens of a micro-batch, as the run will decide or the recipe says."""
    recomputed: int
    demand: Demand

    @property
    def peak(self) -> int:
        return max(self.moments.values())


@dataclass(frozen=True)
class Plan:
    """All that is told."""

    recipe: Recipe
    target: Target
    text: Text
    data: Data
    model: Model
    estimate: Estimate
    seconds: float | None
    """Of a step as the run counts them; None when it was not asked."""
    weightless: bool
    """Whether the model's folder has no weights yet."""
    traffic: Traffic | None
    """What processes send one another; None for one alone."""


def plan(recipe: Recipe, vram: float | None, *, timed: bool, world: int = 1, beside: int | None = None) -> Plan:
    """Work it out for one of `world` processes. vram: GiB of its card; None: this machine. beside: how many of them a
    machine has. Raises RlhfError."""
    cut_of(recipe, world, beside)
    plan_rows.check(recipe, world)
    target = _target(vram, world, beside)
    text = load_text(recipe.model, weights=False)
    data = read(recipe, text)
    model = look_at(recipe, text, data, target, timed=timed)
    estimate = estimated(recipe, data, model, target)
    folder = text.path.weights
    weightless = folder is not None and not any(folder.glob("*.safetensors"))
    seconds = step_seconds(recipe, data, model, estimate) / world if timed else None
    sent = traffic(recipe, data, model, estimate, world) if world > 1 else None
    return Plan(recipe, target, text, data, model, estimate, seconds, weightless, sent)


def _target(vram: float | None, world: int, beside: int | None) -> Target:
    device = pick_device()
    if vram is not None:
        return Target("cuda", int(vram * 2**30), True, world, beside)
    if device.type == "cuda":
        return Target("cuda", torch.cuda.get_device_properties(device).total_memory, False, world, beside)
    return Target("cpu", memory.room(device) // (beside or world) + memory.resident(), False, world, beside)


def traffic(recipe: Recipe, data: Data, model: Model, estimate: Estimate, world: int) -> Traffic:
    """The terms for a step of this recipe."""
    stand, parts = model.standing, model.cut.processes
    matrices = gathered_bytes(model.outline, recipe.model.quantization, parts) if parts > 1 else 0
    often, again = estimate.demand.rounds, estimate.recomputed / max(model.layers, 1)
    shared = plan_rows.rows(recipe, data, use(recipe), model.outline, estimate.budget, again, world)
    return Traffic(world, parts, stand.replicated, stand.spread, matrices, often, data.updates / data.steps, shared)


# --- what it adds up to ----------------------------------------------------------------------------------------------


def estimated(recipe: Recipe, data: Data, model: Model, target: Target) -> Estimate:
    """The moments of a run, and the parts of that which takes most."""
    stand, how, shared = model.standing, use(recipe), recipe.distributed.sequence_parallel
    budget, recomputed = settled(recipe, model, target)
    wanted = demand(data, budget, packed=model.measured.packed, world=target.world // shared)
    here = math.ceil(wanted.tokens / shared)
    scratch = _scratch(how, model, min(wanted.scored, here), target)
    start, tail = model.measured.peak(model.layers, recomputed, here, scratch)
    training = [
        Part("all", "gradients", stand.gradients if wanted.several else stand.head_gradient, "counted"),
        Part("all", f"optimiser, {recipe.training.optimizer}", stand.optimiser, "counted"),
        Part("all", f"activations and scratch, {here:,} tokens", round(start), "measured"),
    ]
    ending = [
        Part("all", "gradients", stand.gradients, "counted"), training[1],
        Part("all", "gradient of the embeddings", round(tail) + stand.embedding, "counted"),
    ]  # fmt: skip
    if model.cut.parted:
        training += _whole_layers(recipe, model, trained=stand.spread > 0)
    moments: dict[str, list[Part]] = {"training": training, "end of the backward pass": ending}
    if target.kind == "cpu":
        held = Part("all", "freed activations kept by the C library", max(round(start) - KEPT, 0), "assumed")
        ending += [held] if stand.embedding > MAPPED else []
        moments |= {"loading": _loading(model), "saving": [training[1], *_saving(stand, held)]}
        whole = Part("process 0", "weights, brought together", stand.together, "counted")
        moments |= {"writing the model": [training[1], whole]} if stand.together else {}
    if isinstance(recipe, PPORecipe) and model.prefill is not None:
        moments |= _sampling(recipe, data, model, training[1])
    common = [Part("all", "before there is a model", model.idle, "measured" if target.kind == "cpu" else "assumed")]
    common += [Part("all", "freed memory kept by the C library", KEPT, "assumed")] if target.kind == "cpu" else []
    common += [Part("policy", "pages of its file that stay", model.mapped, "counted")] if model.mapped else []
    roles = {name: stand.parts[: 1 if name == "loading" else None] for name in moments}
    every = {name: (*common, *roles[name], *own) for name, own in moments.items()}
    sums = {name: sum(p.bytes for p in those) for name, those in every.items()}
    return Estimate(every[max(sums, key=lambda name: sums[name])], sums, budget, recomputed, wanted)


def _whole_layers(recipe: Recipe, model: Model, *, trained: bool) -> list[Part]:
    """Of layers that are held in parts, those that are gathered at once, and the gradient of one."""
    of, packing = model.outline, recipe.model.quantization
    cut, once = model.cut.processes, AT_ONCE
    parts = [Part("all", "layers gathered at once", gathered_bytes(of, packing, cut, once), "assumed")]
    if model.cut.away:
        copied = sizing.parts_bytes(of, packing, cut) * min(once, model.layers) // max(model.layers, 1)
        parts.append(Part("all", "parts of them, copied from main memory", copied, "assumed"))
    size = GRADIENT * gathered_bytes(of, packing, cut, 1) // of.dtype.itemsize
    return [*parts, Part("all", "gradients of a layer, whole", size, "assumed")] if trained else parts


def _loading(model: Model) -> list[Part]:
    """In main memory, while the first base is read."""
    stand = model.standing
    parts = [Part("all", "checks of the largest tensor", _checked(stand.largest), "counted")]
    if stand.loading:
        parts.append(Part("all", "weights whole, until they are shared out", stand.loading, "counted"))
    if model.filed:
        parts.append(Part("all", "file of the weights, read in another dtype", model.filed, "counted"))
    return parts


def _saving(stand: Standing, held: Part) -> list[Part]:
    """In main memory, while a checkpoint is written. held: what is freed and was not given back."""
    parts = [Part("all", "checks of the largest tensor", _checked(stand.largest_trained), "counted")]
    return [*parts, held] if stand.largest_trained > MAPPED else parts


def _checked(size: int) -> int:
    """Bytes that looking for numbers that are not finite takes: their absolute values, and two answers a number."""
    return size + size // 2


def _scratch(how: Use, model: Model, scored: int, target: Target) -> int:
    config = model.outline.model.config.get_text_config()
    head: HeadUse = how.head
    return head_bytes(head, scored, config.vocab_size, config.hidden_size, target.kind, model.outline.dtype)


def settled(recipe: Recipe, model: Model, target: Target) -> tuple[int, int]:
    """Tokens of a micro-batch and layers that are recomputed, by the rules of train/fitting.py."""
    training, wish = recipe.training, recipe.model.gradient_checkpointing
    automatic, selective = training.micro_batch_tokens == "auto", wish == "auto"
    allowed = micro_batch_range(torch.device(target.kind))
    budget = allowed.usual if training.micro_batch_tokens == "auto" else training.micro_batch_tokens
    stand = model.standing
    room = target.room - model.idle - (stand.fixed if target.kind == "cuda" else stand.parts[0].bytes)
    owed = stand.gradients + stand.optimiser
    free = room * SHARE[target.kind] - owed
    shared = recipe.distributed.sequence_parallel
    wanted = max(recipe.data.max_length, budget) // shared
    needs = checkpointing.bound(Role("policy", model.outline))
    if not model.measured.packed or wanted * needs.each(0) > free:
        needs = _footprint(model)
    count = 0 if wish is False else needs.layers
    if selective:
        count = layers_to_recompute(needs, wanted, free)
    if automatic:
        budget = tokens_that_fit(needs.each(count), needs.fixed(count), free, allowed) * shared
    return budget, count


def _footprint(model: Model) -> Footprint:
    """What fitting would see in small forwards."""
    keep, again = model.measured.keep, model.measured.again
    layer, border = keep.kept.layer.each, again.kept.layer.each
    return Footprint(model.layers, layer, 0.0, border, keep.kept.rest.each)


def _sampling(recipe: PPORecipe, data: Data, model: Model, optimiser: Part) -> dict[str, list[Part]]:
    """The prompts whole, and then a token a row with all keys and values; layers held in parts are gathered for it."""
    assert model.prefill is not None
    size = gathered_bytes(model.outline, recipe.model.quantization, model.cut.processes)
    gathered = [Part("policy", "layers gathered", size, "counted")] if model.cut.parted else []
    rollout, config = recipe.rollout, model.outline.model.config
    each = min(rollout.completions_per_prompt, rollout.max_batch)
    first = {s.prompt.tobytes(): s for one in data.deals[: recipe.ppo.mini_batches] for s in one}
    prompts = min(len(first), max(1, rollout.max_batch // each))
    longest = max((len(s.prompt) for one in data.deals for s in one), default=1)
    rows = prompts * each
    slots = longest + rollout.max_new_tokens
    cache = rows * sizing.cache_bytes(config, slots, model.outline.dtype)
    before = prompts * sizing.cache_bytes(config, longest, model.outline.dtype)
    scratch = round(model.prefill.scratch(prompts))
    drawn = draw_bytes(rows, config.get_text_config().vocab_size)
    return {
        "reading the prompts": [
            *gathered, optimiser, Part("policy", f"keys and values, {prompts} prompts", before, "counted"),
            Part("policy", f"scratch of {prompts * longest:,} tokens", scratch, "measured"),
        ],
        "decoding": [
            *gathered, optimiser, Part("policy", f"keys and values, {rows} rows of {slots} tokens", cache, "counted"),
            Part("policy", "logits of a token a row, a wider buffer", drawn + cache // model.layers, "counted"),
        ],
    }  # fmt: skip


# --- time ------------------------------------------------------------------------------------------------------------


def step_seconds(recipe: Recipe, data: Data, model: Model, estimate: Estimate) -> float:
    """Of a step: its tokens through the measured layers, forward and backward, and what else is asked of the model. A
    forward is a third of a forward and backward; a layer that is recomputed takes one more. Several processes share it
    evenly; what they send one another is not counted."""
    rounds = max(1, data.updates // data.steps)
    deals = data.deals
    tokens = sum(tokens_of(d, packed=model.measured.packed) for d in deals) / len(deals)
    scored = sum(int(c.scored.sum()) for d in deals for s in d for c in s.completions) / len(deals)
    of, share = model.measured.seconds, estimate.recomputed / max(model.layers, 1)
    once = tokens * (of.layer.each * model.layers * (1 + share / 3) + of.rest.each) + scored * model.head_seconds
    roles = [p.role for p in model.standing.parts]
    forward = (tokens * of.layer.each * model.layers + scored * model.head_seconds) / 3
    if not isinstance(recipe, PPORecipe):
        return once + forward * ("reference" in roles)
    learners = 1 + sum(role.endswith("critic") for role in roles)
    asked = 2 + learners - 1 + sum(role.startswith("reward") for role in roles)
    passes = rounds / max(recipe.ppo.epochs, 1)
    decoded = 0.0 if model.prefill is None else _decoding(recipe, model, scored * passes)
    return rounds * once * learners + passes * forward * asked + decoded


def _decoding(recipe: PPORecipe, model: Model, new: float) -> float:
    """Of as many new tokens."""
    assert model.prefill is not None
    return new * (model.prefill.seconds * model.layers + model.head_seconds / 3)
