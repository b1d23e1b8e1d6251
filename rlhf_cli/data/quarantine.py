"""Bad rows that were dropped: how many may be, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.data import sources
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.errors import DataError, Problem
from rlhf_cli.recipe.settings.data import SourceSettings

LISTED = 20
"""How many lines an error has for bad rows."""
ALIKE = 3
"""Up to so many rows of a file that are bad for one reason have a line each; more share one, which names so many."""
FILE = "bad-rows.jsonl"
"""Their file in the run directory."""


@dataclass(frozen=True)
class BadRows:
    """Those of a source."""

    source: SourceSettings
    reasons: dict[str, str]
    """`file:line` of each and what is wrong with it."""
    rows: int
    """Rows of the source, good ones too."""
    broken: DataError | None = None
    """Why none after these can be read."""
    advice: str = ""
    """What else these rows may be for."""


class Rows:
    """The rows of a source up to its end, or up to what cannot be read; `broken` tells why."""

    def __init__(self, source: SourceSettings) -> None:
        self._rows = sources.read(source)
        self.broken: DataError | None = None

    def __iter__(self) -> Iterator[sources.Located]:
        try:
            yield from self._rows
        except DataError as error:
            self.broken = error


def bad_rows(source: SourceSettings, dropped: Sequence[Dropped], rows: int, broken: DataError | None = None) -> BadRows:
    """The rows behind some examples that cannot be used."""
    reasons: dict[str, str] = {}
    for one in dropped:
        reasons.setdefault(one.where.partition(" with ")[0], one.reason)
    return BadRows(source, reasons, rows, broken)


def refuse(found: Sequence[BadRows], most: float | None) -> None:
    """DataError when more rows of a split are bad than may be, or some cannot be read at all. most: a number of rows,
    below 1 a share of them, None: any number."""
    broken = [problem for one in found if one.broken is not None for problem in one.broken.problems]
    count, rows = sum(len(one.reasons) for one in found), sum(one.rows for one in found)
    if most is None or count <= (most if isinstance(most, int) else most * rows):
        if broken:
            raise DataError(broken)
        return
    groups = [group for one in found for group in _alike(one.reasons)]
    more = count - sum(size for size, _ in groups[:LISTED])
    text = f"and {more} more bad rows" if more > 0 else f"{count} bad row{'s' if count > 1 else ''} in all"
    hint = "correct them, or set data.on_bad_row: drop to leave them out"
    advice = next((one.advice for one in found if one.reasons and one.advice), "")
    if most:
        text, hint = f"{text}, of {rows} rows: more than data.max_bad_rows {most:g} allows", "correct them, or raise it"
    if count == rows:
        hint = advice or "correct them: the data hold no others"
    elif advice:
        hint = f"{hint}; {advice}"
    raise DataError([*(problem for _, problem in groups[:LISTED]), *broken, Problem(text, hint=hint)])


def _alike(reasons: Mapping[str, str]) -> Iterator[tuple[int, Problem]]:
    """What is wrong with how many rows, in the order in which that is first met."""
    groups: dict[tuple[str, str], list[str]] = {}
    for where, reason in reasons.items():
        groups.setdefault((where.rpartition(":")[0], reason), []).append(where)
    for (_, reason), places in groups.items():
        if len(places) <= ALIKE:
            yield from ((1, Problem(reason, where)) for where in places)
            continue
        others = ", ".join(where.rpartition(":")[2] for where in places[1:ALIKE])
        yield len(places), Problem(f"{reason}; the same in {len(places) - 1} more rows: {others}, ...", places[0])


def quarantined(found: Sequence[BadRows]) -> bytes:
    """JSON lines {where, reason, row}: each bad row as it stands in its file. Reads the files again."""
    lines = [
        json.dumps({"where": where, "reason": one.reasons[where], "row": row}, default=str)
        for one in found
        if one.reasons
        for where, row in sources.read(one.source.model_copy(update={"columns": {}}))
        if where in one.reasons
    ]
    return "".join(f"{line}\n" for line in lines).encode()
