"""Write docs/objectives.md: every objective, estimator and controller, from the catalogue and the docstrings.

    python scripts/make_docs.py            writes it
    python scripts/make_docs.py --check    exit code 1 when it is not what would be written

A test holds the page fresh.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from rlhf_cli.catalog import CONTROLLERS, ESTIMATORS, OBJECTIVES, Entry, Objective, Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "objectives.md"
NEEDS = {
    "reference": "log-probabilities of a frozen reference",
    "scores": "a score of each completion in the data",
    "kl_point": "an estimate of the KL to the reference, made in each step",
}
DATA = {
    "demonstration": "demonstrations: messages, prompt and completion, or plain text",
    "comparison": "comparisons: prompt, chosen, rejected",
    "verdict": "verdicts: prompt, completion, label",
    "task": "prompts",
}
SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
HEAD = """# Objectives

Every name that a recipe may use for an objective, an advantage estimator or a KL controller, with its settings. This
page is made from the catalogue and the docstrings by `scripts/make_docs.py`; do not edit it. The code is in
`rlhf_cli/objectives/`, pure functions of tensors; `tests/objectives/` holds each to values worked out by hand.

In the formulas `u` is the summed log-probability of a completion under the policy minus that under the reference, and
`D` is `u` of the chosen completion minus `u` of the rejected one.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, _contents()]
    parts += [_section(entry, f"objective: {{name: {entry.name}", _facts(entry)) for entry in OBJECTIVES.values()]
    parts += ["## Advantage estimators\n\nOf PPO, under `ppo.advantage`.\n"]
    parts += [
        _section(entry, f"advantage: {{name: {entry.name}", ["reads the critic's values"] if entry.critic else [])
        for entry in ESTIMATORS.values()
    ]
    parts += ["## KL controllers\n\nOf PPO's penalty for leaving the reference, under `ppo.kl`.\n"]
    parts += [_section(entry, f"kl: {{name: {entry.name}", []) for entry in CONTROLLERS.values()]
    return "\n".join(parts)


def _contents() -> str:
    rows = [
        f"| [`{o.name}`](#{o.name}) | `rlhf {o.stage}` | {o.data} | {', '.join(o.needs) or 'nothing'} | {o.help} |"
        for o in OBJECTIVES.values()
    ]
    return _table(("name", "command", "data", "needs", "what it is"), rows) + "\n## Training objectives\n"


def _facts(entry: Objective) -> list[str]:
    needs = "; ".join(NEEDS[need] for need in entry.needs)
    return [f"command: `rlhf {entry.stage}`", f"data: {DATA[entry.data]}", f"needs: {needs or 'nothing else'}"]


def _section(entry: Entry, block: str, facts: Iterable[str]) -> str:
    """One entry: what it is, its formula and source, its settings."""
    module, name = entry.path.split(":")
    code = f"code: `{name}` in `rlhf_cli/{module.replace('.', '/')}.py`"
    settings: type[Settings] = entry.settings  # type: ignore[attr-defined]
    given = "".join(f", {key}: {_plain(value)}" for key, value in settings().model_dump().items())
    lines = [f"### {entry.name}", "", f"{entry.help}.", "", *(f"- {fact}" for fact in (*facts, code)), ""]
    lines += ["```text", inspect.getdoc(entry.load()) or "", "```", "", "```yaml", f"{block}{given}}}", "```", ""]
    return "\n".join(lines) + "\n" + _settings(settings)


def _settings(settings: type[Settings]) -> str:
    rows = [
        f"| `{name}` | {_plain(field.default)} | {_allowed(field)} | {' '.join((field.description or '').split())} |"
        for name, field in settings.model_fields.items()
    ]
    return _table(("setting", "default", "allowed", "meaning"), rows)


def _allowed(field: Any) -> str:
    """The type of a setting and its bounds, in words."""
    kinds = get_args(field.annotation)
    if kinds and all(isinstance(kind, str) for kind in kinds):
        return ", ".join(f"`{kind}`" for kind in kinds)
    bounds = [f"{sign} {_plain(getattr(m, name))}" for name, sign in SIGNS for m in field.metadata if hasattr(m, name)]
    word = "true or false" if field.annotation is bool else "number"
    return " ".join([word, " and ".join(bounds)]).strip() + (" or null" if type(None) in kinds else "")


def _plain(value: Any) -> str:
    """A value as YAML has it."""
    words: Mapping[Any, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value}"


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
