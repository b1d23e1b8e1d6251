"""A user's file imported, its function called. Also a program, which does both for `foreign.rehearse`: whatever kills
that process would have killed the training. Nothing but the standard library is imported here."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTED = b"\0"
"""What the program writes between import and call."""


def imported(path: Path) -> ModuleType:
    """The module of a Python file."""
    spec = importlib.util.spec_from_file_location(f"rlhf_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What a function, plain or async, answers to those of the arguments that it takes."""
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    result = function(**arguments)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    return list(result) if isinstance(result, Iterator) else result


def main() -> None:
    """Import and call as stdin says. An exception is no death: the same call in the training names it."""
    search, file, attribute, arguments = json.load(sys.stdin)
    sys.path[:] = search
    try:
        function = getattr(imported(Path(file)), attribute)
        os.write(1, IMPORTED)
        invoke(function, arguments)
    except BaseException:
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
