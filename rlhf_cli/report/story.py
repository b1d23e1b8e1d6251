"""What a run directory has to tell, read and checked as a whole before a page is written of it. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from rlhf_cli.errors import ModelError, Problem, RecipeError, RlhfError
from rlhf_cli.recipe.glance import run_of
from rlhf_cli.recipe.model_path import read_json, similar
from rlhf_cli.recipe.tree import parse, plain
from rlhf_cli.report.axes import Axis, X, axis
from rlhf_cli.report.evaluation import FIGURES, Table, tables
from rlhf_cli.report.plots import Curve, curves
from rlhf_cli.report.postmortem import EVENTS, title_of
from rlhf_cli.runs.metrics import number, read_lines

SUMMARY = "summary.json"
"""The figures of a data run, in its directory."""
REPORT = "report.html"
_NAMED = 8
"""How many runs of a folder a message names."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Story:
    """A run, finished or not."""

    path: Path
    name: str
    """Short, and another than those of the runs beside it."""
    stage: str
    done: bool
    meaning: dict[str, Any]
    """The recipe as run.json holds it."""
    recipe: dict[str, Any]
    """recipe.yaml; empty where the file is missing, as are all that follow."""
    curves: dict[str, Curve]
    axes: dict[X, Axis]
    """What they may be drawn over."""
    steps: int
    tokens: float | None
    samples: list[dict[str, Any]]
    events: list[tuple[str, list[str]]]
    """What the doctor found or did: a title and sentences, in order."""
    pending: str
    """How far a run came that is not finished; empty for one that is."""
    data: dict[str, Any]
    """data-report.json."""
    summary: dict[str, Any]
    """Of a data run."""
    figures: dict[str, Any]
    """Of an evaluation, as it stands in eval.json."""
    evaluated: list[Table]
    """The same as tables."""


def read_all(given: Sequence[str]) -> list[Story]:
    """The runs that were named, in that order. Raises one RlhfError with everything that is wrong."""
    errors: list[RlhfError] = []
    paths: list[Path] = []
    for text in given:
        path = Path(text).expanduser()
        try:
            _is_run(path, text)
            twin = next((p for p in paths if p.resolve() == path.resolve()), None)
            if twin is not None:
                raise RecipeError(f"is the same run as {twin}", text, "name each run once")
            paths.append(path)
        except RlhfError as error:
            errors.append(error)
    stories = []
    for path, name in zip(paths, names(paths), strict=True):
        try:
            stories.append(read_story(path, name))
        except RlhfError as error:
            errors.append(error)
    if errors:
        worst = max(errors, key=lambda error: error.exit_code)
        raise type(worst)([problem for error in errors for problem in error.problems])
    return stories


def read_story(path: Path, name: str) -> Story:
    """A run by its files. Raises ModelError for one that is damaged."""
    run = sound(path / "run.json", lambda: read_json(path / "run.json"))
    stage, meaning = run.get("stage"), run.get("recipe", {})
    if not isinstance(stage, str) or not isinstance(meaning, dict):
        raise damaged(path / "run.json")
    rows = sound(path / "metrics.jsonl", lambda: read_lines(path / "metrics.jsonl"))
    found = sound(path / "metrics.jsonl", lambda: _curves(rows))
    last = rows[-1] if rows else {}
    figures = _object(path / FIGURES)
    return Story(
        path, name, stage, (path / "DONE").is_file(), meaning, _recipe(path / "recipe.yaml"),
        {curve.name: curve for curve in found}, {x: axis(x, rows) for x in get_args(X)},
        int(last.get("step", 0)), number(last.get("num_tokens")),
        sound(path / "samples.jsonl", lambda: read_lines(path / "samples.jsonl")),
        read_events(path), pending(path, last),
        _object(path / "data-report.json"), _object(path / SUMMARY), figures,
        sound(path / FIGURES, lambda: list(tables(figures))),
    )  # fmt: skip


