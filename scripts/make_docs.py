"""Write docs/objectives.md: every objective, estimator, controller and reward rule, from catalogue and docstrings; and
docs/ppo-properties.md: what holds of PPO, and the tests that hold it, from tests/ppo_properties.py; and
docs/recipes.md: every key of a recipe, from its schema.

    python scripts/make_docs.py            writes them
    python scripts/make_docs.py --check    exit code 1 when they are not what would be written

`rlhf explain NAME` shows the same. Tests hold the pages fresh.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from rlhf_cli.catalog import STAGES, Stage
from rlhf_cli.catalog.entries import LARGEST
from rlhf_cli.catalog.explain import Named
from rlhf_cli.cli.explain import described, formula_lines, offers, plain
from rlhf_cli.recipe.jsonschema import json_schema
from rlhf_cli.recipe.schema import RECIPES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "objectives.md"
PROPERTIES = ROOT / "docs" / "ppo-properties.md"
KEYS = ROOT / "docs" / "recipes.md"
HEAD = """# Objectives

Every name that a recipe may use for an objective, an advantage estimator, a KL controller or a reward rule. This page
is made from the catalogue and the docstrings by `scripts/make_docs.py`; do not edit it. `rlhf explain NAME` shows one
entry on the terminal. Which to take: [choosing.md](choosing.md); how to add one:
[adding-an-objective.md](adding-an-objective.md); all that rewards can be: [rewards.md](rewards.md).

The code is in `rlhf_cli/objectives/`, pure functions of tensors (that of rules in `rlhf_cli/rollouts/rules.py`);
`tests/objectives/` holds each to values worked out by hand, to finite differences and to planted mistakes. "At step 0"
is what the loss is while policy and reference are the same model, or all scores are equal: the first line of
`metrics.jsonl` shows it.
"""


def page() -> str:
    """The whole page."""
    commands = [part for stage in STAGES.values() if stage.trains for part in _command(stage)]
    return "\n".join([HEAD, _contents(), *commands])


def _contents() -> str:
    """A table of all names, grouped by command."""
    rows = []
    for stage in (stage for stage in STAGES.values() if stage.trains):
        for entry in _entries(stage):
            found = described(entry)
            rows.append(
                f"| `{found['command']}` | [`{entry.name}`](#{entry.name}) | {found['data']['kind']} | {entry.help} |"
            )
    return _table(("command", "name", "data", "what it is"), rows)


def _entries(stage: Stage) -> list[Named]:
    return [cast("Named", entry) for entries in offers(stage).values() for entry in entries]


def _command(stage: Stage) -> Iterator[str]:
    yield f"## rlhf {stage.name}\n\n{stage.help}.\n"
    for entry in _entries(stage):
        yield _section(entry.name, described(entry))


def _section(name: str, found: dict[str, Any]) -> str:
    """One entry: what it is, its formula, its settings, its data, its traps. Lists with two marks stay two lists."""
    lines = [f"### {name}", "", f"{found['help']} ({found['kind']}).", "", "```text"]
    lines += [*formula_lines(found["formula"]), "```", ""]
    lines += [found["notes"], ""] if found["notes"] else []
    lines += [*(f"- `{symbol.replace(': ', '`: ', 1)}" for symbol in found["symbols"]), ""]
    facts = {
        "At step 0": found["step_0"],
        "Data": f"{found['data']['help']}. {_formats(found['data']['formats'])}",
        "Needs": "; ".join(found["needs"]),
        "Traps": found["traps"],
        "Source": found["source"],
        "Code": f"`{found['code'].replace(' in ', '` in `')}`",
    }
    lines += [*(f"* **{title}**: {words}" for title, words in facts.items() if words), ""]
    block = yaml.safe_dump(found["recipe"], sort_keys=False)
    return "\n".join([*lines, f"```yaml\n{block}```", "", _settings(found["settings"])])


def _formats(formats: list[dict[str, Any]]) -> str:
    return "Formats: " + ", ".join(f"`{one['name']}`" for one in formats)


def _settings(settings: list[dict[str, Any]]) -> str:
    rows = [f"| `{s['name']}` | {plain(s['default'])} | {s['allowed']} | {s['help']} |" for s in settings]
    return _table(("setting", "default", "allowed", "meaning"), rows) if rows else "No settings.\n"


def _table(head: tuple[str, ...], rows: Iterable[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows]) + "\n"


PROPERTIES_HEAD = """# What holds of PPO

