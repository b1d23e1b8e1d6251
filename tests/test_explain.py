"""`rlhf list` and `rlhf explain`: docstrings taken apart, every name shown, on a terminal and in a pipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.catalog import (
    CONTROLLERS,
    ESTIMATORS,
    OBJECTIVES,
    REWARDS,
    SELECTIONS,
    STAGES,
    Entry,
    NonNegative,
    Share,
)
from rlhf_cli.catalog.explain import Explained, allowed, docstring, explain, needs_of, parse, recipe_of
from rlhf_cli.cli.explain import WIDEST, as_text, explanation, formula_lines, on_terminal, plain
from rlhf_cli.cli.tools import catalogue_lines
from rlhf_cli.data.formats import FORMATS
from rlhf_cli.recipe.schema import RECIPES
from tests.conftest import run_cli

ENTRIES = {**OBJECTIVES, **ESTIMATORS, **CONTROLLERS, **REWARDS}
NAMES = sorted({*ENTRIES, *STAGES})
WHOLE = """a = b
+ c; d = e.

What it does:
in two lines.

A second paragraph. Source: no label.

Symbols: a: one thing, (x; y); b: another; and
more; c: a third.
Source: Someone 2020 (arXiv:2001.00001) eq. 1;
Another 2021
Step 0: log 2 = 0.693147

Traps: the sign; the
mean

