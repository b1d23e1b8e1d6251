"""What became of the data: rows read, kept and dropped, and token statistics. For data-report.json and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf_cli.data.examples import Comparison, Demonstration, Example, Ranking, Steps, Task
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.quarantine import FILE
from rlhf_cli.data.tokenizing import Tokenized

NAMED = 50
"""How many places are listed for each reason; the counts are always exact."""


MUCH = 0.1
"""Share of the examples of a source that nobody leaves out unawares."""


@dataclass(frozen=True)
class Reason:
    """Why rows were left out."""

    reason: str
    count: int
    where: tuple[str, ...]
    """The first of them, as `file:line`."""

    def __str__(self) -> str:
        more = ", ..." if self.count > 3 else ""
        return f"{self.reason}: {self.count} ({', '.join(self.where[:3])}{more})"


@dataclass(frozen=True)
class Lint:
    """Examples of a split that are kept, though something is odd about them."""

    split: str
    found: Reason

    def __str__(self) -> str:
        return f"{self.split} (kept): {self.found}"


@dataclass(frozen=True)
class SourceReport:
    """One source of a split."""

    split: str
    """train or eval"""
    path: str
    format: str
    detected: bool
    """Whether the format was found by the columns."""
    rows: int
    """Rows read."""
    examples: int
    """Examples made from them, before any was dropped for its length."""
    kept: int
    """Examples in use."""
    weight: float
    unused: tuple[str, ...]
    """Columns that the format does not read."""
    digest: str
    """SHA-256 of the examples."""
    dropped: tuple[Reason, ...] = ()

    def line(self) -> str:
        """One line for people."""
        found = " (detected)" if self.detected else ""
        text = f"{self.split} {self.path}: format {self.format}{found}, {self.rows} rows, {self.kept} examples kept"
        if self.unused:
            text += f", columns not used: {', '.join(self.unused)}"
        return "; ".join([text, *(f"dropped, {reason}" for reason in self.dropped)])

    def warning(self) -> str | None:
        """A sentence when much of it is left out for its length."""
        lost = 1.0 - self.kept / max(self.examples, 1)
        if lost <= MUCH or not self.examples:
            return None
        return (
            f"{self.split} {self.path}: {100 * lost:.0f} % of the examples are longer than max_length and left out "
            "(raise data.max_length, or set data.truncation)"
        )


@dataclass(frozen=True)
class Spread:
    """Lengths in tokens."""

    min: int
    mean: float
    p95: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}/{self.mean:.1f}/{self.p95}/{self.max}"


@dataclass(frozen=True)
class TokenReport:
    """The samples of a split."""

    split: str
    samples: int
    prompt: Spread
    completion: Spread | None
    """None for tasks, which have no completions."""
    total: int
    """Tokens, each prompt counted once."""
    scored: int
    ended: float | None
    """Share of the completions whose end token is scored; None for steps, whose end tokens never are."""
    shortened: int
    """Samples that were cut to max_length."""
    labels_cut: int = 0
    """Step labels beyond the cuts."""

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.split}: {self.samples} samples, tokens min/mean/p95/max: prompt {self.prompt}"]
        if self.completion is not None:
            parts += [f"completion {self.completion}", f"{self.total} in all, {self.scored} scored"]
        if self.ended is not None:
            parts.append(f"end token scored in {100 * self.ended:.1f} % of completions")
        if self.shortened:
            parts.append(f"{self.shortened} cut to max_length")
        if self.labels_cut:
            parts.append(f"{self.labels_cut} step labels cut off")
        return ", ".join(parts)


@dataclass(frozen=True)
class DataReport:
    """All sources and splits."""

    sources: tuple[SourceReport, ...]
    tokens: tuple[TokenReport, ...] = ()
    duplicates: Reason | None = None
    """Eval prompts that are train prompts too; they are kept."""
    lints: tuple[Lint, ...] = ()
    bad_rows: int = 0
    """Rows dropped because they cannot be used."""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return asdict(self) | {"bad_rows_file": FILE if self.bad_rows else None}

    def lines(self) -> list[str]:
        """Short lines for people, warnings last."""
        lines = [s.line() for s in self.sources] + [t.line() for t in self.tokens]
        return lines + [f"warning: {w}" for w in self.all_warnings()]

    def all_warnings(self) -> list[str]:
        """What a user should look at."""
        found = list(self.warnings)
        if self.duplicates is not None:
            found.append(f"eval prompts that are also train prompts (kept), {self.duplicates}")
        found += [line for source in self.sources if (line := source.warning()) is not None]
        found += [str(lint) for lint in self.lints]
        for report in self.tokens:
            if report.ended is not None and report.ended < 0.5:
                found.append(
                    f"{report.split}: the end token is scored in only {100 * report.ended:.1f} % of the completions; "
                    "the model will not learn to stop (raise data.max_length or use truncation: drop)"
                )
        return found


def tally(dropped: Iterable[Dropped]) -> tuple[Reason, ...]:
    """Counts by reason, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for one in dropped:
        groups.setdefault(one.reason, []).append(one.where)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(Reason(reason, len(where), tuple(where[:NAMED])) for reason, where in ordered)


