"""Kills runs at random moments, starts them again, and compares what comes out with the undisturbed run.

`python -m tests.faults.kills --kills 200 --seed 7` (`make faults`); `--only ppo:3` repeats one trial of a seed.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults import judge, scenes
from tests.faults.launch import Attempt, Launcher
from tests.faults.nursery import Strike
from tests.faults.shim import Fault
from tests.stages import world as w

Blow = Fault | Strike
KINDS = ("save", "log", "time", "lines", "begin", "end", "disk"), (10, 2, 5, 3, 2, 3, 3)
"""What can happen, and how often."""
MOST = 6
"""Kills of one trial."""


@dataclass(frozen=True)
class Scene:
    """A recipe, and what its undisturbed run did."""

    name: str
    folder: Path
    whole: Path
    ops: list[tuple[str, str]]
    seconds: float

    @property
    def command(self) -> str:
        """What runs it."""
        return scenes.COMMANDS[self.name]

    @property
    def run(self) -> Path:
        """Where the disturbed runs lie."""
        return self.folder / "run"

    @property
    def recipe(self) -> Path:
        """Of the disturbed runs."""
        return self.folder / "run.yaml"


@dataclass
class Tally:
    """What happened."""

    places: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    """SIGTERM and SIGINT, by place."""
    errors: Counter[str] = field(default_factory=Counter)
    """Disk errors, by place."""
    trials: int = 0
    resumed: int = 0
    fresh: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Of all places."""
        return sum(self.places.values())


def prepare(name: str, world: Path, folder: Path, launcher: Launcher, *, prove: bool = False) -> Scene:
    """The undisturbed run. prove: a second one, in a new process, must equal it."""
    folder.mkdir()
    parts = ("run", "whole", "again")
    recipes = {part: w.save(scenes.content(name, world, folder / part), folder / f"{part}.yaml") for part in parts}
    attempt = launcher.start(scenes.COMMANDS[name], recipes["whole"], folder / "whole", verify=True)
    assert attempt.code == 0, attempt.said
    always_whole(attempt, folder / "whole")
    if prove:
        again = launcher.start(scenes.COMMANDS[name], recipes["again"], folder / "again", fresh=True)
        assert again.code == 0, again.said
        judge.same(folder / "again", folder / "whole")
    return Scene(name, folder, folder / "whole", attempt.ops, attempt.seconds)


def always_whole(attempt: Attempt, run: Path) -> None:
    """From the first checkpoint on, a verified one lay there at every operation of every save, never an older one."""
    first = next(n for n, step in enumerate(attempt.whole) if step >= 0)
    after = attempt.whole[first:]
    assert first < len(attempt.whole) / 2
    assert min(after) >= 0, "a moment without any whole checkpoint"
    rolled_back = (run / "rollbacks").exists()
    assert after == sorted(after) or rolled_back, "the newest whole checkpoint was older for a moment"
    assert len(after) > 100


# --- blows -----------------------------------------------------------------------------------------------


def draw(rng: random.Random, scene: Scene, left: float, kind: str) -> Blow:
    """A random moment of a kind. left: the share of the run that is still to come; later ones may never be reached."""
    signum = rng.choice((signal.SIGTERM, signal.SIGINT)) if rng.random() < 0.2 else signal.SIGKILL
    if kind == "time":
        return Strike(after=rng.uniform(0, scene.seconds * max(left, 0.3)), signum=signum)
    if kind == "lines":
        said = rng.random() < 0.5
        path = "said" if said else str(scene.run / "metrics.jsonl")
        most = len((scene.whole / "run.log").read_text().splitlines()) if said else judge.last_line(scene.whole)
        return Strike(path=path, lines=rng.randint(1, most), signum=signum)
    if kind == "disk":
        return disk_error(rng, scene, left)
    place = rng.choice(("export", "report", "done")) if kind == "end" else kind
    return at_operation(rng, scene, place, 1.0 if kind == "end" else left)


def still_to_come(scene: Scene) -> float:
    """The share of the steps that the disturbed run has not logged yet."""
    return 1 - judge.last_line(scene.run) / judge.last_line(scene.whole)


def at_operation(
    rng: random.Random, scene: Scene, place: str, left: float = 1.0, kinds: frozenset[str] = frozenset()
) -> Fault:
    """One of the operations of a place: the rare kinds as often as the frequent ones."""
    ops = [op for where, op in scene.ops if where == place and (not kinds or op in kinds)]
    counts = Counter(ops[: max(1, round(len(ops) * left))])
    op = rng.choice(sorted(counts))
    return Fault(place, op, rng.randint(1, counts[op]), torn=rng.random() < 0.5)


DISK = ("save", "save", "save", "export", "report", "done", "log")


def disk_error(rng: random.Random, scene: Scene, left: float, places: Sequence[str] = DISK) -> Fault:
    """A full disk, or one that fails, at an operation that needs it."""
    place = rng.choice(places)
    usual = at_operation(rng, scene, place, left, frozenset({"write", "fsync", "rename", "mkdir", "open"}))
    return replace(usual, torn=False, errno=rng.choice((errno.ENOSPC, errno.EIO)))


def landed(attempt: Attempt, run: Path, blow: Blow) -> str:
    """Where a kill hit."""
    if isinstance(blow, Fault):
        return blow.place
    places = [place for place, _ in attempt.ops]
    if any((run / "checkpoints").glob(".step-*")):
        return "save"
    if places and places[-1] in {"export", "report", "done"}:
        return places[-1]
    return "training" if "log" in places and judge.last_line(run) else "start"


# --- trials ----------------------------------------------------------------------------------------------


