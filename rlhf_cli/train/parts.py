"""Optimisers over parameters that are held in parts: each process steps its own part, as a plain tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_cli.models import mesh, processes, sharding
from rlhf_cli.train import checkpoint

Named = list[tuple[str, nn.Parameter]]
Lent = list[tuple[nn.Parameter, nn.Parameter]]
"""What stands for a parameter in the optimiser, in the same memory, and the parameter."""


def lend(parameters: Named) -> tuple[Named, Lent]:
    """What an optimiser is given, and the parameters among them that are held in parts."""
    lent = {name: (nn.Parameter(sharding.held(p)), p) for name, p in parameters if sharding.split(p)}
    return [(name, lent[name][0] if name in lent else p) for name, p in parameters], list(lent.values())


def hand_over(lent: Lent) -> None:
    """Give the optimiser the gradients of its parts."""
    for own, parameter in lent:
        assert own.data_ptr() == sharding.held(parameter).data_ptr()
        own.grad = None if parameter.grad is None else sharding.held(parameter.grad)


def forget(optimizer: Optimizer, lent: Lent) -> None:
    """No gradients any more."""
    optimizer.zero_grad(set_to_none=True)
    for _, parameter in lent:
        parameter.grad = None


def clip(parameters: Sequence[nn.Parameter], limit: float, doing: str) -> float:
    """As torch's `clip_grad_norm_`, over whole parameters and parts: the norm before clipping."""
    if not any(sharding.split(p) for p in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    known = [(sharding.split(p), sharding.held(p.grad)) for p in parameters if p.grad is not None]
    squares = [
        sum(float(torch.linalg.vector_norm(grad, dtype=torch.float64)) ** 2 for split, grad in known if split is kind)
        for kind in (True, False)
    ]
    norm = math.sqrt(sum(processes.gather(squares[0], doing)[: mesh.count()]) + squares[1])  # of one copy
    if (scale := limit / (norm + 1e-6)) < 1.0:
        for _, grad in known:
            grad.mul_(scale)
    return norm


def save(optimizer: Optimizer, lent: Lent) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `checkpoint.save_optimizer`, every part made whole; all processes ask together."""
    tensors, state = checkpoint.save_optimizer(optimizer)
    parameters = _whole(optimizer, lent)
    for name in tensors:
        parameter = parameters[int(name.partition(".")[0])]
        if sharding.split(parameter):
            tensors[name] = sharding.whole_like(tensors[name], parameter)
    return tensors, state | {"shapes": _shapes(optimizer, lent)}


def load(optimizer: Optimizer, lent: Lent, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """As `checkpoint.load_optimizer`, of tensors that are whole. Raises ModelError."""
    parameters = _whole(optimizer, lent)
    if state["shapes"] == _shapes(optimizer, lent) and lent:
        state = state | {"shapes": [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]}
        for name, tensor in tensors.items():
            parameter = parameters[int(name.partition(".")[0])]
            if tensor.shape == parameter.shape:
                tensors[name] = sharding.part(tensor, parameter)
    checkpoint.load_optimizer(optimizer, tensors, state)


def _whole(optimizer: Optimizer, lent: Lent) -> list[nn.Parameter]:
    """The parameters of an optimiser in its order."""
    known = {id(own): parameter for own, parameter in lent}
    return [known.get(id(p), p) for group in optimizer.param_groups for p in group["params"]]


def _shapes(optimizer: Optimizer, lent: Lent) -> list[list[list[int]]]:
    """Of the whole parameters, group by group."""
    known = {id(own): parameter for own, parameter in lent}
    return [[list(known.get(id(p), p).shape) for p in group["params"]] for group in optimizer.param_groups]
