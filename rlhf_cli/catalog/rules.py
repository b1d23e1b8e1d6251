"""Rules that score completions in `ppo` without a model: settings, with the only defaults, and one entry each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf_cli.catalog.entries import Entry, Finite, Settings

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
"""A word of a text, apostrophes inside it included."""
Count = Annotated[int, Field(ge=1)]


class Length(Settings):
    unit: Literal["token", "character"] = "token"
    """What is counted: tokens, the end token included, or characters."""
    aim: Literal["at_most", "near"] = "at_most"
    """at_most: nothing is lost up to limit - margin, all from `limit` on; near: nothing is lost at `limit`, all from
    `margin` away from it on."""
    limit: Count = 128
    """The longest length, or the wanted one."""
    margin: Count = 32
    """Over how many tokens or characters the score falls from 0 to -1."""

    @model_validator(mode="after")
    def _margin_fits(self) -> Length:
        if self.aim == "at_most" and self.margin > self.limit:
            raise ValueError(f"margin {self.margin} is larger than limit {self.limit}: every completion would lose")
        return self


class Stop(Settings):
    stopped: Finite = 1.0
    """Score of a completion that a stop token ended."""
    cut: Finite = 0.0
    """Score of one that the length limit ended."""


class Regex(Settings):
    pattern: str = r"(?s)<answer>.+</answer>"
    """A regular expression of Python's re; flags may stand in it, as (?i) or (?s)."""
    match: Literal["search", "full"] = "search"
    """Whether it is looked for anywhere, or has to match the whole completion."""
    matched: Finite = 1.0
    """Score of a completion that matches."""
    missed: Finite = 0.0
    """Score of one that does not."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class NumericAnswer(Settings):
    column: str = "answer"
    """Column of the data with the right number, or with a text that ends in it."""
    marker: str = "####"
    """The answer is the first number after the last of these, in the data and in the completion; empty: the last
    number."""
    without_marker: Literal["last", "wrong"] = "last"
    """A completion without the marker: its last number is its answer, or it is wrong."""
    right: Finite = 1.0
    """Score of the right number."""
    wrong: Finite = 0.0
    """Score of any other number, or of none."""


class Words(Settings):
    plus: list[str] = [
        "beautiful", "best", "excellent", "fun", "glad", "good", "great", "happy", "kind", "love", "nice", "smile",
        "smiled", "sweet", "wonderful",
    ]  # fmt: skip
    """Words that count 1 each; whole words, small and capital letters alike."""
    minus: list[str] = [
        "angry", "awful", "bad", "cried", "cry", "hate", "hurt", "mad", "mean", "sad", "scared", "terrible", "ugly",
        "worst", "wrong",
    ]  # fmt: skip
    """Words that count -1 each."""
    per: Literal["completion", "word"] = "completion"
    """The difference itself, or divided by the number of words of the completion."""

    @field_validator("plus", "minus")
    @classmethod
    def _are_words(cls, words: list[str]) -> list[str]:
        for word in words:
            if WORD.fullmatch(word) is None:
                raise ValueError(f"'{word}' is not one word, so no word of a completion can equal it")
        return words

    @model_validator(mode="after")
    def _on_one_side(self) -> Words:
        both = {w.casefold() for w in self.plus} & {w.casefold() for w in self.minus}
        if both:
            raise ValueError(f"'{min(both)}' stands in plus and in minus")
        if not self.plus and not self.minus:
            raise ValueError("plus and minus are both empty")
        return self


@dataclass(frozen=True)
class Rule(Entry):
    """A score that needs no model. All are functions of a `rollouts.rewards.Rollout`."""

    settings: type[Settings]
    reads: str | None = None
    """The setting that names the column of the data it compares with."""


_M = "rollouts.rules"

RULES: tuple[Rule, ...] = (
    Rule("length", f"{_M}:length", "Loses by its length: over a limit, or away from a target", Length),
    Rule("stop", f"{_M}:stop", "Whether the completion ended by itself", Stop),
    Rule("regex", f"{_M}:regex", "Whether the completion matches a regular expression", Regex),
    Rule("numeric_answer", f"{_M}:numeric_answer", "Whether the number it ends on equals the one in the data",
         NumericAnswer, reads="column"),
    Rule("words", f"{_M}:words", "Words of one list less words of another", Words),
)  # fmt: skip
