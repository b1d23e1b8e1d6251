"""The data gate: every row of every source is read, checked and reported before anything else happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from rlhf_cli.catalog import OBJECTIVES, SELECTIONS, Data, Need
from rlhf_cli.data import formats, sources
from rlhf_cli.data.completions import read_completions
from rlhf_cli.data.examples import Example, Task, digest
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.lints import contradictions
from rlhf_cli.data.quarantine import BadRows, bad_rows, refuse
from rlhf_cli.data.reading import Finished, Format, Wanted
from rlhf_cli.data.report import DataReport, Lint, SourceReport, joined_words, shared_prompts, tally, token_report
from rlhf_cli.data.rows import BadRow
from rlhf_cli.data.shelf import Shelf
from rlhf_cli.data.split import How, Split, make_split
from rlhf_cli.data.suited import nothing_to_learn, suited
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.data_stages import SampleRecipe, ScoreRecipe, SelectRecipe
from rlhf_cli.recipe.schema import PPORecipe, Recipe
from rlhf_cli.recipe.settings.blocks import terms_of
from rlhf_cli.recipe.settings.data import DataSettings, RewardDataSettings, SFTDataSettings, SourceSettings
from rlhf_cli.recipe.work import Work

OnBadRow = Literal["error", "drop"]
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
    bad: tuple[BadRows, ...] = ()
    """Rows of each source that were dropped because they cannot be used."""


@dataclass(frozen=True)
class Prepared:
    """Everything a stage needs of its data. Samples and tasks of a split go by the same index."""

    train: Sequence[Sample]
    source: np.ndarray
    """Source of each train sample: (len(train),) int32."""
    weights: list[float]
    """How often an epoch passes over each source."""
    eval: Sequence[Sample] | None
    tasks_train: list[Task]
    """Empty unless the examples are tasks: nothing else is looked at again."""
    tasks_eval: list[Task]
    report: DataReport
    shelved: tuple[Callable[[], None], ...] = ()
    """What is left to do so that later runs find the samples."""
    bad: tuple[BadRows, ...] = ()
    """Rows that were dropped because they cannot be used."""


def load_examples(
    settings: Sequence[SourceSettings],
    kind: Data,
    on_bad_row: OnBadRow = "error",
    wanted: Wanted = Wanted(),
    split: str = "train",
    max_bad_rows: float | None = None,
) -> tuple[Examples, DataReport]:
    """All examples of some sources.

    An example without what `wanted` asks for is a bad row. Raises DataError for what cannot be read, for bad rows
    unless they are to be dropped (and are not too many), and when a source has no usable row.
    """
    read = [_read(one, kind, wanted, split) for one in settings]
    refuse([one.bad for one in read], 0 if on_bad_row == "error" else max_bad_rows)
    for one in read:
        if not one.items:
            raise DataError(_nothing(one), one.report.path)
    items = [item for one in read for item in one.items]
    source = np.repeat(np.arange(len(read), dtype=np.int32), [len(one.items) for one in read])
    return (
        Examples(items, source, [s.weight for s in settings], tuple(one.bad for one in read)),
        DataReport(
            tuple(one.report for one in read),
            warnings=(*(w for one in read for w in one.warnings), *joined_words(items, split)),
            lints=tuple(Lint(split, reason) for reason in tally(contradictions(items))),
            bad_rows=sum(len(one.bad.reasons) for one in read),
        ),
    )


def prepare(
    data: DataSettings,
    kind: Data,
    template: Template,
    needs: tuple[Need, ...] = (),
    max_length: int | None = None,
    shelf: Shelf | None = None,
) -> Prepared:
    """Train and eval data as samples. `max_length` stands for `data.max_length` (for tasks: the longest prompt).

    `needs`: those of the objective; shelf: where samples may be found. Raises DataError as `load_examples` does, and
    when no sample of a split is left after truncation.
    """
    limit = data.max_length if max_length is None else max_length
    loaded = _load(data, kind, needs)
    both = _both(loaded)
    how = How(limit, data.truncation, isinstance(data, SFTDataSettings) and data.train_on_prompt)
    splits = {
        split: make_split(
            examples.items, examples.source, [(s.digest, s.examples) for s in report.sources], how, template, shelf
        )
        for split, (examples, report) in loaded.items()
    }
    for split, done in splits.items():
        if not len(done.made.samples):
            reasons = "; ".join(str(r) for r in tally(done.cut()))
            raise DataError(
                f"no {split} example is left: {reasons}", f"data.max_length {limit}", "raise data.max_length"
            )
    train, held_out = splits["train"], splits.get("eval")
    return Prepared(
        train=train.made.samples,
        source=train.source[train.made.kept],
        weights=loaded["train"][0].weights,
        eval=held_out.made.samples if held_out else None,
        tasks_train=train.tasks,
        tasks_eval=held_out.tasks if held_out else [],
        report=_report(loaded, splits, both, template),
        shelved=tuple(done.shelved for done in splits.values() if done.shelved is not None),
        bad=tuple(bad for examples, _ in loaded.values() for bad in examples.bad),
    )


def check_data(recipe: Work) -> list[str]:
    """Reads every row of a recipe's data without a tokenizer; lines for people. Raises DataError as the commands do."""
    if isinstance(recipe, SampleRecipe):
        data = recipe.data
        return load_examples(data.prompts, "task", data.on_bad_row, split="prompts",
                             max_bad_rows=data.max_bad_rows)[1].lines()  # fmt: skip
    if isinstance(recipe, ScoreRecipe | SelectRecipe):
        scored = isinstance(recipe, SelectRecipe) and SELECTIONS[recipe.selection.name].scored
        gate = recipe.data
        return read_completions(gate.completions, gate.on_bad_row, gate.max_bad_rows, scored=scored).report.lines()
    assert isinstance(recipe, Recipe)
    loaded = _load(recipe.data, *data_needs(recipe))
    shared = [loaded["eval"][0].items[i].where for i in _both(loaded)]
    lines = _merged([report for _, report in loaded.values()], shared).lines()
    if isinstance(recipe, PPORecipe) and recipe.ppo.ptx is not None:
        _, report = load_examples(
            recipe.ppo.ptx.data, "demonstration", recipe.data.on_bad_row, split="ptx",
            max_bad_rows=recipe.data.max_bad_rows,
        )  # fmt: skip
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
    return {
        split: load_examples(s, kind, data.on_bad_row, wanted, split, data.max_bad_rows) for split, s in splits.items()
    }


