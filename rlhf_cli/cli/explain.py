"""`rlhf explain`: what a name of the catalogue means, as data and as text for a terminal. No torch."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rlhf_cli.catalog import (
    CONTROLLERS,
    ESTIMATORS,
    OBJECTIVES,
    REWARDS,
    SELECTIONS,
    STAGES,
    Data,
    Entry,
    Objective,
    Rule,
    Stage,
    objectives_of,
)
from rlhf_cli.catalog.explain import (
    DATA,
    Named,
    command_of,
    data_of,
    explain,
    needs_of,
    recipe_of,
    settings_of,
)
from rlhf_cli.errors import RecipeError, did_you_mean

Line = tuple[str, str]
"""Text and its style."""
TITLE = "bold cyan"
ENTRIES: dict[str, Named] = {**OBJECTIVES, **ESTIMATORS, **CONTROLLERS, **REWARDS}
FIRST = ("prompt", "messages", "conversations", "instruction")
"""Columns that are named before the others."""
WIDEST = 100
"""Columns of text at most, however wide the terminal."""


def explanation(name: str) -> dict[str, Any]:
    """All there is to say about a name, as plain data. A command says what it offers, an entry what it is; `dpo` and
    some others are both. Raises RecipeError for an unknown name."""
    known = (*ENTRIES, *STAGES)
    if name not in known:
        hint = did_you_mean(name, known) or "`rlhf list` shows all names"
        raise RecipeError(f"there is no objective, estimator, controller, rule or command called '{name}'", hint=hint)
    return {
        "name": name,
        **({"entry": described(ENTRIES[name])} if name in ENTRIES else {}),
        **({"command": _command(STAGES[name])} if name in STAGES else {}),
    }


def described(entry: Named) -> dict[str, Any]:
    """An objective, estimator, controller or rule as plain data."""
    module, attribute = entry.path.split(":")
    return {
        "kind": kind_of(entry),
        "help": entry.help,
        "command": command_of(entry),
        **asdict(explain(entry)),
        "settings": [asdict(setting) for setting in settings_of(entry.settings)],
        "recipe": recipe_of(entry),
        "data": {"kind": data_of(entry), "help": DATA[data_of(entry)], "formats": formats_of(data_of(entry))},
        "needs": needs_of(entry),
        "code": f"{attribute} in rlhf_cli/{module.replace('.', '/')}.py",
    }


def kind_of(entry: Entry) -> str:
    """What sort of name it is."""
    if isinstance(entry, Objective):
        return "objective"
    if isinstance(entry, Rule):
        return "reward rule"
    return "advantage estimator" if entry.name in ESTIMATORS else "KL controller"


def formats_of(kind: Data) -> list[dict[str, Any]]:
    """The data formats that give a kind of example, with the columns that each needs."""
    from rlhf_cli.data.formats import able

    return [{"name": f.name, "columns": [sorted(c, key=_place) for c in f.needs], "help": f.help} for f in able(kind)]


def _place(column: str) -> tuple[bool, str]:
    return column not in FIRST, column


def offers(stage: Stage) -> dict[str, list[Entry]]:
    """What a command lets one choose from, by kind."""
    others: dict[str, dict[str, list[Entry]]] = {
        "ppo": {
            "advantage estimators": [*ESTIMATORS.values()], "KL controllers": [*CONTROLLERS.values()],
            "reward rules": [*REWARDS.values()],
        },
        "select": {"selections": [*SELECTIONS.values()]},
    }  # fmt: skip
    objectives: list[Entry] = [*objectives_of(stage.name)]
    return {"objectives": objectives} if objectives else others.get(stage.name, {})


def _command(stage: Stage) -> dict[str, Any]:
    found = offers(stage).items()
    return {"help": stage.help, "offers": {title: {e.name: e.help for e in entries} for title, entries in found}}


# --- as text ---------------------------------------------------------------------------------------------


def on_terminal(found: dict[str, Any]) -> str:
    """An explanation for stdout: with styles on a terminal, plain elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    with console.capture() as caught:
        for line, style in as_text(found, min(console.width, WIDEST)):
            console.print(Text(line, style), soft_wrap=True)
    return caught.get().removesuffix("\n")


