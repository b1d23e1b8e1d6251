"""Starts the command: in a fork of the nursery, or in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults import shim
from tests.faults.each import PARTS
from tests.faults.nursery import Strike, watch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Attempt:
    """What became of one start of the command."""

    code: int
    said: str
    ops: list[tuple[str, str]]
    """Operations on the run directory, as (place, op), in their order."""
    whole: list[int]
    """Before each operation of a save, where that was asked for: the step of the newest whole checkpoint, -1: none."""
    struck: bool
    """Whether the fault inside the process happened."""
    seconds: float


def environment() -> dict[str, str]:
    """Of every process that is started: one thread, no network, no GPU, and this source."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    still = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **still, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}


class Launcher:
    """Holds the nursery. `start` runs `rlhf STAGE RECIPE` once, to its end or its death."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"], cwd=ROOT, env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> Launcher:
        assert self._answer() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nursery.communicate()

    def start(
        self,
        stage: str,
        recipe: Path,
        run: Path,
        blow: shim.Fault | Strike | None = None,
        fresh: bool = False,
        each: Path | None = None,
        parts: Sequence[str] = PARTS,
        verify: bool = False,
        limits: Mapping[str, int] | None = None,
    ) -> Attempt:
        """Run the command. blow: what happens to it on the way; fresh: in a new process; each: try every disk
        operation of some parts on the way (tests/faults/each.py), and write what came of it there; verify: look for a
        whole checkpoint before every operation of a save;
        limits: FSIZE, bytes of a file, or AS, bytes of memory beyond what the process has."""
        said, trace = self._folder / "said", self._folder / "trace"
        said.unlink(missing_ok=True)
        trace.unlink(missing_ok=True)
        armed = shim.encode(str(run), str(trace), blow if isinstance(blow, shim.Fault) else None, verify)
        strike = blow if isinstance(blow, Strike) else None
        if strike is not None and strike.path == "said":
            strike = Strike(strike.after, str(said), strike.lines, strike.signum)
        if fresh:
            code, seconds = self._new([stage, str(recipe)], armed, said, strike)
        else:
            asked = each and {"run": run, "out": each, "parts": parts}
            code, seconds = self._forked([stage, str(recipe)], armed, said, strike, asked, limits or {})
        lines = trace.read_text().splitlines() if trace.exists() else []
        split = [line.split(" ") for line in lines if line != "struck"]
        ops = [(place, op) for place, op, *_ in split if place != "whole"]
        whole = [int(step) for place, step, *_ in split if place == "whole"]
        text = said.read_text(errors="replace") if said.exists() else ""
        return Attempt(code, text, ops, whole, "struck" in lines, seconds)

    def _forked(
        self,
        arguments: list[str],
        armed: str,
        said: Path,
        strike: Strike | None,
        each: dict[str, Any] | None,
        limits: Mapping[str, int],
    ) -> tuple[int, float]:
        request = {"arguments": arguments, "shim": armed, "said": str(said), "strike": strike and asdict(strike)}
        request |= {"each": each, "limits": dict(limits)}
        assert self._nursery.stdin is not None
        print(json.dumps(request, default=str), file=self._nursery.stdin, flush=True)
        answer = self._answer()
        return answer["code"], answer["seconds"]

    def _new(self, arguments: list[str], armed: str, said: Path, strike: Strike | None) -> tuple[int, float]:
        around = environment()
        around["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/faults/site"), around["PYTHONPATH"]])
        around[shim.VARIABLE] = armed
        command = [sys.executable, "-m", "rlhf_cli", *arguments]
        with (
            said.open("ab") as out,
            subprocess.Popen(command, cwd=ROOT, env=around, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as child,
        ):
            return watch(child.pid, child.poll, strike)

    def _answer(self) -> Any:
        assert self._nursery.stdout is not None
        line = self._nursery.stdout.readline()
        assert line, "the nursery is gone"
        return json.loads(line)
