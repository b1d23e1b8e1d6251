"""report.html: what a run was, how it went, and what the model says before and after. One file, nothing loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.report.axes import Axis, X, axis
from rlhf_cli.report.overlay import phases, travelled
from rlhf_cli.report.parts import shown, side, table, text_of, write_page
from rlhf_cli.report.plots import Curve, curves, grouped, notes, repeats, svg
from rlhf_cli.report.postmortem import PAGE
from rlhf_cli.report.sections import figures, findings
from rlhf_cli.report.story import REPORT, SUMMARY, pending, read_events
from rlhf_cli.runs.metrics import number, read_lines


def write_report(run_path: Path, seconds: float | None = None, target: Path | None = None, x: X = "step") -> Path:
    """Write report.html from what lies in a run directory; the same files give the same page.

    Args:
        run_path: the run; run.json must be there, everything else may be missing.
        seconds: how long the run took; None: not shown.
        target: where to write the page; None: report.html of the run.
        x: what its curves are drawn over.

    Returns:
        Its path. Raises ModelError when a file is damaged or the disk refuses.
    """
    run = read_json(run_path / "run.json")
    rows = read_lines(run_path / "metrics.jsonl")
    found = curves(rows)
    target = target or run_path / REPORT
    by_name = {curve.name: curve for curve in found}
    summary = run_path / SUMMARY
    parts = [
        _head(run_path, run),
        _postmortem(run_path, target),
        _facts(run, rows, found, seconds, pending(run_path, rows[-1] if rows else {}))
        if run.get("role") != "data"
        else "",
        figures("Figures", ("", ""), [read_json(summary)]) if summary.is_file() else "",
        _held_out(found),
        _health(run_path),
        _frontier(by_name),
        _panels([c for c in found if c.name != "nll" or not repeats(by_name)], axis(x, rows)),
        phases([by_name], [run_path.name]),
        _samples(read_lines(run_path / "samples.jsonl")),
        _data(run_path / "data-report.json"),
        _recipe(run_path / "recipe.yaml"),
    ]
    return write_page(target, f"{run_path.name} - rlhf {run.get('stage', '')}", parts)


def _head(path: Path, run: dict[str, Any]) -> str:
    return f"<h1>{escape(path.name)} <small>rlhf {escape(str(run.get('stage', '')))}</small></h1>"


def _postmortem(path: Path, target: Path) -> str:
    """The way to the page about what went wrong, where there is one."""
    way = quote(os.path.relpath(path / PAGE, target.parent))
    if not (path / PAGE).is_file():
        return ""
    return f'<p class="wild">The doctor stepped in during this run: <a href="{way}">post-mortem</a>.</p>'


def _health(path: Path) -> str:
    """What the doctor found, in its words."""
    words = findings(read_events(path))
    return f"<h2>Health</h2>{words}" if words else ""


def _frontier(found: dict[str, Curve]) -> str:
    """Reward against KL, where the run knows both."""
    cells = travelled([found])
    return f'<h2>Reward against KL</h2><div class="panels">{"".join(cells)}</div>' if cells else ""


def _facts(
    run: dict[str, Any], rows: Sequence[dict[str, Any]], found: Sequence[Curve], seconds: float | None, far: str
) -> str:
    """The headline: what was trained on what, for how long."""
    recipe = run.get("recipe", {})
    objective = recipe.get("objective") or {}
    last = rows[-1] if rows else {}
    lora = recipe.get("lora")
    kind = "DoRA" if lora and lora.get("use_dora") else "LoRA"
    facts = [
        ("not finished", far),
        ("model", recipe.get("model", {}).get("name_or_path", "")),
        ("trained", f"{kind} adapter of rank {lora.get('r')}" if lora else "all weights"),
        ("quantised base", recipe.get("model", {}).get("quantization", "none")),
        ("objective", objective.get("name") or run.get("stage", "")),
        ("steps", shown(number(last.get("step"))) or "0"),
        ("tokens", shown(number(last.get("num_tokens")))),
        ("duration", "" if seconds is None else _duration(seconds)),
        ("peak memory", next((f"{shown(max(c.values))} GiB" for c in found if c.name == "mem/peak_gib"), "")),
        ("newest loss" if far else "final loss", next((shown(c.values[-1]) for c in found if c.name == "loss"), "")),
    ]
    cells = [f'<div class="fact"><span>{name}</span><b>{escape(str(v))}</b></div>' for name, v in facts if v]
    return f'<div class="facts" style="margin-top:1.2rem">{"".join(cells)}</div>'


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _held_out(found: Sequence[Curve]) -> str:
    """First and last value of every metric on held-out data."""
    rows = [
        (c.name, f"{shown(c.values[0])} (step {c.steps[0]})", f"{shown(c.values[-1])} (step {c.steps[-1]})",
         shown(c.values[-1] - c.values[0]))
        for c in found
        if c.held_out
    ]  # fmt: skip
    return table("Held-out data", ("metric", "first", "last", "change"), rows)


def _panels(found: Sequence[Curve], where: Axis) -> str:
    cells = []
    for title, members in grouped(found):
        wild = [f"{c.name} was not finite at step {', '.join(map(str, c.wild[:5]))}" for c in members if c.wild]
        said = notes(members) + "".join(f'<p class="wild">{escape(note)}</p>' for note in wild)
        cells.append(f'<div class="panel"><h3>{escape(title)}</h3>{svg(title, members, where)}{said}</div>')
    return f'<h2>Curves</h2><div class="panels">{"".join(cells)}</div>' if cells else ""


def _samples(records: Sequence[dict[str, Any]]) -> str:
    """First and last completion of each prompt, side by side."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_prompt.setdefault(text_of(record.get("prompt", "")), []).append(record)
    cells = []
    for prompt, members in by_prompt.items():
        pair = [members[0], members[-1]] if len(members) > 1 else members
        sides = "".join(side(record) for record in pair)
        cells.append(
            f'<div class="sample"><p class="text prompt">{escape(prompt)}</p><div class="pair">{sides}</div></div>'
        )
    return f"<h2>Samples</h2>{''.join(cells)}" if cells else ""


def _data(path: Path) -> str:
    if not path.is_file():
        return ""
    return table("Data", ("", ""), _leaves(read_json(path)))


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of a nested report; lists of plain values on one line."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{prefix} / {k}" if prefix else str(k))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [leaf for i, v in enumerate(value, start=1) for leaf in _leaves(v, f"{prefix} / {i}")]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)))] if value else []
    amount = number(value)
    return [(prefix, shown(amount) if amount is not None else "" if value is None else str(value))]


def _recipe(path: Path) -> str:
    try:
        return f"<h2>Recipe</h2><pre>{escape(path.read_text(encoding='utf-8'))}</pre>" if path.is_file() else ""
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(path)) from error
