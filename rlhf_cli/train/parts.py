"""Optimisers over parameters that are held in parts: each process steps its own part, as a plain tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_cli.models import mesh, processes, sharding
from rlhf_cli.train import states

Named = list[tuple[str, nn.Parameter]]
Lent = list[tuple[nn.Parameter, nn.Parameter]]
"""What stands for a parameter in the optimiser, in the same memory, and the parameter."""


def lend(parameters: Named) -> tuple[Named, Lent]:
    """What an optimiser is given, and the parameters among them that are held in parts."""
    lent = {name: (nn.Parameter(sharding.held(p)), p) for name, p in parameters if sharding.split(p)}
    return [(name, lent[name][0] if name in lent else p) for name, p in parameters], list(lent.values())


def hand_over(lent: Lent, doing: str) -> None:
    """Give the optimiser the gradients of its parts, added up over all who hold the same ones. Raises Lost."""
    for own, parameter in lent:
        assert own.data_ptr() == sharding.held(parameter).data_ptr()
        own.grad = None if parameter.grad is None else sharding.held(parameter.grad)
        parameter.grad = None
    mesh.add([own for own, _ in lent], doing)


def forget(optimizer: Optimizer, lent: Lent) -> None:
    """No gradients any more."""
    optimizer.zero_grad(set_to_none=True)
    for _, parameter in lent:
        parameter.grad = None


def clip(parameters: Sequence[nn.Parameter], lent: Lent, limit: float, doing: str) -> float:
    """As torch's `clip_grad_norm_`, over whole parameters and what is lent of others: the norm before clipping."""
    if not lent:
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    found = [own.grad for own, _ in lent], [p.grad for p in parameters if not sharding.split(p)]
    known = [[grad for grad in grads if grad is not None] for grads in found]
    squares = [sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in grads) for grads in known]
    norm = math.sqrt(sum(processes.gather(squares[0], doing)[: mesh.count()]) + squares[1])  # of one copy
    if (scale := limit / (norm + 1e-6)) < 1.0:
        for grad in chain(*known):
            grad.mul_(scale)
    return norm


def save(optimizer: Optimizer, lent: Lent) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """As `states.save_optimizer`: the tensors that every process has, those that are of its parts, and the rest."""
    tensors, state = states.save_optimizer(optimizer)
    parameters = _whole(optimizer, lent)
    own = {}
    for name, tensor in tensors.items():
        parameter = parameters[int(name.partition(".")[0])]
        if sharding.shared(parameter) and tensor.shape == sharding.held(parameter).shape:
            own[name] = tensor
    return {k: t for k, t in tensors.items() if k not in own}, own, state | {"shapes": _shapes(optimizer, lent)}


def load(optimizer: Optimizer, lent: Lent, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """As `states.load_optimizer`, of tensors that are whole. Raises ModelError."""
    if state["shapes"] == _shapes(optimizer, lent) and lent:
        state = state | {"shapes": [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]}
        parameters = _whole(optimizer, lent)
        tensors = {name: _part(tensor, parameters[int(name.partition(".")[0])]) for name, tensor in tensors.items()}
    states.load_optimizer(optimizer, tensors, state)


def _part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of it, where the parameter is held in parts; free of the rest."""
    return sharding.part(tensor, parameter).clone() if tensor.shape == parameter.shape else tensor


def _whole(optimizer: Optimizer, lent: Lent) -> list[nn.Parameter]:
    """The parameters of an optimiser in its order."""
    known = {id(own): parameter for own, parameter in lent}
    return [known.get(id(p), p) for group in optimizer.param_groups for p in group["params"]]


def _shapes(optimizer: Optimizer, lent: Lent) -> list[list[list[int]]]:
    """Of the whole parameters, group by group."""
    known = {id(own): parameter for own, parameter in lent}
    return [[list(known.get(id(p), p).shape) for p in group["params"]] for group in optimizer.param_groups]
