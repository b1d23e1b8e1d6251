"""How the layers of a base are shared out when it is loaded (models/sharding.py says what that is): one by one, so that
a device never holds more of them than its parts and one that is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhf_cli.errors import ModelError
from rlhf_cli.models import memory, mesh, quantised
from rlhf_cli.models.sharding import as_trained, layers_of, parts_of, split

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
    if not layers_of(model):
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
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    layers, body = layers_of(model), model.base_model
    as_kept = compute == next((p.dtype for p in layers[0].parameters() if p.is_floating_point()), compute)
    about: dict[str, Any] = {
        "mesh": mesh.mesh(device.type),
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if as_kept else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if mesh.offloads() else OffloadPolicy(),
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
    for part in parts_of(body):
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
        mesh.counted(part)
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
    with as_trained(parts_of(body)), torch.no_grad(), torch.autocast(device.type, compute):
        body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