def pending(path: Path, last: dict[str, Any]) -> str:
    """How far a run came that is under way or was stopped, by its last line of metrics; empty for one that is finished
    or is just being finished. Raises ModelError for a damaged recipe."""
    if (path / "DONE").is_file():
        return ""
    if not last:
        return "no step yet"
    settings = _recipe(path / "recipe.yaml").get("training") or {}
    step, epoch = number(last.get("step")) or 0.0, number(last.get("epoch"))
    most, epochs = number(settings.get("max_steps")), number(settings.get("num_epochs"))
    if (path / "final").is_dir() and (most is None or step >= most):
        return ""
    if most is not None:
        return f"step {step:,.0f} of {most:,.0f}"
    return f"step {step:,.0f}" + (f", epoch {epoch:.2f} of {epochs:g}" if epoch is not None and epochs else "")


def read_events(path: Path) -> list[tuple[str, list[str]]]:
    """What the doctor of a run found or did: a title and sentences, in order. Raises ModelError."""
    return sound(path / EVENTS, lambda: [_event(event) for event in read_lines(path / EVENTS)])


def sound(path: Path, make: Callable[[], Made]) -> Made:
    """What is made of a file; what its content does not bear is reported as damage. Raises ModelError."""
    try:
        return make()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror or error}", where=str(error.filename or path)) from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise damaged(path) from error


def damaged(path: Path) -> ModelError:
    """The error about a file that can be read but does not hold what belongs there."""
    return ModelError("holds something else than rlhf writes there", str(path), "the file is damaged; restore it")


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested settings, as a recipe spells them; a list without blocks is one value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, inner in enumerate(value, start=1):
            yield from leaves(inner, f"{prefix}.{place}")
    elif isinstance(value, list):
        yield prefix, ", ".join(map(_said, value)) or "[]"
    else:
        yield prefix, _said(value)


def names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell a run from the others."""
    parts = [path.resolve().parts for path in paths]
    counts = [1] * len(parts)
    while True:
        found = ["/".join(p[-n:]) for p, n in zip(parts, counts, strict=True)]
        unclear = [i for i, name in enumerate(found) if found.count(name) > 1 and counts[i] < len(parts[i])]
        if not unclear:
            return found
        for i in unclear:
            counts[i] += 1


# --- the files -------------------------------------------------------------------------------------------


def _is_run(path: Path, text: str) -> None:
    """Raises RecipeError when there is no run at a path."""
    if not text.strip():
        raise RecipeError("an empty name is no run", "rlhf report", "name a run directory")
    try:
        there, folder, run = path.exists(), path.is_dir(), (path / "run.json").is_file()
        inside = sorted(p for p in path.iterdir() if (p / "run.json").is_file()) if folder and not run else []
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such folder"
        raise RecipeError(f"cannot be read: {reason}", text, "name a run directory") from error
    if not there:
        raise RecipeError("no such run", text, similar(path) or "name a run directory")
    if not folder:
        known = str(path.parent) if (path.parent / "run.json").is_file() else run_of(path)
        raise RecipeError("is a file", text, f"name its run: {known}" if known else "name a run directory")
    if inside:
        more = " ..." if len(inside) > _NAMED else ""
        raise RecipeError("is no run but holds some", text,
                          f"name them: rlhf report {' '.join(map(str, inside[:_NAMED]))}{more}")  # fmt: skip
    if not run:
        raise RecipeError("is no run: it holds no run.json", text, "name a run directory")


def _curves(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    if any(type(row["step"]) is not int for row in rows):
        raise ValueError("a step that is no number")
    return curves(rows)


def _event(event: dict[str, Any]) -> tuple[str, list[str]]:
    title = f"Step {event['step']}: found" if event["kind"] == "finding" else title_of(event)
    return title, [str(sentence) for sentence in event["sentences"]]


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        root, found = parse(sound(path, lambda: path.read_text(encoding="utf-8")), str(path))
    except RecipeError as error:
        raise ModelError([Problem(p.message, p.where, "the file is damaged; restore it") for p in error.problems],
                         ) from error  # fmt: skip
    value = plain(root)
    if found or not isinstance(value, dict):
        raise damaged(path)
    return value


def _said(value: Any) -> str:
    """A value as a recipe spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and (value != value.strip() or "\n" in value or not value):
        return json.dumps(value, ensure_ascii=False)
    return "{}" if value == {} else str(value)
