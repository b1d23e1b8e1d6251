"""Which processes hold the parts of a layer among them: all (`full`), or those of each machine (`hybrid`).

With `hybrid` every machine holds all layers, in parts; a layer is gathered within the machine, and gradients of its
parts are added up between machines. What FSDP2 sends for that is counted here.
"""

from __future__ import annotations

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
COPIES, PARTS = "copies", "parts"
"""Dimensions of the mesh: machines, and the processes of one."""
_asked: Shard = "none"
_beside: int = 1


def ask(shard: Shard) -> None:
    """How bases that are loaded from here on are to be held; all processes ask together. Raises RecipeError for
    `hybrid` where there is nothing that it could do."""
    global _asked, _beside  # noqa: PLW0603
    _asked, _beside = shard, 1
    _mesh.cache_clear()
    if shard != "none" and processes.count() > 1:
        _beside = _agreed(processes.gather(list(processes.beside()), "comparing machines"), hybrid=shard == "hybrid")
        mesh(pick_device().type)


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
    """Whether a base that is loaded now is to be held in parts: several processes load it together."""
    return _asked != "none" and processes.count() > 1


def count() -> int:
    """Parts of a tensor."""
    return _beside if _asked == "hybrid" else processes.count()


def rank() -> int:
    """Which of them this process holds."""
    return processes.rank() % count()


def mesh(kind: str) -> Any:
    """The processes as FSDP2 wants to know them."""
    return _mesh(kind)


@cache
def _mesh(kind: str) -> Any:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    total = processes.count()
    if _asked != "hybrid":
        return init_device_mesh(kind, (total,))
    copies = processes.own_of([range(place, total, _beside) for place in range(_beside)])
    parts = processes.own_of([range(first, first + _beside) for first in range(0, total, _beside)])
    ranks = torch.arange(total).view(-1, _beside)
    return DeviceMesh.from_group([copies, parts], kind, ranks, mesh_dim_names=(COPIES, PARTS))


def in_turn(work: Callable[[], None], doing: str) -> None:
    """work() on every process, those of a machine one after the other: what it takes is there once a machine. It fails
    as `processes.together`."""
    for turn in range(_beside):
        mine = turn == processes.beside()[0]
        processes.together(work if mine else _nothing, doing)


def _nothing() -> None:
    return None


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


def counted(part: Any, kind: str) -> None:
    """Count what FSDP2 sends for one module that it shares out: a ring's share of each collective. Before PyTorch 2.9
    it cannot be asked, and nothing is counted."""
    if not hasattr(part, "set_custom_all_gather"):
        return
    part.set_custom_all_gather(_Gather())
    part.set_custom_reduce_scatter(_Scatter())
    found = _mesh(kind)
    if found.ndim == 2:
        copies = found.size(0)
        part.set_all_reduce_hook(lambda own: traffic.add("copied", 2 * own.nbytes * (copies - 1) / copies))
