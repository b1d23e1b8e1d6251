"""Runs of the command line in forks of a process that has imported everything, so that a death costs no new start.

Speaks JSON lines: {arguments, shim, said, strike, each, limits} -> {code, seconds}. The command is
`rlhf_cli.cli.app.main`, the very function that `python -m rlhf_cli` calls; its random generators are stirred first, as
in any new process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.faults import shim
from tests.faults.each import Each

TOO_LONG = 600.0


@dataclass(frozen=True)
class Strike:
    """A signal from outside: after so many seconds, or once a file has so many lines."""

    after: float = 0.0
    path: str = ""
    lines: int = 0
    signum: int = int(signal.SIGKILL)

    def due(self, seconds: float) -> bool:
        """Whether it is time."""
        if not self.path:
            return seconds >= self.after
        try:
            return Path(self.path).read_bytes().count(b"\n") >= self.lines
        except FileNotFoundError:
            return False


def watch(pid: int, ended: Callable[[], int | None], strike: Strike | None) -> tuple[int, float]:
    """Wait for the end of a child, striking it on the way: its exit code (negative: the signal), and the seconds."""
    start = time.monotonic()
    struck = strike is None
    while (code := ended()) is None:
        seconds = time.monotonic() - start
        if not struck and strike is not None and strike.due(seconds):
            os.kill(pid, strike.signum)
            struck = True
        if seconds > TOO_LONG:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return code, time.monotonic() - start


def _warm() -> None:
    """Import what a run imports. No computation: a fork must not inherit torch's threads."""
    import matplotlib.backends.backend_svg
    import peft
    import torch
    import transformers

    from rlhf_cli.catalog import STAGES
    from rlhf_cli.cli import app, view

    torch.set_num_threads(1)
    assert all((app, view, matplotlib.backends.backend_svg))
    assert all((peft.LoraModel, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast))
    for stage in STAGES.values():
        stage.load()


def _stir() -> None:
    """Other random states than the nursery's, as a new process would have."""
    import random

    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.seed()


def _child(request: dict[str, Any]) -> NoReturn:
    """The command, from its first line to its exit code."""
    from rlhf_cli.cli import app

    code = 1
    try:
        said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _stir()
        for name, value in request["limits"].items():
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if name == "AS" else 0
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (own + value, resource.RLIM_INFINITY))
        if request["each"]:
            asked = request["each"]
            Each(Path(asked["run"]), Path(asked["out"]), asked["parts"]).install()
        else:
            shim.arm(request["shim"])
        sys.argv = ["rlhf", *request["arguments"]]
        app.main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    finally:
        os._exit(code)


def main() -> None:
    """Serve until stdin ends."""
    _warm()
    answer = os.fdopen(os.dup(1), "w")
    print(json.dumps("ready"), file=answer, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(request)

        def ended(pid: int = pid) -> int | None:
            found, status = os.waitpid(pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if found else None

        code, seconds = watch(pid, ended, Strike(**request["strike"]) if request["strike"] else None)
        print(json.dumps({"code": code, "seconds": seconds}), file=answer, flush=True)


if __name__ == "__main__":
    main()
