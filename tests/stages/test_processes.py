"""Two and three processes: the same run as one."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from rlhf_cli.cli import app
from tests import several
from tests.conftest import run_cli
from tests.stages import world as w
from tests.stages.conftest import train

FEW: dict[str, Any] = {"training": {"max_steps": 4}}
UNSTEADY = {"rollout/logprob_gap_max", "rollout/logprob_gap_mean", "rollout/halvings", "rollout/useful_share"}
"""Of PPO: a difference of two roundings, and what depends on how prompts are batched."""
RATIOS = {"val/explained_variance"}
"""Of PPO: one less a ratio of small variances, which magnifies roundings; compared to 1e-4."""


def assert_same(one: Path, many: Path, *, stopped: bool = False) -> None:
    """Both runs have the same metrics at every step, to rounding. stopped: one was also evaluated where it stopped."""
    left, right = w.metrics(one), w.metrics(many)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for a, b in zip(left, right, strict=True):
        coarse = set(several.close(a, b, 1e-4))
        apart = [n for n in several.close(a, b) if n not in UNSTEADY and (n not in RATIOS or n in coarse)]
        assert [name for name in apart if not (stopped and name.startswith("eval/"))] == [], a["step"]


@pytest.fixture(scope="module")
def recipes(base: Path, rm: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A recipe of each kind of stage."""
    folder = tmp_path_factory.mktemp("processes")

    def make(name: str, stage: str, kind: str, **more: Any) -> dict[str, Any]:
        content = w.recipe(stage, base, world, kind, folder / name, **w.merged(FEW, more))
        data = content["data"]
        data["train"], data["eval"] = ({"path": data[s], "limit": n} for s, n in (("train", 80), ("eval", 10)))
        return content

    rewards = [{"function": f"{world}/reward.py:true_reward"}, {"run": str(rm), "weight": 0.5}]
    sampled = {"ppo": {"epochs": 1, "mini_batches": 2}, "rollout": {"max_new_tokens": 6}, "evaluation": {"samples": 2}}
    return {
        "sft": make("sft", "sft", "chat"),
        "rm": make("rm", "train-rm", "pairs", lora=w.LORA),
        "dpo": make("dpo", "dpo", "pairs", lora=w.LORA, objective={"name": "dpo"}),
        "kto": make("kto", "dpo", "verdicts", lora=w.LORA, objective={"name": "kto"}),
        "ppo": make("ppo", "ppo", "prompts", lora=w.LORA, rewards=rewards, **sampled),
    }


