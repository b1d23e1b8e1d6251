"""One source: its rows read, checked and made examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlhf_cli.catalog import Data, Need
from rlhf_cli.data import formats, sources
from rlhf_cli.data.examples import digest
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.heap import Heap
from rlhf_cli.data.quarantine import BadRows, Rows, bad_rows
from rlhf_cli.data.reading import Finished, Format, Wanted
from rlhf_cli.data.report import SourceReport, tally
from rlhf_cli.data.rows import BadRow, truth
from rlhf_cli.data.suited import nothing_to_learn, suited
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import SourceSettings

READ_FOR: dict[str, Need] = {
    "margin": "target", "target": "target", "chosen_safe": "safety", "rejected_safe": "safety",
    "chosen_score": "scores", "score_chosen": "scores", "rejected_score": "scores", "score_rejected": "scores",
}  # fmt: skip
"""What an objective must need for a column of pairs to be read."""
LOOKED_AT = 16
"""How many rows decide the format of a source."""
IMITATED = "imitated like the others; keep the true ones, or learn from both with rlhf dpo and objective.name: kto"


@dataclass(frozen=True)
class Read:
    """What became of its rows."""

    items: Heap
    bad: BadRows
    report: SourceReport
    warnings: tuple[str, ...]

    def nothing(self) -> str:
        """Why no row can be used."""
        reasons = "; ".join(str(r) for r in self.report.dropped)
        return f"none of its {self.report.rows} rows can be used: {reasons}"


def read_source(settings: SourceSettings, kind: Data, wanted: Wanted, split: str) -> Read:
    """A source read to its end. Raises DataError when it cannot be read, holds no rows or has none of the columns."""
    whole = Rows(settings)
    rows = iter(whole)
    head = list(itertools.islice(rows, LOOKED_AT))
    if not head:
        raise whole.broken or DataError("holds no rows", settings.path)
    columns = list(dict.fromkeys(c for _, row in head for c in row))
    sources.check_columns(settings, columns, [row for _, row in head])
    chosen = (
        formats.detect(columns, kind, settings.path)
        if settings.format == "auto"
        else formats.named(settings.format, kind, settings.path)
    )
    names = dict.fromkeys(columns + sources.keys_of_messages(columns, [row for _, row in head]))
    together = chosen.finish.get(kind)
    found: list[Any] | Heap = Heap() if together is None else []
    located: Iterator[sources.Located] = itertools.chain(head, rows)
    labels = _Labels()
    if kind == "demonstration" and "label" not in chosen.reads:
        located = labels.watched(located)
    bad, count = _examples(located, chosen, kind, names, found)
    done = Finished([], []) if together is None else together(list(found), wanted)
    items, unfit, unused = suited(found if together is None else done.items, wanted)
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
    warnings = (*done.warnings, *nothing_to_learn(items), *labels.warnings(count))
    return Read(
        items,
        replace(bad_rows(settings, bad, count, whole.broken), advice=formats.as_pairs(names, chosen, kind)),
        report,
        tuple(f"{split} {settings.path}: {w}" for w in warnings),
    )


class _Labels:
    """Verdicts in a column `label` that nothing reads."""

    def __init__(self) -> None:
        self._false: list[str] = []
        self._strange = False

    def watched(self, located: Iterable[sources.Located]) -> Iterator[sources.Located]:
        """The same rows."""
        for where, row in located:
            try:
                if row.get("label") is not None and not truth(row, "label"):
                    self._false.append(where)
            except BadRow:
                self._strange = True  # labels that say something else
            yield where, row

    def warnings(self, rows: int) -> list[str]:
        """How many say false, where the column holds verdicts."""
        if self._strange or not self._false:
            return []
        places = ", ".join(self._false[:3]) + (", ..." if len(self._false) > 3 else "")
        return [f"{len(self._false)} of {rows} rows are labelled false ({places}) and {IMITATED}"]


def _used(column: str, chosen: Format, wanted: Wanted) -> bool:
    need = READ_FOR.get(column)
    return column in chosen.reads and (need is None or need in wanted.needs)


def _examples(
    rows: Iterator[sources.Located], chosen: Format, kind: Data, names: dict[str, None], items: list[Any] | Heap
) -> tuple[list[Dropped], int]:
    """The rows that the format's reader refuses, and the number of rows. What it gives comes to `items`; `names` learns
    their columns."""
    bad: list[Dropped] = []
    count, read = 0, chosen.gives[kind]
    for where, row in rows:
        count += 1
        if not names.keys() >= row.keys():
            names |= dict.fromkeys(row)
        try:
            items.extend(read(row, where))
        except BadRow as error:
            bad.append(Dropped(str(error), where))
    return bad, count
