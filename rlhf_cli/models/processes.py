"""Several processes that train one model: what they tell one another. With one process, nothing is told.

Every process holds the whole model and computes a share of each step; what they compute is put together here, in the
order of the processes, so that all go on with the same numbers to the last bit. Collectives are torch.distributed's
(gloo for what lies in memory, NCCL for what lies on a GPU). Words travel as JSON, numbers as tensors, nothing pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_cli.errors import ModelError, RlhfError
from rlhf_cli.models import absent, memory, traffic
from rlhf_cli.models.absent import Group, Lost
from rlhf_cli.models.device import pick_device
from rlhf_cli.models.meeting import agree
from rlhf_cli.runs.place import Place

T = TypeVar("T")
BUCKET = 1 << 24
"""Numbers in one reduction: 64 MiB."""


_group: Group | None = None


class Elsewhere(RlhfError):
    """Another process has failed; it says itself why."""

    def __init__(self, rank: int, code: int) -> None:
        super().__init__(f"process {rank} has failed")
        self.exit_code = code


# --- beginning and end -----------------------------------------------------------------------------------------------


def start(place: Place, seconds: float) -> None:
    """Meet the others; this process's device becomes the current one. seconds: how long a collective may wait.

    Raises ModelError: no GPU for it on a machine that has some, or not all processes came.
    """
    global _group  # noqa: PLW0603
    import torch.distributed as dist

    if place.world == 1:
        return
    cuda = torch.cuda.is_available()
    if cuda and place.local >= torch.cuda.device_count():
        raise ModelError(f"process {place.rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}",
                         "torchrun --nproc-per-node", "start as many processes as there are GPUs")  # fmt: skip
    if cuda:
        torch.cuda.set_device(place.local)
    limit = timedelta(seconds=seconds)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"rlhf/{agree(dist.PrefixStore('rlhf', store), place, seconds)}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank,
            world_size=world, timeout=limit,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the {place.world} processes did not find one another: {_line(error)}", "torchrun") from error
    _group = Group(place, dist.PrefixStore("told", store), seconds)
    absent.join(_group)
    traffic.begin()


def stop() -> None:
    """Leave the others in peace."""
    global _group  # noqa: PLW0603
    if _group is not None:
        import torch.distributed as dist

        _group = None
        dist.destroy_process_group()


def met() -> bool:
    """Whether there are others."""
    return _group is not None


def speaks(error: BaseException) -> bool:
    """Whether it is for this process to tell of its error, so that one line does."""
    return _group is None or absent.speaks(_group, elsewhere=isinstance(error, Elsewhere))


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process computes whole what it is asked, and tells nobody."""
    if _group is None:
        yield
        return
    _group.alone += 1
    try:
        yield
    finally:
        _group.alone -= 1


# --- who -----------------------------------------------------------------------------------------------------------


def count() -> int:
    """Processes that share the work at hand."""
    return 1 if _group is None or _group.alone else _group.place.world


def rank() -> int:
    """Which of all this is; 0 writes."""
    return 0 if _group is None else _group.place.rank


def beside() -> tuple[int, int]:
    """Which of the processes of this machine this is, and how many there are."""
    return (0, 1) if _group is None else (_group.place.local, _group.place.beside)


def own_of(sets: Sequence[Sequence[int]]) -> Any:
    """The torch.distributed group of that one of these sets of processes which this one is in; all ask for the same
    sets together. Its collectives wait as long for one another as those of all."""
    import torch.distributed as dist

    assert _group is not None
    limit = timedelta(seconds=_group.seconds)
    made = [dist.new_group(list(ranks), timeout=limit) for ranks in sets]  # every process makes every group
    return next(group for group, ranks in zip(made, sets, strict=True) if rank() in ranks)


# --- telling -------------------------------------------------------------------------------------------------------


