"""Write docs/objectives.md: every objective, estimator, controller and reward rule, from catalogue and docstrings; and
docs/ppo-properties.md: what holds of PPO, and the tests that hold it, from tests/ppo_properties.py.

    python scripts/make_docs.py            writes them
    python scripts/make_docs.py --check    exit code 1 when they are not what would be written

`rlhf explain NAME` shows the same. Tests hold the pages fresh.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from rlhf_cli.catalog import STAGES, Stage
from rlhf_cli.catalog.explain import Named
from rlhf_cli.cli.explain import described, formula_lines, offers, plain

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "objectives.md"
PROPERTIES = ROOT / "docs" / "ppo-properties.md"
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


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    check, stale = parser.parse_args().check, 0
    for path, text in ((PAGE, page()), (PROPERTIES, properties_page())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path.name} is stale: python scripts/make_docs.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
