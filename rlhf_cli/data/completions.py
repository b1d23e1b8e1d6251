"""Completions as data: those of `rlhf sample` and `rlhf score`, or of any file with prompts and completions."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_cli.data import rows, sources
from rlhf_cli.data.examples import Message, Prompt
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.quarantine import BadRows, Rows, bad_rows, refuse
from rlhf_cli.data.report import DataReport, SourceReport, tally
from rlhf_cli.data.rows import BadRow, Row
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import SourceSettings

LOOKED_AT = 16
"""Rows whose columns are checked."""
READ = (
    "prompt",
    "completion",
    "completions",
    "score",
    "scores",
    "finished",
    "row",
    "by",
    "index",
    "where",
    "cost",
    "of",
)
"""Columns that mean something here."""


@dataclass(frozen=True)
class Candidate:
    """A completion that may become training data."""

    prompt: Prompt
    completion: str
    where: str
    """`file:line` of its row."""
    finished: bool = True
    """False: the length limit cut it."""
    score: float | None = None
    """None: not scored, or it could not be."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the prompt's own row."""
    by: Mapping[str, Any] = field(default_factory=dict)
    """What sampled it, and how."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """The whole row."""

    @property
    def model(self) -> str:
        """The model that wrote it; empty when nobody says."""
        return str(self.by.get("model", ""))


@dataclass(frozen=True)
class Completions:
    """All that was read."""

    items: list[Candidate]
    report: DataReport
    bad: tuple[BadRows, ...]
    """Rows of each source that cannot be used."""

    def without(self, reasons: Mapping[int, str]) -> Completions:
        """Without the items of these places, which turned out to be bad rows, each with its reason."""
        reports, bad, start = [], [], 0
        for report, known in zip(self.report.sources, self.bad, strict=True):
            stop = start + report.kept
            wrong = [Dropped(r, row_of(self.items[i].where)) for i, r in reasons.items() if start <= i < stop]
            more = bad_rows(known.source, wrong, known.rows)
            reports.append(replace(report, kept=report.kept - len(wrong), dropped=report.dropped + tally(wrong)))
            bad.append(replace(known, reasons=known.reasons | more.reasons))
            start = stop
        items = [item for i, item in enumerate(self.items) if i not in reasons]
        count = sum(len(one.reasons) for one in bad)
        return Completions(items, replace(self.report, sources=tuple(reports), bad_rows=count), tuple(bad))


def read_completions(
    settings: Sequence[SourceSettings], on_bad_row: str, max_bad_rows: float | None, *, scored: bool
) -> Completions:
    """Every completion of some sources, in their order. Raises DataError: unreadable files, no column of completions or
    (scored) of scores, bad rows unless they are to be dropped, no row at all."""
    found: list[Candidate] = []
    bad: list[BadRows] = []
    reports: list[SourceReport] = []
    for source in settings:
        items, dropped, columns, of = _read(source, scored)
        bad.append(of)
        reports.append(
            SourceReport(
                split="completions",
                path=source.path,
                format="completions",
                detected=source.format == "auto",
                rows=of.rows,
                examples=len(items),
                kept=len(items),
                weight=source.weight,
                unused=tuple(c for c in columns if c not in READ and not c.endswith("_ids")),
                digest=_digest(items),
                dropped=tally(dropped),
            )
        )
        found += items
    refuse(bad, 0 if on_bad_row == "error" else max_bad_rows)
    for one in reports:
        if not one.examples:
            reasons = "; ".join(str(reason) for reason in one.dropped)
            raise DataError(f"none of its {one.rows} rows can be used: {reasons}", one.path)
    report = DataReport(tuple(reports), bad_rows=sum(len(one.reasons) for one in bad))
    return Completions(found, report, tuple(bad))


def by_prompt(items: Iterable[Candidate]) -> list[list[Candidate]]:
    """The completions of each prompt, prompts and completions in the order in which they came."""
    groups: dict[Prompt, list[Candidate]] = {}
    for item in items:
        groups.setdefault(item.prompt, []).append(item)
    return list(groups.values())


def plain_prompt(prompt: Prompt) -> Any:
    """A prompt as JSON: text, or a list of {role, content}."""
    return prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]


# --- rows ------------------------------------------------------------------------------------------------


def _read(source: SourceSettings, scored: bool) -> tuple[list[Candidate], list[Dropped], list[str], BadRows]:
    """What a source gives, the rows it refuses, the columns of the first ones, and what becomes of those refused."""
    if source.format not in ("auto", "completions"):
        raise DataError(
            f"format {source.format} is not one of completions: rows have columns prompt and completion, or prompt "
            "and completions", source.path, "leave format out, and name your columns in `columns`",
        )  # fmt: skip
    whole = Rows(source)
    read = iter(whole)
    head = list(itertools.islice(read, LOOKED_AT))
    if not head:
        raise whole.broken or DataError("holds no rows", source.path)
    columns = list(dict.fromkeys(c for _, row in head for c in row))
    sources.check_columns(source, columns, [row for _, row in head])
    _check_columns(columns, source.path, scored)
    items: list[Candidate] = []
    bad: list[Dropped] = []
    count = 0
    for where, row in itertools.chain(head, read):
        count += 1
        try:
            items += _candidates(row, where, scored)
        except BadRow as error:
            bad.append(Dropped(str(error), where))
    return items, bad, columns, bad_rows(source, bad, count, whole.broken)


def _check_columns(columns: Sequence[str], where: str, scored: bool) -> None:
    several = "completions" in columns
    found = f"found: {', '.join(sorted(columns))}"
    for wanted in ("prompt", "completions" if several else "completion"):
        if wanted not in columns:
            raise DataError(f"no column '{wanted}'; {found}", where, "name your columns in `columns`, or sample first: "
                            "rlhf sample")  # fmt: skip
    score = "scores" if several else "score"
    if scored and score not in columns:
        raise DataError(f"no column '{score}'; {found}", where, "score the completions first: rlhf score")


def _candidates(row: Row, where: str, scored: bool) -> Iterator[Candidate]:
    """The completions of a row: one, or those of a list."""
    if "completions" in row:
        if "completion" in row:
            raise BadRow("both 'completion' and 'completions': which is meant?")
        prompt, texts = rows.several_answers(row)
        if not texts:
            raise BadRow("'completions' is empty")
        scores = rows.items(row, "scores") if scored else [None] * len(texts)
        if len(scores) != len(texts):
            raise BadRow(f"{len(texts)} completions and {len(scores)} scores")
        for k, (text, score) in enumerate(zip(texts, scores, strict=True)):
            known = None if score is None else rows.number({"score": score}, "score")
            yield Candidate(prompt, text, f"{where} completion {k + 1}", score=known, facts=_object(row, "row"))
        return
    prompt, (text,) = _one(row)
    if "score" in row or not scored:
        known = rows.number(row, "score") if scored else None
        finished = row.get("finished", True)
        if not isinstance(finished, bool):
            raise BadRow("'finished' is neither true nor false")
        yield Candidate(prompt, text, where, finished, known, _object(row, "row"), _object(row, "by"), row)
        return
    raise BadRow("no 'score'")


def _one(row: Row) -> tuple[Prompt, tuple[str, ...]]:
    """Prompt and completion; a completion that is empty is one too, if it was sampled."""
    if row.get("completion") == "" and "completion_ids" in row:
        return rows.prompt(row), ("",)
    return rows.answers(row, "completion")


def _object(row: Row, column: str) -> Mapping[str, Any]:
    value = row.get(column)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRow(f"'{column}' is {rows.kind_of(value)}, not an object")
    return value


def token_ids(candidate: Candidate) -> tuple[list[int], list[int]] | None:
    """The tokens that `rlhf sample` wrote beside a completion. Raises BadRow when they are no ids."""
    found = [candidate.given.get(column) for column in ("prompt_ids", "completion_ids")]
    if None in found:
        return None
    for ids in found:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise BadRow("'prompt_ids' and 'completion_ids' are not both lists of token ids")
    return found[0], found[1]  # type: ignore[return-value]


def _digest(items: Iterable[Candidate]) -> str:
    """SHA-256 of the content of some completions."""
    state = hashlib.sha256()
    for item in items:
        known = [plain_prompt(item.prompt), item.completion, item.score, item.finished]
        state.update(json.dumps(known, sort_keys=True).encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as messages: text becomes what a user says."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


PLACE = re.compile(r" completion \d+$")


def row_of(where: str) -> str:
    """The row that a completion stands in."""
    return PLACE.sub("", where)
