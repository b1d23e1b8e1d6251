from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.runs import provenance
from rlhf_cli.runs.trackers import open_trackers

STUB = """
calls = []
class Handle:
    def log(self, metrics, step): calls.append(["log", metrics, step])
    def finish(self): calls.append(["finish"])
def init(**settings):
    calls.append(["init", settings])
    return Handle()
def log(metrics, step): Handle().log(metrics, step)
def finish(): Handle().finish()
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_reach_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / f"{name}.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    trackers = open_trackers([name], tmp_path / "runs" / "a", {"seed": 1})
    trackers.log(3, {"step": 3, "loss": 0.5, "note": "text"})  # type: ignore[dict-item]
    trackers.close()
    calls = sys.modules[name].calls
    monkeypatch.delitem(sys.modules, name)
    assert calls[0][1]["name"] == "a"
    assert calls[0][1]["config"] == {"seed": 1}
    assert calls[1:] == [["log", {"loss": 0.5}, 3], ["finish"]]


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