# --- one source ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    items: list[Example]
    bad: BadRows
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
    names = dict.fromkeys(columns + sources.keys_of_messages(columns, [row for _, row in head]))
    items, bad, count = _examples(itertools.chain(head, rows), chosen, kind, names)
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
        unused=() if kind == "task" else tuple(c for c in names if not _used(c, chosen, wanted)),
        digest=digest(items),
        dropped=tally(bad + done.dropped + unused),
    )
    warnings = (*done.warnings, *nothing_to_learn(items))
    return _Read(
        items, bad_rows(settings, bad, count), report, tuple(f"{split} {settings.path}: {w}" for w in warnings)
    )


def _used(column: str, chosen: Format, wanted: Wanted) -> bool:
    need = READ_FOR.get(column)
    return column in chosen.reads and (need is None or need in wanted.needs)


def _examples(
    rows: Iterator[sources.Located], chosen: Format, kind: Data, names: dict[str, None]
) -> tuple[list[Any], list[Dropped], int]:
    """What the format's reader gives, the rows it refuses, and the number of rows; `names` learns their columns."""
    items: list[Any] = []
    bad: list[Dropped] = []
    count, read = 0, chosen.gives[kind]
    for where, row in rows:
        count += 1
        if not names.keys() >= row.keys():
            names |= dict.fromkeys(row)
        try:
            items += read(row, where)
        except BadRow as error:
            bad.append(Dropped(str(error), where))
    return items, bad, count


def _nothing(one: _Read) -> str:
    reasons = "; ".join(str(r) for r in one.report.dropped)
    return f"none of its {one.report.rows} rows can be used: {reasons}"


# --- the report ------------------------------------------------------------------------------------------


def _report(
    loaded: dict[str, tuple[Examples, DataReport]],
    splits: dict[str, Split],
    both: dict[int, list[int]],
    template: Template,
) -> DataReport:
    reports = []
    for split, (_, report) in loaded.items():
        counted = []
        for index, one in enumerate(report.sources):
            cut = splits[split].cut(index)
            counted.append(replace(one, kept=one.kept - len(cut), dropped=one.dropped + tally(cut)))
        tokens = token_report(split, splits[split].made, template.stop_ids)
        odd = tuple(Lint(split, reason) for reason in tally(splits[split].lints))
        reports.append(replace(report, sources=tuple(counted), tokens=(tokens,), lints=report.lints + odd))
    kept = {split: set(done.made.kept.tolist()) for split, done in splits.items()} if both else {}
    shared = [i for i, train in both.items() if i in kept["eval"] and not kept["train"].isdisjoint(train)]
    return _merged(reports, [splits["eval"].places[i] for i in shared])


def _both(loaded: dict[str, tuple[Examples, DataReport]]) -> dict[int, list[int]]:
    """The eval examples whose prompt is a train prompt too, by index: those of the train examples."""
    return shared_prompts(loaded["train"][0].items, loaded["eval"][0].items) if "eval" in loaded else {}


def _merged(reports: list[DataReport], shared: list[str]) -> DataReport:
    """The reports of the splits as one; shared: the eval examples whose prompt is a train prompt too."""
    return DataReport(
        sources=tuple(s for r in reports for s in r.sources),
        tokens=tuple(t for r in reports for t in r.tokens),
        duplicates=next(iter(tally(Dropped("same prompt", where) for where in shared)), None),
        warnings=tuple(w for r in reports for w in r.warnings),
        lints=tuple(lint for r in reports for lint in r.lints),
        bad_rows=sum(r.bad_rows for r in reports),
    )
