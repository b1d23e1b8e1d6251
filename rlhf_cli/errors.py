"""Errors that users see. Each kind has its exit code and prints one line a problem: where, what, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    message: str
    where: str = ""
    """`file:line:column key`, `file:line`, a tensor or a row; empty when the message says it all."""
    hint: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        text = f"{text} ({self.hint})" if self.hint else text
        return " ".join(text.split())


class RlhfError(Exception):
    """Base of everything that is reported to the user without a traceback."""

    exit_code = 1

    def __init__(self, problems: str | Problem | Iterable[Problem], where: str = "", hint: str = "") -> None:
        if isinstance(problems, str):
            problems = [Problem(problems, where, hint)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems = list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RecipeError(RlhfError):
    """A wrong command line or a wrong recipe."""

    exit_code = 2


class DataError(RlhfError):
    """A data file or a row that cannot be used."""

    exit_code = 3


class ModelError(RlhfError):
    """A model, adapter, device, disk or memory that cannot do what was asked."""

    exit_code = 4


class DivergedError(RlhfError):
    """Training produced a non-finite number, or a tripwire that is set to stop was touched."""

    exit_code = 5


class Interrupted(RlhfError):
    """SIGINT or SIGTERM was obeyed; a whole checkpoint was written first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def counted(number: int, what: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` when a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""