def as_text(found: dict[str, Any], width: int) -> Iterator[Line]:
    """The lines of an explanation, at most so wide."""
    if "entry" in found:
        yield from _entry_lines(found["name"], found["entry"], width)
    if "command" in found:
        if "entry" in found:
            yield "", ""
        yield from _command_lines(found["name"], found["command"], width)


def _entry_lines(name: str, entry: dict[str, Any], width: int) -> Iterator[Line]:
    yield from ((line, TITLE) for line in _fill(f"{name}: {entry['help']}", width, 0))
    yield "", ""
    yield from ((line, "cyan") for line in _hang(formula_lines(entry["formula"]), width))
    for paragraph in filter(None, entry["notes"].split("\n\n")):
        yield "", ""
        yield from ((line, "") for line in _fill(paragraph, width))
    yield from _section("Symbols", _hang(entry["symbols"], width))
    import yaml

    block = yaml.safe_dump(entry["recipe"], sort_keys=False).splitlines()
    yield from _section(f"Recipe of rlhf {entry['command']}", (f"  {line}" for line in block), "green")
    yield from _section("Settings", _setting_lines(entry["settings"], width))
    yield from _section("Data", _data_lines(entry["data"], width))
    yield from _section("Needs", _hang(entry["needs"], width))
    yield from _section("At step 0", _hang([entry["step_0"]], width))
    yield from _section("Traps", _hang(entry["traps"].split("; "), width))
    yield from _section("Source", _hang([entry["source"]], width))
    yield from _section("Code", [f"  {entry['code']}"])


def formula_lines(formula: str) -> list[str]:
    """A formula with each of its equations or cases on a line."""
    return [part for line in formula.splitlines() for part in re.split(r"; (?=[^;]*[=:])", line)]


def _setting_lines(settings: list[dict[str, Any]], width: int) -> Iterator[str]:
    for setting in settings:
        yield from _hang([f"{setting['name']}: {plain(setting['default'])}   ({setting['allowed']})"], width)
        yield from _fill(setting["help"], width, 6)


def _data_lines(data: dict[str, Any], width: int) -> Iterator[str]:
    yield from _hang([data["help"]], width)
    for one in data["formats"]:
        yield from _fill(f"{one['name']}: {_columns(one['columns'])}", width, 6)


def _columns(sets: list[list[str]]) -> str:
    """Sets of columns in words; what the larger sets add to the smallest is named alone."""
    least, *more = sorted(sets, key=len)
    if more and all(set(least) < set(names) for names in more):
        added = " or ".join(", ".join(name for name in names if name not in least) for names in more)
        return f"{', '.join(least)}; {added}"
    return " or ".join(", ".join(names) for names in sets)


def _command_lines(name: str, command: dict[str, Any], width: int) -> Iterator[Line]:
    yield from ((line, TITLE) for line in _fill(f"rlhf {name}: {command['help']}", width, 0))
    for title, entries in command["offers"].items():
        yield from _section(title[0].upper() + title[1:], name_lines(entries, width))
    if command["offers"]:
        own = "selections" in command["offers"]
        yield "", ""
        yield f"`rlhf {f'schema {name}` has their settings' if own else 'explain NAME` tells more of each'}.", ""


def name_lines(entries: dict[str, str], width: int) -> Iterator[str]:
    """A line for each name, and more where its help is longer than the terminal is wide."""
    for name, words in entries.items():
        first, *more = textwrap.wrap(words, max(width - 20, 20))
        yield f"  {name:<17} {first}"
        yield from (f"{'':<20}{line}" for line in more)


def plain(value: Any) -> str:
    """A value as YAML has it."""
    import yaml

    return str(yaml.safe_dump(value, width=1000, default_flow_style=True)).removesuffix("...\n").strip()


def _section(title: str, lines: Iterable[str], style: str = "") -> Iterator[Line]:
    """A heading and its lines; nothing when there are none."""
    if found := list(lines):
        yield "", ""
        yield title, "bold"
        yield from ((line, style) for line in found)


def _fill(words: str, width: int, indent: int = 2) -> list[str]:
    space = " " * indent
    return textwrap.wrap(words, width, initial_indent=space, subsequent_indent=space, break_long_words=False)


def _hang(parts: Iterable[str], width: int) -> Iterator[str]:
    """Each part in lines of its own, continued further in."""
    for part in parts:
        yield from textwrap.wrap(part, width, initial_indent="  ", subsequent_indent="      ", break_long_words=False)
