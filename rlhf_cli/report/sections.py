"""What a report says of runs in words and tables: the figures of each, settings that differ, data, samples, health."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from rlhf_cli.report.overlay import key
from rlhf_cli.report.parts import shown, side, table, text_of
from rlhf_cli.report.plots import Curve
from rlhf_cli.report.story import Story, leaves, sound
from rlhf_cli.runs.metrics import number

PROMPTS = 12
"""So many prompts are shown with their completions."""
FINDINGS = 30
"""Of each run so many findings, the newest ones."""
_ABSENT = "\N{EM DASH}"
_OWN_PLACE = "output_dir"


def overview(stories: Sequence[Story]) -> str:
    """What each run is and how far it came."""
    rows = []
    for story in stories:
        model, objective = (story.meaning.get(block) or {} for block in ("model", "objective"))
        lora = story.meaning.get("lora")
        peak = story.curves.get("mem/peak_gib")
        trained = f"adapter of rank {lora['r']}" if lora else "all weights" if story.curves else ""
        rows.append((
            story.name, story.stage, str(model.get("name_or_path", "")), str(objective.get("name", "")), trained,
            shown(story.steps) if story.curves else "", shown(story.tokens),
            shown(peak.values[-1]) if peak else "", "done" if story.done else "not finished",
        ))  # fmt: skip
    names = ("run", "command", "model", "objective", "trained", "steps", "tokens", "peak memory, GiB", "state")
    used = [i for i in range(len(names)) if any(row[i] for row in rows)]
    return table("Runs", [names[i] for i in used], [[row[i] for i in used] for row in rows])


def held_out(stories: Sequence[Story]) -> str:
    """First and last value of every metric on held-out data."""
    known = dict.fromkeys(name for s in stories for name, curve in s.curves.items() if curve.held_out)
    having = [s for s in stories if any(curve.held_out for curve in s.curves.values())]
    rows = [(name, *(_ends(s.curves.get(name)) for s in having)) for name in known]
    return table("Held-out data, first and last", ("metric", *(s.name for s in having)), rows)


def _ends(curve: Curve | None) -> str:
    return f"{shown(curve.values[0])} to {shown(curve.values[-1])}" if curve else _ABSENT


# --- settings --------------------------------------------------------------------------------------------


def settings(stories: Sequence[Story]) -> str:
    """The recipe keys that differ; those of blocks that not every recipe has are folded away."""
    found = [dict(leaves(story.recipe)) for story in stories]
    blocks = [set(story.recipe) for story in stories]
    shared, lone = [], []
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one.get(name, _ABSENT) for one in found]
        block = name.split(".")[0]
        if len(set(values)) > 1 and block != _OWN_PLACE:
            (shared if all(block in known for known in blocks) else lone).append((name, *values))
    names = ("key", *(story.name for story in stories))
    said = table("Settings that differ", names, shared)
    if not said and any(found):
        said = "<h2>Settings that differ</h2><p>None of those that all recipes have.</p>"
    return said + folded("Settings of blocks that not every recipe has", table("", names, lone))


def folded(title: str, content: str) -> str:
    """Content that opens on a click; nothing where there is none."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


# --- data ------------------------------------------------------------------------------------------------


def data(stories: Sequence[Story]) -> str:
    """Sources and tokens of all runs, and what there was to say of them."""
    sources: list[tuple[str, ...]] = []
    tokens: list[tuple[str, ...]] = []
    words = []
    for story in stories:
        path = story.path / "data-report.json"
        sources += sound(path, lambda s=story: list(_sources(s)))  # type: ignore[misc]
        tokens += sound(path, lambda s=story: list(_tokens(s)))  # type: ignore[misc]
        words += sound(path, lambda s=story: [f"{s.name}: {text}" for text in _remarks(s.data)])  # type: ignore[misc]
    remarks = f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in words)}</ul>" if words else ""
    first = table("Data", ("run", "split", "path", "format", "rows", "kept", "dropped"), sources)
    lengths = ("run", "split", "samples", "prompt, mean / 95 % / max", "completion, mean / 95 % / max", "tokens")
    return first + remarks + folded("Lengths in tokens", table("", lengths, tokens))