Each line is a property with the tests below `tests/` that hold it; `tests/objectives/test_objectives.py` runs each
`check_`. This page is made from `tests/ppo_properties.py` by `scripts/make_docs.py`; do not edit it. `make planted`
plants each known mistake of PPO code into a copy of the project and shows which of these tests catches it.
"""


def properties_page() -> str:
    """The page of PPO's properties."""
    found = runpy.run_path(str(ROOT / "tests" / "ppo_properties.py"))["PROPERTIES"]
    rows = []
    for number, (says, tests) in found.items():
        rows.append(f"| {number} | {says} | {'<br>'.join(f'`{test}`' for test in tests)} |")
    return PROPERTIES_HEAD + "\n" + _table(("", "what holds", "tests"), rows)


# --- keys of recipes -------------------------------------------------------------------------------------

KEYS_HEAD = """# Recipes: every key

What a recipe may hold, by command and by block: the same as `recipes/schema.json`, which editors read, and as
`rlhf schema`. This page is made from the recipe classes by `scripts/make_docs.py`; do not edit it. A key without a
default must be given. The settings of objectives, estimators, KL controllers and rules are in
[objectives.md](objectives.md); whole recipes, commented, are in the folder `recipes/`.

Any key can be given on the command line as well: `--set training.learning_rate=1e-6`, for items of lists by their
number, counted from 0: `--set rewards.0.weight=2`. Unknown keys, wrong types and keys that nothing would read are
refused, all at once.
"""
OTHERS = {"select": "loops.md"}
"""Where the names of a block are told that no objective page has."""
Schema = dict[str, Any]


def keys_page() -> str:
    """Every key of every recipe."""
    recipes = {stage: json_schema(stage) for stage in RECIPES}
    help_of = {key: words for recipe in reversed(recipes.values()) for key, words in _help(recipe)}
    for recipe in recipes.values():
        for key, body in recipe["properties"].items():
            body.setdefault("description", help_of.get(key, ""))
    trains = [stage.name for stage in STAGES.values() if stage.trains]
    blocks = _blocks(recipes)
    first, *others = (recipes[stage]["properties"] for stage in trains)
    shared = {key: body for key, body in first.items() if all(other.get(key) == body for other in others)}
    parts = [f"## Commands that train\n\nAll of {', '.join(f'`{stage}`' for stage in trains)} share:\n"]
    parts.append(_keys(shared, recipes[trains[0]]["required"], blocks, trains[0]))
    for stage, recipe in recipes.items():
        own = {k: v for k, v in recipe["properties"].items() if k != "stage" and not (stage in trains and k in shared)}
        parts += [f"## rlhf {stage}\n", _keys(own, recipe["required"], blocks, stage)]
    parts.append("## Blocks\n")
    for (_, title), (stage, body) in blocks.items():
        parts += [f"### {title}\n", _keys(body["properties"], body.get("required", []), blocks, stage)]
    return "\n".join([KEYS_HEAD, *parts])


def _help(recipe: Schema) -> Iterator[tuple[str, str]]:
    """The keys of a recipe that say what they are: some commands only narrow what others explain."""
    yield from ((k, body["description"]) for k, body in recipe["properties"].items() if "description" in body)


