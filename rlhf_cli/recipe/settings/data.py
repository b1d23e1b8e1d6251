"""Where a recipe's examples come from, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rlhf_cli.catalog import Finite, Positive, Settings
from rlhf_cli.recipe.settings.blocks import Checked, Count, Name, as_list, as_mapping


class SourceSettings(Settings):
    path: Name
    """A file (.jsonl, .json, .parquet, .txt, each also .gz), a folder of such files, a run of `rlhf sample`, `score` or
    `select`, or a hub data set."""
    format: str = "auto"
    """How a row is read: auto detects it from the columns and says what it took."""
    columns: dict[str, str | Annotated[list[str], Field(min_length=1)]] = {}
    """Names of your columns for the names of the format, for instance {prompt: question, chosen: good}. A list of
    columns becomes a list of their values, and `a.b` is b inside the objects of column a."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    limit: Count | None = None
    """Use only the first rows."""
    weight: Positive = 1.0
    """How often an epoch passes over this source: 2 twice, 0.5 a random half."""


Source = Annotated[SourceSettings, as_mapping("path", SourceSettings)]
Sources = Annotated[
    list[Source], BeforeValidator(as_list, json_schema_input_type=Source | list[Source]), Field(min_length=1)
]


class DataSettings(Checked):
    train: Sources
    """A path, or a list of paths or of {path, format, columns, name, split, limit, weight}."""
    eval: Sources | None = None
    """Held-out data in the same forms; null: no evaluation."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence (prompt and completion) in tokens."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """What happens to longer ones. left cuts the start of the prompt, right the end of the completion; the header
    before the completion is never cut. The counts are always shown."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be used (empty completion, equal pair, wrong columns): stop, or drop and count it. The rows
    dropped are written to bad-rows.jsonl in the run directory, each with its place and the reason."""
    max_bad_rows: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of each split at most so many rows (a whole number) or such a share of them (below 1) may be dropped as bad:
    more stop the run after all. null: any number. Only read with `on_bad_row: drop`."""
    cache: Literal["auto", "off"] = "auto"
    """auto: the tokens are kept for later runs on the same rows with the same tokenizer, in the folder RLHF_CACHE
    (default: rlhf in the user's cache), and taken from there. off: neither. Every row is read and checked all the same,
    and the result never changes."""

    def contradictions(self) -> Iterator[str]:
        yield from self.unread(("max_bad_rows",), "on_bad_row", "drop")
        for i, one in enumerate(self.eval or []):
            if one.weight != 1:
                yield f"eval.{i}.weight is not read: a weight says how often an epoch of training passes over a source"
        for i, one in enumerate(self.train):
            first = next(k for k, other in enumerate(self.train) if _alike(one, other))
            if first < i:
                yield f"train.{i} is the same source as train.{first}: give one of them, with weight: 2"


def _alike(one: SourceSettings, other: SourceSettings) -> bool:
    return one.model_dump(exclude={"weight"}) == other.model_dump(exclude={"weight"})


class SFTDataSettings(DataSettings):
    train_on_prompt: bool = False
    """Also train on the prompt's tokens."""


class SegmentSettings(Settings):
    by: Literal["sub_sentence", "sentence", "answer"]
    """Where a completion is cut: at commas too, at the ends of sentences, or nowhere."""
    categories: Annotated[list[str], Field(min_length=1)] | None = None
    """Only errors of these categories count; null: all."""


class RatingSettings(Checked):
    method: Literal["bradley_terry", "elo"] = "bradley_terry"
    """bradley_terry fits all games at once; elo goes through them in their order."""
    k: Positive = 32.0
    """Points a game can move; only read with `method: elo`."""
    start: Finite = 1500.0
    """Rating before the first game; only read with `method: elo`."""
    shuffles: Count = 1
    """Orders of the games that elo is averaged over; 1: the order of the file. Only read with `method: elo`."""
    l2: Positive = 0.1
    """Pull towards the mean, so that whoever never lost has a finite rating; only read with `method: bradley_terry`."""
    target: Literal["zscore", "minmax", "logit"] = "zscore"
    """Ratings as targets: mean 0 and deviation 1, between 0 and 1, or in logits around their mean."""
    scope: Literal["dataset", "prompt"] = "dataset"
    """What is scaled together: all ratings, or those of a prompt."""

    def contradictions(self) -> Iterator[str]:
        yield from self.unread(("k", "start", "shuffles"), "method", "elo")
        yield from self.unread(("l2",), "method", "bradley_terry")


class RewardDataSettings(DataSettings):
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    """Put after each step that does not end with it already; the label of a step sits on its last token."""
    segments: SegmentSettings | None = None
    """How the format `spans` cuts completions into pieces; it needs this."""
    ratings: RatingSettings = RatingSettings()
    """How the format `games` makes scores of games."""
