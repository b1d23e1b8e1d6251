"""The data gate: every row of every source is read, checked and reported before anything else happens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from rlhf_cli.catalog import OBJECTIVES, Data, Need
from rlhf_cli.data import formats, sources
from rlhf_cli.data.examples import Example
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.reading import Finished, Format, Wanted
from rlhf_cli.data.report import DataReport, SourceReport, joined_words, shared_prompts, tally, token_report
from rlhf_cli.data.rows import BadRow
from rlhf_cli.data.suited import nothing_to_learn, suited
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokens import Sample, Tokenized, tokenize
from rlhf_cli.errors import DataError, Problem
from rlhf_cli.recipe.schema import PPORecipe, Recipe
from rlhf_cli.recipe.settings.blocks import terms_of
from rlhf_cli.recipe.settings.data import DataSettings, RewardDataSettings, SFTDataSettings, SourceSettings

OnBadRow = Literal["error", "drop"]
LISTED = 20
"""How many bad rows an error names."""
READ_FOR: dict[str, Need] = {
    "margin": "target", "target": "target", "chosen_safe": "safety", "rejected_safe": "safety",
    "chosen_score": "scores", "score_chosen": "scores", "rejected_score": "scores", "score_rejected": "scores",
}  # fmt: skip
"""What an objective must need for a column of pairs to be read."""
LOOKED_AT = 16
"""How many rows decide the format of a source."""


@dataclass(frozen=True)
class Examples:
    """The examples of a split, in the order of their sources."""

    items: list[Example]
    source: np.ndarray
    """Source of each example: (len(items),) int32."""
    weights: list[float]
    """Weight of each source; not applied yet."""


@dataclass(frozen=True)
class Prepared:
    """Everything a stage needs of its data. Samples and examples of a split go by the same index."""

    train: list[Sample]
    source: np.ndarray
    """Source of each train sample: (len(train),) int32."""
    weights: list[float]
    """How often an epoch passes over each source."""
    eval: list[Sample] | None
    examples_train: list[Example]
    examples_eval: list[Example] | None
    report: DataReport


def load_examples(
    settings: Sequence[SourceSettings],
    kind: Data,
    on_bad_row: OnBadRow = "error",
    wanted: Wanted = Wanted(),
    split: str = "train",
) -> tuple[Examples, DataReport]:
    """All examples of some sources.

    An example without what `wanted` asks for is a bad row. Raises DataError for what cannot be read, for bad rows
    unless they are to be dropped, and when a source has no usable row.
    """
    read = [_read(one, kind, wanted, split) for one in settings]
    if on_bad_row == "error":
        _refuse([d for one in read for d in one.bad])
    for one in read:
        if not one.items:
            raise DataError(_nothing(one), one.report.path)
    items = [item for one in read for item in one.items]
    source = np.repeat(np.arange(len(read), dtype=np.int32), [len(one.items) for one in read])
    return (
        Examples(items, source, [s.weight for s in settings]),
        DataReport(
            tuple(one.report for one in read),
            warnings=(*(w for one in read for w in one.warnings), *joined_words(items, split)),
        ),
    )


def prepare(
    data: DataSettings,
    kind: Data,
    template: Template,
    needs: tuple[Need, ...] = (),
    max_length: int | None = None,
) -> Prepared:
    """Train and eval data as samples. `max_length` stands for `data.max_length` (for tasks: the longest prompt).

    `needs`: those of the objective. Raises DataError as `load_examples` does, and when no sample of a split is left
    after truncation.
    """
    limit = data.max_length if max_length is None else max_length
    loaded = _load(data, kind, needs)
    on_prompt = isinstance(data, SFTDataSettings) and data.train_on_prompt
    made = {
        split: tokenize(examples.items, template, limit, data.truncation, on_prompt)
        for split, (examples, _) in loaded.items()
    }
    for split, tokens in made.items():
        if not tokens.samples:
            reasons = "; ".join(str(r) for r in tally(_cut(loaded[split][0], tokens)))
            raise DataError(
                f"no {split} example is left: {reasons}", f"data.max_length {limit}", "raise data.max_length"
            )
    kept = {split: [loaded[split][0].items[i] for i in tokens.kept] for split, tokens in made.items()}
    return Prepared(
        train=made["train"].samples,
        source=loaded["train"][0].source[made["train"].kept],
        weights=loaded["train"][0].weights,
        eval=made["eval"].samples if "eval" in made else None,
        examples_train=kept["train"],
        examples_eval=kept.get("eval"),
        report=_report(loaded, made, kept, template),
    )


def check_data(recipe: Recipe) -> list[str]:
    """Reads every row of a recipe's data without a tokenizer; lines for people. Raises DataError as `prepare` does."""
    loaded = _load(recipe.data, *data_needs(recipe))
    items = {split: examples.items for split, (examples, _) in loaded.items()}
    lines = _merged([report for _, report in loaded.values()], items).lines()
    if isinstance(recipe, PPORecipe) and recipe.ppo.ptx is not None:
        _, report = load_examples(recipe.ppo.ptx.data, "demonstration", recipe.data.on_bad_row, split="ptx")
        lines += report.lines()
    return [*lines, "lengths not checked: tokens are counted when the stage starts (try --dry-run)"]


