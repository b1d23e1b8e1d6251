"""Every check, on the real code."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

from tests import objectives
from tests.objectives.support import Check

CHECK_MODULES = [
    importlib.import_module(f"tests.objectives.{found.name}")
    for found in pkgutil.iter_modules(objectives.__path__)
    if found.name.endswith("_checks")
]


def checked() -> list[tuple[ModuleType, list[Check]]]:
    """(module, all checks of it): several files may check one module."""
    found: dict[str, tuple[ModuleType, list[Check]]] = {}
    for checks in CHECK_MODULES:
        found.setdefault(checks.MODULE.__name__, (checks.MODULE, []))[1].extend(checks.CHECKS)
    return list(found.values())


CHECKED = checked()


@pytest.mark.parametrize(
    ("module", "check"),
    [(module, check) for module, checks in CHECKED for check in checks],
    ids=[check.__name__.removeprefix("check_") for _, checks in CHECKED for check in checks],
)
def test_objective(module: ModuleType, check: Check) -> None:
    check(module)