def _blocks(recipes: dict[str, Schema]) -> dict[tuple[str, str], tuple[str, Schema]]:
    """(class, title) of each block that has no name of the catalogue -> a command that has it, and its schema."""
    used: dict[str, tuple[str, list[str]]] = {}
    for stage, recipe in recipes.items():
        for name, place in _references(recipe, recipe["$defs"], ""):
            stages = used.setdefault(name, (place, []))[1]
            stages += [] if stage in stages else [stage]
    places = [place for place, _ in used.values()]
    found = {}
    for name, (place, stages) in used.items():
        title = place if places.count(place) == 1 else f"{place} of {', '.join(stages)}"
        found[name, title] = stages[0], recipes[stages[0]]["$defs"][name]
    return found


def _references(part: Any, definitions: Schema, place: str) -> Iterator[tuple[str, str]]:
    """The blocks that a schema refers to, each with the key where it stands."""
    if isinstance(part, list):
        for one in part:
            yield from _references(one, definitions, place)
    elif isinstance(part, dict):
        for key, body in part.get("properties", {}).items():
            yield from _references(body, definitions, f"{place}.{key}".lstrip("."))
        for key in ("anyOf", "oneOf", "items", "additionalProperties"):
            yield from _references(part.get(key), definitions, place)
        name = part.get("$ref", "").rpartition("/")[2]
        if name and not _named(name):
            yield name, place
            yield from _references(definitions[name], definitions, place)


def _named(definition: str) -> str | None:
    """The name of the catalogue that a definition is for, or None."""
    found = re.fullmatch(r"(?:\w+?__blocks__)?(\w+?)_(?:block|term|mix)(?:__\d+)?", definition)
    return found and found[1]


def _keys(properties: Schema, required: list[str], blocks: dict[tuple[str, str], Any], stage: str) -> str:
    titles = dict(blocks.keys())  # by class
    rows = []
    for key, body in properties.items():
        default = "" if key in required else _default(body)
        words = (body.get("description") or "").replace("|", "\\|")
        rows.append(f"| `{key}` | {default} | {_allowed(body, titles, stage)} | {words} |")
    return _table(("key", "default", "allowed", "meaning"), rows)


def _default(body: Schema) -> str:
    value = body.get("default")
    block = bool(value) and isinstance(value, dict)
    return "its defaults" if block or "default" not in body else f"`{plain(value)}`"


def _allowed(body: Schema, titles: dict[str, str], stage: str) -> str:
    """The values that a schema allows, in words."""
    choices = body.get("anyOf") or body.get("oneOf") or []
    if name := body.get("$ref", "").rpartition("/")[2]:
        page = OTHERS.get(stage, f"objectives.md#{_named(name)}")
        return f"[`{_named(name)}`]({page})" if _named(name) else f"[{titles[name]}](#{_slug(titles[name])})"
    names = [one["$ref"].rpartition("/")[2] for one in choices if _named(one.get("$ref", "").rpartition("/")[2])]
    if len(names) > 1:
        names = [name for name in names if not name.endswith("_mix")]
        shown = ", ".join(f"`{_named(name)}`" for name in names[:6])
        return f"[{{name: ...}}]({OTHERS.get(stage, 'objectives.md')}): {shown}{' ...' if len(names) > 6 else ''}"
    if choices:
        return " or ".join(dict.fromkeys(_allowed(one, titles, stage) for one in choices))
    if "enum" in body or "const" in body:
        return ", ".join(f"`{plain(value)}`" for value in body.get("enum", [body.get("const")]))
    if body.get("type") == "array":
        return f"list of {_allowed(body.get('items', {}), titles, stage)}"
    words = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "{name: value}"}
    signs = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
    bounds = [f"{sign} {body[key]:g}" for key, sign in signs if key in body and abs(body[key]) < LARGEST]
    return " ".join([words.get(body.get("type", ""), body.get("type", "any")), " and ".join(bounds)]).strip()


def _slug(title: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-")


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    check, stale = parser.parse_args().check, 0
    for path, text in ((PAGE, page()), (PROPERTIES, properties_page()), (KEYS, keys_page())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path.name} is stale: python scripts/make_docs.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
