"""Layers held in parts: each of several processes keeps a share of every matrix of a base's layers (PyTorch's FSDP2).
Which processes share with which: models/mesh.py; matrices in 4 bits: models/quantised.py.

A layer is gathered when its turn comes and let go after it; gradients of trained matrices are added up as each layer's
backward pass ends. With `cpu_offload` the parts and their gradients lie in main memory, and are copied for that. So
every forward and backward of such a base is made by all processes together, in the same order (train/lockstep.py), or
between `gathered`. Vectors (norms, biases), embeddings, heads and adapters stay whole on every
process, and their gradients are added up once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_cli.models import absent, mesh, processes, quantised

if TYPE_CHECKING:
    from rlhf_cli.models.base import Base
    from rlhf_cli.models.roles import Role

SAMPLING = "while it samples (without the faster decode step of bases that are whole)"


@contextmanager
def as_trained(parts: Sequence[Any]) -> Iterator[None]:
    """Every matrix takes gradients inside: whenever FSDP2 sets up a layer it looks in which dtype those are kept."""
    flags = {p: p.requires_grad for one in parts for p in one.parameters() if split(p) and p.is_floating_point()}
    for parameter in flags:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def split(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return hasattr(tensor, "to_local")


def shared(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return split(tensor) and mesh.count() > 1


def held(tensor: Tensor) -> Tensor:
    """What this process holds of it; the same memory, without gradient."""
    if not split(tensor):
        return tensor.detach()
    own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return own


def whole(tensor: Tensor) -> Tensor:
    """A tensor whole and on the CPU, in process 0, if all processes ask; elsewhere nothing, (0,). One that is not held
    in parts as it is."""
    from torch.distributed.tensor import DTensor

    if not split(tensor):
        return tensor
    about: Any = tensor
    there = held(tensor).to(about.device_mesh.device_type)  # what lies in main memory is not sent from there
    with collective("bringing together what is held in parts"):
        full = DTensor.from_local(there, about.device_mesh, about.placements, run_check=False,
                                  shape=tensor.shape, stride=tensor.stride()).full_tensor()  # fmt: skip
    return full.cpu() if processes.rank() == 0 else full.new_empty(0, device="cpu")


def part(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as another of that shape is; all of it where that one is whole."""
    if not split(like):
        return full
    parts = full.chunk(mesh.count(), 0)
    return parts[mesh.rank()] if mesh.rank() < len(parts) else full[:0]


def fill(own: Tensor, full: Tensor) -> None:
    """Write a whole tensor over one that may be held in parts. Raises RuntimeError for another shape."""
    if own.shape != full.shape:
        raise RuntimeError(f"a tensor of shape {tuple(full.shape)} for one of {tuple(own.shape)}")
    _arrived(own)
    with torch.no_grad():
        held(own).copy_(part(full, own))


def _arrived(tensor: Tensor) -> None:
    """Before something is written over it: what lies in main memory may still be on its way to the card."""
    if torch.cuda.is_available() and held(tensor).device.type == "cpu":
        torch.cuda.synchronize()


def round_as(own: Base, other: Base) -> None:
    """Round the weights of a base to what another one holds of the same."""
    kept = {name: p.dtype for name, p in other.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in own.model.named_parameters():
            _arrived(parameter)
            held(parameter).copy_(held(parameter).to(kept[name]))


def state(base: Base) -> dict[str, Tensor]:
    """The tensors of the model by name: those that `collect` brought together, or its own."""
    if base.collected is not None:
        return base.collected
    return dict(base.model.state_dict())


def collect(role: Role) -> None:
    """Bring all tensors of a whole model together in process 0, on the CPU and in the compute dtype, for what writes
    them alone."""
    base = role.base
    if base.shards and role.adapter is None:
        tensors = base.model.state_dict()
        base.collected = {k: whole(v.to(base.dtype)) if split(v) else v for k, v in tensors.items()}


@contextmanager
def gathered(base: Base, layers: int | None = None) -> Iterator[None]:
    """All layers (or the first few) whole on every process, so that forwards inside are each process's own affair."""
    if not base.shards:
        yield
        return
    parts = parts_of(base.model.base_model)
    if layers is not None:
        parts = layers_of(base.model)[:layers]
    with collective("gathering layers"), as_trained(parts):
        for one in parts:
            one.set_reshard_after_forward(False, recurse=False)
            one.unshard()
    try:
        yield
    finally:
        for one in parts:
            one.set_reshard_after_forward(True, recurse=False)
            one.reshard()


def start_pass(base: Base) -> None:
    """A forward with gradient is to come: forwards before it that had none are forgotten. FSDP2 would gather layers for
    their backward passes, which never come; it can be told so from PyTorch 2.13 on, and only wastes time before."""
    body: Any = base.model.base_model
    if hasattr(body, "reset_iter_state"):
        body.reset_iter_state()


@contextmanager
def as_plain(base: Base) -> Iterator[None]:
    """Inside, this process's part stands for each tensor that is held in parts: of such a tensor peft asks how many
    rows are here, where it should ask the layer how many it has."""
    kept = [(m, n, p) for m in base.model.modules() for n, p in m._parameters.items() if p is not None and split(p)]
    for module, name, parameter in kept:
        own = nn.Parameter(held(parameter), requires_grad=False)
        own.__dict__.update(parameter.__dict__)
        module._parameters[name] = own
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


@contextmanager
def collective(doing: str) -> Iterator[None]:
    """Collectives that are not told one by one: where one fails, another process is gone. Raises Lost."""
    try:
        yield
    except RuntimeError as error:
        if not processes.met() or not absent.of_others(error):
            raise
        raise processes.lost(doing) from error


def words(base: Base) -> str:
    """How much of the base this process holds, in words."""
    weights = [p for n, p in base.model.named_parameters() if "lora_" not in n]
    counts = [(quantised.numbers(p), held(p).numel() / max(p.numel(), 1)) for p in weights]
    everything, own = sum(n for n, _ in counts), sum(round(n * share) for n, share in counts)
    among = "" if mesh.count() == processes.count() else f" ({mesh.count()} of a machine share its layers out)"
    away = sum(quantised.numbers(p) for p in weights if split(p)) if mesh.offloads() else 0
    if processes.count() == 1:
        return f"{away:,} of {everything:,} parameters of the base lie in main memory, none of them {SAMPLING}"
    where = ", those of its layers in main memory" if away else ""
    return (
        f"sharded: each of {processes.count()} processes{among} holds {own:,} of {everything:,} parameters of the "
        f"base{where}, all of them {SAMPLING}"
    )


def parts_of(body: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in body.modules() if isinstance(module, FSDPModule)]


def layers_of(model: nn.Module) -> list[Any]:
    """The decoder layers: the outermost that can be recomputed each by itself."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(below) for below in module.modules())
    return found
