"""Machines that are none: a torchrun for each, all of them on this one, which meet over a rendezvous."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.several import ROOT


def launch(folder: Path, commands: Sequence[Sequence[object]], counts: Sequence[int]) -> tuple[list[int], str]:
    """As several.launch, by so many processes on each of some machines."""
    work = folder / "work.json"
    told = {"commands": [[str(a) for a in line] for line in commands], "kill": None, "values": {}}
    work.write_text(json.dumps(told))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said, agents = [], []
    with ExitStack() as stack:
        for count in counts:
            line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(counts)), "--nproc-per-node"]
            line += [str(count), "--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", f"127.0.0.1:{port}"]
            line += ["-m", "tests.several", str(work)]
            agent = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            agents.append(stack.enter_context(agent))
            stack.callback(agent.kill)
        said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert work.with_suffix(".codes").exists(), "\n".join(said)[-3000:]
    return json.loads(work.with_suffix(".codes").read_text()), "\n".join(said)
