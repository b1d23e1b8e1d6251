"""Runs that many tests start from, made once: a pretrained model, its LoRA SFT, a reward model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.conftest import Outcome, run_cli
from tests.stages import world as w

Train = Callable[..., Path]


def quick(*arguments: object) -> Outcome:
    """The command line without drawing the report, which takes longer than the tiny training."""
    with patch("rlhf_cli.stages.common.write_report", lambda path: path / "report.html"):
        return run_cli(*arguments)


def train(content: dict[str, Any], *options: object, code: int = 0) -> Path:
    """Run a recipe; the run directory. Fails with the errors when the exit code is another one."""
    out = Path(content["output_dir"])
    outcome = quick(content["stage"], w.save(content, out.with_suffix(".yaml")), *options)
    assert outcome.code == code, outcome.err
    return out


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy task's data and reward.py."""
    return w.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared runs lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def base(tiny_model: Path, world: Path, runs: Path) -> Path:
    """A full SFT of the tiny model: it answers with praise and blame in equal shares."""
    settings = {"num_epochs": 3, "batch_size": 24}
    return train(w.recipe("sft", tiny_model, world, "chat", runs / "base", training=settings))


@pytest.fixture(scope="session")
def sft_lora(base: Path, world: Path, runs: Path) -> Path:
    """A LoRA SFT on `base`."""
    return train(w.recipe("sft", base, world, "chat", runs / "sft-lora", lora=w.LORA))


@pytest.fixture(scope="session")
def rm(sft_lora: Path, world: Path, runs: Path) -> Path:
    """A LoRA reward model that starts from `sft_lora`, on the same base."""
    return train(w.recipe("train-rm", sft_lora, world, "pairs", runs / "rm", lora={"r": 8}))


@pytest.fixture
def toy(world: Path, base: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`toy(stage, kind, name, rows, **more)`: a LoRA recipe on `base`, on few rows, that writes to tmp_path/name."""

    def make(stage: str, kind: str, name: str = "run", rows: int = 96, **more: Any) -> dict[str, Any]:
        content = w.recipe(stage, base, world, kind, tmp_path / name, lora=w.LORA)
        data = content["data"]
        data["train"], data["eval"] = ({"path": data[s], "limit": n} for s, n in (("train", rows), ("eval", 16)))
        return w.merged(content, more)

    return make
