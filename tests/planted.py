"""The known mistakes of PPO, planted one at a time into a copy of the project, and the tests that catch them.

    python -m tests.planted                all of them (`make planted`); prints a table of which test catches which
    python -m tests.planted NAME ...       those whose names hold one of these words
    python -m tests.planted --usual        those that the test suite plants every time

A mistake is a few edits (planted_bugs.py, planted_more.py): each old text must occur exactly once, so the list is true.
The tests that it names must pass in the copy as it is, and each of them must fail with the mistake in it: fail, not
break, for an import that fails proves nothing. torch is imported once, every mistake is tried in a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.copies import ROOT, copy_project
from tests.planted_bugs import Planted
from tests.planted_more import PLANTED

COPIED = ("rlhf_cli", "tests", "pyproject.toml")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "hypothesis", "numpy", "tokenizers")
"""Packages of which all that the tests import is imported before the forks."""


def mutated(text: str, old: str, new: str) -> str:
    """A file's text with an edit made. ValueError when there is not exactly one place for it."""
    if text.count(old) != 1:
        raise ValueError(f"occurs {text.count(old)} times, not once: {old}")
    return text.replace(old, new)


@contextlib.contextmanager
def in_place(folder: Path, bug: Planted) -> Iterator[None]:
    """The copy in `folder` with a mistake in it, and afterwards as it was."""
    before = {file: (folder / "rlhf_cli" / file).read_text(encoding="utf-8") for file, _, _ in bug.edits}
    now = dict(before)
    for file, old, new in bug.edits:
        now[file] = mutated(now[file], old, new)
    try:
        for file, text in now.items():
            (folder / "rlhf_cli" / file).write_text(text, encoding="utf-8")
        yield
    finally:
        for file, text in before.items():
            (folder / "rlhf_cli" / file).write_text(text, encoding="utf-8")


class Outcomes:
    """A plugin of pytest that notes what became of each test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """passed, failed, or broken: outside of the test itself."""
        if report.when == "call":
            self.found.setdefault(report.nodeid, report.outcome)
        elif report.failed:
            self.found[report.nodeid] = "broken"


def run_tests(folder: Path, tests: Sequence[str], *, first: bool = False) -> dict[str, str]:
    """What became of these tests of the copy in `folder`, by node id; run in a fork. Broken when it could not run.

    first: without a mistake; leaves compiled files, and a list of what was imported.
    """
    said = folder / "outcomes.json"
    said.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            _in_the_fork(folder, tests, said, first)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    os.waitpid(child, 0)
    if not said.exists():
        return dict.fromkeys(tests, "broken")
    found: dict[str, str] = json.loads(said.read_text(encoding="utf-8"))
    return {test: _of(test, found) for test in tests}


def _of(test: str, found: dict[str, str]) -> str:
    """The outcome of a named test, whose parameters may be left out: the worst of its cases."""
    own = {outcome for node, outcome in found.items() if node == test or node.startswith(f"{test}[")}
    return next((outcome for outcome in ("broken", "failed", "passed", "skipped") if outcome in own), "broken")


def _in_the_fork(folder: Path, tests: Sequence[str], said: Path, first: bool) -> None:
    import pytest

    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "rlhf_cli")]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    sys.dont_write_bytecode = not first
    os.chdir(folder)
    with (folder / "pytest.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        _import_recipes()
        outcomes = Outcomes()
        pytest.main(["-q", "--tb=short", f"--basetemp={folder / 'tmp'}", *tests], plugins=[outcomes])
        home = importlib.import_module("rlhf_cli").__file__
        if home is not None and Path(home).is_relative_to(folder):
            said.write_text(json.dumps(outcomes.found), encoding="utf-8")
        if first:
            (folder / "imported").write_text("\n".join(n for n in sys.modules if n.split(".")[0] in HEAVY))


def _import_recipes() -> None:
    """The recipe classes: pydantic looks for their docstrings in all modules there are, so without the heavy ones."""
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] in HEAVY}
    importlib.import_module("rlhf_cli.recipe.schema")
    sys.modules.update(hidden)


def caught(bugs: Sequence[Planted], folder: Path, tell: Any = print) -> dict[str, dict[str, str]]:
    """For each mistake by name what became of its tests, and under "" of all of them without any mistake."""
    os.environ["OMP_NUM_THREADS"] = "1"
    copy_project(COPIED, folder)
    found = {"": run_tests(folder, sorted({test for bug in bugs for test in bug.tests}), first=True)}
    imported = folder / "imported"
    for module in imported.read_text().split() if imported.exists() else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    odd = [f"{test}: {outcome}" for test, outcome in found[""].items() if outcome != "passed"]
    tell(f"without a mistake: {len(found['']) - len(odd)} tests pass" + "".join(f"\n  NOT {line}" for line in odd))
    for bug in bugs:
        began = time.monotonic()
        try:
            with in_place(folder, bug):
                found[bug.name] = run_tests(folder, bug.tests)
        except ValueError as error:
            found[bug.name] = dict.fromkeys(bug.tests, f"not run, an edit {error}")
        tell(_row(bug, found[bug.name], time.monotonic() - began))
    return found


def _row(bug: Planted, found: dict[str, str], seconds: float) -> str:
    good = all(outcome == "failed" for outcome in found.values())
    lines = [f"{'caught' if good else 'MISSED'}  {bug.name} ({seconds:.1f} s)"]
    lines += [f"          {test.removeprefix('tests/')}: {outcome}" for test, outcome in found.items()]
    return "\n".join(lines)


def main() -> int:
    """Plant and tell; 1 when a test did not do what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="words that the names of mistakes hold")
    parser.add_argument("--usual", action="store_true", help="those that the test suite plants")
    parser.add_argument("--out", type=Path, help="also write the outcomes to this file, as JSON")
    asked = parser.parse_args()
    bugs = [b for b in PLANTED if b.usual or not asked.usual]
    bugs = [b for b in bugs if not asked.names or any(word in b.name for word in asked.names)]
    with tempfile.TemporaryDirectory() as folder:
        found = caught(bugs, Path(folder).resolve(), lambda line: print(line, flush=True))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found), encoding="utf-8")
    missed = [b.name for b in bugs if set(found[b.name].values()) != {"failed"}]
    print(
        f"{len(bugs) - len(missed)} of {len(bugs)} mistakes caught" + (f"; not: {', '.join(missed)}" if missed else "")
    )
    return 1 if missed or set(found[""].values()) != {"passed"} else 0


if __name__ == "__main__":
    sys.exit(main())
