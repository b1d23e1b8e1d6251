"""A disk that is full or fails at any operation of a run: exit code 4, one line, nothing lost, and the run goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import each, judge, scenes
from tests.faults.launch import Launcher
from tests.stages import world as w

pytestmark = pytest.mark.timeout(900)
FEW = {"lora": {"target_modules": ["q_proj"]}, "training": {"max_steps": 4}, "checkpoint": {"keep": 1}}
"""Few tensors, so that every write can fail; the second save retires the first checkpoint."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.build(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def launcher(folder: Path) -> Iterator[Launcher]:
    with Launcher(folder) as found:
        yield found


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_every_operation_fails_once(folder: Path, launcher: Launcher, stage: str) -> None:
    """In setting up, logging, saving and finishing. The run in which all this was tried equals one without."""
    runs = [folder / f"{stage}-{name}" for name in ("run", "whole")]
    recipes = [w.save(w.merged(scenes.content(stage, folder, r), FEW), r.with_suffix(".yaml")) for r in runs]
    whole = launcher.start(stage, recipes[1], runs[1])
    assert whole.code == 0, whole.said
    parts = each.PARTS if stage == "sft" else ("save",)
    attempt = launcher.start(stage, recipes[0], runs[0], each=folder / f"{stage}-rows", parts=parts)
    assert attempt.code == 0, attempt.said
    rows = each.read(folder / f"{stage}-rows")
    judge.same(runs[0], runs[1])
    for row in rows:
        assert_fails_well(row)
    codes = (errno.ENOSPC, errno.EIO) if stage == "sft" else (errno.ENOSPC,)
    assert {(r.part, r.errno) for r in rows} == {(p, e) for p in parts for e in codes}
    ops = {"open", "write", "fsync", "rename", "mkdir"} | ({"unlink", "rmdir"} if stage == "sft" else set())
    assert {row.op for row in rows if row.part == "save"} == ops
    assert len(rows) > 80


def assert_fails_well(row: each.Row) -> None:
    """The code, the line, and what lies there."""
    errors = [line for line in row.said if line.startswith("error: ")]
    assert "Traceback" not in "".join(row.said), row
    assert row.newest >= row.before, "a checkpoint that was whole is gone"
    if row.file == "run.log" and row.code == each.SWALLOWED:  # what is said is said on the terminal all the same
        assert errors == []
        return
    assert (row.code, len(errors)) == (4, 1), row
    assert os.strerror(row.errno) in errors[0], row
    assert not row.done or row.part == "finish"
    if row.part in ("begin", "save"):
        assert row.kept or row.newest > row.before, "what lay there is not as it was"
    if row.part == "save" and not row.file.endswith(".jsonl"):
        assert f"checkpoints/step-{row.newest:06d}; free some space" in errors[0], row
