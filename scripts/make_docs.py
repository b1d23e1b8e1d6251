"""Write docs/objectives.md: every objective, estimator and controller, from the catalogue and the docstrings.

    python scripts/make_docs.py            writes it
    python scripts/make_docs.py --check    exit code 1 when it is not what would be written

`rlhf explain NAME` shows the same. A test holds the page fresh.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.catalog import STAGES, Stage
from rlhf_cli.catalog.explain import Named
from rlhf_cli.cli.explain import described, formula_lines, offers, plain

PAGE = Path(__file__).resolve().parents[1] / "docs" / "objectives.md"
HEAD = """# Objectives

Every name that a recipe may use for an objective, an advantage estimator or a KL controller. This page is made from the
catalogue and the docstrings by `scripts/make_docs.py`; do not edit it. `rlhf explain NAME` shows one entry on the
terminal. Which to take: [choosing.md](choosing.md); how to add one: [adding-an-objective.md](adding-an-objective.md).

The code is in `rlhf_cli/objectives/`, pure functions of tensors; `tests/objectives/` holds each to values worked out by
hand, to finite differences and to planted mistakes. "At step 0" is what the loss is while policy and reference are the
same model, or all scores are equal: the first line of `metrics.jsonl` shows it.
"""


def page() -> str:
    """The whole page."""
    commands = [part for stage in STAGES.values() for part in _command(stage)]
    return "\n".join([HEAD, _contents(), *commands])


def _contents() -> str:
    """A table of all names, grouped by command."""
    rows = []
    for stage in STAGES.values():
        for entry in _entries(stage):
            found = described(entry)
            rows.append(
                f"| `{found['command']}` | [`{entry.name}`](#{entry.name}) | {found['data']['kind']} | {entry.help} |"
            )
    return _table(("command", "name", "data", "what it is"), rows)


def _entries(stage: Stage) -> list[Named]:
    return [entry for entries in offers(stage).values() for entry in entries]


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


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is stale")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is stale: python scripts/make_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
