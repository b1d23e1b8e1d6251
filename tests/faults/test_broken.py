"""Damage from outside: the newest checkpoint in every way broken, limits of the system, folders that cannot be written.

`DAMAGE`: what is done to the newest checkpoint, and the words with which it is passed over. The run goes on from the
one before and ends as if nothing had happened; with both broken it is refused.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import judge, scenes
from tests.faults.launch import Launcher
from tests.faults.shim import Fault
from tests.faults.test_disk import FEW
from tests.stages import world as w

pytestmark = pytest.mark.timeout(900)
Spoil = Callable[[Path], object]
HEAD = ("run.log", "run.json", "recipe.yaml", "data-report.json")
"""Files that every start writes."""
FILES = ("manifest.json", "state.json", "policy.safetensors", "policy-optimizer.safetensors", "random.safetensors")


def cut(name: str) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-7])


def flip(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def no_json(folder: Path) -> None:
    """state.json keeps its size."""
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(f"[{text[1:]}")


def gone(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def of_another_step(folder: Path) -> None:
    shutil.copy(folder.with_name("step-000002") / "manifest.json", folder)


def a_link(folder: Path) -> None:
    (folder / "state.json").rename(folder.parent.parent / "state.json")
    (folder / "state.json").symlink_to(folder.parent.parent / "state.json")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def swapped(folder: Path) -> None:
    shutil.copy(folder.with_name("step-000002") / "policy.safetensors", folder)


DAMAGE: dict[str, tuple[Spoil, str]] = {
    **{f"cut-{name}": (cut(name), f"{name} has ") for name in FILES[1::2]},
    **{f"flip-{name}": (flip(name), f"{name} has another SHA-256 than manifest.json says") for name in FILES[1:]},
    **{f"no-{name}": (gone(name), f"{name} is missing") for name in FILES[::3]},
    "cut-manifest.json": (cut("manifest.json"), "manifest.json is damaged"),
    "flip-manifest.json": (flip("manifest.json"), ""),
    "manifest-of-another-step": (of_another_step, "manifest.json is of step-000002, format 1; wanted step-000004"),
    "weights-of-another-step": (swapped, "policy.safetensors has another SHA-256 than manifest.json says"),
    "extra-file": (lambda folder: (folder / "more.bin").touch(), "more.bin is not in manifest.json"),
    "no-json": (no_json, "state.json has another SHA-256 than manifest.json says"),
    "link": (a_link, "state.json is not a plain file"),
    "empty": (emptied, "manifest.json is missing"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.build(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def launcher(folder: Path) -> Iterator[Launcher]:
    with Launcher(folder) as found:
        yield found


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    more = w.merged(FEW, {"checkpoint": {"keep": 2}})
    return w.save(w.merged(scenes.content("sft", folder, folder / "run"), more), folder / "run.yaml")


@pytest.fixture(scope="module")
def whole(folder: Path, launcher: Launcher, recipe: Path) -> Path:
    """The undisturbed run, under another name."""
    attempt = launcher.start("sft", recipe, folder / "run", each=folder / "rows", parts=())
    assert attempt.code == 0, attempt.said
    (folder / "run").rename(folder / "whole")
    path = folder / "whole" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(folder / "run"), str(folder / "whole")))
    return folder / "whole"


@pytest.fixture
def died(folder: Path, whole: Path) -> Path:
    """A copy of it that died before its end, with the checkpoints of steps 2 and 4."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    (run / "DONE").unlink()
    shutil.rmtree(run / "final")
    return run


def said_errors(said: str) -> list[str]:
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_checkpoint_is_broken(folder: Path, launcher: Launcher, recipe: Path, died: Path, name: str) -> None:
    spoil, words = DAMAGE[name]
    newest = died / "checkpoints" / "step-000004"
    spoil(newest)
    attempt = launcher.start("sft", recipe, died, each=folder / "rows", parts=())
    assert attempt.code == 0, attempt.said
    assert said_errors(attempt.said) == []
    (line,) = [line for line in attempt.said.splitlines() if "not whole" in line]
    assert f"{newest}: this checkpoint is not whole and was passed over: {words}" in line
    assert f"resumed from {died / 'checkpoints' / 'step-000002'}" in attempt.said
    (died / "state.json").unlink(missing_ok=True)
    judge.same(died, folder / "whole")


