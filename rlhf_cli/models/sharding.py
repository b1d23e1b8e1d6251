"""Layers held in parts: each of several processes keeps a share of every matrix of a base's layers (PyTorch's FSDP2).
Which processes share with which: models/mesh.py; matrices in 4 bits: models/quantised.py.

A layer is gathered when its turn comes and let go after it; gradients of trained matrices are added up as each layer's
backward pass ends. So every forward and backward of such a base is made by all processes together, in the same order
(train/lockstep.py), or between `gathered`. Vectors (norms, biases), embeddings, heads and adapters stay whole on every
process, and their gradients are added up once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_cli.errors import ModelError
from rlhf_cli.models import absent, memory, mesh, processes, quantised

if TYPE_CHECKING:
    from rlhf_cli.models.base import Base
    from rlhf_cli.models.roles import Role

Quantise = Callable[[nn.Module, torch.device], None]
"""Quantises on a device what was put off within a module."""


def shard(model: Any, device: torch.device, compute: torch.dtype, source: str, quantization: Any = None) -> bool:
    """Keep this process's part of the matrices of every layer, on the device; all else goes there whole. Whether all
    processes must `meet` then.

    compute: the dtype in which trained layers are gathered. quantization: how the layers of a plain model are to be
    quantised. Raises ModelError for weights quantised otherwise than in 4 bits, for those by a PyTorch that cannot, for
    an architecture without layers that are known, and when memory does not suffice.
    """
    packed = getattr(model, "is_loaded_in_4bit", False)
    if packed:
        quantised.check_parts(source)
    other = quantization is not None and not quantization.load_in_4bit
    if other or (not packed and getattr(model.config, "quantization_config", None) is not None):
        raise ModelError("weights that are quantised otherwise than in 4 bits cannot be shared out", source,
                         "use distributed.shard: none")  # fmt: skip
    if not _layers(model):
        raise ModelError(f"{type(model).__name__} has no layers that could be shared out", source,
                         "use distributed.shard: none")  # fmt: skip
    try:
        put_off = quantization is not None and not packed
        quantise = quantised.put_off(model, quantization) if put_off else None
        return _share_out(model, device, compute, quantise)
    except Exception as error:
        if not memory.ran_out(error):
            raise
        raise ModelError("the weights do not fit the memory", source, "use more processes") from error


def _share_out(model: Any, device: torch.device, compute: torch.dtype, quantise: Quantise | None) -> bool:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers, body = _layers(model), model.base_model
    as_kept = compute == next((p.dtype for p in layers[0].parameters() if p.is_floating_point()), compute)
    about: dict[str, Any] = {
        "mesh": mesh.mesh(device.type),
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if as_kept else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    for layer in layers:  # one after the other, so that no more than one is whole on the device
        if quantise is not None:
            quantise(layer, device)
        joined = quantised.in_4_bits(layer)
        for linear in joined:
            quantised.join(linear)
        fully_shard(layer, **about, ignored_params={p for p in layer.parameters() if p.ndim < 2})
        for linear in joined:
            quantised.mark(linear)
    if quantise is not None:
        quantise(model, device)
    whole = {p for p in model.parameters() if not split(p)}
    fully_shard(body, **about, ignored_params=whole)
    for part in _parts(body):
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
        mesh.counted(part, device.type)
    for parameter in whole:  # else each keeps the mapped file of all weights in memory
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(device, copy=True)
    for module in model.modules():
        module._buffers.update({k: v if v is None else v.to(device) for k, v in module._buffers.items()})
    return not as_kept


def in_parts(
    read: Callable[[], Any], device: torch.device, compute: torch.dtype, source: str, quantization: Any
) -> Any:
    """A model that `read` gives, held in parts. The processes of a machine read it one after the other, so that it is
    there whole once. It fails as `processes.together` and `shard`."""
    found: list[Any] = []
    unmet = False

    def work() -> None:
        nonlocal unmet
        if quantization is not None:
            quantised.check_parts(source)  # before anything is read
        model = read()
        unmet = shard(model, device, compute, source, quantization)
        quantised.keep_4bit_layout(model)
        found.append(model)
        memory.give_back()

    mesh.in_turn(work, f"reading {source}")
    if unmet:
        meet(found[0], device, compute)
    return found[0]


def meet(model: Any, device: torch.device, compute: torch.dtype) -> None:
    """A first forward with every matrix to be trained, of all processes together."""
    body = model.base_model
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
    parts = full.chunk(mesh.count(), 0)
    return parts[mesh.rank()] if mesh.rank() < len(parts) else full[:0]


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
        if not absent.of_others(error):
            raise
        raise processes.lost(doing) from error


def words(base: Base) -> str:
    """How much of the base this process holds, in words."""
    counts = [(quantised.numbers(p), held(p).numel() / max(p.numel(), 1)) for p in base.model.parameters()]
    everything, own = sum(n for n, _ in counts), sum(round(n * share) for n, share in counts)
    among = "" if mesh.count() == processes.count() else f" ({mesh.count()} of a machine share its layers out)"
    return (
        f"sharded: each of {processes.count()} processes{among} holds {own:,} of {everything:,} parameters of the "
        "base, all of them while it samples (without the lean decode step)"
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
