"""A run that is stopped and started again equals, bit for bit, the run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.train import snapshot
from rlhf_cli.train.engine import Engine
from tests.conftest import run_cli
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]
OFTEN = {"evaluation": {"every": 2}, "checkpoint": {"every": 3}}
DROPOUT = {"lora": {"r": 8, "alpha": 16, "dropout": 0.1}}
EIGHT = {"lora": {"r": 128, "alpha": 16, "dropout": 0.1}, "training": {"optimizer": "adamw_8bit"}}
"""Matrices large enough that bitsandbytes keeps their moments in 8 bits."""


def assert_same(run: Path, whole: Path) -> None:
    """All that training left behind is equal, optimisers and generators included."""
    assert w.metrics(run) == w.metrics(whole)
    for name in ("samples.jsonl", "data-report.json"):
        assert (run / name).exists() == (whole / name).exists()
        assert not (run / name).exists() or (run / name).read_bytes() == (whole / name).read_bytes()
    assert w.contents(run / "final") == w.contents(whole / "final")
    last = max(p.name for p in (whole / "checkpoints").iterdir())
    found, known = (w.contents(folder / "checkpoints" / last) for folder in (run, whole))
    tensors = [name for name in known if name.endswith(".safetensors")]
    assert tensors
    assert [name for name in tensors if found[name] != known[name]] == []


def stop_at(step: int, signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while step `step` is under way."""
    tick = Engine.tick

    def stopped(self: Engine, metrics: dict[str, float]) -> None:
        if self.step + 1 == step:
            os.kill(os.getpid(), signum)
        tick(self, metrics)

    monkeypatch.setattr(Engine, "tick", stopped)


