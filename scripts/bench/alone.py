"""A process of its own for a figure: it runs a real command up to a place, measures there, and leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from probe import probe


@contextmanager
def cost(found: dict[str, Any]) -> Iterator[None]:
    """Seconds, and MiB before and at the peak: of this process, or of its GPU."""
    import torch

    if not torch.cuda.is_available():
        with probe(found):
            yield
        found["seconds"] = found["cpu"]
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    idle, began = torch.cuda.memory_allocated(), time.perf_counter()
    yield
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    found |= {"seconds": time.perf_counter() - began, "idle": idle / 2**20, "peak": peak / 2**20}


def repeated(function: Callable[[], Any], turns: int) -> dict[str, float]:
    """The least seconds of some turns after one to warm up; MiB of all over what there was before."""
    each: list[dict[str, Any]] = [{} for _ in range(turns + 1)]
    for found in each:
        with cost(found):
            function()
    seconds = min(found["seconds"] for found in each[1:])
    return {"seconds": seconds, "memory": max(found["peak"] for found in each) - each[0]["idle"]}


def leave(out: Path, found: dict[str, Any]) -> NoReturn:
    """Write what was found, and go."""
    (out / "found.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


def command(made: dict[str, Any], out: Path, *options: str) -> None:
    """The real command on a recipe."""
    import yaml

    from rlhf_cli.cli.app import main

    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    sys.argv = ["rlhf", made["stage"], str(path), *options]
    main()


def process(script: str, out: Path, words: Sequence[str], cache: str = "") -> dict[str, Any]:
    """What a process of its own finds out."""
    (out / "found.json").unlink(missing_ok=True)
    shutil.rmtree(out / "run", ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                                "RLHF_CACHE": cache}  # fmt: skip
    done = subprocess.run(
        [sys.executable, script, "--out", str(out), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if not (out / "found.json").is_file():
        sys.exit(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((out / "found.json").read_text(encoding="utf-8"))
    return found
