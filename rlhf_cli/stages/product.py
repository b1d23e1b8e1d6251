"""What the commands that make data share: rows are made piece by piece, and a run that was stopped goes on.

A piece is a fixed part of the work, made the same way whatever came before. Each is one line of `data.pieces`, or some
of them are, which several processes have made together; the last line may be cut and is made again. When all are there,
`data.jsonl` is written as a whole. What is written, the first of several processes writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from rlhf_cli.data.quarantine import FILE, BadRows, quarantined
from rlhf_cli.data.report import DataReport
from rlhf_cli.errors import ModelError
from rlhf_cli.models import processes
from rlhf_cli.recipe.data_path import PRODUCT
from rlhf_cli.runs.decide import PIECES
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.files import disk_error, remove_quietly, sync_folder, temporary, write_new
from rlhf_cli.runs.metrics import HINT, Lines
from rlhf_cli.runs.signals import Signals

AGAIN = "the same command goes on after the last whole piece"
SUMMARY = "summary.json"
"""The figures of the run, in its directory."""


class Piece(NamedTuple):
    """A part of the rows, of one piece or of some in a row."""

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

    def first() -> None:
        run.begin(dict(lineage))
        display.attach(run.path / "run.log")
        run.write_data_report(report.to_json(), quarantined(bad))

    processes.first(first, "setting up the run directory")
    if report.bad_rows:
        display.note(f"bad rows dropped: {report.bad_rows}, written to {run.path / FILE}")


def make(
    run: Run, display: Display, count: int, pieces: Callable[[range], Piece], *, at_once: int = 1,
    borders: Sequence[int] = (),
) -> dict[str, float]:  # fmt: skip
    """All pieces that are not there yet; the sums of their figures. A signal is obeyed after the piece under way.

    pieces: makes so many in a row, at most at_once of them and none of `borders` with those before it. Several
    processes call it with the same numbers, deal its work out among themselves, and all know what it comes to.
    """
    lines = Lines(run.path / PIECES)
    done, sums = processes.first(partial(_reopened, lines), "looking for what is there")
    display.start(count, done)
    try:
        with Signals(display.warn, "this piece") as signals:
            while done < count:
                began = time.monotonic()
                stop = min([done + at_once, count, *(border for border in borders if border > done)])
                made = pieces(range(done, stop))
                line = {"rows": made.rows, "figures": made.figures, "more": list(made.more), "pieces": stop - done}
                processes.first(partial(_written, lines, line, stop in borders), f"writing piece {stop} of {count}")
                _add(sums, made.figures)
                done = stop
                display.step(done, _shown(made.figures, time.monotonic() - began), True)
                _hear(signals, f"ending piece {done}")
                if signals.caught is not None and done < count:
                    lines.size()
                    raise signals.interrupted(f"piece {done} of {count}")
    except processes.Lost as lost:
        raise processes.Lost(lost.problems[0].message, lost.problems[0].where, AGAIN) from lost
    finally:
        lines.close()
        display.stop()
    return sums


def finish(
    run: Run,
    display: Display,
    rows: Iterable[Mapping[str, Any]],
    summary: dict[str, Any],
    more: Mapping[str, Iterable[Mapping[str, Any]]] = MappingProxyType({}),
) -> None:
    """data.jsonl and the summary, whole, then DONE. more: further files of rows, by their names; all rows are read when
    they are written."""

    def first() -> None:
        for name, others in more.items():
            write_rows(run.path / name, others)
        write_rows(run.path / PRODUCT, rows)
        run.put(SUMMARY, summary)
        run.finish({"step": 0, **{k: v for k, v in summary.items() if isinstance(v, int | float)}})
        remove_quietly(run.path / PIECES)

    processes.first(first, f"writing {PRODUCT}")
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


def _reopened(lines: Lines) -> tuple[int, dict[str, float]]:
    """Whole pieces that are there, and the sums of their figures; what follows them is cut off."""
    done, size, sums = 0, 0, dict[str, float]()
    if lines.path.is_file():
        with lines.path.open("rb") as file:
            for line in file:
                try:
                    made = json.loads(line)
                    figures, pieces = made["figures"], made.get("pieces", 1)
                except (ValueError, KeyError, TypeError):
                    break
                _add(sums, figures)
                done, size = done + pieces, size + len(line)
    lines.cut(size)
    return done, sums


def _written(lines: Lines, line: dict[str, Any], read: bool) -> None:
    """Add a line. read: others read it from the disk before all is written."""
    lines.append(line)
    if read:
        lines.size()


def _hear(signals: Signals, doing: str) -> None:
    """A signal that one of several processes caught is meant for all."""
    if processes.count() > 1:
        caught = processes.gather(signals.caught, doing)
        signals.caught = next((number for number in caught if number is not None), None)


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
