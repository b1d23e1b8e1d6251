"""Who is in memory during a run, and what each takes whatever the number of tokens. For `rlhf plan`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from rlhf_cli.catalog import ESTIMATORS
from rlhf_cli.data.prepare import data_needs
from rlhf_cli.errors import RecipeError
from rlhf_cli.models import sizing
from rlhf_cli.models.base import Base, Text, load_text
from rlhf_cli.models.gate import ADAPTER, header
from rlhf_cli.models.sizing import Weights
from rlhf_cli.recipe.model_path import resolve_model
from rlhf_cli.recipe.schema import PPORecipe, Recipe, RewardRecipe
from rlhf_cli.recipe.settings.model import Quantization
from rlhf_cli.stages.plan_work import Use
from rlhf_cli.train.optim import state_bytes


class Part(NamedTuple):
    """What one role takes for one purpose."""

    role: str
    what: str
    bytes: int
    how: str


class Away(Part):
    """The same of main memory."""


class Cut(NamedTuple):
    """How the layers of a base are held."""

    processes: int
    """That share them out among themselves."""
    away: bool = False
    """Whether their shares lie in main memory."""

    @property
    def parted(self) -> bool:
        """Whether a layer is gathered when its turn comes."""
        return self.processes > 1 or self.away

    def spared(self, base: Base, packing: Quantization) -> int:
        """Bytes of the layers that the device does not hold."""
        if not self.parted:
            return 0
        here = sizing.parts_bytes(base, packing, self.processes) if self.away else 0
        return sizing.saved(base, packing, self.processes) + here

    def of(self, role: str, what: str, size: int, base: Base, packing: Quantization) -> Iterator[Part]:
        """Where weights of so many bytes in all lie."""
        yield Part(role, what, size - self.spared(base, packing), "counted")
        if self.away:
            yield Away(role, what, sizing.parts_bytes(base, packing, self.processes, pinned=True), "counted")


@dataclass(frozen=True)
class Standing:
    """What is there throughout the training."""

    parts: tuple[Part, ...]
    gradients: int
    """Of the learner that has the most."""
    head_gradient: int
    """Of a head that is trained, which is there before the backward pass begins."""
    embedding: int
    """Of embeddings that are trained: bytes of their gradient beyond that of the shortened model's."""
    optimiser: int
    largest: int
    """Bytes of the largest tensor that is loaded, and of the largest that is trained."""
    largest_trained: int
    weights: Weights
    trained: int
    """Numbers that are trained, of all learners."""
    adapters: int
    """Numbers in adapters and heads."""
    loading: int
    """Bytes of the base beyond its part, which are there until it is shared out."""
    replicated: int
    """Numbers that are trained whole by every process."""
    spread: int
    """Numbers that are trained in parts, every part filled up to the largest."""
    together: int = 0
    """Bytes of weights that are trained in parts, whole: process 0 writes the trained model alone."""
    away: tuple[Part, ...] = ()
    """What lies in main memory instead (distributed.cpu_offload); not in any of the other figures."""

    @property
    def fixed(self) -> int:
        """Weights, adapters, heads."""
        return sum(part.bytes for part in self.parts)


def standing(recipe: Recipe, text: Text, outline: Base, use: Use, cut: Cut) -> Standing:
    """All roles of the recipe, as one process holds them. Raises ModelError for a missing model."""
    packing = recipe.model.quantization
    found = sizing.weights(outline, packing)
    name = "reward" if isinstance(recipe, RewardRecipe) else "policy"
    words = packing if packing != "none" else str(_dtype(outline))[6:]
    less = cut.spared(outline, packing)
    parts = [*cut.of(name, f"weights, {words}", found.bytes, outline, packing)]
    whole = _trained(recipe, outline, use)
    shared = sizing.layer_matrices(outline) if cut.parted else {}
    split = [sizing.part(p, cut.processes) for p in whole if id(p) in shared]
    kept = [p for p in whole if id(p) not in shared]
    learned = kept if cut.away else kept + split
    learners = {name: learned}
    hidden = outline.model.config.get_text_config().hidden_size
    own = 0 if recipe.lora is None else sizing.nbytes(learned)
    if own:
        parts.append(Part(name, "adapter and head" if use.outputs else "adapter", own, "counted"))
    parts += _reference(recipe, text, outline, own, cut)
    if isinstance(recipe, PPORecipe):
        parts += _rewards(recipe, text, outline, cut)
        for critic in _critics(recipe):
            learners[critic] = [*learned, *_head(1, hidden)]
            size = sizing.nbytes(learners[critic])
            parts.append(Part(critic, "adapter and head" if recipe.lora else "weights, float32", size, "counted"))
            if cut.away and split:
                parts.append(Away(critic, "weights, float32", _pinned(split), "counted"))
    if cut.away and split:
        states_away = len(learners) * sum(state_bytes(p, recipe.training) for p in split)
        parts.append(Away("all", "gradients", _pinned(split), "counted"))
        parts.append(Away("all", f"optimiser, {recipe.training.optimizer}", states_away, "counted"))
    states = [sum(state_bytes(p, recipe.training) for p in those) for those in learners.values()]
    gradients = [sizing.nbytes(those) for those in learners.values()]
    full = recipe.lora is None
    embedding, head = outline.model.get_input_embeddings(), outline.model.get_output_embeddings()
    extra = max((p.numel() for those in learners.values() for p in those), default=0)
    trained = sum(p.numel() for p in whole) * len(learners) + (hidden + 1) * (len(learners) - 1)
    spread = cut.processes * sum(p.numel() for p in split) * len(learners)
    plain = sizing.weights(outline, "none").bytes  # until each layer is quantised and shared out
    apart = sum(p.numel() for p in whole if id(p) in shared) * len(learners)
    together = outline.dtype.itemsize * sum(p.numel() for p in whole if id(p) in shared and cut.processes > 1)
    return Standing(
        tuple(p for p in parts if not isinstance(p, Away)), max(gradients),
        sizing.nbytes(head.parameters()) if full and not use.outputs else 0,
        sizing.nbytes(embedding.parameters()) if full else 0, sum(states), found.largest, 4 * extra, found,
        trained, trained if recipe.lora is not None else 0, plain - found.bytes + less if cut.parted else 0,
        trained - apart, spread, together, tuple(p for p in parts if isinstance(p, Away)),
    )  # fmt: skip


