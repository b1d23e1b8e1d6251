"""The data gate: every row of every source is read, checked and reported before anything else happens."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from rlhf_cli.catalog import OBJECTIVES, SELECTIONS, Data, Need
from rlhf_cli.data.completions import read_completions
from rlhf_cli.data.examples import Example, Task
from rlhf_cli.data.gathering import read_source
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.heap import Heap, joined
from rlhf_cli.data.lints import contradictions
from rlhf_cli.data.quarantine import BadRows, bad_rows, refuse
from rlhf_cli.data.reading import Wanted
from rlhf_cli.data.report import DataReport, Lint, joined_words, shared_prompts, tally, token_report
from rlhf_cli.data.right_numbers import check_rule
from rlhf_cli.data.shelf import Shelf
from rlhf_cli.data.split import How, Split, make_split
from rlhf_cli.data.template import NO_TEMPLATE, NO_TEMPLATE_HINT, Template
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.data_stages import SampleRecipe, ScoreRecipe, SelectRecipe
from rlhf_cli.recipe.evaluation import EvalRecipe
from rlhf_cli.recipe.local_model import Told, told_of
from rlhf_cli.recipe.schema import PPORecipe, Recipe
from rlhf_cli.recipe.settings.blocks import terms_of
from rlhf_cli.recipe.settings.data import DataSettings, RewardDataSettings, SFTDataSettings, SourceSettings
from rlhf_cli.recipe.work import Work

OnBadRow = Literal["error", "drop"]


@dataclass(frozen=True)
class Examples:
    """The examples of a split, in the order of their sources."""

    items: Heap
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
    read = [read_source(one, kind, wanted, split) for one in settings]
    refuse([one.bad for one in read], 0 if on_bad_row == "error" else max_bad_rows)
    for one in read:
        if not one.items:
            raise DataError(one.nothing(), one.report.path)
    items = joined([one.items for one in read])
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

    `needs`: those of the objective; shelf: where samples may be found. What the chat template refuses is a bad row.
    Raises DataError as `load_examples` does, and when no sample of a split is left after truncation.
    """
    limit = data.max_length if max_length is None else max_length
    loaded = _load(data, kind, needs)
    both = _both(loaded)
    how = How(limit, data.truncation, isinstance(data, SFTDataSettings) and data.train_on_prompt)
    splits = {
        split: make_split(
            examples.items, examples.source, [(s.digest, s.examples) for s in report.sources], how, template, shelf,
            strict=data.on_bad_row == "error",
        )
        for split, (examples, report) in loaded.items()
    }  # fmt: skip
    for split, done in splits.items():
        loaded[split] = _with_refused(*loaded[split], done)
        refuse(loaded[split][0].bad, 0 if data.on_bad_row == "error" else data.max_bad_rows)
        if not len(done.made.samples):
            raise _nothing_left(split, done, limit)
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


EVALUATED: dict[str, Data] = {
    "pairs": "comparison", "rankings": "ranking", "scored": "rated", "steps": "steps",
    "demonstrations": "demonstration", "prompts": "task",
}  # fmt: skip
"""The kind of example under each key of `data` of an evaluation."""


def check_data(recipe: Work, made: Container[str] = ()) -> list[str]:
    """Reads every row of a recipe's data without a tokenizer; lines for people. made: names of runs that are still to
    be made. Raises DataError as the commands do, also for chat messages where the model's folder has no template."""
    told, words = told_of(recipe, made), "lengths not checked: tokens are counted when the stage starts (try --dry-run)"
    if isinstance(recipe, ScoreRecipe | SelectRecipe):
        scored = isinstance(recipe, SelectRecipe) and SELECTIONS[recipe.selection.name].scored
        gate, there = recipe.data, _there(recipe.data.completions, made)
        if not there:
            return []
        return read_completions(there, gate.on_bad_row, gate.max_bad_rows, scored=scored).report.lines()
    data: Any = recipe.data  # type: ignore[attr-defined]
    read = []
    tasks: list[Any] = []
    for split, sources, kind, wanted in _gates(recipe, made):
        if there := _there(sources, made):
            found, report = load_examples(there, kind, data.on_bad_row, wanted, split, data.max_bad_rows)
            _check_template(found.items, told)
            read.append((split, found, report))
            if kind == "task":
                tasks += found.items
    for i, reward in enumerate(recipe.rewards_read() if tasks else []):
        check_rule(reward, tasks, f"rewards.{i}")
    if isinstance(recipe, SampleRecipe | EvalRecipe):
        return [line for _, _, report in read for line in report.lines()]
    loaded = {split: (found, report) for split, found, report in read if split in ("train", "eval")}
    both = _both(loaded) if "train" in loaded else {}
    shared = [loaded["eval"][0].items[i].where for i in both]
    lines = _merged([report for _, report in loaded.values()], shared).lines()
    return [*lines, *(line for split, _, report in read if split == "ptx" for line in report.lines()), words]


