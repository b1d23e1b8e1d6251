"""docs/adding-an-objective.md is done as it is written, in a copy of the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.copies import ROOT, copy_project
from tests.stages import world as w

PAGE = ROOT / "docs" / "adding-an-objective.md"
STEP = re.compile(
    r"^In `(?P<file>[^`]+)`, (?:above `(?P<above>[^`]+)`|a new file):\n\n```\w+\n(?P<text>.*?)```$", re.M | re.S
)
COPIED = ("rlhf_cli", "recipes", "tests", "scripts", "docs", "pyproject.toml")


@dataclass(frozen=True)
class Copy:
    """The project with the example added."""

    folder: Path
    changed: tuple[str, ...]

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A Python program in the copy, which must succeed."""
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True, timeout=280,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done


def add(folder: Path) -> tuple[str, ...]:
    """Do the steps of the page. Returns the files that they touch."""
    touched = []
    for step in STEP.finditer(PAGE.read_text(encoding="utf-8")):
        file, above, text = folder / step["file"], step["above"], step["text"]
        touched.append(step["file"])
        if above is None:
            assert not file.exists()
            file.write_text(text, encoding="utf-8")
            continue
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (place,) = (n for n, line in enumerate(lines) if line.lstrip().startswith(above))
        between = "\n\n" if text.startswith("def ") else ""
        file.write_text("".join([*lines[:place], text, between, *lines[place:]]), encoding="utf-8")
    return tuple(touched)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A copy of what the example needs, with its four steps done and everything generated."""
    folder = tmp_path_factory.mktemp("adding")
    copy_project(COPIED, folder)
    made = Copy(folder, add(folder))
    made.run("scripts/make_docs.py")
    schema = made.run("-m", "rlhf_cli", "schema").stdout
    (folder / "recipes" / "schema.json").write_text(schema, encoding="utf-8")
    (folder / "demo" / "world").mkdir(parents=True)
    for name, count in (("pairs", 32), ("pairs-eval", 4)):
        w.write_rows(folder / "demo" / "world" / f"{name}.jsonl", w.rows("pairs", count, 1))
    return made


def test_it_is_one_function_one_entry_one_check_and_one_recipe(copy: Copy) -> None:
    assert copy.changed == (
        "rlhf_cli/objectives/preference.py", "rlhf_cli/catalog/preference.py", "tests/objectives/preference_checks.py",
        "recipes/objectives/exponential.yaml",
    )  # fmt: skip


def test_it_is_explained_and_listed(copy: Copy) -> None:
    shown = copy.run("-m", "rlhf_cli", "explain", "exponential").stdout
    assert shown.startswith("exponential: An exponential on DPO's margin\n\n  exp(-z)\n")
    assert "\n  z: beta D\n" in shown
    assert "exponential" in copy.run("-m", "rlhf_cli", "list").stderr
    assert "### exponential\n" in (copy.folder / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert "exponential" in (copy.folder / "recipes" / "schema.json").read_text(encoding="utf-8")


CHECKS = """
from tests.objectives import preference_checks as p
from tests.objectives.mutation import mutants
from tests.objectives.support import compiled

for check in p.CHECKS:
    check(p.MODULE)
planted = [m for m in mutants(p.MODULE) if m.place.startswith("exponential: ")]
assert len(planted) > 10
for mutant in planted:
    try:
        p.check_exponential_by_hand(compiled(p.MODULE, mutant.tree))
    except Exception:
        continue
    raise SystemExit(f"nothing notices {mutant.place}")
"""


def test_its_checks_pass_and_notice_every_small_mistake(copy: Copy) -> None:
    copy.run("-c", CHECKS)


def test_the_catalogue_and_the_generated_files_are_whole(copy: Copy) -> None:
    chosen = "exponential or page_is_fresh or file_is_fresh or names_are_unique"
    done = copy.run("-m", "pytest", "tests/test_catalog.py", "tests/recipe/test_schema_json.py", "-k", chosen)
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 8


def test_it_trains_from_the_loss_that_its_docstring_says(copy: Copy, tiny_model: Path) -> None:
    recipe = "recipes/objectives/exponential.yaml"
    start = f"model.name_or_path={tiny_model}"
    assert "fit for rlhf dpo" in copy.run("-m", "rlhf_cli", "check", recipe, "--set", start).stderr
    copy.run("-m", "rlhf_cli", "dpo", recipe, start, "--max-steps", "1", "evaluation.samples=0", "-o", "run")
    (first, *_) = [row for row in w.lines(copy.folder / "run" / "metrics.jsonl") if "loss" in row]
    assert abs(first["loss"] - 1.0) < 1e-5
