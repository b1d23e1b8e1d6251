"""Runs that die again and again end as if nothing had happened. `make faults` is the long version."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import judge, kills, scenes
from tests.faults.launch import Launcher
from tests.faults.nursery import Strike
from tests.faults.shim import Fault

pytestmark = pytest.mark.timeout(900)  # on a machine that is busy with other things
Blows = Iterator[tuple[kills.Blow, bool]]
TRIALS = {
    "sft": (("save", "save", "save", "end", "time"), ("begin", "log", "disk", "save", "lines")),
    "dpo": (("save", "save", "log", "end", "lines"),),
    "ppo": (("save", "save", "save", "end", "time"),),
}
"""Kinds of blows, one after the other, by stage and trial."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def launcher(folder: Path) -> Iterator[Launcher]:
    with Launcher(folder) as found:
        yield found


@pytest.fixture(scope="module")
def sft(folder: Path, launcher: Launcher) -> kills.Scene:
    return kills.prepare("sft", folder, folder / "sft", launcher)


def blows_of(scene: kills.Scene, kinds: tuple[str, ...], seed: int) -> Blows:
    """Early ones, so that the run does not come to its end before them."""
    rng = random.Random(f"{scene.name} {seed}")
    for kind in kinds:
        left = kills.still_to_come(scene) / 2
        blow = kills.disk_error(rng, scene, left, ["save"]) if kind == "disk" else kills.draw(rng, scene, left, kind)
        yield (Strike(blow.after, blow.path, blow.lines) if isinstance(blow, Strike) else blow), False


@pytest.mark.parametrize("stage", TRIALS)
def test_killed_runs_end_like_the_undisturbed_one(
    folder: Path, launcher: Launcher, sft: kills.Scene, stage: str
) -> None:
    tally = kills.Tally()
    scene = sft if stage == "sft" else kills.prepare(stage, folder, folder / stage, launcher)
    seen = {op for place, op in scene.ops if place == "save"}
    assert seen >= {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "close"}
    for seed, kinds in enumerate(TRIALS[stage]):
        kills.trial(scene, blows_of(scene, kinds, seed), launcher, tally)
    print(kills.line(stage, tally, 0.0))
    assert tally.kills >= sum(map(len, TRIALS[stage])) - 2
    assert tally.places["save"] >= 2
    assert tally.resumed >= 2
    assert tally.errors == ({"save": 1} if stage == "sft" else {})


def test_a_process_of_its_own(launcher: Launcher, sft: kills.Scene) -> None:
    """Killed in a save as a user started it: `python -m rlhf_cli`. Another process goes on as if it were the same."""
    tally = kills.Tally()
    kills.trial(sft, iter([(Fault("save", "rename", 2), True)]), launcher, tally)
    assert (tally.kills, tally.fresh, tally.resumed) == (1, 1, 1)


def test_death_after_the_last_checkpoint_got_its_name(launcher: Launcher, sft: kills.Scene) -> None:
    """No further save comes that would delete the older ones."""
    renames = sft.ops.count(("save", "rename"))
    kills.trial(sft, iter([(Fault("save", "rename", renames), False)]), launcher, kills.Tally())


# --- the harness itself ----------------------------------------------------------------------------------

CHANGES = {
    "metrics.jsonl": (b'"loss": ', b'"loss": 1'),
    "samples.jsonl": (b'"completion": "', b'"completion": " '),
    "run.json": (b'"digest": "', b'"digest": "0'),
    "recipe.yaml": (b"seed: 3", b"seed: 4"),
    "final/adapter_model.safetensors": (b"\0", b"\1"),
    "checkpoints/step-000012/state.json": (b'"tokens": ', b'"tokens": 1'),
    "checkpoints/step-000010/policy-optimizer.safetensors": (b"\0", b"\1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_found(sft: kills.Scene, tmp_path: Path, name: str) -> None:
    whole, run = sft.whole, tmp_path / "whole"
    shutil.copytree(whole, run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(whole), str(run)))
    judge.same(run, whole)
    old, new = CHANGES[name]
    content = (run / name).read_bytes()
    (run / name).write_bytes(content.replace(old, new, 1))
    assert (run / name).read_bytes() != content
    with pytest.raises(AssertionError):
        judge.same(run, whole)


def test_a_lost_checkpoint_is_found(sft: kills.Scene, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sft.whole, run)
    assert judge.whole_steps(run) == [10, 12]
    assert judge.survived(run, 12) == 12
    shutil.rmtree(run / "checkpoints" / "step-000012")
    with pytest.raises(AssertionError, match="was whole and is gone"):
        judge.survived(run, 12)
    shutil.rmtree(run / "checkpoints" / "step-000010")
    with pytest.raises(AssertionError, match="step 12 is logged, and the newest whole checkpoint is -1"):
        judge.survived(run, -1)


def test_a_torn_checkpoint_is_found(sft: kills.Scene, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sft.whole, run)
    path = run / "checkpoints" / "step-000010" / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="step-000010 is not whole"):
        judge.whole_steps(run)