def _there(sources: Sequence[SourceSettings], made: Container[str]) -> list[SourceSettings]:
    return [source for source in sources if source.path not in made]


def _gates(recipe: Work, made: Container[str]) -> Iterator[tuple[str, list[SourceSettings], Data, Wanted]]:
    """Each split of a recipe's data: its sources, what they are read as, and for what."""
    if isinstance(recipe, SampleRecipe):
        yield "prompts", recipe.data.prompts, "task", Wanted()
    elif isinstance(recipe, EvalRecipe):
        for key, sources in recipe.data.given().items():
            known = key == "steps" and recipe.model.name_or_path not in made
            yield key, sources, EVALUATED[key], Wanted(**recipe.cut()) if known else Wanted()
    else:
        assert isinstance(recipe, Recipe)
        kind, needs = data_needs(recipe)
        for split, sources in _splits(recipe.data).items():
            yield split, sources, kind, wanted_of(recipe.data, needs)
        if isinstance(recipe, PPORecipe) and recipe.ppo.ptx is not None:
            yield "ptx", recipe.ppo.ptx.data, "demonstration", Wanted()


def _check_template(items: Sequence[Example], told: Told) -> None:
    """DataError for the first chat messages where the tokenizer is known to have no template."""
    chat = next((i for i in items if isinstance(i.prompt, tuple)), None) if told.template is False else None
    if chat is not None:
        raise DataError(NO_TEMPLATE, chat.where, NO_TEMPLATE_HINT)


def data_needs(recipe: Recipe) -> tuple[Data, tuple[Need, ...]]:
    """The kind of example a recipe trains on, and what its objective, or the terms of its mix, need of each."""
    block: Any = getattr(recipe, "objective", None)
    if block is None:
        return "task", ()
    entries = [OBJECTIVES[term.name] for _, term in terms_of(block)]
    return entries[0].data, tuple(dict.fromkeys(need for entry in entries for need in entry.needs))


def _load(data: DataSettings, kind: Data, needs: tuple[Need, ...]) -> dict[str, tuple[Examples, DataReport]]:
    """The examples of each split."""
    wanted = wanted_of(data, needs)
    return {
        split: load_examples(sources, kind, data.on_bad_row, wanted, split, data.max_bad_rows)
        for split, sources in _splits(data).items()
    }


def _splits(data: DataSettings) -> dict[str, list[SourceSettings]]:
    return {"train": data.train} | ({"eval": data.eval} if data.eval else {})


def wanted_of(data: DataSettings, needs: tuple[Need, ...]) -> Wanted:
    """What is made of the rows of a recipe."""
    if isinstance(data, RewardDataSettings):
        return Wanted(needs, data.step_separator, data.segments, data.ratings)
    return Wanted(needs)


def _nothing_left(split: str, done: Split, limit: int) -> DataError:
    reasons = "; ".join(str(r) for r in tally(done.cut() + done.refused()))
    where, hint = f"data.max_length {limit}", "raise data.max_length"
    if not done.made.dropped:
        where, hint = "", "give another model.chat_template"
    return DataError(f"no {split} example is left: {reasons}", where, hint)


def _with_refused(examples: Examples, report: DataReport, done: Split) -> tuple[Examples, DataReport]:
    """The same with the rows that the chat template refuses among the bad ones."""
    more = (bad_rows(one.source, done.refused(i), one.rows) for i, one in enumerate(examples.bad))
    bad = tuple(replace(o, reasons=o.reasons | m.reasons | o.reasons) for o, m in zip(examples.bad, more, strict=True))
    return replace(examples, bad=bad), replace(report, bad_rows=sum(len(one.reasons) for one in bad))


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
            cut = splits[split].cut(index) + splits[split].refused(index)
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
