"""The table of PPO's properties is whole, names tests that exist, and its page is fresh."""

from __future__ import annotations

import ast
import runpy
from functools import cache
from pathlib import Path

import pytest

from tests.objectives.test_objectives import CHECKED
from tests.planted_more import PLANTED
from tests.ppo_properties import PROPERTIES

TESTS = Path(__file__).parent
RUN = {check.__name__ for _, checks in CHECKED for check in checks}


@cache
def functions(file: str) -> set[str]:
    """Names of the functions at the top of a file below tests/."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_property_is_missing() -> None:
    assert sorted(PROPERTIES) == list(range(1, 54))
    assert len({p.says for p in PROPERTIES.values()}) == 53
    assert all(p.says.endswith(".") and p.tests and len(set(p.tests)) == len(p.tests) for p in PROPERTIES.values())


@pytest.mark.parametrize("number", PROPERTIES)
def test_its_tests_exist(number: int) -> None:
    for test in PROPERTIES[number].tests:
        file, _, name = test.partition("::")
        assert name in functions(file), test
        assert name in RUN if name.startswith("check_") else name.startswith("test_"), test


def test_tests_that_catch_mistakes_exist() -> None:
    for test in (test for bug in PLANTED for test in bug.tests):
        file, _, name = test.removeprefix("tests/").partition("::")
        name, _, case = name.partition("[")
        assert name in functions(file), test
        assert name != "test_objective" or f"check_{case[:-1]}" in RUN, test


def test_the_page_is_fresh() -> None:
    made = runpy.run_path(str(TESTS.parent / "scripts" / "make_docs.py"))
    page, text = made["PROPERTIES"], made["properties_page"]()
    assert page.read_text(encoding="utf-8") == text, "run: python scripts/make_docs.py"
    for number, found in PROPERTIES.items():
        assert f"| {number} | {found.says} |" in text
