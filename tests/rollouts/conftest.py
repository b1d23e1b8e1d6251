"""The model folder of tests/models, and servers that stand in for vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.conftest import model_folder
from tests.rollouts.stand_in import StandIn

__all__ = ["model_folder"]


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Iterator[StandIn]:
    found = StandIn(tiny_model)
    yield found
    found.close()


@pytest.fixture
def stand_in(opened: StandIn) -> StandIn:
    """The server as it was at the start."""
    opened.rank, opened.context, opened.sleeps, opened.shift = 16, 128, False, 0.0
    opened.runtime_lora, opened.raw, opened.awake, opened.change = True, False, True, lambda answer: answer
    for held in (opened.loaded, opened.calls, opened.bodies, opened.draws_of):
        held.clear()  # type: ignore[attr-defined]
    return opened


@pytest.fixture(scope="module")
def fresh(tiny_model: Path) -> Iterator[Callable[..., StandIn]]:
    """Servers that hold no adapter of another test in memory."""
    made: list[StandIn] = []

    def make(**more: Any) -> StandIn:
        made.append(StandIn(tiny_model, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()
