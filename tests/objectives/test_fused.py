"""Chains of operations compiled into single kernels: the numbers of the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from rlhf_cli.objectives import fused, head, head_known
from rlhf_cli.objectives.fused import Fused
from tests.objectives import head_checks, head_known_checks
from tests.objectives.support import Check


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every chain compiled, whatever is asked; the names of those that were called."""
    called: list[str] = []
    by = Fused.by

    def record(self: Fused, _: bool) -> object:
        called.append(self.plain.__name__)
        return by(self, True)

    monkeypatch.setattr(Fused, "by", record)
    return called


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("module", "check", "chains"),
    [
        (head, head_checks.check_head_values_and_gradients, {"bend", "absorb", "by_each", "by_both", "finish"}),
        (head, head_checks.check_head_upcasts, {"absorb", "finish"}),
        (head_known, head_known_checks.check_known_values_and_gradients, {"bend", "_exponentiate", "finish"}),
        (head_known, head_known_checks.check_known_in_half_precision, {"_exponentiate", "finish"}),
        (head_known, head_known_checks.check_known_extremes, {"_exponentiate"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_compiled_chains_of_the_head(module: object, check: Check, chains: set[str], compiled: list[str]) -> None:
    check(module)
    assert chains <= set(compiled)


@pytest.mark.usefixtures("compiler")
def test_one_compilation_serves_many_sizes() -> None:
    def chain(x: torch.Tensor, per_row: torch.Tensor) -> torch.Tensor:
        return (x - per_row[:, None]).exp_()

    both, before = Fused(chain), counters["stats"]["unique_graphs"]
    for rows, columns in ((4, 9), (7, 3), (5, 5), (30, 2)):
        x, per_row = torch.randn(rows, columns), torch.randn(rows)
        torch.testing.assert_close(both.by(True)(x, per_row), both.by(False)(x, per_row))
    assert counters["stats"]["unique_graphs"] - before == 1


def test_what_cannot_be_compiled_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("\n\n  no compiler\nmore words")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    assert fused.attempt(torch.device("cpu")) == "no compiler"
    monkeypatch.setattr(torch, "compile", lambda function, **__: lambda x: function(x) + 0.5)
    assert fused.attempt(torch.device("cpu")) == "the compiled kernel is wrong by 0.5"


def test_options_that_this_pytorch_does_not_know_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `deterministic` is unknown before 2.10."""
    asked: list[object] = []

    def compiled(function: object, **more: object) -> object:
        asked.append(more["options"])
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(fused, "OPTIONS", {"max_autotune": False, "of_another_version": 3})
    assert Fused(torch.neg).compiled(torch.ones(1)) == -1
    assert asked == [{"max_autotune": False}]