def interrupted_at(content: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of a recipe, stopped in step `step`."""
    run = Path(content["output_dir"])
    with monkeypatch.context() as patched:
        stop_at(step, signal.SIGTERM, patched)
        outcome = quick(content["stage"], w.save(content, run.with_suffix(".yaml")))
    assert outcome.code == 143, outcome.err
    return run


def interrupted(content: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch, signum: int) -> Path:
    """The run of a recipe, stopped in step `step`, then finished by the same command."""
    run = Path(content["output_dir"])
    with monkeypatch.context() as patched:
        stop_at(step, signum, patched)
        outcome = quick(content["stage"], w.save(content, run.with_suffix(".yaml")))
    assert outcome.code == 128 + signum, outcome.err
    assert f"stopped after step {step}, checkpoint written" in outcome.errors[0]
    assert not (run / "DONE").exists()
    assert w.metrics(run)[-1]["step"] == step
    assert (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    again = quick(content["stage"], run.with_suffix(".yaml"))
    assert again.code == 0, again.err
    assert f"going on after step {step}" in again.err
    return run


def test_a_signal_while_the_report_is_drawn(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no error of what draws, whose code in C would take it for its own."""
    content = toy("sft", "chat", rows=32, training={"max_steps": 1})
    run = Path(content["output_dir"])
    recipe = w.save(content, run.with_suffix(".yaml"))
    with monkeypatch.context() as patched:
        patched.setattr("rlhf_cli.stages.common.write_report", lambda path: os.kill(os.getpid(), signal.SIGINT))
        outcome = run_cli("sft", recipe)
    assert (outcome.code, outcome.errors) == (
        130, ["error: SIGINT: stopped after report.html; the same command goes on from here"],
    )  # fmt: skip
    assert not (run / "DONE").exists()
    left = run / "rollbacks" / "01" / ".metrics.jsonl.tmp-77"
    left.parent.mkdir(parents=True)
    left.touch()
    assert quick("sft", recipe).code == 0
    assert (run / "DONE").exists()
    assert list(left.parent.iterdir()) == []


def test_a_signal_while_a_checkpoint_is_read(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, and it is no bug of what reads."""
    content = toy("sft", "chat", rows=48, training={"max_steps": 3}, checkpoint={"every": 1})
    run = interrupted_at(content, 1, monkeypatch)
    recipe, restore = run.with_suffix(".yaml"), snapshot.restore

    def struck(engine: Engine, saved: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        restore(engine, saved)

    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "restore", struck)
        outcome = quick("sft", recipe)
    assert (outcome.code, outcome.errors) == (
        130, ["error: SIGINT: stopped after reading the checkpoint; the same command goes on from here"],
    )  # fmt: skip
    again = quick("sft", recipe)
    assert (again.code, "going on after step 1" in again.err) == (0, True), again.err


CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "sft": ("sft", "chat", 4, DROPOUT),
    "sft-full-8bit": ("sft", "completion", 4, {"lora": None, "training": {"optimizer": "adamw_8bit"}}),
    "rm": ("train-rm", "pairs", 4, EIGHT),
    "dpo": ("dpo", "pairs", 4, {"objective": {"name": "dpo"}, **DROPOUT}),
    "dpo-second-epoch": ("dpo", "pairs", 5, {"objective": {"name": "dpo"}, "data": {"train": {"limit": 50}}}),
    "kto": ("dpo", "verdicts", 4, {"objective": {"name": "kto"}, **EIGHT}),
    "bco": ("dpo", "verdicts", 4, {"objective": {"name": "bco"}}),
    "aot-ld": ("dpo", "pairs", 4, {"objective": {"terms": [{"name": "aot"}, {"name": "ld_dpo"}]}}),
    "step_labels": ("train-rm", "steps", 4, {"objective": {"name": "step_labels"}}),
    "simpo": ("simpo", "pairs", 4, EIGHT),
    "orpo": ("orpo", "pairs", 4, DROPOUT),
    "orpo-full": ("orpo", "pairs", 4, {"lora": None, "training": {"optimizer": "adafactor"}}),
}


def eight_bits(run: Path) -> bool:
    """Whether moments in the newest checkpoint are kept in 8 bits."""
    last = max((run / "checkpoints").iterdir())
    (path,) = last.glob("*-optimizer.safetensors")
    return any(tensor.dtype == torch.uint8 for tensor in load_file(path).values())


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_exactly(toy: Toy, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stage, kind, step, settings = CASES[name]
    schedule = {"training": {"max_steps": 7, "lr_scheduler": "cosine", "warmup_ratio": 0.2}}
    more = w.merged(OFTEN, schedule, settings)
    run = interrupted(toy(stage, kind, "stopped", **more), step, monkeypatch, signal.SIGTERM)
    whole = train(toy(stage, kind, "whole", **more))
    assert_same(run, whole)
    if settings.get("training", {}).get("optimizer") == "adamw_8bit":
        assert eight_bits(whole)
    if name == "dpo-second-epoch":
        assert w.metrics(whole)[4]["epoch"] == 1.0  # step 5, after which it was stopped, is in the second epoch


def ppo(toy: Toy, world: Path, name: str, rewards: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    settings = {
        "rewards": rewards, "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2},
        "ppo": {"mini_batches": 2, "kl": {"name": "doubling", "target_kl_per_sequence": 0.5}, "penalty": {}},
        "training": {"max_steps": 5, "learning_rate": 5e-3, "lr_scheduler": "linear"},
    }  # fmt: skip
    return toy("ppo", "prompts", name, **w.merged(OFTEN, DROPOUT, settings, more))


@pytest.mark.parametrize("kind", ["lora", "full", "8bit"])
def test_a_stopped_ppo_goes_on_exactly(
    toy: Toy, world: Path, rm: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rewards: list[dict[str, Any]] = [{"function": f"{world / 'reward.py'}:true_reward"}]
    rewards += [{"run": str(rm)}] if kind == "lora" else []
    more = {"full": {"lora": None}, "8bit": w.merged(EIGHT, {"checkpoint": {"every": 2}})}.get(kind, {})
    run = interrupted(ppo(toy, world, "stopped", rewards, **more), 3, monkeypatch, signal.SIGINT)
    whole = train(ppo(toy, world, "whole", rewards, **more))
    assert_same(run, whole)
    assert len(set(w.column(whole, "kl_coef"))) > 1  # the controller's state matters here
    assert w.column(run, "episode")[-1] == 5 * 32


def test_the_signal_in_the_last_step_ends_the_run_as_usual(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    content = toy("dpo", "pairs", "run", objective={"name": "dpo"}, training={"max_steps": 2})
    stop_at(2, signal.SIGTERM, monkeypatch)
    assert (train(content) / "DONE").exists()


@pytest.mark.parametrize("step", [2, 6])
def test_a_run_that_died_goes_on_from_its_last_checkpoint(toy: Toy, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Before the first checkpoint it starts over; later it forgets the lines written after the checkpoint."""
    more = w.merged(OFTEN, {"objective": {"name": "dpo"}, "training": {"max_steps": 7}})
    content = toy("dpo", "pairs", "died", **more)
    run, tick = Path(content["output_dir"]), Engine.tick

    def dies(self: Engine, metrics: dict[str, float]) -> None:
        tick(self, metrics)
        if self.step == step - 1:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "tick", dies)
        outcome = quick("dpo", w.save(content, run.with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert "the power is gone" in outcome.errors[0]
    assert "Traceback" not in outcome.err
    assert "Traceback" in (run / "run.log").read_text()
    assert w.metrics(run)[-1]["step"] == step - 1
    train(content)
    assert_same(run, train(toy("dpo", "pairs", "whole", **more)))


def test_a_second_signal_leaves_at_once(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    content = toy("dpo", "pairs", "run", objective={"name": "dpo"}, checkpoint={"every": 2}, training={"max_steps": 5})
    run, tick = Path(content["output_dir"]), Engine.tick

    def twice(self: Engine, metrics: dict[str, float]) -> None:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Left, match="143"):
                os.kill(os.getpid(), signal.SIGTERM)
            raise KeyboardInterrupt
        tick(self, metrics)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "tick", twice)
        patched.setattr(os, "_exit", leave)
        outcome = quick("dpo", w.save(content, run.with_suffix(".yaml")))
    assert outcome.code == 130
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert "resumed from" in quick("dpo", run.with_suffix(".yaml")).err


# --- in a process of its own -----------------------------------------------------------------------------


def stopped_process(content: dict[str, Any], lines: int) -> tuple[Path, int, str]:
    """Start the command, send SIGTERM once metrics.jsonl has so many lines; the exit code and stderr."""
    run = Path(content["output_dir"])
    recipe = w.save(content, run.with_suffix(".yaml"))
    arguments = [sys.executable, "-m", "rlhf_cli", content["stage"], str(recipe)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        limit = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.read()
    return run, process.returncode, said


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_process_that_got_sigterm(toy: Toy, world: Path, rm: Path, stage: str) -> None:
    def content(name: str) -> dict[str, Any]:
        if stage == "ppo":
            return ppo(toy, world, name, [{"run": str(rm)}], training={"max_steps": 10})
        settings = {"objective": {"name": "dpo"}, "training": {"max_steps": 24, "batch_size": 32}}
        return toy("dpo", "pairs", name, **w.merged(OFTEN, settings))

    run, code, said = stopped_process(content("stopped"), 5)
    assert code == 143, said
    assert "Traceback" not in said
    assert "Warning" not in said
    assert "error: SIGTERM: stopped after step" in said
    assert not (run / "DONE").exists()
    again = quick(stage, run.with_suffix(".yaml"))
    assert again.code == 0, again.err
    assert "resumed from" in again.err
    assert_same(run, train(content("whole")))
