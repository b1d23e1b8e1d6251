"""postmortem.html: where a run was paused, undone or broke off, what the figures and the texts looked like, and what to
try. One file, nothing loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.report.parts import shown, side, table, text_of, write_page
from rlhf_cli.report.plots import Curve, curves, svg
from rlhf_cli.rollouts.health import RULES
from rlhf_cli.runs.metrics import number, read_lines

EVENTS = "doctor.jsonl"
"""One object an event: {step, kind, wires, sentences, ...}."""
FOLDER = "rollbacks"
"""Of a run: for each rollback a folder 01, 02, ... with the lines of metrics.jsonl and samples.jsonl it took back."""
PAGE = "postmortem.html"
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("KL to the reference", ("objective/kl",)),
    ("Score", ("objective/scores", "objective/rlhf_reward")),
    ("Length", ("completions/mean_length",)),
    ("Ends and repetition", ("completions/eos_rate", "rollout/repetition", "rollout/unique_share")),
    ("Entropy", ("objective/entropy",)),
    ("Policy update", ("policy/approxkl", "policy/clipfrac")),
    ("Critic", ("val/explained_variance",)),
    ("Loss", ("loss", "loss/value")),
)
BEFORE, AFTER = 30, 30
"""Steps that are drawn on either side of an event."""
MOST = 8
"""Events on a page, the newest ones."""
_WITHOUT_WIRE = ("training.learning_rate: lower", "training.max_grad_norm: lower", "ppo.kl.coef: higher")

Row = dict[str, Any]


def write_postmortem(run_path: Path) -> Path:
    """Write the page from what lies in a run directory; the same files give the same page.

    Returns:
        Its path. Raises ModelError when a file is damaged or the disk refuses.
    """
    run, rows = read_json(run_path / "run.json"), read_lines(run_path / "metrics.jsonl")
    events = [event for event in read_lines(run_path / EVENTS) if event["kind"] != "finding"]
    name = escape(run_path.name)
    parts = [f'<h1>{name} <small>post-mortem</small></h1><p><a href="report.html">report</a></p>']
    for event in events[-MOST:]:
        parts += _section(run_path, run.get("recipe", {}), rows, event)
    return write_page(run_path / PAGE, f"{run_path.name} - post-mortem", parts)


def _section(run_path: Path, recipe: Row, rows: Sequence[Row], event: Row) -> list[str]:
    """All about one event."""
    split, tried = int(event["step"]), list(rows)
    if event["kind"] == "rollback":
        split = int(event["to"])
        lost = read_lines(run_path / FOLDER / f"{event['number']:02d}" / "metrics.jsonl")
        tried = [row for row in rows if row["step"] <= split] + lost
    tried = [row for row in tried if event["step"] - BEFORE <= row["step"] <= event["step"]]
    after = [row for row in rows if split < row["step"] <= event["step"] + AFTER]
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in event["sentences"])
    return [
        f"<h2>{escape(title_of(event))}</h2><ul>{sentences}</ul>",
        _figures(tried, event),
        _panels(tried, after, event),
        _texts(event),
        table("What to try", ("recipe key", "now", "try"), _remedies(recipe, event["wires"])),
    ]


def title_of(event: Row) -> str:
    """What happened, in words."""
    step = event["step"]
    return {
        "pause": f"Step {step}: paused",
        "stop": f"Step {step}: stopped, no rollback was left",
        "diverged": f"Step {step}: training diverged",
    }.get(event["kind"]) or (
        f"Step {step}: rolled back to step {event['to']}, learning rates x {event['lr_scale']:g} from there"
    )


def _figures(tried: Sequence[Row], event: Row) -> str:
    """The key figures some steps before the event and at it."""
    at = next((row for row in reversed(tried) if row["step"] == event["step"]), None)
    earlier = [row for row in tried if row["step"] < event["step"]][-10:]
    first = next((row for row in earlier if row["step"] > 0), None)
    if at is None or first is None:
        return ""
    names = [name for _, members in PANELS for name in members]
    cells = [(n, shown(number(first[n])), shown(number(at[n]))) for n in names if n in first and n in at]
    return table("Figures", ("", f"step {first['step']}", f"step {event['step']}"), cells)


def _panels(tried: Sequence[Row], after: Sequence[Row], event: Row) -> str:
    """The curves that led to the event, and how it went on."""
    later = "after the rollback" if event["kind"] == "rollback" else "after it"
    found, rest = _by_name(tried), _by_name(after)
    cells = []
    for title, names in PANELS:
        members = [found[name] for name in names if name in found]
        members += [Curve(f"{n}, {later}", rest[n].steps, rest[n].values) for n in names if n in rest]
        if members:
            drawn = svg(f"{title}, {event['kind']} {event.get('number', '')} step {event['step']}", members)
            cells.append(f'<div class="panel"><h3>{escape(title)}</h3>{drawn}</div>')
    return f'<h2>Curves around it</h2><div class="panels">{"".join(cells)}</div>' if cells else ""


def _by_name(rows: Iterable[Row]) -> dict[str, Curve]:
    return {curve.name: curve for curve in curves(rows)}


def _texts(event: Row) -> str:
    """Completions of the last step in good health beside those of the event."""
    before = event.get("before", {})
    good = [{"step": before.get("step"), **text} for text in before.get("texts", [])]
    bad = [{"step": event["step"], **text} for text in event.get("texts", [])]
    columns = [("Texts in good health", good), ("Texts at the event", bad)]
    cells = "".join(
        f"<div><h3>{escape(name)}</h3>{''.join(map(_text, texts))}</div>" for name, texts in columns if texts
    )
    return f'<h2>Texts</h2><div class="pair">{cells}</div>' if cells else ""


def _text(record: Row) -> str:
    prompt = escape(text_of(record.get("prompt", "")))
    return f'<div class="sample"><p class="text prompt">{prompt}</p>{side(record)}</div>'


def _remedies(recipe: Row, wires: Sequence[str]) -> list[tuple[str, str, str]]:
    """(recipe key, its value now, what to try), each key once."""
    advice = [r for rule in RULES if rule.wire in wires for r in rule.remedies] or list(_WITHOUT_WIRE)
    pairs = dict(reversed([line.split(": ", 1) for line in advice]))
    keys = dict.fromkeys(line.split(": ", 1)[0] for line in advice)
    return [(key, _now(recipe, key), pairs[key]) for key in keys]


def _now(recipe: Row, key: str) -> str:
    """The value of a dotted key; empty where it has none or is no single value."""
    value: Any = recipe
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None or isinstance(value, dict | list) else str(value)