@pytest.mark.parametrize("name", ["no-manifest.json", "flip-policy.safetensors"])
def test_no_checkpoint_is_whole(folder: Path, launcher: Launcher, recipe: Path, died: Path, name: str) -> None:
    """Nothing is started over in silence, and nothing of what lies there is lost. `--resume never` sets it aside."""
    spoil, words = DAMAGE[name]
    for step in (2, 4):
        spoil(died / "checkpoints" / f"step-{step:06d}")
    before = {k: v for k, v in w.contents(died).items() if k not in HEAD}
    attempt = launcher.start("sft", recipe, died, each=folder / "rows", parts=())
    assert attempt.code == 4, attempt.said
    (line,) = said_errors(attempt.said)
    assert line == (
        f"error: {died / 'checkpoints'}: no checkpoint there is whole: step-000004: {words} (restore one; --resume "
        f"never archives the old run and starts anew; or choose another output_dir)"
    )
    after = w.contents(died)
    assert {k: after.get(k) for k in before} == before


# --- limits and folders ----------------------------------------------------------------------------------


def test_files_may_not_grow(folder: Path, launcher: Launcher, recipe: Path, whole: Path) -> None:
    """As on a small full disk: logs fit and a checkpoint does not. With room again, the run starts over and equals."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    attempt = launcher.start("sft", recipe, run, each=folder / "rows", parts=(), limits={"FSIZE": 6000})
    (line,) = said_errors(attempt.said)
    assert attempt.code == 4
    assert "checkpoint step-000002 could not be saved: File too large (there is no whole checkpoint yet; " in line
    assert list((run / "checkpoints").iterdir()) == []
    assert launcher.start("sft", recipe, run, each=folder / "rows", parts=()).code == 0
    assert w.metrics(run) == w.metrics(whole)


@pytest.mark.parametrize("spare", [0, 2**22, 2**23])
def test_memory_that_may_not_grow(folder: Path, launcher: Launcher, recipe: Path, spare: int) -> None:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    attempt = launcher.start("sft", recipe, run, each=folder / "rows", parts=(), limits={"AS": spare})
    (line,) = said_errors(attempt.said)
    assert attempt.code == 4, attempt.said
    assert "out of memory" in line or "the weights do not fit the memory" in line
    assert not run.exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT])
@pytest.mark.parametrize("op", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written(folder: Path, launcher: Launcher, recipe: Path, code: int, op: str) -> None:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    attempt = launcher.start("sft", recipe, run, Fault("begin", op, 1, errno=code))
    (line,) = said_errors(attempt.said)
    assert (attempt.code, attempt.struck) == (4, True), attempt.said
    assert str(run) in line
    assert os.strerror(code) in line
    assert not run.exists(), "a folder that was made is taken back"


# --- the lock --------------------------------------------------------------------------------------------

LOCKS = {"dead pid": "4194303 here", "another host": "17 elsewhere", "empty": "", "garbage": "\0\0 what is this"}


@pytest.mark.parametrize("name", [*LOCKS, "reused pid"])
def test_a_stale_lock_is_no_lock(folder: Path, launcher: Launcher, recipe: Path, died: Path, name: str) -> None:
    """The lock is the system's: what the file says is for people, and nobody has to remove it."""
    (died / ".lock").write_text(LOCKS.get(name, f"{os.getpid()} {os.uname().nodename}"))
    attempt = launcher.start("sft", recipe, died, each=folder / "rows", parts=())
    assert attempt.code == 0, attempt.said
    assert not (died / ".lock").exists()


def test_a_lock_that_is_a_folder(folder: Path, launcher: Launcher, recipe: Path, died: Path) -> None:
    (died / ".lock").mkdir()
    attempt = launcher.start("sft", recipe, died, each=folder / "rows", parts=())
    (line,) = said_errors(attempt.said)
    assert attempt.code == 4
    assert f"{died / '.lock'}: cannot create the lock: Is a directory" in line
    (died / ".lock").rmdir()
