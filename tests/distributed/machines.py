"""Machines that are none: a torchrun for each, all of them on this one, which meet over a rendezvous."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.several import ROOT


def heads(counts: Sequence[int], restarts: int = 0) -> list[list[str]]:
    """The torchrun of each of some machines with so many processes, but for what they are to run."""
    line = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", str(restarts)]
    if len(counts) == 1:
        return [[*line, "--standalone", "--nproc-per-node", str(counts[0])]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line += ["--nnodes", str(len(counts)), "--rdzv-backend", "c10d", "--rdzv-id", "x"]
    line += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
    return [[*line, "--nproc-per-node", str(count)] for count in counts]


def launch(
    folder: Path, commands: Sequence[Sequence[object]], counts: Sequence[int], kill: dict[str, Any] | None = None
) -> tuple[list[int], str]:
    """As several.launch, by so many processes on each of some machines."""
    work = folder / "work.json"
    told = {"commands": [[str(a) for a in line] for line in commands], "kill": kill, "values": {}}
    work.write_text(json.dumps(told))
    said, agents = [], []
    with ExitStack() as stack:
        for head in heads(counts):
            line = [*head, "-m", "tests.several", str(work)]
            agent = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            agents.append(stack.enter_context(agent))
            stack.callback(agent.kill)
        said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert work.with_suffix(".codes").exists(), "\n".join(said)[-3000:]
    return json.loads(work.with_suffix(".codes").read_text()), "\n".join(said)