def gather(thing: Any, doing: str) -> list[Any]:
    """A thing of each process, as JSON, in their order. Raises Lost."""
    if count() == 1:
        return [thing]
    said = torch.frombuffer(bytearray(json.dumps(thing).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in _gathered(said, doing)]


def gather_rows(rows: Tensor | None, doing: str) -> list[Tensor]:
    """Rows (n, ...) of each process, as many as it has, on the CPU; None of one that has none. Raises Lost."""
    about = None if rows is None else (str(rows.dtype).removeprefix("torch."), list(rows.shape))
    every = gather(about, doing)
    kinds = [(dtype, shape[1:]) for dtype, shape in (one for one in every if one is not None)]
    if not kinds:
        return [torch.zeros(0) for _ in every]
    dtype, tail = kinds[0]
    own = torch.zeros(0, *tail, dtype=getattr(torch, dtype)) if rows is None else rows.detach().cpu().contiguous()
    parts = _gathered(own.view(-1).view(torch.uint8) if own.numel() else torch.zeros(0, dtype=torch.uint8), doing)
    return [part.view(own.dtype).view(-1, *tail) if part.numel() else own[:0] for part in parts]


def together(work: Callable[[], Any], doing: str) -> list[Any]:
    """What work() says on each process, as JSON, in their order.

    Where it fails on one it fails on all: with its own error there, elsewhere with Elsewhere; when memory ran out, as
    that. Raises Lost.
    """
    if count() == 1:
        return [work()]
    said, caught, failed = None, None, None
    try:
        said = work()
    except Exception as error:
        caught, failed = error, [memory.ran_out(error), getattr(error, "exit_code", 1)]
    every = gather([failed, said], doing)
    failures = {r: about for r, (about, _) in enumerate(every) if about is not None}
    deadly = {r: code for r, (of_memory, code) in failures.items() if not of_memory}
    if caught is not None and (rank() in deadly or not deadly):
        raise caught
    if deadly:
        raise Elsewhere(*next(iter(deadly.items()))) from caught
    if failures:
        raise torch.OutOfMemoryError(f"process {next(iter(failures))} ran out of memory")
    return [said for _, said in every]


def first(work: Callable[[], Any], doing: str) -> Any:
    """What work() says on process 0, as JSON; the others wait for it. It fails as `together`."""
    if count() == 1:
        return work()

    def on_first() -> Any:
        if rank() != 0:
            return None
        with alone():
            return work()

    return together(on_first, doing)[0]


def same(thing: Any, doing: str) -> None:
    """ModelError unless a thing, as JSON, is the same on every process. Raises Lost."""
    every = gather(thing, doing)
    for other, told in enumerate(every):
        if json.dumps(told) != json.dumps(every[0]):
            raise ModelError(f"process {other} has {told}, process 0 {every[0]}, while {doing}", "torchrun",
                             "let all machines see the same files and have the same versions installed")  # fmt: skip


def add(parameters: Sequence[torch.nn.Parameter], doing: str, among: Any = None) -> int:
    """The sum of the processes' gradients, or of those among a group, in all of them; a parameter without one anywhere
    stays so. Bytes that were handed to the reductions. Raises Lost."""
    if _group is None or count() == 1 or not parameters:
        return 0
    device, handed = pick_device(), 0  # whose collectives are quick, also where gradients lie in main memory
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    _reduce(has, doing, among, largest=True)
    kept = [p for p, flag in zip(parameters, has.tolist(), strict=True) if flag]
    for bucket in _buckets(kept):
        flat = torch.cat([_gradient(p).reshape(-1).float() for p in bucket]).to(device)
        _reduce(flat, doing, among)
        handed += flat.nbytes
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p).to(p)
    return handed


# --- collectives ---------------------------------------------------------------------------------------------------


def _gathered(own: Tensor, doing: str) -> list[Tensor]:
    """Bytes (n,) of each process, on the CPU."""
    import torch.distributed as dist

    assert _group is not None
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    with _others(doing):
        dist.all_gather(sizes, torch.tensor([own.numel()]))
    longest = max(int(size) for size in sizes)
    if not longest:
        return [own[:0] for _ in sizes]
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: own.numel()] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    with _others(doing):
        dist.all_gather(parts, padded)
    traffic.add("other", 8 + longest)
    return [part[: int(size)].clone() for part, size in zip(parts, sizes, strict=True)]


def _reduce(tensor: Tensor, doing: str, among: Any, *, largest: bool = False) -> None:
    """The sum, or the largest, of the tensors of all processes or of a group, in place."""
    import torch.distributed as dist

    with _others(doing):
        dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=among)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters that are reduced at once."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def _others(doing: str) -> Iterator[None]:
    """A collective: what goes wrong in it names who is missing."""
    assert _group is not None
    with absent.telling(_group, doing):
        yield


def lost(doing: str) -> Lost:
    """The error of a collective that was not told: of all who meet it, whoever does not say so is the missing one."""
    assert _group is not None
    return absent.silent(_group, doing)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
