"""What an entry of the catalogue says. No torch; only `Entry.load()` crosses that line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 1e15
"""Numbers of recipes and data beyond it are refused: their squares overflow where they are computed with."""
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
AboveOne = Annotated[float, Field(gt=1, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """A block of a recipe: unknown keys refused, no silent conversion, the string under a field is its help."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def refuse_unread(self, keys: Sequence[str], key: str, value: str) -> None:
        """Raise ValueError for the first of `keys` that was changed although nothing reads it: `key` is not `value`."""
        given = getattr(self, key)
        for unread in () if given == value else keys:
            if getattr(self, unread) != type(self).model_fields[unread].default:
                raise ValueError(f"{unread} is only read with {key}: {value}, and {key} is {given}")


@dataclass(frozen=True)
class Entry:
    """A name in the catalogue."""

    name: str
    path: str
    """`module:attribute` below rlhf_cli, imported on use."""
    help: str
    """One line."""

    def load(self) -> Any:
        """The object behind the name. May import torch."""
        module, attribute = self.path.split(":")
        return getattr(importlib.import_module(f"rlhf_cli.{module}"), attribute)


Data = Literal["demonstration", "comparison", "verdict", "task", "ranking", "rated", "steps"]
Need = Literal[
    "reference", "scores", "target", "safety", "kl_point", "running", "common", "certainty", "whole_step", "best",
    "strict", "firm", "hard", "grades",
]  # fmt: skip
NEEDS: dict[Need, str] = {
    "reference": "log-probabilities of a frozen reference",
    "scores": "a score of each completion of a pair in the data",
    "target": "the probability that chosen is better: 1 unless the data say otherwise",
    "safety": "whether each completion of a pair is safe",
    "kl_point": "an estimate of the KL to the reference, made in each step",
    "running": "means of the rewards of all steps before",
    "common": "sums over the tokens up to the shorter completion's length",
    "certainty": "how sure the policy is of each completion",
    "whole_step": "all examples of a step at once: it mixes them",
    "best": "one completion of each ranking that stands alone at the top",
    "strict": "rankings without ties",
    "firm": "steps that are right or wrong: neutral ones are left out",
    "hard": "steps that are right, neutral or wrong, not probabilities",
    "grades": "rankings with scores, not only an order",
}
Head = Literal["score", "tokens", "language"]


@dataclass(frozen=True)
class Objective(Entry):
    """A training objective."""

    stage: str
    """The command it belongs to."""
    data: Data
    """The canonical example it is computed on."""
    needs: tuple[Need, ...]
    """What it asks for besides the data; NEEDS says it in words."""
    settings: type[Settings]
    head: Head | None = None
    """Reward models: what is trained and where it is read. score: one number at the last token; tokens: classes or a
    number at tokens; language: the language model's own head."""


@dataclass(frozen=True)
class Estimator(Entry):
    """An advantage estimator. All share the signature of `objectives.advantage.gae`."""

    critic: bool
    """Whether it reads values."""
    group: int
    """Completions of a prompt it needs at least."""
    greedy: bool
    """Whether it needs the score of a greedy completion of each prompt."""
    whitened: bool
    """Whether its advantages are whitened over the rollout unless the recipe says otherwise: as it is published."""
    settings: type[Settings]


@dataclass(frozen=True)
class Controller(Entry):
    """Adapts a KL coefficient."""

    settings: type[Settings]


@dataclass(frozen=True)
class Stage(Entry):
    """A command that works from a recipe."""

    recipe: str
    """Name of the recipe class in recipe/schema.py."""
    trains: bool = True
    """Whether a model comes out, or data."""
