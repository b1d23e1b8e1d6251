"""Bad rows that were dropped: how many may be, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.data import sources
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.errors import DataError, Problem
from rlhf_cli.recipe.settings.data import SourceSettings

LISTED = 20
"""How many bad rows an error names."""
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


def bad_rows(source: SourceSettings, dropped: Sequence[Dropped], rows: int) -> BadRows:
    """The rows behind some examples that cannot be used."""
    reasons: dict[str, str] = {}
    for one in dropped:
        reasons.setdefault(one.where.partition(" with ")[0], one.reason)
    return BadRows(source, reasons, rows)


def refuse(found: Sequence[BadRows], most: float | None) -> None:
    """DataError when more rows of a split are bad than may be. most: a number of rows, below 1 a share of them, None:
    any number."""
    reasons = [Problem(reason, where) for one in found for where, reason in one.reasons.items()]
    rows = sum(one.rows for one in found)
    if most is None or len(reasons) <= (most if isinstance(most, int) else most * rows):
        return
    more = len(reasons) - LISTED
    text = (
        f"and {more} more bad rows" if more > 0 else f"{len(reasons)} bad row{'s' if len(reasons) > 1 else ''} in all"
    )
    hint = "correct them, or set data.on_bad_row: drop to leave them out"
    if most:
        text, hint = f"{text}, of {rows} rows: more than data.max_bad_rows {most:g} allows", "correct them, or raise it"
    raise DataError([*reasons[:LISTED], Problem(text, hint=hint)])


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
