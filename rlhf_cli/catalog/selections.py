"""Ways to make training data of scored completions: settings, with the only defaults, and one entry each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rlhf_cli.catalog.entries import Data, Entry, Finite, NonNegative, Settings

Count = Annotated[int, Field(ge=1)]


class Best(Settings):
    count: Count = 1
    """Completions kept of each prompt, the highest scores first."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of what all prompts keep, only this share with the highest scores: a ranking over the whole data set."""


class Threshold(Settings):
    min_score: Finite = 0.0
    """Completions with at least this score are kept."""
    at_most: Count | None = None
    """Of each prompt at most so many, the highest scores first."""


class Pairs(Settings):
    which: Literal["best_worst", "all"] = "best_worst"
    """One pair of each prompt, its best completion and its worst; or every two completions."""
    min_gap: NonNegative = 0.0
    """Scores of a pair must lie at least this far apart; equal ones never make a pair."""


class Ranking(Settings):
    min_completions: Annotated[int, Field(ge=2)] = 2
    """Prompts with fewer different completions are left out."""


class Verdict(Settings):
    threshold: Finite | None = None
    """Completions above are wanted, those below are not; null: the mean score of their prompt."""
    margin: NonNegative = 0.0
    """Completions this close to the threshold are left out; one right at it always is."""


class Spin(Settings):
    column: str = "completion"
    """Column of the prompts' rows that holds the completion of the data: chosen against each of the model's own."""


class Games(Settings):
    between: Literal["models", "completions"] = "models"
    """Who meets at a prompt: completions of different models, or every two."""
    tie: NonNegative = 0.0
    """Scores this close are a tie."""
    samples: Annotated[int, Field(ge=0)] = 1000
    """Bootstrap samples of the prompts behind the intervals of the ratings; 0: none."""


@dataclass(frozen=True)
class Selection(Entry):
    """A way to select. All are functions of groups of `data.completions.Candidate`, one group a prompt."""

    settings: type[Settings]
    gives: Data
    """The kind of example that its rows are."""
    scored: bool = True
    """Whether completions need a score."""


_M = "data.selection"

SELECTIONS: tuple[Selection, ...] = (
    Selection("best", f"{_M}:best", "The best completions of each prompt, as demonstrations", Best, "demonstration"),
    Selection("threshold", f"{_M}:threshold", "Every completion that is good enough, as demonstrations; and the "
              "prompts that have none", Threshold, "demonstration"),
    Selection("pairs", f"{_M}:pairs", "A better and a worse completion, with their scores", Pairs, "comparison"),
    Selection("ranking", f"{_M}:ranking", "All completions of a prompt with their scores", Ranking, "ranking"),
    Selection("verdict", f"{_M}:verdict", "Completions that are wanted or not", Verdict, "verdict"),
    Selection("spin", f"{_M}:spin", "The data's completion against the model's own", Spin, "comparison", scored=False),
    Selection("games", f"{_M}:games", "Completions against each other, and ratings of their models",
              Games, "rated"),
)  # fmt: skip