Raises ValueError for nothing.
"""


def test_a_docstring_in_its_parts() -> None:
    assert parse(WHOLE, "m:f") == Explained(
        "a = b\n+ c; d = e",
        "What it does: in two lines.\n\nA second paragraph. Source: no label.\n\nRaises ValueError for nothing.",
        ("a: one thing, (x; y)", "b: another; and more", "c: a third"),
        "Someone 2020 (arXiv:2001.00001) eq. 1; Another 2021",
        "log 2 = 0.693147",
        "the sign; the mean",
    )
    assert formula_lines("a = b\n+ c; d = e; for all; x: y") == ["a = b", "+ c", "d = e; for all", "x: y"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "lacks Source:, Step 0:, Traps:"),
        ("x\n\nSource: a 2020\nTraps: b", "lacks Step 0:"),
        ("x\n\nSource: a 2020\nStep 0:\nTraps: b", "lacks Step 0:"),
        ("\n\nSource: a 2020\nStep 0: 1\nTraps: b", "lacks a formula"),
        ("x\n\nSource: a\nStep 0: 1\nTraps: b\n\nSource: c", "two `Source:`"),
        ("x\n\nsource: a\nStep 0: 1\nTraps: b", "lacks Source:"),
    ],
)
def test_a_part_that_is_missing(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"^m:f: ") as caught:
        parse(text, "m:f")
    assert complaint in str(caught.value)


def test_a_path_that_leads_nowhere() -> None:
    with pytest.raises(ValueError, match=r"no module rlhf_cli\.objectives\.nothing"):
        docstring(Entry("x", "objectives.nothing:x", "help"))
    with pytest.raises(ValueError, match=r"objectives\.preference:nothing is not there"):
        docstring(Entry("x", "objectives.preference:nothing", "help"))


def test_shared_symbols_come_with_the_formulas_that_use_them() -> None:
    names = [symbol.split(":")[0] for symbol in explain(OBJECTIVES["dpo"]).symbols]
    assert names[-2:] == ["u", "D"], "D is said in terms of u"
    assert not {"u", "D"} & {symbol.split(":")[0] for symbol in explain(OBJECTIVES["simpo"]).symbols}
    assert any(symbol.startswith("S: ") for symbol in explain(ESTIMATORS["rloo"]).symbols)
    assert any(symbol.startswith("KL: ") for symbol in explain(CONTROLLERS["doubling"]).symbols)


def test_allowed_values_in_words() -> None:
    assert allowed(float) == "number"
    assert allowed(NonNegative) == "number >= 0"
    assert allowed(Share | None) == "number >= 0 and <= 1 or null"
    assert (allowed(bool), allowed(str), allowed(int)) == ("true or false", "text", "whole number")
    assert allowed(list[str]) == "list of text"
    assert plain(["a", "b c"]) == "[a, b c]"
    assert [plain(v) for v in (None, True, 0.1, 1e-4, "+", "yes")] == ["null", "true", "0.1", "0.0001", "+", "'yes'"]


@pytest.mark.parametrize("name", ENTRIES)
def test_the_recipe_that_is_shown_is_valid(name: str) -> None:
    block = recipe_of(ENTRIES[name])
    rest: dict[str, Any] = {"model": "m", "data": {"train": "d"}, "training": {"learning_rate": 0.1}, "output_dir": "o"}
    if block["stage"] == "ppo":
        rest["rewards"] = [{"function": "f.py:g"}]
    recipe = RECIPES[block["stage"]].model_validate(rest | block)
    chosen = recipe.ppo if block["stage"] == "ppo" else recipe  # type: ignore[attr-defined]
    named = [getattr(chosen, key, None) for key in ("objective", "advantage", "kl")]
    named += [reward.rule for reward in getattr(recipe, "rewards", ())]
    assert name in {getattr(one, "name", None) for one in named}


def test_needs_in_words() -> None:
    assert needs_of(OBJECTIVES["cross_entropy"]) == []
    assert len(needs_of(OBJECTIVES["odpo"])) == 2
    assert len(needs_of(OBJECTIVES["cost"])) == 2
    assert needs_of(ESTIMATORS["gae"]) == ["a critic"]
    assert needs_of(ESTIMATORS["rloo"]) == ["at least 2 completions of each prompt"]
    assert needs_of(ESTIMATORS["remax"]) == ["the score of a greedy completion of each prompt"]
    assert needs_of(ESTIMATORS["reinforce"]) == []
    assert len(needs_of(CONTROLLERS["fixed"])) == 1
    assert {name: len(needs_of(rule)) for name, rule in REWARDS.items() if needs_of(rule)} == {"numeric_answer": 1}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_a_terminal_of_80_columns(name: str) -> None:
    lines = list(as_text(explanation(name), 80))
    text = "\n".join(line for line, _ in lines)
    assert max(len(line) for line, _ in lines) <= 80
    assert lines[0][1] == "bold cyan"
    assert all(line or not style for line, style in lines)
    if name in ENTRIES:
        titles = [line for line, style in lines if style == "bold"]
        assert {"Symbols", "Data", "At step 0", "Traps", "Source", "Code"} <= set(titles)
        for key in ENTRIES[name].settings.model_fields:
            assert f"\n  {key}: " in text
    if name in STAGES:
        assert f"rlhf {name}: {STAGES[name].help}"[:60] in text
        others = {"ppo": [*ESTIMATORS, *CONTROLLERS, *REWARDS], "select": [*SELECTIONS]}
        offered = [o.name for o in OBJECTIVES.values() if o.stage == name] or others.get(name, [])
        assert all(f"\n  {one} " in text for one in offered)


def test_every_name_as_data() -> None:
    for name in NAMES:
        outcome = run_cli("explain", name, "--json")
        assert (outcome.code, outcome.err) == (0, "")
        found = json.loads(outcome.out)
        assert found["name"] == name
        assert ("entry" in found, "command" in found) == (name in ENTRIES, name in STAGES)
    found = json.loads(run_cli("explain", "odpo", "--json").out)["entry"]
    assert (found["kind"], found["command"], found["data"]["kind"]) == ("objective", "dpo", "comparison")
    assert ["prompt", "chosen", "rejected"] in found["data"]["formats"][0]["columns"]
    assert [(s["name"], s["default"]) for s in found["settings"]] == [("beta", 0.1), ("alpha", 1.0), ("offset", "log")]
    assert found["recipe"]["objective"]["name"] == "odpo"
    assert found["code"] == "odpo in rlhf_cli/objectives/preference.py"


def test_plain_when_piped_and_styled_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_cli("explain", "dpo")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    assert outcome.out.startswith("dpo: Direct preference optimisation")
    assert "[" not in outcome.out.splitlines()[2], "no markup"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    styled = on_terminal(explanation("dpo"))
    assert "\x1b[1" in styled
    assert max(len(line) for line in styled.splitlines() if "\x1b" not in line) <= WIDEST


def test_an_unknown_name() -> None:
    outcome = run_cli("explain", "r-dpo")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.errors == [
        "error: there is no objective, estimator, controller, rule or command called 'r-dpo' (did you mean 'r_dpo'?)"
    ]
    outcome = run_cli("explain", "@@@@")
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "`rlhf list` shows all names" in outcome.err
    assert run_cli("explain").code == 2


# --- list ------------------------------------------------------------------------------------------------


def test_list_as_data() -> None:
    outcome = run_cli("list", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    data = json.loads(outcome.out)
    assert [entry["name"] for entry in data["stages"]] == list(STAGES)
    assert {o["name"]: o["stage"] for o in data["objectives"]} == {o.name: o.stage for o in OBJECTIVES.values()}
    ipo = next(entry for entry in data["objectives"] if entry["name"] == "ipo")
    assert [(s["name"], s["default"], s["allowed"]) for s in ipo["settings"]] == [
        ("beta", 0.1, "number > 0"), ("average", True, "true or false")
    ]  # fmt: skip
    assert (ipo["data"], ipo["needs"], ipo["head"]) == ("comparison", ["reference"], None)
    estimators = {entry["name"]: entry for entry in data["estimators"]}
    assert (estimators["gae"]["critic"], estimators["rloo"]["group"], estimators["remax"]["greedy"]) == (True, 2, True)
    assert [entry["name"] for entry in data["controllers"]] == list(CONTROLLERS)
    assert {entry["name"]: entry["reads"] for entry in data["rules"]} == {r.name: r.reads for r in REWARDS.values()}
    words = next(entry for entry in data["rules"] if entry["name"] == "words")
    assert [s["name"] for s in words["settings"]] == ["plus", "minus", "per"]


def test_list_has_a_line_for_each_name_below_its_command() -> None:
    outcome = run_cli("list")
    assert (outcome.code, outcome.out) == (0, "")
    found: dict[str, list[str]] = {}
    for line in outcome.err.splitlines():
        if line.startswith("rlhf "):
            command = line.removeprefix("rlhf ").split(":")[0]
        elif line.startswith("  "):
            found.setdefault(command, []).append(line.split()[0])
    offered = {stage: [o.name for o in OBJECTIVES.values() if o.stage == stage] for stage in STAGES}
    offered = {stage: names for stage, names in offered.items() if names}
    assert found == offered | {"ppo": [*ESTIMATORS, *CONTROLLERS, *REWARDS], "select": [*SELECTIONS]}


def test_list_is_folded_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert max(len(line) for line in catalogue_lines() if line.startswith("  ")) <= 60


# --- both ------------------------------------------------------------------------------------------------


def test_it_is_light() -> None:
    program = (
        "import sys; from rlhf_cli.cli.app import run_command_line as r; "
        "assert r(['explain', 'kto']) == r(['list']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Kahneman-Tversky" in done.stdout


def test_docs_are_made_from_the_same_parts() -> None:
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    for name, entry in ENTRIES.items():
        found = explain(entry)
        section = page.split(f"### {name}\n")[1].split("\n### ")[0]
        for part in (*formula_lines(found.formula), found.step_0, found.traps, found.source):
            assert part in section, f"{name}: {part}"


def test_the_guide_names_every_entry_and_no_other() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([a-z_]+)`", guide))
    assert set(ENTRIES) <= words
    keys = {key for model in RECIPES.values() for key in model.model_fields} | {
        key for entry in ENTRIES.values() for key in entry.settings.model_fields
    }
    assert words - set(ENTRIES) <= keys | set(FORMATS) | {"log1p", "margin", "target"}
    for snippet in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL):
        rest = {"stage": "dpo", "model": "m", "data": {"train": "d"}, "training": {"learning_rate": 0.1}}
        RECIPES["dpo"].model_validate(rest | {"output_dir": "o"} | yaml.safe_load(snippet))


def test_links_between_the_pages() -> None:
    docs = Path(__file__).parents[1] / "docs"
    for page in ("objectives.md", "choosing.md", "adding-an-objective.md"):
        for target in re.findall(r"\]\(([^)#]+\.md)\)", (docs / page).read_text(encoding="utf-8")):
            assert (docs / target).is_file(), f"{page}: {target}"
