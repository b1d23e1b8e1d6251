"""What the commands that make data share: rows are made piece by piece, and a run that was stopped goes on.

A piece is a fixed part of the work, made the same way whatever came before. Each is one line of `data.pieces`; the last
line may be cut and is made again. When all are there, `data.jsonl` is written as a whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_cli.data.quarantine import FILE, BadRows, quarantined
from rlhf_cli.data.report import DataReport
from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.data_path import PRODUCT
from rlhf_cli.runs.decide import PIECES
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.files import disk_error, remove_quietly, sync_folder, temporary, write_new
from rlhf_cli.runs.metrics import HINT, Lines
from rlhf_cli.runs.signals import Signals

SUMMARY = "summary.json"
"""The figures of the run, in its directory."""


class Piece(NamedTuple):
    """A part of the rows."""

    rows: list[dict[str, Any]]
    figures: dict[str, float]
    """Sums and counts, to be added up over the pieces."""
    more: Sequence[dict[str, Any]] = ()
    """Further rows, of another file."""


def tell(report: DataReport, display: Display) -> None:
    """The lines of a data report."""
    for line in report.lines():
        warning = line.removeprefix("warning: ")
        display.note(line) if warning == line else display.warn(warning)


def begin(
    run: Run, display: Display, lineage: Mapping[str, Any], report: DataReport, bad: Sequence[BadRows] = ()
) -> None:
    """Everything was accepted: create or reopen the run directory."""
    run.begin(dict(lineage))
    display.attach(run.path / "run.log")
    run.write_data_report(report.to_json(), quarantined(bad))
    if report.bad_rows:
        display.note(f"bad rows dropped: {report.bad_rows}, written to {run.path / FILE}")


def make(run: Run, display: Display, count: int, piece: Callable[[int], Piece]) -> dict[str, float]:
    """All pieces that are not there yet; the sums of their figures. A signal is obeyed after the piece under way."""
    lines = Lines(run.path / PIECES)
    done, size, sums = _known(lines.path)
    lines.cut(size)
    display.start(count, done)
    try:
        with Signals(display.warn, "this piece") as signals:
            for number in range(done, count):
                began = time.monotonic()
                made = piece(number)
                lines.append({"rows": made.rows, "figures": made.figures, "more": list(made.more)})
                _add(sums, made.figures)
                display.step(number + 1, _shown(made.figures, time.monotonic() - began), True)
                if signals.caught is not None and number + 1 < count:
                    lines.size()
                    raise signals.interrupted(f"piece {number + 1} of {count}")
    finally:
        lines.close()
        display.stop()
    return sums


def finish(run: Run, display: Display, rows: Iterable[Mapping[str, Any]], summary: dict[str, Any]) -> None:
    """data.jsonl and the summary, whole, then DONE."""
    write_rows(run.path / PRODUCT, rows)
    run.put(SUMMARY, summary)
    run.finish({"step": 0, **{k: v for k, v in summary.items() if isinstance(v, int | float)}})
    remove_quietly(run.path / PIECES)
    display.note(f"done: {run.path / PRODUCT}, {summary['rows']} rows")


def made_rows(run: Run, kind: Literal["rows", "more"] = "rows") -> Iterator[dict[str, Any]]:
    """The rows of all pieces, or their further rows. Raises ModelError when the file was damaged."""
    path = run.path / PIECES
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield from json.loads(line)[kind]
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError("is not what was written there", f"{path}:{number}",
                                 "the file is damaged; --resume never starts anew") from error  # fmt: skip


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, whole or absent. Raises ModelError."""
    draft = temporary(path)
    try:
        draft.unlink(missing_ok=True)
        write_new(draft, (json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))
        os.rename(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, "cannot be written", path, HINT) from error
    finally:
        remove_quietly(draft)


def _known(path: Path) -> tuple[int, int, dict[str, float]]:
    """Whole pieces that are there, their bytes, and the sums of their figures."""
    done, size, sums = 0, 0, dict[str, float]()
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    figures = json.loads(line)["figures"]
                except (ValueError, KeyError, TypeError):
                    break
                _add(sums, figures)
                done, size = done + 1, size + len(line)
    return done, size, sums


def _add(sums: dict[str, float], figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        sums[name] = sums.get(name, 0.0) + value


def _shown(figures: Mapping[str, float], seconds: float) -> dict[str, float]:
    """What a line of progress says of a piece."""
    shown = {}
    if "tokens" in figures:
        shown["tokens_per_second"] = figures["tokens"] / max(seconds, 1e-9)
    if "score" in figures and figures.get("scored"):
        shown["objective/scores"] = figures["score"] / figures["scored"]
    return shown