def data_needs(recipe: Recipe) -> tuple[Data, tuple[Need, ...]]:
    """The kind of example a recipe trains on, and what its objective, or the terms of its mix, need of each."""
    block: Any = getattr(recipe, "objective", None)
    if block is None:
        return "task", ()
    entries = [OBJECTIVES[term.name] for _, term in terms_of(block)]
    return entries[0].data, tuple(dict.fromkeys(need for entry in entries for need in entry.needs))


def _load(data: DataSettings, kind: Data, needs: tuple[Need, ...]) -> dict[str, tuple[Examples, DataReport]]:
    """The examples of each split."""
    wanted = Wanted(needs)
    if isinstance(data, RewardDataSettings):
        wanted = Wanted(needs, data.step_separator, data.segments, data.ratings)
    splits = {"train": data.train} | ({"eval": data.eval} if data.eval else {})
    return {split: load_examples(s, kind, data.on_bad_row, wanted, split) for split, s in splits.items()}


# --- one source ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    items: list[Example]
    bad: list[Dropped]
    report: SourceReport
    warnings: tuple[str, ...]


def _read(settings: SourceSettings, kind: Data, wanted: Wanted, split: str) -> _Read:
    rows = sources.read(settings)
    head = list(itertools.islice(rows, LOOKED_AT))
    if not head:
        raise DataError("holds no rows", settings.path)
    columns = list(dict.fromkeys(c for _, row in head for c in row))
    sources.check_columns(settings, columns, [row for _, row in head])
    chosen = (
        formats.detect(columns, kind, settings.path)
        if settings.format == "auto"
        else formats.named(settings.format, kind, settings.path)
    )
    items, bad, count = _examples(itertools.chain(head, rows), chosen, kind)
    done = chosen.finish[kind](items, wanted) if kind in chosen.finish else Finished(items, [])
    items, unfit, unused = suited(done.items, wanted)
    bad += unfit
    report = SourceReport(
        split=split,
        path=settings.path,
        format=chosen.name,
        detected=settings.format == "auto",
        rows=count,
        examples=len(items),
        kept=len(items),
        weight=settings.weight,
        unused=() if kind == "task" else tuple(c for c in columns if not _used(c, chosen, wanted)),
        digest=digest(items),
        dropped=tally(bad + done.dropped + unused),
    )
    warnings = (*done.warnings, *nothing_to_learn(items))
    return _Read(items, bad, report, tuple(f"{split} {settings.path}: {w}" for w in warnings))


def _used(column: str, chosen: Format, wanted: Wanted) -> bool:
    need = READ_FOR.get(column)
    return column in chosen.reads and (need is None or need in wanted.needs)


def _examples(rows: Iterator[sources.Located], chosen: Format, kind: Data) -> tuple[list[Any], list[Dropped], int]:
    """What the format's reader gives, the rows it refuses, and the number of rows."""
    items: list[Any] = []
    bad: list[Dropped] = []
    count, read = 0, chosen.gives[kind]
    for where, row in rows:
        count += 1
        try:
            items += read(row, where)
        except BadRow as error:
            bad.append(Dropped(str(error), where))
    return items, bad, count


def digest(items: Sequence[Example]) -> str:
    """SHA-256 of the content of some examples; where they came from does not matter."""
    state = hashlib.sha256()
    for item in items:
        state.update(repr(replace(item, where="")).encode("utf-8", "backslashreplace"))
    return state.hexdigest()


def _refuse(bad: list[Dropped]) -> None:
    if not bad:
        return
    problems = [Problem(d.reason, d.where) for d in bad[:LISTED]]
    more = len(bad) - LISTED
    text = f"and {more} more bad rows" if more > 0 else f"{len(bad)} bad row{'s' if len(bad) > 1 else ''} in all"
    raise DataError([*problems, Problem(text, hint="correct them, or set data.on_bad_row: drop to leave them out")])


def _nothing(one: _Read) -> str:
    reasons = "; ".join(str(r) for r in one.report.dropped)
    return f"none of its {one.report.rows} rows can be used: {reasons}"


# --- the report ------------------------------------------------------------------------------------------


def _cut(examples: Examples, tokens: Tokenized, source: int | None = None) -> list[Dropped]:
    """What tokenising left out, of one source or of all."""
    return [
        Dropped(reason, examples.items[i].where)
        for i, reason in tokens.dropped
        if source is None or examples.source[i] == source
    ]


def _report(
    loaded: dict[str, tuple[Examples, DataReport]],
    made: dict[str, Tokenized],
    kept: dict[str, list[Example]],
    template: Template,
) -> DataReport:
    reports = []
    for split, (examples, report) in loaded.items():
        counted = []
        for index, one in enumerate(report.sources):
            cut = _cut(examples, made[split], index)
            counted.append(replace(one, kept=one.kept - len(cut), dropped=one.dropped + tally(cut)))
        tokens = token_report(split, made[split], template.stop_ids)
        reports.append(replace(report, sources=tuple(counted), tokens=(tokens,)))
    return _merged(reports, kept)


def _merged(reports: list[DataReport], items: dict[str, list[Example]]) -> DataReport:
    """The reports of the splits as one, with the prompts that both have."""
    shared = [] if "eval" not in items else shared_prompts(items["train"], items["eval"])
    return DataReport(
        sources=tuple(s for r in reports for s in r.sources),
        tokens=tuple(t for r in reports for t in r.tokens),
        duplicates=next(iter(tally(shared)), None),
        warnings=tuple(w for r in reports for w in r.warnings),
    )
