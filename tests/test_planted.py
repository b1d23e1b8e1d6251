"""Known mistakes of PPO code, planted into a copy of the project, are caught: a few here, all by `make planted`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.planted import ROOT, in_place, mutated
from tests.planted_bugs import Planted
from tests.planted_more import PLANTED

USUAL = [bug.name for bug in PLANTED if bug.usual]
Outcome = dict[str, dict[str, str]]


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_mistake_fits_the_code_of_today(bug: Planted) -> None:
    """One place for each edit, and what comes out is still Python, and another program."""
    assert bug.tests
    for file, old, new in bug.edits:
        text = (ROOT / "rlhf_cli" / file).read_text(encoding="utf-8")
        wrong = mutated(text, old, new)
        assert wrong != text
        compile(wrong, file, "exec")


def test_names_and_edits_are_all_different() -> None:
    assert len({bug.name for bug in PLANTED}) == len(PLANTED) >= 40
    assert len({bug.edits for bug in PLANTED}) == len(PLANTED)


def test_the_copy_is_as_it_was_afterwards(tmp_path: Path) -> None:
    file = tmp_path / "rlhf_cli" / "a.py"
    file.parent.mkdir()
    file.write_text("one = 1\ntwo = 1\n")
    bug = Planted("", (("a.py", "one = 1", "one = 2"), ("a.py", "two = 1", "two = 3")), ())
    with in_place(tmp_path, bug):
        assert file.read_text() == "one = 2\ntwo = 3\n"
    assert file.read_text() == "one = 1\ntwo = 1\n"
    for old in ("three", "= 1"):
        with (
            pytest.raises(ValueError, match="times, not once"),
            in_place(tmp_path, Planted("", (("a.py", old, ""),), ())),
        ):
            pass
    assert file.read_text() == "one = 1\ntwo = 1\n"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Outcome]:
    """What became of the tests, with and without each of the usual mistakes; all in one process, when first asked."""
    said = tmp_path_factory.mktemp("planted") / "outcomes.json"

    def found() -> Outcome:
        if not said.exists():
            asked = [sys.executable, "-m", "tests.planted", "--usual", "--out", str(said)]
            done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=280)
            assert said.exists(), done.stdout + done.stderr
        known: Outcome = json.loads(said.read_text())
        return known

    return found


def test_without_a_mistake_they_pass(outcomes: Callable[[], Outcome]) -> None:
    assert set(outcomes()[""].values()) == {"passed"}


@pytest.mark.parametrize("name", USUAL)
def test_it_is_caught(outcomes: Callable[[], Outcome], name: str) -> None:
    """By every test that says so, which fails and does not just break."""
    found = outcomes()[name]
    assert found
    assert set(found.values()) == {"failed"}, found
