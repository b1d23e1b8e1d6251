"""A run as the processes see it that only help: they decide, write and say nothing. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rlhf_cli.recipe.work import Work
from rlhf_cli.runs.decide import Decision, Identity
from rlhf_cli.runs.directory import Run

NOBODY = Identity({}, {}, "", None)
"""What a recipe asks for is the first process's to know."""


class Follower(Run):
    """The run directory of the first process, to read from."""

    def __init__(self, recipe: Work, decision: Decision) -> None:
        super().__init__(recipe, "", "auto", NOBODY, decision)

    def begin(self, lineage: dict[str, Any]) -> None:
        """The first process does."""

    def log(self, metrics: dict[str, Any]) -> None:
        """The first process does."""

    def sample(self, record: dict[str, Any]) -> None:
        """The first process does."""

    def write_data_report(self, report: dict[str, Any], bad_rows: bytes = b"") -> None:
        """The first process does."""

    def put(self, name: str, value: dict[str, Any]) -> None:
        """The first process does."""

    def rewind(self, lines: dict[str, int]) -> list[str]:
        """The first process does."""
        return []

    def finish(self, metrics: dict[str, Any]) -> None:
        """The first process does."""


class Mute:
    """A display that shows nothing: the first process speaks for all."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def start(self, total_steps: int, first_step: int) -> None:
        """Nothing."""

    def step(self, step: int, metrics: Mapping[str, float], show: bool) -> None:
        """Nothing."""

    def phase(self, name: str, total: float = 0) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def advance(self, count: float) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""

    def attach(self, path: Path) -> None:
        """Nothing."""
