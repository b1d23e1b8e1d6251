"""Which processes hold the parts of a layer among them: all (`full`), or those of each machine (`hybrid`).

With `hybrid` every machine holds all layers, in parts, and FSDP2 knows the processes of one machine only: a layer is
gathered among them, micro-batch by micro-batch. Between machines the gradients of the parts are added up by us, once a
step. (FSDP2 could do that as well, after the last micro-batch; but it forgets what it has kept until then as soon as it
is told that no layers need to be gathered for backward passes that never come.) What is sent is counted here.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cli.errors import RecipeError
from rlhf_cli.models import processes, traffic
from rlhf_cli.models.device import pick_device

Shard = Literal["none", "full", "hybrid"]
CARDS: tuple[str, ...] = ("cuda",)
"""Kinds of devices with a memory of their own, whose parts can lie in main memory."""
_asked: Shard = "none"
_offload: bool = False
_beside: int = 1
_copies: Any = None
"""Of `hybrid`: the group of those that hold the same part, one on each machine."""


def ask(shard: Shard, *, offload: bool = False) -> None:
    """How bases that are loaded from here on are to be held; all processes ask together. offload: with their parts in
    main memory. Raises RecipeError for `hybrid` where there is nothing that it could do."""
    global _asked, _offload, _beside, _copies  # noqa: PLW0603
    _asked, _offload, _beside, _copies = shard, offload, 1, None
    _mesh.cache_clear()
    if wanted() and not processes.met():
        _start_alone()
    if shard != "none" and processes.count() > 1:
        _beside = _agreed(processes.gather(list(processes.beside()), "comparing machines"), hybrid=shard == "hybrid")
        mesh(pick_device().type)
    if shard == "hybrid" and processes.count() > 1:
        total = processes.count()
        _copies = processes.own_of([range(place, total, _beside) for place in range(_beside)])


def _start_alone() -> None:
    """What FSDP2 wants to be there also where one process is all there are: nothing is sent."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(leave)


def leave() -> None:
    """Bases that are loaded from here on are held whole."""
    ask("none")
    if dist.is_initialized() and not processes.met():
        dist.destroy_process_group()


def _agreed(told: Sequence[Sequence[int]], *, hybrid: bool) -> int:
    """Processes of the largest machine, from what each says: its place on its machine, and how many are there."""
    sizes = [size for _, size in told]
    if not hybrid:
        return max(sizes)
    where, size = "distributed.shard", sizes[0]
    if any(other != size for other in sizes) or any(rank % size != place for rank, (place, _) in enumerate(told)):
        raise RecipeError(f"hybrid needs as many processes on each machine, and there are {_several(sizes)}", where,
                          "start as many on each, or set full")  # fmt: skip
    if size == len(told):
        raise RecipeError(f"hybrid copies layers between machines, and all {size} processes are on one", where,
                          "set full, which is the same there")  # fmt: skip
    if size == 1:
        raise RecipeError("hybrid shares layers out within a machine, and there is one process on each", where,
                          "set full to share them out between machines, or none")  # fmt: skip
    return size


def _several(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sorted(set(sizes)))) if len(set(sizes)) > 1 else f"{sizes[0]} in another order"


def wanted() -> bool:
    """Whether a base that is loaded now is to be held in parts: several processes load it together, or one keeps the
    only part in main memory."""
    return _asked != "none" and (processes.count() > 1 or (offloads() and not processes.met()))


def offloads() -> bool:
    """Whether parts lie in main memory, away from the device that computes."""
    return _offload and pick_device().type in CARDS


def count() -> int:
    """Parts of a tensor."""
    return _beside if _asked == "hybrid" else processes.count()


def rank() -> int:
    """Which of them this process holds."""
    return processes.rank() % count()


def mesh(kind: str) -> Any:
    """The processes that share layers out with this one, as FSDP2 wants to know them."""
    return _mesh(kind)


@cache
def _mesh(kind: str) -> Any:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    total = processes.count()
    if _asked != "hybrid" or total == 1:
        return init_device_mesh(kind, (total,))
    parts = processes.own_of([range(first, first + _beside) for first in range(0, total, _beside)])
    return DeviceMesh.from_group(parts, kind)


def in_turn(work: Callable[[], None], doing: str) -> None:
    """work() on every process, those of a machine one after the other: what it takes is there once a machine. It fails
    as `processes.together`."""
    for turn in range(_beside):
        mine = turn == processes.beside()[0]
        processes.together(work if mine else _nothing, doing)


def _nothing() -> None:
    return None


def add(parts: Sequence[torch.nn.Parameter], doing: str) -> None:
    """The sum of the gradients of parts over the machines that hold them all. Raises Lost."""
    if _copies is not None:
        copies = _copies.size()
        traffic.add("copied", 2 * processes.add(parts, doing, _copies) * (copies - 1) / copies)


# --- what is sent ----------------------------------------------------------------------------------------------------


class _Gather:
    """FSDP2's gathering of a layer, counted."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        traffic.add("gathered", input_tensor.nbytes * (group.size() - 1))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Scatter(_Gather):
    """FSDP2's sum of the gradients of a layer, each process getting that of its part; counted."""

    def __call__(  # type: ignore[override]
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        traffic.add("scattered", output_tensor.nbytes * (group.size() - 1))
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the older name
        return scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def counted(part: Any) -> None:
    """Count what FSDP2 sends for one module that it shares out: a ring's share of each collective. Before PyTorch 2.9
    it cannot be asked, and nothing is counted."""
    if not hasattr(part, "set_custom_all_gather"):
        return
    part.set_custom_all_gather(_Gather())
    part.set_custom_reduce_scatter(_Scatter())
