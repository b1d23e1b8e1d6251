"""What to change in a recipe so that it fits a card: each change worked out by the same estimate.

In the order of what it costs: what is in memory at once (changes no result), the optimiser's state, which weights are
trained and how the frozen ones are kept, the length of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from rlhf_cli.errors import RecipeError
from rlhf_cli.models.device import micro_batch_range
from rlhf_cli.recipe.schema import PPORecipe, Recipe
from rlhf_cli.stages.plan import Plan, estimated
from rlhf_cli.stages.plan_model import Model, look_at
from rlhf_cli.stages.plan_work import dealt, shorter

SHORTEST = 128
"""Tokens below which max_length is not lowered."""
SHOWN = 6


class Change(NamedTuple):
    """Something to add to the command line."""

    sets: tuple[str, ...]
    """KEY=VALUE of each --set."""
    words: str
    """What it costs."""
    peak: int
    fits: bool


Reread = Callable[[Sequence[str]], Recipe]
"""The recipe with further overrides. Raises RecipeError where they do not fit it."""


def advice(plan: Plan, reread: Reread) -> list[Change]:
    """Changes that make it fit, the cheapest first: each by itself, and together with all that cost less. When nothing
    is enough, the one that takes least."""
    known = {_loaded_as(plan.recipe): plan.model}
    tried: dict[tuple[str, ...], Change] = {}
    before: tuple[str, ...] = ()
    best = plan.estimate.peak
    for sets, words in _ladder(plan):
        alone = _try(plan, reread, sets, words, known)
        if alone is not None:
            tried[alone.sets] = alone
        added = _try(plan, reread, (*before, *sets), words, known) if before else alone
        if added is not None and added.peak < best:
            before, best = added.sets, added.peak
            tried[added.sets] = added
    fitting = [change for change in tried.values() if change.fits]
    least = sorted(tried.values(), key=lambda change: change.peak)[:1]
    return fitting[:SHOWN] or least


def _ladder(plan: Plan) -> Iterator[tuple[tuple[str, ...], str]]:
    recipe, same = plan.recipe, "same result"
    allowed = micro_batch_range(torch.device(plan.target.kind))
    if recipe.model.gradient_checkpointing is not True:
        yield ("model.gradient_checkpointing=true",), f"{same}, about a third slower"
    budget = plan.estimate.budget // 2
    while budget >= allowed.least:
        yield (f"training.micro_batch_tokens={budget}",), f"{same}, slower where rows are short"
        budget //= 4
    if plan.target.world > 1 and recipe.model.quantization != "int8" and recipe.distributed.shard == "none":
        yield ("distributed.shard=full",), f"{same}, the layers travel for each micro-batch"
    if isinstance(recipe, PPORecipe):
        rows = recipe.rollout.max_batch // 4
        while rows >= 1:
            yield (f"rollout.max_batch={rows}",), f"{same}, slower rollouts"
            rows //= 4
    if recipe.training.optimizer in ("adamw", "paged_adamw"):
        yield ("training.optimizer=adamw_8bit",), "moments in 8 bits"
    lora = ("lora={r: 16, alpha: 32}",) if recipe.lora is None else ()
    if lora:
        yield lora, "an adapter is trained instead of all weights"
    if recipe.model.quantization == "none":
        yield (*lora, "model.quantization=nf4"), "frozen weights in 4 bits, slower"
    if plan.target.kind == "cuda" and recipe.model.quantization != "int8" and not recipe.distributed.cpu_offload:
        shard = ("distributed.shard=full",) if recipe.distributed.shard == "none" else ()
        words = f"{same}, slower: layers come from main memory, whose optimiser steps on the CPU"
        yield (*shard, "distributed.cpu_offload=true"), words
    longest = recipe.data.max_length // 2
    while longest >= SHORTEST:
        yield (f"data.max_length={longest}",), "longer examples are left out"
        longest //= 2


def _try(plan: Plan, reread: Reread, sets: tuple[str, ...], words: str, known: dict[str, Model]) -> Change | None:
    sets = tuple({one.partition("=")[0]: one for one in sets}.values())
    try:
        recipe = reread(sets)
    except RecipeError:
        return None
    data = plan.data if recipe.data.max_length == plan.recipe.data.max_length else shorter(plan.data, recipe)
    if data is None:
        return None
    data = dealt(recipe, data.prepared) if isinstance(recipe, PPORecipe) else data
    key = _loaded_as(recipe)
    if key not in known:
        known[key] = look_at(recipe, plan.text, data, plan.target, timed=False)
    model = known[key].standing_of(recipe, plan.text, plan.target)
    left = len(plan.data.prepared.train) - len(data.prepared.train)
    peak = estimated(recipe, data, model, plan.target).peak
    words = f"{left:,} examples left out" if left and "data.max_length" in sets[-1] else words
    return Change(sets, words, peak, peak <= plan.target.room)


def _loaded_as(recipe: Recipe) -> str:
    """What the measured figures depend on."""
    return repr((recipe.lora, recipe.model.quantization))


def headroom(plan: Plan, reread: Reread) -> int:
    """Tokens of the largest micro-batch, by powers of two, that fits; that of the recipe when no larger one does."""
    most = plan.estimate.budget
    limit = micro_batch_range(torch.device(plan.target.kind)).most
    while most * 2 <= limit:
        try:
            recipe = reread((f"training.micro_batch_tokens={most * 2}",))
        except RecipeError:
            break
        if estimated(recipe, plan.data, plan.model, plan.target).peak > plan.target.room:
            break
        most *= 2
    return most
