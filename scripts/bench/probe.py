"""What a stretch of a process costs: CPU seconds, wall seconds, and the peak of resident memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def memory(key: str) -> float:
    """MiB of VmRSS or VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(key))


@contextmanager
def probe(found: dict[str, Any]) -> Iterator[None]:
    """What the body costs."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts again here
    idle, cpu, clock = memory("VmRSS"), time.process_time(), time.perf_counter()
    yield
    found |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - clock, "idle": idle,
              "peak": memory("VmHWM")}  # fmt: skip
