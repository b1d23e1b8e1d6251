"""Kills one of several processes at random moments, lets torchrun start them again, and compares what comes out with
the undisturbed run. `python -m tests.faults.ranks --kills 30 --seed 7`; `--only hybrid` for one kind.

Each kind is a run of two processes, or of two machines with two each. A kill hits any of them; the others must end by
themselves, within the time that a collective may wait, and torchrun starts all anew. `stopped` ones hang instead.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.models.absent import NO_STORE
from tests.distributed import machines
from tests.faults import judge, scenes
from tests.faults.launch import ROOT, environment
from tests.faults.nursery import Strike
from tests.stages import world as w

MOST = 4
"""Kills of one trial."""
TERM = 30.0
"""Seconds after which torchrun kills a process that does not obey SIGTERM."""
SLACK = 15.0
"""Seconds for a process to end once it knows, on a busy machine."""
FOREVER = 400.0
COME_BACK = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What several machines are told (docs/scaling.md)."""


@dataclass(frozen=True)
class Kind:
    """A run of several processes."""

    scene: str
    """Of tests/faults/scenes.py."""
    distributed: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    machines: tuple[int, ...] = (2,)
    """Processes on each."""
    signum: int = int(signal.SIGKILL)
    timeout: int = 120


FULL: dict[str, Any] = {"lora": None}
NF4 = {"model": {"quantization": "nf4"}}
KINDS = {
    "full": Kind("sft", {"shard": "full"}, FULL),
    "nf4": Kind("dpo", {"shard": "full"}, NF4),
    "ppo": Kind("ppo", {"shard": "full"}),
    "hybrid": Kind("sft", {"shard": "hybrid"}, FULL, machines=(2, 2)),
    "rows": Kind("dpo", {"sequence_parallel": 2}),
    "stopped": Kind("sft", {"shard": "full"}, FULL, signum=int(signal.SIGSTOP), timeout=20),
    "stopped-hybrid": Kind("sft", {"shard": "hybrid"}, FULL, (2, 2), int(signal.SIGSTOP), 20),
    "stopped-rows": Kind("dpo", {"sequence_parallel": 2}, {}, (2,), int(signal.SIGSTOP), 20),
}


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    trials: int = 0
    resumed: int = 0
    waited: float = 0.0
    """The longest that the others needed to end, in seconds."""
    at: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Job:
    """The processes of a run, from the start of their torchruns to the end of these."""

    def __init__(self, kind: Kind, recipe: Path, said: Path, restarts: int) -> None:
        self._recipe, self.said, self._stack = recipe, said, ExitStack()
        self._command = ["-m", "rlhf_cli", kind.scene, str(recipe)]
        self._heads = machines.heads(kind.machines, restarts)
        self._count = sum(kind.machines)
        self._around = environment() | {"RLHF_CACHE": ""} | (COME_BACK if len(kind.machines) > 1 else {})
        self.agents: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Job:
        out = self._stack.enter_context(self.said.open("wb"))
        for head in self._heads:
            agent = subprocess.Popen(
                [*head, *self._command], cwd=ROOT, env=self._around,
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self.agents.append(self._stack.enter_context(agent))
            self._stack.callback(self._end, agent)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self, agent: subprocess.Popen[bytes]) -> None:
        for pid in _children(agent.pid) if agent.poll() is None else ():
            _strike(pid, signal.SIGKILL)
        agent.kill()

    def ended(self) -> bool:
        """Whether all torchruns have."""
        return all(agent.poll() is not None for agent in self.agents)

    def processes(self) -> list[int]:
        """Those that compute, when all of them are there."""
        found = [pid for agent in self.agents if agent.poll() is None for pid in _children(agent.pid)
                 if str(self._recipe) in _line(pid)]  # fmt: skip
        return found if len(found) == self._count else []

    def wait(self) -> list[int]:
        """Until all have ended: the exit codes of the torchruns."""
        deadline = time.monotonic() + FOREVER
        while not self.ended():
            assert time.monotonic() < deadline, f"never ends: {self.said.read_text()[-2000:]}"
            time.sleep(0.05)
        return [agent.returncode for agent in self.agents]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _strike(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):  # it ended by itself
        os.kill(pid, signum)


# --- blows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A kind, and what its undisturbed run did."""

    name: str
    kind: Kind
    folder: Path
    seconds: float

    @property
    def run(self) -> Path:
        """Where the disturbed runs lie."""
        return self.folder / "run"

    @property
    def whole(self) -> Path:
        """The undisturbed one."""
        return self.folder / "whole"


def prepare(name: str, world: Path, folder: Path) -> Scene:
    """The undisturbed run."""
    kind = KINDS[name]
    folder.mkdir()
    about = {"distributed": kind.distributed | {"timeout": kind.timeout}}
    for part in ("run", "whole"):
        made = scenes.content(kind.scene, world, folder / part)
        w.save(w.merged(made, about, kind.more), folder / f"{part}.yaml")
    began = time.monotonic()
    with Job(kind, folder / "whole.yaml", folder / "whole.txt", 0) as job:
        assert set(job.wait()) == {0}, job.said.read_text()
    return Scene(name, kind, folder, time.monotonic() - began)


