"""Runs on a device whose memory is made up: how much is in memory at once, what happens when it was too much."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.data.batch import Batch
from rlhf_cli.models import checkpointing, memory
from rlhf_cli.models.roles import Role
from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.test_interrupted import assert_same, interrupted

Toy = Callable[..., dict[str, Any]]
SHORT = {
    "objective": {"name": "dpo"},
    "training": {"max_steps": 3, "batch_size": 12, "learning_rate": 1e-3},
    "model": {"gradient_checkpointing": "auto"},
}


class Device:
    """Memory of which a token takes `keeping` bytes in a layer that keeps its activations, and one where it does not;
    a backward pass that takes more than `capacity` runs out of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, capacity: int, keeping: int = 100) -> None:
        self.free, self.capacity, self.keeping, self.held, self.measured = free, capacity, keeping, 0, 0
        hidden, backward = Role.hidden, Role.backward

        def seen(role: Role, batch: Batch) -> torch.Tensor:
            count, all_of_them = checkpointing.recomputed(role.base.model), len(role.base.model.model.layers)
            self.held = batch.tokens * (self.keeping * (all_of_them - count) + count)
            return hidden(role, batch)

        def limited(role: Role, loss: torch.Tensor) -> None:
            if self.held > self.capacity:
                raise torch.OutOfMemoryError("CUDA out of memory")
            backward(role, loss)

        def peak(device: torch.device, function: Callable[[], None]) -> int:
            function()
            self.measured += 1
            return self.held

        monkeypatch.setattr(Role, "hidden", seen)
        monkeypatch.setattr(Role, "backward", limited)
        monkeypatch.setattr(memory, "peak", peak)
        monkeypatch.setattr(memory, "room", lambda device: self.free)


def go(content: dict[str, Any]) -> Outcome:
    return quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))


def said(outcome: Outcome) -> list[str]:
    """What was said of the memory."""
    return [line for line in outcome.err.splitlines() if "micro-batches of" in line or "out of memory" in line]


def test_the_budget_is_what_was_measured_and_a_resumed_run_keeps_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 layers keep 200 bytes a token, half of what is free is planned with: 128 tokens, as if the recipe said so."""
    known = train(toy("dpo", "pairs", "known", **w.merged(SHORT, {"training": {"micro_batch_tokens": 128}})))
    every = w.merged(SHORT, {"model": {"gradient_checkpointing": False}, "checkpoint": {"every": 2}})
    device = Device(monkeypatch, 10**9, 10**9)
    monkeypatch.setattr("rlhf_cli.train.fitting.owed", lambda role, engine: device.free // 2 - 200 * 130)
    outcome = go(toy("dpo", "pairs", "whole", **every))
    assert outcome.code == 0, outcome.err
    assert said(outcome) == ["micro-batches of 128 tokens, activations of 0 of 2 layers recomputed"]
    assert device.measured == 2
    assert w.metrics(tmp_path / "whole") == w.metrics(known)
    run = interrupted(toy("dpo", "pairs", "stopped", **every), 2, monkeypatch, signal.SIGTERM)
    assert_same(run, tmp_path / "whole")
    assert device.measured == 4, "the resumed run does not measure"


def test_automatic_recomputation_fits_where_all_layers_fit(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device holds a step's tokens only with every layer recomputed, which a wrong measurement hides."""
    device = Device(monkeypatch, 10**9, 1024 * 2)
    always = toy("dpo", "pairs", "always", **w.merged(SHORT, {"model": {"gradient_checkpointing": True}}))
    assert "out of memory" not in go(always).err
    outcome = go(toy("dpo", "pairs", "auto", **SHORT))
    assert outcome.code == 0, outcome.err
    assert said(outcome) == [
        "micro-batches of 1024 tokens, activations of 0 of 2 layers recomputed",
        "warning: out of memory: recomputing the activations of 1 layers (same result)",
        "warning: out of memory: recomputing the activations of 2 layers (same result)",
    ]
    assert w.metrics(tmp_path / "auto") == w.metrics(tmp_path / "always")
    device.free = 2 * 10**6  # the same run where it is known beforehand that not all can be kept
    outcome = go(toy("dpo", "pairs", "known", **SHORT))
    assert outcome.code == 0, outcome.err
    (first,) = [line for line in said(outcome) if "micro-batches of" in line]
    assert "activations of 2 of 2 layers" in first


def test_less_of_everything_before_one_example_ends_the_run(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 10**9, 100 * 2)
    outcome = go(toy("dpo", "pairs", "halved", **SHORT))
    assert outcome.code == 0, outcome.err
    assert [line.split(": ")[2] for line in said(outcome) if "warning" in line][:3] == [
        "recomputing the activations of 1 layers (same result)",
        "recomputing the activations of 2 layers (same result)",
        "going on with micro-batches of 512 tokens (same result)",
    ]
    device.capacity = 20
    outcome = go(toy("dpo", "pairs", "refused", **SHORT))
    assert (outcome.code, len(outcome.errors)) == (4, 1), outcome.err
    assert "out of memory with a single example" in outcome.errors[0]
