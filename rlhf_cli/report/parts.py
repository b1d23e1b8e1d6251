"""What the pages of a run are made of: their look, numbers for people, tables, samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf_cli.runs.files import disk_error, write_atomic
from rlhf_cli.runs.metrics import HINT, number

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
.panel > p { color: var(--soft); margin: .2rem 0 0; font-size: .85rem; } .panel > p.wild, .wild { color: var(--bad); }
.wild { margin: .2rem 0 0; font-size: .85rem; }
svg { width: 100%; height: auto; display: block; } svg * { stroke-linejoin: round; stroke-linecap: butt; }
.sample { margin-bottom: .8rem; } .pair { display: grid; gap: .8rem; grid-template-columns: 1fr 1fr; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; } .pair > div { background: var(--mark);
  border-radius: 6px; padding: .5rem .7rem; min-width: 0; } .prompt { margin: 0 0 .6rem; }
table { border-collapse: collapse; }
.scroll { overflow-x: auto; --veil: var(--back) 45%, transparent;
  --shade: color-mix(in srgb, var(--soft) 55%, transparent), transparent;
  background: linear-gradient(90deg, var(--veil)) 0 0 / 2.2rem 100% no-repeat local,
  linear-gradient(270deg, var(--veil)) 100% 0 / 2.2rem 100% no-repeat local,
  linear-gradient(90deg, var(--shade)) 0 0 / .7rem 100% no-repeat,
  linear-gradient(270deg, var(--shade)) 100% 0 / .7rem 100% no-repeat; }
td, th { border: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
th:not(:first-child), td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem; overflow-x: auto;
  font: 13px/1.45 ui-monospace, monospace; }
.legend { position: sticky; top: 0; z-index: 1; background: var(--back); padding: .5rem 0; margin: 1rem 0 0;
  max-height: 30vh; overflow-y: auto; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  border-bottom: 1px solid var(--line); }
.legend label { display: inline-flex; align-items: center; gap: .35rem; overflow-wrap: anywhere; }
.legend input { display: none; margin: 0; } @supports selector(:has(*)) { .legend input { display: inline; } }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
svg.key { width: 1.9rem; height: .5rem; display: inline-block; flex: none; vertical-align: .12em; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); }
.cards > div { background: var(--mark); border-radius: 6px; padding: .5rem .7rem; min-width: 0; }
.cards h3 { overflow-wrap: anywhere; } .cards > div > div { margin-top: .5rem; } .cards .pair > div { padding: 0; }
summary { cursor: pointer; margin: 1rem 0 .6rem; }
.phases span { margin-right: 1rem; } .phases i { display: inline-block; width: .8rem; height: .8rem;
  margin-right: .35rem; border-radius: 2px; } .fact > div + div { margin-top: .6rem; }
.fact > div > b { display: inline; }
td:nth-child(2):last-child { overflow-wrap: anywhere; }
@media (max-width: 700px) { td, th { padding: .25rem .45rem; } .scroll table { font-size: .85rem; } }
@media (min-width: 700px) { .scroll :is(td, th):first-child { position: sticky; left: 0; background: var(--back); } }
.bar { display: flex; height: .8rem; margin-top: .2rem; border-radius: 3px; overflow: hidden; } .bar i { height: 100%; }
"""


def write_page(target: Path, title: str, parts: Iterable[str]) -> Path:
    """Write a page of these parts, empty ones left out. Raises ModelError when the disk refuses."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )
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
    if abs(value) >= 1e15:
        return f"{value:.4g}"
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def side(record: dict[str, Any]) -> str:
    """A completion with what is known of it."""
    score = number(record.get("score"))
    label = f"step {record.get('step', '?')}" + (f", score {shown(score)}" if score is not None else "")
    label += "".join(f", {name} {shown(number(record[name]))}" for name in ("kl", "length") if name in record)
    return f'<div><h3>{escape(label)}</h3><p class="text">{escape(text_of(record.get("completion", "")))}</p></div>'


def text_of(value: Any) -> str:
    """A prompt as text: messages one under the other."""
    if isinstance(value, list):
        turns = [m if isinstance(m, dict) else {"content": m} for m in value]
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}".removeprefix(": ") for m in turns)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table under its title, if it has one, its first column words and the others numbers; nothing without rows."""
    body = "".join(
        "<tr>"
        + "".join(f"<td{'' if i == 0 else ' class=n'}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    if not body:
        return ""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr>" if any(names) else ""
    name = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{name}<div class="scroll"><table>{head}{body}</table></div>'
