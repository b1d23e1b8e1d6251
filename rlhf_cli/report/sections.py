"""What a report says of runs in words and tables: the figures of each, settings that differ, data, samples, health."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

from rlhf_cli.catalog import STAGES
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
_TIED = "\N{NO-BREAK SPACE}"
_NOTHING = {_ABSENT, "null", "[]", "{}"}
_OWN_PLACE = "output_dir"


def overview(stories: Sequence[Story]) -> str:
    """What each run is and how far it came."""
    rows = []
    for story in stories:
        model, objective = (story.meaning.get(block) or {} for block in ("model", "objective"))
        lora = story.meaning.get("lora")
        peak = story.curves.get("mem/peak_gib")
        kind = "DoRA" if lora and lora.get("use_dora") else "LoRA"
        trained = f"{kind}, rank {lora['r']}" if lora else "all weights" if story.curves else ""
        rows.append((
            story.name, story.stage, str(model.get("name_or_path", "")), str(objective.get("name", "")),
            trained.replace(" ", _TIED),
            shown(story.steps) if story.curves else "", shown(story.tokens),
            shown(peak.values[-1]) if peak else "", _state(story),
        ))  # fmt: skip
    names = ("run", "command", "model", "objective", "trained", "steps", "tokens", "peak memory, GiB", "state")
    return _used("Runs", names, rows)


def _state(story: Story) -> str:
    if story.done:
        return "done"
    return f"not{_TIED}finished" + (f": {story.pending}" if story.pending else "")


def _used(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of the columns in which something stands."""
    used = [i for i in range(len(names)) if any(row[i] for row in rows)]
    return table(title, [names[i] for i in used], [[row[i] for i in used] for row in rows])


def held_out(stories: Sequence[Story]) -> str:
    """First and last value of every metric on held-out data."""
    known = dict.fromkeys(name for s in stories for name, curve in s.curves.items() if curve.held_out)
    having = [s for s in stories if any(curve.held_out for curve in s.curves.values())]
    rows = [(name, *(_ends(s.curves.get(name)) for s in having)) for name in known]
    return table("Held-out data, first and last", ("metric", *(s.name for s in having)), rows)


def _ends(curve: Curve | None) -> str:
    return f"{shown(curve.values[0])} to {shown(curve.values[-1])}".replace(" ", _TIED) if curve else _ABSENT


# --- settings --------------------------------------------------------------------------------------------


def settings(stories: Sequence[Story]) -> str:
    """The recipe keys that differ: of all runs that train in one table, of the others in one for each command."""
    kinds: dict[str, list[Story]] = {}
    for story in stories:
        trains = story.stage in STAGES and STAGES[story.stage].trains
        kinds.setdefault("" if trains else story.stage, []).append(story)
    return "".join(
        _differing(f"Settings that differ, rlhf {stage}" if stage else "Settings that differ", members)
        for stage, members in kinds.items()
        if len(members) > 1
    )


def _differing(title: str, stories: Sequence[Story]) -> str:
    """Keys that a command lacks, and in which the others agree, are folded away."""
    found = [dict(leaves(story.recipe)) for story in stories]
    shared: list[tuple[str, ...]] = []
    lone: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one.get(name, _ABSENT) for one in found]
        having = {story.stage for story, one in zip(stories, found, strict=True) if name in one}
        within = {value for story, value in zip(stories, values, strict=True) if story.stage in having}
        if len(set(values)) > 1 and not set(values) <= _NOTHING and name != _OWN_PLACE:
            (shared if len(within) > 1 else lone).append((name, *values))
    names = ("key", *(story.name for story in stories))
    said = table(title, names, shared) or f"<h2>{escape(title)}</h2><p>None.</p>"
    return said + folded("Settings that some of the commands do not have", table("", names, lone))


def folded(title: str, content: str) -> str:
    """Content that opens on a click; nothing where there is none."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


# --- data ------------------------------------------------------------------------------------------------


def data(stories: Sequence[Story]) -> str:
    """Sources and tokens of all runs, and what there was to say of them."""
    sources: list[tuple[str, ...]] = []
    tokens: list[tuple[str, ...]] = []
    words: list[str] = []
    for story in stories:
        found = sound(story.path / "data-report.json", partial(_data, story))
        sources, tokens, words = sources + found[0], tokens + found[1], words + found[2]
    remarks = f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in words)}</ul>" if words else ""
    first = _used("Data", ("run", "split", "path", "format", "rows", "kept", "dropped"), sources)
    lengths = ("run", "split", "samples", "prompt, mean / 95 % / max", "completion, mean / 95 % / max", "tokens")
    return first + remarks + folded("Lengths in tokens", _used("", lengths, tokens))


def _data(story: Story) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[str]]:
    return list(_sources(story)), list(_tokens(story)), [f"{story.name}: {text}" for text in _remarks(story.data)]


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
        ends = "".join(map(side, [records[0], records[-1]] if len(records) > 1 else records))
        texts = ends if len(found) > 1 else f'<div class="pair">{ends}</div>'
        cards.append(f'<div class="run{n}"><h3>{key(n)} {escape(stories[n].name)}</h3>{texts}</div>')
    said = f'<p class="text prompt">{escape(prompt.strip())}</p>'
    return f'<div class="sample">{said}<div class="cards">{"".join(cards)}</div></div>'


# --- health ----------------------------------------------------------------------------------------------


def health(stories: Sequence[Story]) -> str:
    """What the doctor found, in its words."""
    parts = [f'<div class="run{n}"><h3>{key(n)} {escape(story.name)}</h3>{findings(story.events)}</div>'
             for n, story in enumerate(stories) if story.events]  # fmt: skip
    return f"<h2>Health</h2>{''.join(parts)}" if parts else ""


def findings(events: Sequence[tuple[str, list[str]]]) -> str:
    """What was found or done in one run, the newest ones."""
    left = len(events) - len(events[-FINDINGS:])
    items = [f"<li>{left} earlier ones are in doctor.jsonl</li>"] if left else []
    items += [f"<li><b>{escape(title)}</b> {escape('; '.join(words))}</li>" for title, words in events[-FINDINGS:]]
    return f"<ul>{''.join(items)}</ul>" if items else ""


# --- figures of runs that do not train -------------------------------------------------------------------


def summaries(stories: Sequence[Story]) -> str:
    """The figures of data runs, a table a command."""
    parts = []
    for stage in dict.fromkeys(s.stage for s in stories if s.summary):
        runs = [s for s in stories if s.stage == stage and s.summary]
        parts.append(figures(f"rlhf {stage}", ("", *(s.name for s in runs)), [s.summary for s in runs]))
    return "".join(parts)


def figures(title: str, names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> str:
    """The figures of summary.json of some runs, a column each."""
    found = [dict(leaves(summary)) for summary in summaries]
    rows = [(name.replace("_", " "), *(_figure(one.get(name)) for one in found))
            for name in dict.fromkeys(name for one in found for name in one)]  # fmt: skip
    return table(title, names, [row for row in rows if any(row[1:])])


def _figure(text: str | None) -> str:
    if text is None:
        return _ABSENT
    try:
        return shown(number(float(text)))
    except ValueError:
        return "" if text in _NOTHING else text


def evaluations(stories: Sequence[Story]) -> str:
    """The tables of `rlhf eval` runs."""
    return "".join(table(f"{s.name}: {title}", names, rows) for s in stories for title, names, rows in s.evaluated)