@pytest.fixture(scope="module")
def ones(recipes: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Each of them by one process."""
    return {name: train(content) for name, content in recipes.items()}


def line(content: dict[str, Any], out: Path, *options: object) -> list[object]:
    """The command that runs a recipe into another folder."""
    path = w.save(content | {"output_dir": str(out)}, out.with_suffix(".yaml"))
    return [content["stage"], path, "--quiet", *options]


@pytest.mark.slow
def test_two_processes_equal_one(
    recipes: dict[str, dict[str, Any]], ones: dict[str, Path], base: Path, world: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    train(recipes["dpo"] | {"output_dir": str(half)}, "--max-steps", 2)  # by one process, to be ended by two
    wrong = w.merged(recipes["sft"], {"data": {"train": str(world / "pairs.jsonl")}})
    wild = w.merged(recipes["sft"], {"training": {"learning_rate": 1e15, "max_grad_norm": None}})
    commands = [line(content, tmp_path / name) for name, content in recipes.items()]
    commands += [
        line(recipes["dpo"], half),
        line(recipes["ppo"], tmp_path / "two", "--max-steps", 2),
        line(wrong, tmp_path / "wrong"),
        line(wild, tmp_path / "wild"),
    ]
    codes, said = several.launch(tmp_path, commands, 2)
    assert codes == [0] * 7 + [3, 5], said
    for name, one in ones.items():
        assert_same(one, tmp_path / name)
    assert_same(ones["dpo"], half, stopped=True)
    train(recipes["ppo"] | {"output_dir": str(tmp_path / "two")})  # begun by two, ended by one
    assert_same(ones["ppo"], tmp_path / "two", stopped=True)

    rows = w.lines(tmp_path / "sft" / "metrics.jsonl")
    trained = sum(tensor.numel() for tensor in load_file(tmp_path / "sft" / "final" / "model.safetensors").values())
    assert rows[-1]["distributed/gradient_bytes"] == 4 * trained
    for name, content in recipes.items():
        path = w.save(content, tmp_path / f"plan-{name}.yaml")
        told = json.loads(run_cli("plan", path, "--no-time", "--json", "--world-size", 2).out)["communication"]
        assert w.lines(tmp_path / name / "metrics.jsonl")[-1]["distributed/gradient_bytes"] == told["handed"], name
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert len(errors) == 2, errors
    assert "pairs.jsonl" in errors[0]
    assert "loss is" in errors[1] or "grad_norm is" in errors[1]
    last = w.lines(tmp_path / "wild" / "metrics.jsonl")[-1]
    assert not math.isfinite(float(last.get("loss", last.get("grad_norm", 0.0))))


@pytest.mark.slow
def test_a_process_that_dies_is_replaced_and_nothing_is_lost(
    recipes: dict[str, dict[str, Any]], ones: dict[str, Path], tmp_path: Path
) -> None:
    often = w.merged(recipes["sft"], {"checkpoint": {"every": 1}, "lora": w.LORA | {"dropout": 0.3}})
    lines = [line(often, tmp_path / name) for name in ("killed", "whole")]  # the second, once all have started anew
    codes, said = several.launch(tmp_path, lines, 3, {"process": 1, "step": 2})
    assert codes == [0, 0], said
    assert "resumed from" in (tmp_path / "killed" / "run.log").read_text()
    assert "resumed from" not in (tmp_path / "whole" / "run.log").read_text()
    assert "process 1 (last seen: " in said
    assert "is gone" in said
    whole, killed = (w.contents(tmp_path / name / "final") for name in ("whole", "killed"))
    assert whole == killed
    assert w.metrics(tmp_path / "whole") == w.metrics(tmp_path / "killed"), "counted bytes are the same too"


@pytest.mark.parametrize("command", ["merge", "report", "chat", "data", "plan", "check", "serve-rollouts", "list"])
def test_what_is_no_stage_runs_alone(command: str, monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    arguments = [] if command == "list" else ["runs/x"]
    outcome = cli(command, *arguments)
    assert outcome.code == 2
    words = f"rlhf {command} runs in one process, and here are 2 (start it as rlhf {command})"
    assert outcome.errors == [f"error: torchrun: {words}"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(app, "PATIENCE", 0.0)  # without torchrun, which ends this one once the first has said it
    outcome = cli(command, *arguments)
    assert (outcome.code, outcome.errors) == (2, [f"error: process 1: torchrun: {words}"])


def test_the_first_of_a_machine_tells_before_they_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others leave it the time to, one after the other."""
    waited: list[float] = []
    monkeypatch.setattr(app.time, "sleep", waited.append)
    for torchrun, local in (("", "1"), ("x", "0"), ("x", "1"), ("x", "2")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun) if torchrun else None
        monkeypatch.setenv("LOCAL_RANK", local)
        assert app._speaks(ValueError())
    assert waited[:2] == [0.0, 0.0]
    assert waited[2] >= app.PATIENCE > 1.0
    assert waited[3] > waited[2]


def test_frames_of_c_do_not_hide_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    monkeypatch.setattr(app, "run_command_line", lambda arguments: 0)
    monkeypatch.setattr(app.gc, "disable", lambda: None)
    for command, torchrun, level in (("sft", "", None), ("--debug", "x", None), ("sft", "x", "ERROR")):
        monkeypatch.setattr(app.sys, "argv", ["rlhf", command])
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun) if torchrun else None
        with pytest.raises(SystemExit):
            app.main()
        assert os.environ.get("TORCH_CPP_LOG_LEVEL") == level


def test_without_a_place_for_temporary_files(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a process that is not the first may meet alone, on a disk of its own."""
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(app, "PATIENCE", 0.0)
    monkeypatch.setattr(app, "check_shell", lambda arguments: no_folder())
    outcome = cli("sft", "r.yaml")
    words = "no temporary file can be written: No usable temporary directory found in ['/full']"
    assert outcome.code == 4
    assert outcome.errors == [f"error: process 3: {words} (free some space, or set TMPDIR)"]


def no_folder() -> None:
    """What Python says."""
    with patch("tempfile._candidate_tempdir_list", lambda: ["/full"]), patch("tempfile.tempdir", None):
        tempfile.gettempdir()
