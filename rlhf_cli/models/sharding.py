"""Layers held in parts: each of several processes keeps a share of every matrix of a base's layers (PyTorch's FSDP2).

A layer is gathered when its turn comes and let go after it; gradients of trained matrices are added up as each layer's
backward pass ends. So every forward and backward of such a base is made by all processes together, in the same order
(train/lockstep.py), or between `gathered`. Vectors (norms, biases), embeddings, heads and adapters stay whole on every
process, and their gradients are added up once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_cli.errors import ModelError
from rlhf_cli.models import memory, processes

if TYPE_CHECKING:
    from rlhf_cli.models.base import Base
    from rlhf_cli.models.roles import Role

_asked: bool = False


def ask(wanted: bool) -> None:
    """Whether bases that are loaded from here on are to be held in parts."""
    global _asked  # noqa: PLW0603
    _asked = wanted
    _mesh.cache_clear()


def wanted() -> bool:
    """Whether a base that is loaded now is to be held in parts: several processes load it together."""
    return _asked and processes.count() > 1


def shard(model: Any, device: torch.device, compute: torch.dtype, source: str) -> None:
    """Keep this process's part of the matrices of every layer, on the device; all else goes there whole.

    compute: the dtype in which trained layers are gathered. Raises ModelError for quantised weights, for an
    architecture without layers that are known, and when memory does not suffice.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError("quantised weights cannot be shared out", source, "use distributed.shard: none")
    try:
        _share_out(model, device, compute, source)
    except Exception as error:
        if not memory.ran_out(error):
            raise
        raise ModelError("the weights do not fit the memory", source, "use more processes") from error


def _share_out(model: Any, device: torch.device, compute: torch.dtype, source: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers = _layers(model)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers that could be shared out", source,
                         "use distributed.shard: none")  # fmt: skip
    mesh = _mesh(device.type)
    as_kept = compute == next(layers[0].parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if as_kept else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    matrices = {p for layer in layers for p in layer.parameters() if p.ndim > 1}
    whole = {p for p in model.parameters() if p not in matrices}
    body = model.base_model
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)
    fully_shard(body, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)
    for part in _parts(body):
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    model.to(device)
    for parameter in whole:  # else each keeps the mapped file of all weights in memory
        parameter.data = parameter.data.clone()
    if not as_kept:
        _meet(body, device, compute)


def _meet(body: Any, device: torch.device, compute: torch.dtype) -> None:
    """A first forward with every matrix to be trained."""
    with _as_trained(_parts(body)), torch.no_grad(), torch.autocast(device.type, compute):
        body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)


@contextmanager
def _as_trained(parts: Sequence[Any]) -> Iterator[None]:
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


def held(tensor: Tensor) -> Tensor:
    """What this process holds of it; the same memory, without gradient."""
    if not split(tensor):
        return tensor.detach()
    own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return own


def whole(tensor: Tensor) -> Tensor:
    """A tensor whole and on the CPU, in process 0, if all processes ask; elsewhere nothing, (0,). One that is not held
    in parts as it is."""
    if not split(tensor):
        return tensor
    with collective("bringing together what is held in parts"):
        full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full.cpu() if processes.rank() == 0 else full.new_empty(0, device="cpu")


def whole_like(own: Tensor, parameter: Tensor) -> Tensor:
    """As `whole`, of a tensor of which this process has its part, cut as the parameter is."""
    from torch.distributed.tensor import DTensor

    if own.shape != held(parameter).shape:
        return own
    about: Any = parameter
    return whole(DTensor.from_local(own, about.device_mesh, about.placements, run_check=False,
                                    shape=parameter.shape, stride=parameter.stride()))  # fmt: skip


def part(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as another of that shape is; all of it where that one is whole."""
    if not split(like):
        return full
    parts = full.chunk(processes.count(), 0)
    return parts[processes.rank()] if processes.rank() < len(parts) else full[:0]


def fill(own: Tensor, full: Tensor) -> None:
    """Write a whole tensor over one that may be held in parts. Raises RuntimeError for another shape."""
    if own.shape != full.shape:
        raise RuntimeError(f"a tensor of shape {tuple(full.shape)} for one of {tuple(own.shape)}")
    with torch.no_grad():
        held(own).copy_(part(full, own))


def round_as(own: Base, other: Base) -> None:
    """Round the weights of a base to what another one holds of the same."""
    kept = {name: p.dtype for name, p in other.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in own.model.named_parameters():
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
    parts = _parts(base.model.base_model)
    if layers is not None:
        parts = _layers(base.model)[:layers]
    with collective("gathering layers"), _as_trained(parts):
        for one in parts:
            one.set_reshard_after_forward(False, recurse=False)
            one.unshard()
    try:
        yield
    finally:
        for one in parts:
            one.set_reshard_after_forward(True, recurse=False)
            one.reshard()


@contextmanager
def collective(doing: str) -> Iterator[None]:
    """Collectives that are not told one by one: where one fails, another process is gone. Raises Lost."""
    try:
        yield
    except RuntimeError as error:
        if not _of_others(error):
            raise
        raise processes.Lost(f"another process is gone, or did not answer, while {doing}",
                             f"process {processes.rank()}",
                             "the same command goes on from the newest whole checkpoint") from error  # fmt: skip


def _of_others(error: RuntimeError) -> bool:
    """Whether a collective failed, by the words of gloo and NCCL."""
    from torch.distributed import DistError

    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out")
    return isinstance(error, DistError) or any(word in str(error).lower() for word in words)


def words(base: Base) -> str:
    """How much of the base this process holds, in words."""
    everything = sum(p.numel() for p in base.model.parameters())
    own = sum(held(p).numel() for p in base.model.parameters())
    return (
        f"sharded: each of {processes.count()} processes holds {own:,} of {everything:,} parameters of the base, "
        "all of them while it samples (without the lean decode step)"
    )


def _parts(body: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in body.modules() if isinstance(module, FSDPModule)]


def _layers(model: nn.Module) -> list[Any]:
    """The decoder layers: the outermost that can be recomputed each by itself."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(below) for below in module.modules())
    return found


@cache
def _mesh(kind: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (processes.count(),))