def trial(scene: Scene, blows: Iterator[tuple[Blow, bool]], launcher: Launcher, tally: Tally) -> None:
    """Blow after blow on one run until none is left or it ended before one; then to its end, and the comparison."""
    shutil.rmtree(scene.run, ignore_errors=True)
    tally.trials += 1
    newest, strict, done, locked = -1, True, False, False
    for blow, fresh in blows:
        locked = (scene.run / "DONE").exists()
        attempt = launcher.start(scene.command, scene.recipe, scene.run, blow, fresh)
        spoke(attempt, newest, tally)
        newest = judge.survived(scene.run, newest, scene.name == scenes.ROLLS_BACK)
        if attempt.code == 0:
            done = True
            break
        strict &= attempt.code != 128 + blow.signum if isinstance(blow, Strike) else True
        _ended_as_it_should(attempt, blow)
        _count(tally, landed(attempt, scene.run, blow), blow)
        tally.fresh += fresh
    if not done:
        locked = (scene.run / "DONE").exists()
        attempt = launcher.start(scene.command, scene.recipe, scene.run)
        assert attempt.code == 0, f"code {attempt.code}: {attempt.said}"
        spoke(attempt, newest, tally)
    judge.same(scene.run, scene.whole, strict, locked)
    judge.fresh_report(scene.run)
    again = launcher.start(scene.command, scene.recipe, scene.run)
    assert (again.code, again.said.splitlines()) == (0, [f"{scene.run}: up to date"]), again.said


def spoke(attempt: Attempt, newest: int, tally: Tally) -> None:
    """A death leaves nothing to complain about; a checkpoint is gone on from."""
    assert "Traceback" not in attempt.said, attempt.said
    for words in ("not whole", "were lost", "is gone"):
        assert words not in attempt.said, attempt.said
    if "step 0:" in attempt.said or "resumed from" in attempt.said:
        assert ("resumed from" in attempt.said) == (newest >= 0), attempt.said
    tally.resumed += "resumed from" in attempt.said


def _ended_as_it_should(attempt: Attempt, blow: Blow) -> None:
    """The exit code, and one line about what was not a SIGKILL."""
    errors = [line for line in attempt.said.splitlines() if line.startswith("error: ")]
    if isinstance(blow, Fault) and blow.errno:
        assert (attempt.code, len(errors)) == (4, 1), f"code {attempt.code}: {attempt.said}"
        assert os.strerror(blow.errno) in errors[0], errors[0]
        return
    signum = blow.signum if isinstance(blow, Strike) else signal.SIGKILL
    allowed = {-signum} if signum == signal.SIGKILL else {-signum, 128 + signum}
    assert attempt.code in allowed, f"code {attempt.code}: {attempt.said}"
    assert len(errors) == (attempt.code > 0), attempt.said


def _count(tally: Tally, place: str, blow: Blow) -> None:
    if isinstance(blow, Strike):
        (tally.places if blow.signum == signal.SIGKILL else tally.stops)[place] += 1
    elif blow.errno:
        tally.errors[place] += 1
    else:
        tally.places[place] += 1
        tally.ops["half a write" if blow.torn and blow.op == "write" else blow.op] += 1


def random_blows(rng: random.Random, scene: Scene) -> Iterator[tuple[Blow, bool]]:
    """A few blows; some in a new process."""
    for _ in range(rng.randint(2, MOST)):
        left = still_to_come(scene)
        kind = rng.choices(*KINDS)[0]
        yield draw(rng, scene, left, kind), rng.random() < 0.04


def one(scene: Scene, seed: int, number: int, launcher: Launcher, tally: Tally) -> None:
    """A trial of a seed."""
    rng = random.Random(f"{seed} {scene.name} {number}")
    blows: list[str] = []

    def told() -> Iterator[tuple[Blow, bool]]:
        for blow, fresh in random_blows(rng, scene):
            blows.append(f"{blow}{' in a new process' if fresh else ''}")
            yield blow, fresh

    try:
        trial(scene, told(), launcher, tally)
    except AssertionError as error:
        kept = scene.folder.parent / f"failed-{scene.name}-{number}"
        shutil.copytree(scene.run, kept)
        tally.failures.append(
            f"{scene.name} trial {number}: {error}\n  after: {'; '.join(blows)}\n  the run is kept: {kept}\n"
            f"  repeat: .venv/bin/python -m tests.faults.kills --seed {seed} --only {scene.name}:{number}"
        )


def line(name: str, tally: Tally, seconds: float) -> str:
    """One scene in one line."""
    at = ", ".join(f"{place} {count}" for place, count in tally.places.most_common())
    how = ", ".join(f"{op} {count}" for op, count in tally.ops.most_common())
    equal = tally.trials - len(tally.failures)
    return (
        f"{name}: {tally.kills} kills ({tally.fresh} in new processes) in {tally.trials} runs; at: {at}; "
        f"before: {how}; besides {tally.stops.total()} SIGTERM or SIGINT and {tally.errors.total()} disk errors; "
        f"resumed {tally.resumed} times; {equal} of {tally.trials} runs equal; {seconds:.0f} s"
    )


def main(arguments: Sequence[str]) -> int:
    """The long version. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--only", default="", metavar="SCENE:TRIAL")
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    world = scenes.build(folder)
    failures: list[str] = []
    only, _, number = chosen.only.partition(":")
    with Launcher(folder) as launcher:
        for name in [only] if only else scenes.COMMANDS:
            tally, start = Tally(), time.monotonic()
            scene = prepare(name, world, folder / name, launcher, prove=True)
            if only:
                one(scene, chosen.seed, int(number), launcher, tally)
            while not only and tally.kills < chosen.kills / len(scenes.COMMANDS):
                one(scene, chosen.seed, tally.trials, launcher, tally)
            print(line(name, tally, time.monotonic() - start), flush=True)
            failures += tally.failures
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not failures:
        shutil.rmtree(folder)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