def draw(rng: random.Random, scene: Scene) -> Strike:
    """A random moment of what is still to come: a time, a step, or a checkpoint that is being written."""
    last, total = judge.last_line(scene.run), judge.last_line(scene.whole)
    how = rng.choices(("time", "step", "save"), (3, 4, 4))[0]
    if how == "time":
        return Strike(after=rng.uniform(0, scene.seconds), signum=scene.kind.signum)
    lines = 1 + last + rng.randint(1, max(1, (total - last) // 2))  # the line of step 0 comes before
    path = str(scene.run / ("checkpoints" if how == "save" else "metrics.jsonl"))
    return Strike(after=rng.uniform(0, 0.1), path=path, lines=lines, signum=scene.kind.signum)


def _due(strike: Strike, seconds: float) -> bool:
    """As Strike.due; of a folder of checkpoints: whether a draft lies there."""
    if strike.path.endswith("checkpoints"):
        return any(Path(strike.path).glob(".step-*"))
    return strike.due(seconds)


def blow(rng: random.Random, scene: Scene, job: Job, tally: Tally) -> bool:
    """Kill one of the processes, and wait until the others have ended. Whether the run had not ended before."""
    while not (pids := job.processes()):
        if job.ended():
            return False
        time.sleep(0.05)
    strike, began = draw(rng, scene), time.monotonic()
    while not _due(strike, time.monotonic() - began):
        if job.processes() != pids or (scene.run / "DONE").exists():
            return False  # they end, or have already: torchrun would wait five minutes for one that dies then
        time.sleep(0.004)
    if strike.path:
        time.sleep(strike.after)
    chosen, struck = rng.randrange(len(pids)), time.monotonic()
    _strike(pids[chosen], strike.signum)
    where = Path(strike.path).name or f"{strike.after:.1f} s"
    limit = SLACK if strike.signum == signal.SIGKILL else scene.kind.timeout + TERM + SLACK
    while any(map(_line, pids)) and not job.ended():
        assert time.monotonic() - struck < limit, f"after {limit:g} s there are still {[*filter(_line, pids)]}"
        time.sleep(0.02)
    tally.waited = max(tally.waited, time.monotonic() - struck)
    tally.kills += 1
    tally.at.append(f"{chosen}@{where}:{judge.last_line(scene.run)}")
    return True


def trial(rng: random.Random, scene: Scene, tally: Tally, most: int = MOST) -> None:
    """Blow after blow on one run, to its end, and the comparison."""
    shutil.rmtree(scene.run, ignore_errors=True)
    tally.trials += 1
    newest, struck = -1, 0
    with Job(scene.kind, scene.folder / "run.yaml", scene.folder / "said.txt", 3 * most) as job:
        while struck < most and blow(rng, scene, job, tally):
            newest, struck = judge.survived(scene.run, newest), struck + 1
        codes, said = job.wait(), job.said.read_text(errors="replace")
    assert set(codes) == {0}, f"exit codes {codes}: {said[-2000:]}"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, said
    assert "is a bug of rlhf" not in said, errors
    lost = [line for line in errors if NO_STORE in line]  # process 0 was struck: one line a machine
    assert len(errors) - len(lost) - (-len(lost) // len(scene.kind.machines)) <= struck, errors
    tally.resumed += said.count("resumed from")
    judge.same(scene.run, scene.whole, strict=False)


def one(scene: Scene, seed: int, tally: Tally) -> None:
    """A trial of a seed; a failure is kept."""
    number = tally.trials
    try:
        trial(random.Random(f"{seed} {scene.name} {number}"), scene, tally)
    except AssertionError as error:
        kept = scene.folder.parent / f"failed-{scene.name}-{number}"
        shutil.copytree(scene.folder, kept)
        tally.failures.append(f"{scene.name} trial {number}: {error}\n  after: {tally.at}\n  kept: {kept}")


def line(name: str, tally: Tally, seconds: float) -> str:
    """One kind in one line."""
    equal = tally.trials - len(tally.failures)
    return (
        f"{name}: {tally.kills} kills in {tally.trials} runs, resumed {tally.resumed} times, {equal} of {tally.trials} "
        f"runs equal, the others ended within {tally.waited:.1f} s, {seconds:.0f} s; process@moment:step: "
        f"{' '.join(tally.at)}"
    )


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", default="", metavar="KIND,KIND")
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    world, kinds = scenes.build(folder), chosen.only.split(",") if chosen.only else list(KINDS)
    failures: list[str] = []
    for name in kinds:
        tally, start = Tally(), time.monotonic()
        scene = prepare(name, world, folder / name)
        while tally.kills < chosen.kills / len(kinds) and not tally.failures:
            one(scene, chosen.seed, tally)
        print(line(name, tally, time.monotonic() - start), flush=True)
        failures += tally.failures
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not failures:
        shutil.rmtree(folder)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
