"""The classical mistakes, planted one at a time: the check of that function must notice.

The second test plants every small mistake there is (an operator turned, a constant moved, a `where` swapped ...) and
demands that some check fails. What it may leave alive is listed by the checks of the module, each with the reason why
it changes no result; the name of a function there spares the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest

from tests.objectives.mutation import mutants
from tests.objectives.support import Check, compiled, mutated
from tests.objectives.test_objectives import CHECK_MODULES, CHECKED

CLASSICAL = [
    pytest.param(checks.MODULE, check, old, new, id=title)
    for checks in CHECK_MODULES
    for title, check, old, new in checks.CLASSICAL
]
SURVIVORS: dict[str, str] = {place: reason for checks in CHECK_MODULES for place, reason in checks.SURVIVORS.items()}


@pytest.mark.parametrize(("module", "check", "old", "new"), CLASSICAL)
def test_classical_mistake(module: ModuleType, check: Check, old: str, new: str) -> None:
    check(module)
    wrong = mutated(module, old, new)
    with pytest.raises((AssertionError, RuntimeError)):
        check(wrong)


def survivors(module: ModuleType, checks: Sequence[Check]) -> list[str]:
    """The planted mistakes that no check of the module notices."""
    left = []
    for mutant in mutants(module):
        name = mutant.place.split(":", 1)[0]
        if name in SURVIVORS or mutant.place in SURVIVORS:
            continue
        function = name.strip("_").removeprefix("clipped_")
        nearest = sorted(checks, key=lambda check: function not in check.__name__)
        if not any(fails(check, compiled(module, mutant.tree)) for check in nearest):
            left.append(mutant.place)
    return left


def fails(check: Check, module: ModuleType) -> bool:
    """Whether the check notices; an error of any kind counts."""
    try:
        check(module)
    except Exception:
        return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "checks"), CHECKED, ids=[module.__name__.split(".")[-1] for module, _ in CHECKED])
def test_every_small_mistake_is_noticed(module: ModuleType, checks: Sequence[Check]) -> None:
    assert survivors(module, checks) == []
