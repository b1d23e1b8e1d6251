"""What a run says of itself as it starts: how long it will be, and what a user may not have meant."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.recipe import hub
from tests.conftest import run_cli
from tests.stages import world as w
from tests.stages.conftest import quick

Toy = Callable[..., dict[str, Any]]


def said(content: dict[str, Any], tmp_path: Path, *options: object) -> list[str]:
    outcome = quick(content["stage"], w.save(content, tmp_path / "r.yaml"), "--dry-run", *options)
    assert outcome.code == 0, outcome.err
    return outcome.err.splitlines()


def test_the_length_of_a_run_is_said_in_epochs(toy: Toy, tmp_path: Path) -> None:
    few = {"path": str(w.write_rows(tmp_path / "few.jsonl", w.rows("pairs", 20, 1))), "weight": 2}
    for training, line in (
        ({"batch_size": 16, "num_epochs": 2}, "training: 12 steps of 16 examples, 2 epochs of 96"),
        ({"batch_size": 16, "max_steps": 3}, "training: 3 steps of 16 examples, 0.5 epochs of 96"),
        ({"batch_size": 96, "num_epochs": 1}, "training: 1 step of 96 examples, 1 epoch of 96"),
    ):
        lines = said(toy("dpo", "pairs", objective={"name": "dpo"}, training=training), tmp_path)
        assert line in lines
        assert not any("lower training.batch_size" in one for one in lines)
    content = toy("dpo", "pairs", objective={"name": "dpo"}, data={"train": few}, training={"batch_size": 64})
    lines = said(content, tmp_path)
    assert "training: 1 step of 40 examples, 1 epoch of 40" in lines
    assert (
        "warning: a step asks for 64 examples and an epoch has 40: every step takes just these 40, and is an epoch "
        "(lower training.batch_size)"
    ) in lines


def test_the_prompts_of_a_rollout_that_are_not_there(toy: Toy, tmp_path: Path) -> None:
    content = toy("ppo", "prompts", rewards=[{"rule": {"name": "stop"}}], rollout={"max_new_tokens": 8})
    lines = said(content, tmp_path, "training.batch_size=400", "ppo.mini_batches=1")
    assert any(line.startswith("warning: a step asks for 400 prompts and an epoch has 96") for line in lines)
    assert any(line.startswith("training: 1 step of 96 prompts, 1 epoch of 96") for line in lines)


def test_an_adapter_is_called_by_its_name(toy: Toy, tmp_path: Path) -> None:
    content = toy("sft", "chat", lora={"r": 2, "use_dora": True}, training={"max_steps": 1})
    content["evaluation"]["samples"] = 0
    content["data"]["eval"] = None
    run, path = Path(content["output_dir"]), w.save(content, tmp_path / "r.yaml")
    outcome = quick("sft", path)
    assert outcome.code == 0, outcome.err
    assert ", DoRA: " in outcome.err
    assert "a DoRA adapter of rank 2" in (run / "final" / "README.md").read_text()
    assert ", DoRA r 2" in run_cli("plan", path, "--no-time").err


def test_a_model_without_a_template_is_told_of_in_a_chat(tiny_model: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_model, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    for model, words in ((bare, f"{bare}: its tokenizer has no chat template: it goes on writing"), (tiny_model, "")):
        with pytest.MonkeyPatch.context() as patched, open(os.devnull) as nothing:
            patched.setattr("sys.stdin", nothing)
            outcome = quick("chat", model)
        assert outcome.code == 0
        assert outcome.err.startswith(words) if words else not outcome.err


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that nobody answers for."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.unreachable.cache_clear()


@pytest.mark.usefixtures("away")
def test_a_hub_that_cannot_be_reached_is_said_at_once(toy: Toy, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE
    content = toy("sft", "chat")
    content["model"]["name_or_path"] = "org/none"
    began = time.monotonic()
    try:
        outcome = quick("sft", w.save(content, tmp_path / "r.yaml"))
        assert (outcome.code, len(outcome.errors)) == (4, 1)
        assert (
            "org/none: not in the cache, and the hub cannot be reached (127.0.0.1: Connection refused)" in outcome.err
        )
        rows = toy("sft", "chat", data={"train": "org/none", "eval": None})
        outcome = quick("check", w.save(rows, tmp_path / "rows.yaml"))
        assert outcome.code == 3
        assert "the hub cannot be reached (127.0.0.1: Connection refused)" in outcome.err
        assert time.monotonic() - began < 10  # its library would wait half a minute each time
        assert constants.HF_HUB_OFFLINE
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        hub.unreachable.cache_clear()


def test_nothing_is_asked_of_the_hub_when_it_is_not_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refuse(host: str, port: int) -> str:
        raise AssertionError(f"asked {host}")

    monkeypatch.setattr(hub, "_connect", refuse)
    for offline, proxies in ((True, {}), (False, {"https": "http://proxy:3128"})):
        hub.unreachable.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(hub, "getproxies", lambda found=proxies: found)
        assert hub.unreachable() == ""
    hub.unreachable.cache_clear()
