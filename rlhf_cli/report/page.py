"""report.html: what a run was, how it went, and what the model says before and after. One file, nothing loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.report.plots import Curve, curves, grouped, svg
from rlhf_cli.runs.files import disk_error, write_atomic
from rlhf_cli.runs.metrics import HINT, number, read_lines

_CSS = """
:root { color-scheme: light dark; --back: #fcfcfa; --ink: #1d2126; --soft: #636b74; --line: #dcdfe2; --card: #ffffff;
  --mark: #eef3f8; --bad: #b3261e; --hue0: #2563a8; --hue1: #c2571a; --hue2: #2e7d4f; --hue3: #8e4aa8; --hue4: #a33b4d;
  --hue5: #6b6f1d; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e4e7ea; --soft: #9aa4ae; --line: #30363d;
  --card: #1b1f24; --mark: #22303e; --bad: #ff8a80; --hue0: #6cb2f5; --hue1: #f39c5b; --hue2: #6fcf97; --hue3: #cf9bea;
  --hue4: #f28b9c; --hue5: #cfd36a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1180px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h1 small { color: var(--soft); font-weight: 400; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; } h3 { font-size: .9rem; margin: 0 0 .3rem; color: var(--soft); }
.facts, .panels { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
.fact, .panel, .sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; min-width: 0; }
.fact b { display: block; font-size: 1.05rem; overflow-wrap: anywhere; } .fact span { color: var(--soft); }
.wild { color: var(--bad); margin: .2rem 0 0; font-size: .85rem; }
svg { width: 100%; height: auto; display: block; } svg * { stroke-linejoin: round; stroke-linecap: butt; }
.sample { margin-bottom: .8rem; } .pair { display: grid; gap: .8rem; grid-template-columns: 1fr 1fr; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; } .pair > div { background: var(--mark);
  border-radius: 6px; padding: .5rem .7rem; min-width: 0; } .prompt { margin: 0 0 .6rem; }
table { border-collapse: collapse; background: var(--card); } .scroll { overflow-x: auto; }
td, th { border: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
th:not(:first-child), td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem; overflow-x: auto;
  font: 13px/1.45 ui-monospace, monospace; }
"""


def write_report(run_path: Path, seconds: float | None = None) -> Path:
    """Write report.html from what lies in a run directory; the same files give the same page.

    Args:
        run_path: the run; run.json must be there, everything else may be missing.
        seconds: how long the run took; None: not shown.

    Returns:
        Its path. Raises ModelError when a file is damaged or the disk refuses.
    """
    run = read_json(run_path / "run.json")
    rows = read_lines(run_path / "metrics.jsonl")
    found = curves(rows)
    parts = [
        _head(run_path, run),
        _facts(run, rows, found, seconds),
        _held_out(found),
        _panels(found),
        _samples(read_lines(run_path / "samples.jsonl")),
        _data(run_path / "data-report.json"),
        _recipe(run_path / "recipe.yaml"),
    ]
    title = escape(f"{run_path.name} - {run.get('stage', '')}")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>\n<style>{_CSS}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n"
        "</body></html>\n"
    )
    target = run_path / "report.html"
    try:
        write_atomic(target, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise disk_error(error, "cannot be written", target, HINT) from error
    return target


def shown(value: float | None) -> str:
    """A number for people: four significant digits, no exponent where none is needed."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _head(path: Path, run: dict[str, Any]) -> str:
    return f"<h1>{escape(path.name)} <small>{escape(str(run.get('stage', '')))}</small></h1>"


def _facts(run: dict[str, Any], rows: Sequence[dict[str, Any]], found: Sequence[Curve], seconds: float | None) -> str:
    """The headline: what was trained on what, for how long."""
    recipe = run.get("recipe", {})
    objective = recipe.get("objective") or {}
    last = rows[-1] if rows else {}
    lora = recipe.get("lora")
    facts = [
        ("model", recipe.get("model", {}).get("name_or_path", "")),
        ("trained", f"adapter of rank {lora.get('r')}" if lora else "all weights"),
        ("quantised base", recipe.get("model", {}).get("quantization", "none")),
        ("objective", objective.get("name") or run.get("stage", "")),
        ("steps", shown(number(last.get("step"))) or "0"),
        ("tokens", shown(number(last.get("num_tokens")))),
        ("duration", "" if seconds is None else _duration(seconds)),
        ("final loss", next((shown(c.values[-1]) for c in found if c.name == "loss"), "")),
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
    return _table("Held-out data", ("metric", "first", "last", "change"), rows)


def _panels(found: Sequence[Curve]) -> str:
    cells = []
    for title, members in grouped(found):
        wild = [f"{c.name} was not finite at step {', '.join(map(str, c.wild[:5]))}" for c in members if c.wild]
        notes = "".join(f'<p class="wild">{escape(note)}</p>' for note in wild)
        cells.append(f'<div class="panel"><h3>{escape(title)}</h3>{svg(title, members)}{notes}</div>')
    return f'<h2>Curves</h2><div class="panels">{"".join(cells)}</div>' if cells else ""


def _samples(records: Sequence[dict[str, Any]]) -> str:
    """First and last completion of each prompt, side by side."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_prompt.setdefault(_text(record.get("prompt", "")), []).append(record)
    cells = []
    for prompt, members in by_prompt.items():
        pair = [members[0], members[-1]] if len(members) > 1 else members
        sides = "".join(_side(record) for record in pair)
        cells.append(
            f'<div class="sample"><p class="text prompt">{escape(prompt)}</p><div class="pair">{sides}</div></div>'
        )
    return f"<h2>Samples</h2>{''.join(cells)}" if cells else ""


def _side(record: dict[str, Any]) -> str:
    score = number(record.get("score"))
    label = f"step {record.get('step', '?')}" + (f", score {shown(score)}" if score is not None else "")
    return f'<div><h3>{escape(label)}</h3><p class="text">{escape(_text(record.get("completion", "")))}</p></div>'


def _text(value: Any) -> str:
    """A prompt as text: messages one under the other."""
    if isinstance(value, list):
        turns = [m if isinstance(m, dict) else {"content": m} for m in value]
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}".removeprefix(": ") for m in turns)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data(path: Path) -> str:
    if not path.is_file():
        return ""
    return _table("Data", ("", ""), _leaves(read_json(path)))


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


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if i == 0 else ' class=n'}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    if not body:
        return ""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>" if any(names) else ""
    return f'<h2>{escape(title)}</h2><div class="scroll"><table>{head}{body}</table></div>'
