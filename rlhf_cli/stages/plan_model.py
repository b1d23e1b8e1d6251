"""What is known of a model before a run: counted on an outline, measured on two layers. For `rlhf plan`."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rlhf_cli.catalog import STAGES
from rlhf_cli.models import memory, sizing
from rlhf_cli.models.adapters import load_peft
from rlhf_cli.models.base import Base, Text
from rlhf_cli.models.device import compute_dtype, micro_batch_range, pick_device
from rlhf_cli.models.portions import portions
from rlhf_cli.models.shortened import Measured, head_seconds, measure, role_of, shortened
from rlhf_cli.recipe.schema import PPORecipe, Recipe
from rlhf_cli.rollouts.prefill import Prefill, prefill
from rlhf_cli.stages import plan_rows
from rlhf_cli.stages.plan_roles import Cut, Standing, cut_of, standing
from rlhf_cli.stages.plan_work import Data, demand, use

CONTEXT = 512 * 2**20
"""What a CUDA context and the libraries' workspaces take of a card: an assumption, they differ by card and driver."""
OPERATIONS = 4e10
"""Of a measured forward and backward, at most: so large models are measured on fewer tokens."""
LEAST, MOST = 128, 512
"""Tokens that are measured at least and at most."""
PROMPTS = 4
"""That are read at once, at most, when sampling is measured."""


@dataclass(frozen=True)
class Target:
    """What the run is planned for."""

    kind: Literal["cpu", "cuda"]
    room: int
    """Bytes in all that the run may take."""
    given: bool
    """Whether the user said how much."""
    world: int = 1
    """Processes that train together; each has this room."""
    beside: int | None = None
    """How many of them a machine has, where that is said."""


@dataclass(frozen=True)
class Model:
    """What is known of a model as a recipe loads it, whatever its data and micro-batches."""

    outline: Base
    standing: Standing
    measured: Measured
    prefill: Prefill | None
    idle: int
    """Bytes of the process, or of the card, before there is a model."""
    head_seconds: float
    """For a scored token, over the whole vocabulary, forward and backward."""
    layers: int
    mapped: int
    """Bytes of quantised matrices as their file has them: it stays mapped for the tensors that are used as they lie."""
    cut: Cut
    filed: int = 0
    """Bytes of its file, where its numbers are read in another dtype: it is mapped until all of them are."""

    def standing_of(self, recipe: Recipe, text: Text, target: Target) -> Model:
        """The same for a recipe that loads its model alike."""
        cut = _cut(recipe, target)
        return replace(self, standing=standing(recipe, text, self.outline, use(recipe), cut), cut=cut)


def look_at(recipe: Recipe, text: Text, data: Data, target: Target, *, timed: bool) -> Model:
    """Count and measure. Raises ModelError."""
    STAGES[recipe.stage].load()
    load_peft()
    dtype = torch.bfloat16 if _assumed(recipe, target) else compute_dtype(recipe.model.dtype, pick_device())
    how = use(recipe)
    outline = sizing.outline(text, recipe.model, dtype, recipe.lora, trained=recipe.lora is None)
    plan_rows.check(recipe, target.world, outline)
    layers = int(text.config.get_text_config().num_hidden_layers)
    settings = recipe.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    with shortened(text, settings, trained=recipe.lora is None) as base:
        base.packed = base.packed and recipe.training.layout != "padded"
        role = role_of(base, recipe.lora, dropout=how.dropout, outputs=how.outputs)
        tokens = _tokens(outline, layers)
        shared = recipe.distributed.sequence_parallel
        usual = micro_batch_range(base.device).usual * shared
        examples = demand(data, usual, packed=base.packed, world=target.world // shared).largest
        batches = portions(examples, tokens, base.vocabulary, packed=base.packed)
        found = None
        if isinstance(recipe, PPORecipe) and recipe.rollout.engine != "vllm":  # a server samples elsewhere
            prompt = max((len(s.prompt) for one in data.deals for s in one), default=1)
            found = prefill(role, max(1, min(prompt, tokens // PROMPTS)), prompt)
        seconds = head_seconds(base, text.config.get_text_config().vocab_size) if timed and how.head.statistics else 0.0
        measured = measure(role, how.work, batches, timed=timed)
        del role, base, batches
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
    gc.collect()
    memory.give_back()
    idle = memory.resident() if target.kind == "cpu" else CONTEXT
    cut = _cut(recipe, target)
    stand = standing(recipe, text, outline, how, cut)
    as_filed = target.kind == "cpu" and getattr(text.config, "dtype", None) == dtype
    mapped = stand.weights.quantised * dtype.itemsize if as_filed and not cut.parted else 0
    own, kept = getattr(text.config, "dtype", None), torch.float32 if recipe.lora is None else dtype
    filed = 0 if own is None or own == kept else stand.weights.numbers * own.itemsize
    return Model(outline, stand, measured, found, idle, seconds, layers, mapped, cut, filed)


def _cut(recipe: Recipe, target: Target) -> Cut:
    away = recipe.distributed.cpu_offload and target.kind == "cuda"
    return Cut(cut_of(recipe, target.world, target.beside), away)


def _assumed(recipe: Recipe, target: Target) -> bool:
    """Whether the dtype is that of a card that is not here."""
    return recipe.model.dtype == "auto" and target.kind == "cuda" and pick_device().type != "cuda"


def _tokens(outline: Base, layers: int) -> int:
    """How many are measured: fewer of large models."""
    body = sum(p.numel() for n, p in outline.model.named_parameters() if ".layers." in n) / max(layers, 1)
    return int(max(LEAST, min(MOST, OPERATIONS / (12 * max(body, 1)))))
