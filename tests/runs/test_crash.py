"""Dying or failing at any disk operation of a save leaves a whole checkpoint, and the next save works."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from rlhf_cli.errors import ModelError
from rlhf_cli.runs import manifest
from rlhf_cli.train import checkpoint
from tests.runs import crash_save
from tests.runs.helpers import Screen


def attempt(folder: Path, mode: str, limit: int) -> None:
    """Body of a child: save until the limit."""
    torch.set_num_threads(1)
    try:
        crash_save.main(folder, mode, limit)
    except ModelError:
        os._exit(3)


def check(folder: Path) -> None:
    screen = Screen()
    found = checkpoint.newest(folder, screen)  # type: ignore[arg-type]
    assert found is not None
    assert screen.warnings == []
    step = found.state["step"]
    expected = crash_save.content(step)
    assert torch.equal(found.tensors("policy")["w"], expected["policy"]["w"])
    assert torch.equal(found.tensors("moments")["m"], expected["moments"]["m"])
    checkpoint.save(folder, "step-000009", crash_save.content(9), {"step": 9}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-000009"]


@pytest.mark.parametrize("mode", ["exchange", "plain", "exchange-full", "plain-full"])
def test_any_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    context = get_context("fork")
    for limit in range(1, 120):
        folder = tmp_path / str(limit) / "checkpoints"
        child = context.Process(target=attempt, args=(folder, mode, limit))
        child.start()
        child.join()
        assert child.exitcode in {0, 3, 9}
        if "plain" not in mode:
            assert any(not manifest.fault(path) for path in folder.glob("step-*"))
        check(folder)
        if child.exitcode == 0:
            assert limit > 30
            return
    raise AssertionError("the child never came to its end")


def test_kill_at_random_moments(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from rlhf_cli.train import checkpoint\n"
        "torch.set_num_threads(1); folder = Path(sys.argv[1])\n"
        "big = torch.arange(400_000)\n"
        "for step in range(1, 10_000):\n"
        "    checkpoint.save(folder, f'step-{step:06d}', {'p': {'w': big + step}}, {'step': step}, keep=2)\n"
        "    print(step, flush=True)\n"
    )
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        said = int(child.stdout.readline())
        time.sleep(random.random() * 0.2)
        child.send_signal(signal.SIGKILL)
        said = int((child.communicate()[0].split() or [said])[-1])
        found = checkpoint.newest(tmp_path, Screen())  # type: ignore[arg-type]
        assert found is not None
        assert found.state["step"] >= said
        assert torch.equal(found.tensors("p")["w"], torch.arange(400_000) + found.state["step"])