def _sources(story: Story) -> Iterator[tuple[str, ...]]:
    for source in story.data.get("sources", []):
        dropped = "; ".join(f"{reason['reason']}: {reason['count']}" for reason in source["dropped"])
        yield (story.name, str(source["split"]), str(source["path"]), str(source["format"]),
               shown(source["rows"]), shown(source["kept"]), dropped)  # fmt: skip


def _tokens(story: Story) -> Iterator[tuple[str, ...]]:
    for split in story.data.get("tokens", []):
        spreads = [" / ".join(shown(spread[name]) for name in ("mean", "p95", "max")) if spread else ""
                   for spread in (split["prompt"], split["completion"])]  # fmt: skip
        yield story.name, str(split["split"]), shown(split["samples"]), *spreads, shown(split["total"])


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    yield from map(str, report.get("warnings", []))
    if report.get("duplicates"):
        yield f"eval prompts that are also train prompts (kept): {report['duplicates']['count']}"
    for lint in report.get("lints", []):
        yield f"{lint['split']} (kept): {lint['found']['reason']}: {lint['found']['count']}"
    if report.get("bad_rows"):
        yield f"bad rows dropped: {report['bad_rows']}"


# --- samples ---------------------------------------------------------------------------------------------


def samples(stories: Sequence[Story]) -> str:
    """First and last completion of each prompt, the runs side by side; prompts that more runs have come first."""
    by_prompt: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for n, story in enumerate(stories):
        for record in story.samples:
            by_prompt.setdefault(text_of(record.get("prompt", "")), {}).setdefault(n, []).append(record)
    order = sorted(by_prompt, key=lambda prompt: -len(by_prompt[prompt]))
    cells = [_sample(prompt, by_prompt[prompt], stories) for prompt in order[:PROMPTS]]
    left = len(order) - len(cells)
    more = f"<p>{left} more prompts are in the runs' samples.jsonl.</p>" if left else ""
    return f"<h2>Samples, first and last</h2>{''.join(cells)}{more}" if cells else ""


def _sample(prompt: str, found: dict[int, list[dict[str, Any]]], stories: Sequence[Story]) -> str:
    cards = []
    for n, records in found.items():
        ends = [records[0], records[-1]] if len(records) > 1 else records
        name = f"<h3>{key(n)} {escape(stories[n].name)}</h3>"
        cards.append(f'<div class="run{n}">{name}{"".join(map(side, ends))}</div>')
    return (
        f'<div class="sample"><p class="text prompt">{escape(prompt)}</p><div class="cards">{"".join(cards)}</div></div>'
    )


# --- health ----------------------------------------------------------------------------------------------


def health(stories: Sequence[Story]) -> str:
    """What the doctor found, in its words."""
    parts = []
    for n, story in enumerate(stories):
        shown_ones = story.events[-FINDINGS:]
        left = len(story.events) - len(shown_ones)
        items = [f"<li>{left} earlier ones are in doctor.jsonl</li>"] if left else []
        items += [f"<li><b>{escape(title)}</b> {escape('; '.join(words))}</li>" for title, words in shown_ones]
        name = f"<h3>{escape(story.name)}</h3>" if len(stories) > 1 else ""
        if items:
            parts.append(f'<div class="run{n}">{name}<ul>{"".join(items)}</ul></div>')
    return f"<h2>Health</h2>{''.join(parts)}" if parts else ""


# --- figures of runs that do not train -------------------------------------------------------------------


def summaries(stories: Sequence[Story]) -> str:
    """The figures of data runs, a table a command."""
    parts = []
    for stage in dict.fromkeys(s.stage for s in stories if s.summary):
        runs = [s for s in stories if s.stage == stage and s.summary]
        found = [dict(leaves(s.summary)) for s in runs]
        rows = [(name.replace("_", " "), *(_figure(one.get(name)) for one in found))
                for name in dict.fromkeys(name for one in found for name in one)]  # fmt: skip
        title = f"rlhf {stage}" if len(stories) > 1 else "Figures"
        parts.append(table(title, ("", *(s.name for s in runs)), [row for row in rows if any(row[1:])]))
    return "".join(parts)


def _figure(text: str | None) -> str:
    if text is None:
        return _ABSENT
    try:
        return shown(number(float(text)))
    except ValueError:
        return "" if text == "{}" else text


def evaluations(stories: Sequence[Story]) -> str:
    """The tables of `rlhf eval` runs."""
    return "".join(table(f"{s.name}: {title}", names, rows) for s in stories for title, names, rows in s.evaluated)
