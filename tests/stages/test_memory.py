"""Out of memory: the micro-batch is halved and the step repeated, same result; one example too large ends the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.models.roles import Role
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]
SHORT = {"objective": {"name": "dpo"}, "training": {"max_steps": 3, "batch_size": 12, "learning_rate": 1e-3}}


def small_device(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """A device on which a backward pass over more than `most` tokens runs out of memory; sizes of those that passed."""
    passed: list[int] = []
    hidden, backward, size = Role.hidden, Role.backward, [0]

    def seen(self: Role, batch: Any) -> torch.Tensor:
        size[0] = batch.tokens
        return hidden(self, batch)

    def limited(self: Role, loss: torch.Tensor) -> None:
        if size[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passed.append(size[0])
        backward(self, loss)

    monkeypatch.setattr(Role, "hidden", seen)
    monkeypatch.setattr(Role, "backward", limited)
    return passed


def test_the_result_is_the_same_in_less_memory(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    known = w.metrics(train(toy("dpo", "pairs", "large", **SHORT)))
    passed = small_device(monkeypatch, 90)
    content = toy("dpo", "pairs", "small", **SHORT)
    outcome = quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert outcome.code == 0, outcome.err
    assert "warning: out of memory: going on with micro-batches of 64 tokens (same result)" in outcome.err
    assert len(passed) > 6
    for old, new in zip(known, w.metrics(Path(content["output_dir"])), strict=True):
        assert new == pytest.approx(old, rel=1e-4, abs=1e-5)


def test_one_example_that_does_not_fit_ends_the_run(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    small_device(monkeypatch, 10)
    content = toy("dpo", "pairs", "small", **SHORT)
    outcome = quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (4, 1), outcome.err
    assert "out of memory with a single example" in outcome.errors[0]
    assert "max_length" in outcome.errors[0]
    assert not (Path(content["output_dir"]) / "DONE").exists()
