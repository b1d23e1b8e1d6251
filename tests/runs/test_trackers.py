from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.runs import provenance
from rlhf_cli.runs.trackers import open_trackers

STUBS = {
    "wandb": """
calls, counter = [], 0
class Handle:
    def define_metric(self, name, step_metric=None): calls.append(["define", name, step_metric])
    def log(self, metrics, step=None):
        # as wandb does: what comes with a smaller number than the last one is dropped
        global counter
        step = counter if step is None else step
        if step >= counter:
            calls.append(["log", metrics])
            counter = step + 1
    def finish(self): calls.append(["finish"])
def init(**settings):
    calls.append(["init", settings])
    return Handle()
""",
    "trackio": """
calls = []
def init(**settings): calls.append(["init", settings])
def log(metrics, step): calls.append(["log", {**metrics, "step": step}])
def finish(): calls.append(["finish"])
""",
    "tensorboard": """
calls, points = [], []
class SummaryWriter:
    def __init__(self, folder, purge_step):
        calls.append(["init", {"name": folder.split("/")[-2], "config": {"seed": 1}}])
        points[:] = [p for p in points if p[0] < purge_step]
        self.open = True
    def add_scalar(self, name, value, step):
        assert self.open
        points.append([step, name, value])
    def close(self):
        assert self.open
        self.open = False
        calls.append(["finish"])
""",
}


def stub(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A library that takes notes, in place of the real one."""
    module = ModuleType(name)
    exec(STUBS[name], vars(module))
    place = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, place, module)
    monkeypatch.setattr("rlhf_cli.runs.trackers.find_spec", lambda name: True)
    return module


@pytest.mark.parametrize("name", STUBS)
def test_numbers_reach_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = stub(name, monkeypatch)
    trackers = open_trackers([name], tmp_path / "runs" / "a", {"seed": 1})
    trackers.log(3, {"step": 3, "loss": 0.5, "note": "text"})  # type: ignore[dict-item]
    trackers.close()
    calls = module.calls
    assert calls[0][1]["name"] == "a"
    assert calls[0][1]["config"] == {"seed": 1}
    if name == "wandb":
        assert calls[1:3] == [["define", "step", None], ["define", "*", "step"]]
    if name == "tensorboard":
        assert module.points == [[3, "loss", 0.5]]
    else:
        assert calls[-2] == ["log", {"loss": 0.5, "step": 3}]
    assert calls[-1] == ["finish"]


@pytest.mark.parametrize("name", STUBS)
def test_steps_that_come_again_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """After a rollback from step 4 to step 1, and after going on from step 2 in a process of its own."""
    module = stub(name, monkeypatch)
    for steps in ([1, 2, 3, 4, 2, 3], [3, 4]):
        trackers = open_trackers([name], tmp_path / "runs" / "a", {})
        for i, step in enumerate(steps):
            trackers.log(step, {"loss": step + i / 10 + len(steps)})
        trackers.close()
    if name == "tensorboard":
        assert module.points == [[1, "loss", 7.0], [2, "loss", 8.4], [3, "loss", 5.0], [4, "loss", 6.1]]
        return
    logged = [call[1] for call in module.calls if call[0] == "log"]
    assert [one["step"] for one in logged] == [1, 2, 3, 4, 2, 3, 3, 4]
    assert [one["loss"] for one in logged] == pytest.approx([7.0, 8.1, 9.2, 10.3, 8.4, 9.5, 5.0, 6.1])


def test_a_tracker_without_a_step_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = stub("tensorboard", monkeypatch)
    open_trackers(["tensorboard"], tmp_path / "a", {}).close()
    assert module.calls == []


def test_missing_libraries_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_cli.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as error:
        open_trackers(["tensorboard", "trackio"], tmp_path, {})
    assert len(error.value.problems) == 2
    assert "pip install 'rlhf-cli[trackio]'" in str(error.value)
    open_trackers([], tmp_path, {}).log(1, {"loss": 1.0})


def test_provenance_names_neither_user_nor_host() -> None:
    import getpass
    import platform

    text = json.dumps([provenance.versions(), provenance.hardware()])
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert provenance.versions()["torch"][0].isdigit()
    assert provenance.hardware()["memory"] > 2**28


def test_what_a_library_greets_with_is_not_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = stub("trackio", monkeypatch)
    monkeypatch.setattr(module, "init", lambda **_: print("welcome"))
    monkeypatch.setattr(module, "finish", lambda: print("goodbye"))
    open_trackers(["trackio"], tmp_path / "a", {}).close()
    caught = capsys.readouterr()
    assert (caught.out, caught.err) == ("", "welcome\ngoodbye\n")


def test_a_tracker_that_cannot_work_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ValueError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(stub("wandb", monkeypatch), "init", fail)
    with pytest.raises(RecipeError) as caught:
        open_trackers(["wandb"], tmp_path / "a", {})
    assert [str(p) for p in caught.value.problems] == [
        "logging.report_to: wandb cannot be opened: No API key configured. (set it up, or leave it out)"
    ]