def _pinned(split: Iterable[torch.Tensor]) -> int:
    return sum(sizing.pinned_bytes(sizing.nbytes([p])) for p in split)


def cut_of(recipe: Recipe, world: int, beside: int | None) -> int:
    """How many of so many processes share layers out among themselves, `beside` on each machine. Raises RecipeError for
    `hybrid` where it would be refused."""
    shard, where = recipe.distributed.shard, "--processes-per-machine"
    if shard != "hybrid" or world == 1:
        return world if shard == "full" else 1
    if beside is None:
        raise RecipeError("distributed.shard is hybrid, and how many processes a machine has is not said", where,
                          "give it, for instance --processes-per-machine 8")  # fmt: skip
    if not 1 < beside < world or world % beside:
        raise RecipeError(f"{world} processes are no machines of {beside}, and distributed.shard hybrid needs several, "
                          "with as many on each", where, "give another number, or set full")  # fmt: skip
    return beside


def _dtype(outline: Base) -> torch.dtype:
    return next(p.dtype for n, p in outline.model.named_parameters() if "lora_" not in n)


def _trained(recipe: Recipe, outline: Base, use: Use) -> list[nn.Parameter]:
    """What the optimiser changes of the first learner."""
    if recipe.lora is not None:
        found = [p for _, p in sizing.adapter(outline)]
    else:
        head = outline.model.get_output_embeddings()
        unused = {id(head.weight)} - {id(outline.model.get_input_embeddings().weight)} if use.outputs else set()
        found = [p for p in outline.model.parameters() if id(p) not in unused]
    outputs = use.outputs
    if isinstance(recipe, PPORecipe) and recipe.critic.shared and ESTIMATORS[recipe.ppo.advantage.name].critic:
        outputs = 2 if recipe.ppo.lagrange is not None else 1
    hidden = outline.model.config.get_text_config().hidden_size
    return found + _head(outputs, hidden, bias=use.outputs != 1)


def _head(outputs: int, hidden: int, *, bias: bool = True) -> list[nn.Parameter]:
    """Matrix and bias of a head (models/build.py: a reward model's has none); nothing for no outputs."""
    return list(nn.Linear(hidden, outputs, bias=bias, device="meta").parameters()) if outputs else []


def _reference(recipe: Recipe, text: Text, outline: Base, own: int, cut: Cut) -> Iterator[Part]:
    if not isinstance(recipe, PPORecipe) and "reference" not in data_needs(recipe)[1]:
        return
    named = getattr(recipe, "reference", None)
    if named is not None:
        yield from _frozen("reference", named, recipe, text, outline, cut)
    elif recipe.lora is None:
        kept, size = _dtype(outline).itemsize, outline.dtype.itemsize
        every = kept * sum(p.numel() for p in outline.model.parameters())
        for one in cut.of("reference", f"a frozen copy, {str(outline.dtype)[6:]}", every, outline, "none"):
            yield one._replace(bytes=one.bytes // kept * size)
    elif text.path.kind == "adapter" or (isinstance(recipe, PPORecipe) and recipe.ppo.reference_update is not None):
        yield Part("reference", "a frozen copy of the adapter", own, "counted")
    else:
        yield Part("reference", "the policy with its adapter off", 0, "counted")


def _rewards(recipe: PPORecipe, text: Text, outline: Base, cut: Cut) -> Iterator[Part]:
    for i, reward in enumerate(recipe.rewards):
        if reward.run is not None:
            role = f"reward {i}" if len(recipe.rewards) > 1 else "reward"
            yield from _frozen(role, reward.run, recipe, text, outline, cut)


def _frozen(role: str, name: str, recipe: Recipe, text: Text, outline: Base, cut: Cut) -> Iterator[Part]:
    """Another model: an adapter on the policy's base, or a base of its own."""
    path = resolve_model(name, weights=False)
    settings = recipe.model.model_copy(update={"name_or_path": name, "revision": None})
    other = load_text(settings, path.role, "policy", "reward", "cost", "process", weights=False)
    if path.kind == "adapter":
        own = _adapter_file(path.weights)
        if recipe.lora is not None and other.source == text.source:
            yield Part(role, "adapter on the policy's base", own, "counted")
            return
        yield Part(role, "adapter", own, "counted")
    elif recipe.lora is not None and other.source == text.source and path.role == "policy":
        yield Part(role, "the policy's base with adapters off", 0, "counted")
        return
    base = sizing.outline(other, settings, outline.dtype, None, trained=False)
    packing = recipe.model.quantization
    yield from cut.of(role, "weights of its own", sizing.weights(base, packing).bytes, base, packing)


def _adapter_file(folder: Path | None) -> int:
    assert folder is not None
    tensors = header(folder / ADAPTER)
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors.values())


def _critics(recipe: PPORecipe) -> list[str]:
    """Those with weights of their own."""
    if not ESTIMATORS[recipe.ppo.advantage.name].critic or recipe.critic.shared:
        return []
    return ["critic", "cost-critic"] if recipe.ppo.lagrange is not None else ["critic"]
