"""What the checks share.

A check is a function of a *module*: `check_dpo_by_hand(m)` reads `m.dpo` and asserts. `test_objectives.py` gives it the
real module, `test_mutants.py` a copy with a mistake planted, for which it must fail.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.catalog import Objective
from rlhf_cli.catalog.explain import explain

Check = Callable[[Any], None]
NAN, INF = float("nan"), float("inf")


def checks_of(namespace: dict[str, Any]) -> list[Check]:
    """The checks that a module defines, in order."""
    return [value for name, value in namespace.items() if name.startswith("check_")]


def doubles(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor | Sequence[Any], tolerance: float = 1e-7) -> None:
    """Same shape, and every number within tolerance (absolute and relative)."""
    wanted = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual.detach(), wanted.detach(), rtol=tolerance, atol=tolerance)


def leaf(values: Tensor) -> Tensor:
    """The same numbers, taking gradients."""
    return values.detach().clone().requires_grad_()


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of output.sum(); zeros for an input that it does not depend on."""
    found = torch.autograd.grad(output.sum(), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def untouched(output: Tensor, *inputs: Tensor) -> bool:
    """No gradient reaches any of the inputs, at all."""
    if not output.requires_grad:
        return True
    return all(g is None for g in torch.autograd.grad(output.sum(), inputs, allow_unused=True, retain_graph=True))


def differentiates(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """The gradient agrees with finite differences (float64)."""
    return torch.autograd.gradcheck(function, tuple(leaf(i) for i in inputs), raise_exception=False)


def finite(*tensors: Tensor) -> bool:
    """No NaN and no infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def refuses(error: type[Exception], function: Callable[..., Any], *arguments: Any, **settings: Any) -> bool:
    """The call raises that error."""
    try:
        function(*arguments, **settings)
    except error:
        return True
    return False


def compiled(module: ModuleType, source: str | Any) -> ModuleType:
    """A module under the same name made from other source, or from a syntax tree."""
    copy = ModuleType(module.__name__)
    exec(compile(source, f"<a copy of {module.__name__}>", "exec"), copy.__dict__)
    return copy


def mutated(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of the module in which `old`, which must occur exactly once, is replaced."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module.__name__} holds {source.count(old)} times: {old}"
    return compiled(module, source.replace(old, new))


def start(entry: Objective) -> float | None:
    """The loss where policy = reference, with default settings: the first number of the docstring's `Step 0:` that
    stands alone or after `=` or a comma; None when it has none."""
    found = re.search(r"(?:^|= |, )(\d+(?:\.\d+)?)(?=$|,| with| at| where)", explain(entry).step_0)
    return float(found[1]) if found else None
