"""What a layer of an architecture takes, measured: the model with two layers and then one, at its real width, with
random weights, is loaded as the model itself would be and computes on a few examples.

From one to two layers is a layer; what one layer takes less that is all the rest (embeddings, the last norm, the head).
Attention, kernels, quantisation, adapters and recomputation are those of a run. T tokens.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_cli.data.batch import Batch
from rlhf_cli.errors import ModelError
from rlhf_cli.models import adapters, checkpointing, memory
from rlhf_cli.models.base import Base, Text, load_base, quiet
from rlhf_cli.models.checks import allows_packing
from rlhf_cli.models.counting import Peaks, peaks
from rlhf_cli.models.roles import Role, disable_dropout
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings

VOCABULARY = 512
"""Rows of its embedding at most: what the head takes of a vocabulary is known from its tiles (models/scratch.py)."""
LAYERS = 2
FEW = 65537
"""Random numbers that its weights are made of: a prime, so that no two rows are alike."""
TURNS = 3
"""Of which the fastest counts; of what takes longer than LONG seconds only one."""
LONG = 1.0
Work = Callable[[Role, Batch], Tensor]
"""A number with gradient that uses the role as a step does."""


@dataclass(frozen=True)
class Line:
    """Bytes, or seconds, as a straight line over the tokens of a micro-batch."""

    each: float
    fixed: float = 0.0

    def at(self, tokens: float) -> float:
        return self.each * tokens + self.fixed

    def __sub__(self, other: Line) -> Line:
        return Line(self.each - other.each, self.fixed - other.fixed)


@dataclass(frozen=True)
class Stack:
    """Of a decoder: what a layer takes, and what all the rest does with one layer."""

    layer: Line
    rest: Line

    def at(self, layers: int, tokens: float) -> float:
        return layers * self.layer.at(tokens) + self.rest.at(tokens)


@dataclass(frozen=True)
class Moments:
    """Bytes beyond weights, their gradients and optimiser, in the three places of counting.Peaks."""

    kept: Stack
    start: Stack
    tail: Stack


@dataclass(frozen=True)
class Measured:
    """What a forward and backward take."""

    keep: Moments
    """When layers keep their activations."""
    again: Moments
    """When all are recomputed."""
    seconds: Stack
    """When they are kept; the head without its vocabulary."""
    packed: bool
    tokens: int
    """That were computed at most."""
    spread: float | None = None
    """How much longer the slowest turn took than the fastest, as a share; None: not timed, or once."""

    def peak(self, layers: int, recomputed: int, tokens: float, scratch: float) -> tuple[float, float]:
        """Bytes at most up to the embeddings, and from there on. scratch: of the head over its vocabulary."""
        if recomputed >= layers:
            of = self.again
            return max(of.kept.at(layers, tokens) + scratch, of.start.at(layers, tokens)), of.tail.at(1, tokens)
        saved = recomputed * (self.keep.kept.layer.at(tokens) - self.again.kept.layer.at(tokens))
        of = self.keep
        start = max(of.kept.at(layers, tokens) + scratch, of.start.at(layers, tokens)) - saved
        return start, of.tail.at(1, tokens)


@contextmanager
def shortened(text: Text, settings: ModelSettings, *, trained: bool) -> Iterator[Base]:
    """The model with two layers and a small vocabulary, random, loaded by the code that loads models."""
    quiet()
    config = copy.deepcopy(text.config)
    inner = config.get_text_config()
    inner.num_hidden_layers = 1
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:1]
    inner.vocab_size = min(VOCABULARY, inner.vocab_size)
    inner.pad_token_id = inner.bos_token_id = inner.eos_token_id = None
    try:
        with tempfile.TemporaryDirectory(prefix="rlhf-plan-") as folder:
            _write(config, folder)
            base = load_base(folder, _countable(settings), trained=trained)
        if text.config.get_text_config().num_hidden_layers > 1:
            _double(base.model)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        if memory.ran_out(error):
            raise ModelError("two layers of this model do not fit the memory of this machine", text.source,
                             "plan it on a larger one") from error  # fmt: skip
        raise ModelError(f"two layers of this model cannot be made: {str(error).splitlines()[0]}", text.source,
                         "report it with the name of the model") from error  # fmt: skip
    base.packed = allows_packing(base)
    yield base


def _countable(settings: ModelSettings) -> ModelSettings:
    """Without what is compiled for a device, which this may not be, and whose operations cannot be watched."""
    plain = {"kernels": "compiled", "attn_implementation": "flex_attention"}
    return settings.model_copy(update={k: "auto" for k, compiled in plain.items() if getattr(settings, k) == compiled})


def _double(model: Any) -> None:
    """A second layer, a copy of the first: a large one takes long to quantise."""
    stack, inner = _stack(model), model.config.get_text_config()
    if len(stack) != 1:
        return
    layer = copy.deepcopy(stack[0])
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 1  # type: ignore[assignment]
    stack.append(layer)
    inner.num_hidden_layers = LAYERS
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types * LAYERS


def _write(config: Any, folder: str) -> None:
    """A model of this configuration; its numbers are a few random ones over and over, which is quick."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    few = torch.randn(FEW, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            whole = len(flat) // FEW * FEW
            flat[:whole].view(-1, FEW).copy_(few.expand(whole // FEW, FEW))
            flat[whole:].copy_(few[: len(flat) - whole])
    model.save_pretrained(folder)


def role_of(base: Base, lora: LoraSettings | None, *, dropout: bool, outputs: int = 0) -> Role:
    """A role that is trained as a recipe says; outputs: of a head of its own."""
    if lora is not None and base.peft is None:
        adapters.add_adapter(base, "policy", adapters.lora_config(lora))
    checkpointing.enable(base.model, "auto")
    if not dropout:
        disable_dropout(base)
    head = nn.Linear(base.model.config.get_text_config().hidden_size, outputs, device=base.device) if outputs else None
    return Role("policy", base, None if lora is None else "policy", head, trained=True)


def measure(role: Role, work: Work, batches: tuple[Batch, Batch], *, timed: bool) -> Measured:
    """Forward and backward of two micro-batches of this role, the first the smaller, with two layers and with one."""
    small, large = (batch.to(role.base.device) for batch in batches)
    found = checkpointing.layers(role.base.model)
    count = len(found) or len(_stack(role.base.model))
    if not count:
        raise ModelError("no layers are found in this architecture", role.base.source, "report it with its name")
    seen: dict[tuple[int, bool, int], Peaks] = {}
    spent: dict[int, list[float]] = {}
    for layers in range(count, 0, -1):
        if layers < count:
            _drop_last(role.base.model)
        for recomputed in (False, True) if found else (False,):
            checkpointing.recompute(role.base.model, layers if recomputed else 0)
            for place, batch in enumerate((small, large)):
                seen[layers, recomputed, place] = _counted(role, work, batch)
        checkpointing.recompute(role.base.model, 0)
        spent[layers] = _timed(role, work, large) if timed else [0.0]

    def stack(recomputed: bool, which: int) -> Stack:
        lines = [
            _line(small.tokens, seen[n, recomputed, 0][which], large.tokens, seen[n, recomputed, 1][which])
            for n in range(1, count + 1)
        ]
        layer = lines[1] - lines[0] if count > 1 else lines[0]
        return Stack(layer, lines[0] - layer)

    keep = Moments(*(stack(False, which) for which in range(3)))
    again = Moments(*(stack(True, which) for which in range(3))) if found else keep
    whole, one = min(spent[count]), min(spent[1])
    layer = max(whole - one, 0.0) if count > 1 else one
    seconds = Stack(Line(layer / large.tokens), Line(max(one - layer, 0.0) / large.tokens))
    spread = max(max(turns) / min(turns) for turns in spent.values()) - 1.0 if len(spent[count]) > 1 else None
    return Measured(keep, again, seconds, role.base.packed, large.tokens, spread)


def head_seconds(base: Base, vocabulary: int) -> float:
    """For a scored token, forward and backward (three products with the head's matrix), by a few rows and columns."""
    size, rows, columns = base.model.config.get_text_config().hidden_size, 128, 4096
    hidden, matrix = (torch.randn(n, size, device=base.device, dtype=base.dtype) for n in (rows, columns))
    spent = []
    for _ in range(TURNS + 1):
        began = clock(base.device)
        (hidden @ matrix.T).float().exp_()
        spent.append(clock(base.device) - began)
    return 3 * min(spent) * vocabulary / (rows * columns)


def _line(few: int, at_few: float, many: int, at_many: float) -> Line:
    """Through two points; through the origin where they are one."""
    if many <= few:
        return Line(at_many / many)
    each = (at_many - at_few) / (many - few)
    return Line(each, at_many - each * many)


def _counted(role: Role, work: Work, batch: Batch) -> Peaks:
    """Bytes of a forward and backward; gradients are there already."""
    for _, parameter in role.parameters:
        parameter.grad = torch.zeros_like(parameter)
    return peaks(partial(_forward, role, work, batch), role.backward, role.base.model.get_input_embeddings())


def _timed(role: Role, work: Work, batch: Batch) -> list[float]:
    """Seconds of a forward and backward, some times over; the first, which warms up, only where it is the only one."""
    spent: list[float] = []
    while len(spent) <= TURNS and not (spent and spent[0] > LONG):
        began = clock(role.base.device)
        role.backward(_forward(role, work, batch))
        spent.append(clock(role.base.device) - began)
    return spent[1:] or spent


def _forward(role: Role, work: Work, batch: Batch) -> Tensor:
    with role.active(train=True):
        return work(role, batch)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _stack(model: nn.Module) -> nn.ModuleList:
    """The layers of a decoder."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[0], "mlp")]
    layered = [m for m in model.modules() if isinstance(m, nn.ModuleList)
               and any(isinstance(layer, GradientCheckpointingLayer) for layer in m)]  # fmt: skip
    return (layered or stacks or [nn.ModuleList()])[0]


def _drop_last(model: Any) -> None:
    """The decoder without its last layer."""
    stack = _stack(model)
    del stack[len(stack) - 1]
    model.config.get_text_config().num_hidden_layers = len(stack)
