"""What memory is free on the device, what a computation took of it at most, and how running out of it shows.

The only place that asks: everything that decides by memory takes these numbers as arguments.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of a control group, of its second and its first version: the limit, and what is used."""


NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "can't start new thread")
"""How libraries say it."""


def room(device: torch.device) -> int:
    """Bytes that could be allocated now: on a card what is free or only cached; else what the machine, and every
    control group this process is in, leaves to it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min([_available(), *_grouped()])


def peak(device: torch.device, function: Callable[[], object]) -> int | None:
    """Bytes that function() held at most beyond what was held before; None on a device that does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def most() -> int:
    """Bytes that were held at most: on a card since this was asked last, elsewhere by the process so far."""
    if torch.cuda.is_available():
        found = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return int(found)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """Bytes of main memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: at most, so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Return freed memory that the C library keeps for later to the system."""
    with suppress(OSError, AttributeError):  # only glibc can
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def ran_out(error: Exception) -> bool:
    """Whether this is the device's, the CPU allocator's or the system's word for no memory."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in NO_MEMORY)


def _available() -> int:
    """What the system could give without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _grouped() -> Iterator[int]:
    """What each control group with a limit leaves; pages of files that can be dropped count as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = CGROUPS / controllers
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            for limit, used in _LIMITS:
                if (most := _number(folder / limit)) is not None:
                    yield max(0, most - (_number(folder / used) or 0) + _droppable(folder))
            if folder == top:
                break


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _droppable(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