def spread(lengths: Sequence[int] | np.ndarray) -> Spread:
    """Minimum, mean, 95th percentile (a length that occurs) and maximum."""
    values = np.asarray(lengths)
    p95 = np.percentile(values, 95, method="inverted_cdf")
    return Spread(int(values.min()), float(values.mean()), int(p95), int(values.max()))


def token_report(split: str, made: Tokenized, stop_ids: Sequence[int]) -> TokenReport:
    """Statistics of a split that is not empty."""
    arrays, last = made.samples.arrays, made.samples.last()
    prompts, completions = made.samples.lengths()
    ended = arrays["scored"][last] & np.isin(arrays["ids"][last], stop_ids)  # (C,)
    return TokenReport(
        split=split,
        samples=len(made.samples),
        prompt=spread(prompts),
        completion=spread(completions) if len(completions) else None,
        total=len(arrays["ids"]),
        scored=int(arrays["scored"].sum()),
        ended=int(ended.sum()) / len(ended) if len(ended) and not len(arrays["label_ends"]) else None,
        shortened=made.shortened,
        labels_cut=made.labels_cut,
    )


def shared_prompts(train: Iterable[Example], held_out: Sequence[Example]) -> dict[int, list[int]]:
    """The held-out examples whose prompt is a train prompt too, by index: those of the train examples."""
    asked: dict[Any, list[int]] = {prompt_of(item): [] for item in held_out}
    for index, item in enumerate(train) if asked else ():
        if (found := asked.get(prompt_of(item))) is not None:
            found.append(index)
    return {i: found for i, item in enumerate(held_out) if (found := asked[prompt_of(item)])}


def prompt_of(item: Example) -> Any:
    """What an example asks: its prompt, a conversation without its last answer, or a plain text itself."""
    if not isinstance(item, Demonstration):
        return item.prompt
    if isinstance(item.prompt, tuple):
        return item.prompt[:-1] if item.completion is None else item.prompt
    return item.prompt or item.completion


def joined_words(items: Iterable[Example], split: str) -> list[str]:
    """A warning when most completions begin right at the last letter of their prompt."""
    pairs = ((i.prompt, first_completion(i)) for i in items if isinstance(i.prompt, str))
    ends = Counter(p[-1].isalnum() and c[0].isalnum() for p, c in pairs if p and c)
    count = ends.total()
    if not count or ends[True] < count / 2:
        return []
    return [
        f"{split}: {ends[True]} of {count} completions begin right at the last letter of their prompt; "
        "text is joined as it stands, so end prompts or begin completions with a space"
    ]


def first_completion(item: Example) -> str:
    """The completion of an example, the first one of several, its first step; empty when there is none."""
    match item:
        case Comparison():
            return item.chosen
        case Ranking():
            return item.completions[0]
        case Steps():
            return item.steps[0]
        case Task():
            return ""
    return item.completion or ""
