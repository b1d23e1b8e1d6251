"""`file.py:function`, as recipes name functions."""

from __future__ import annotations

import difflib
from pathlib import Path

from rlhf_cli.errors import RecipeError

WRITE = "write file.py:function"


def function_file(name: str, key: str) -> Path:
    """The file of `file.py:function`. RecipeError naming `key`: it is written otherwise, or there is no such file."""
    file, colon, attribute = name.rpartition(":")
    where = f"{key} {name}"
    if not colon:
        raise RecipeError("no function is named", where, WRITE)
    if not file or not attribute:
        raise RecipeError(f"no {'function' if file else 'file'} is named beside the colon", where, WRITE)
    path = Path(file)
    if path.is_dir():
        raise RecipeError("this is a folder", where, WRITE)
    if not path.is_file():
        raise RecipeError("no such file", where, _similar(path) or WRITE)
    if path.suffix != ".py":
        raise RecipeError("this is not a Python file", where, WRITE)
    return path


def _similar(path: Path) -> str:
    """A file of that kind beside a missing one, when its name is close."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    beside = [other.stem for other in path.parent.iterdir() if other.suffix == path.suffix and other.is_file()]
    close = difflib.get_close_matches(path.stem, beside, n=1)
    return f"did you mean '{path.with_name(close[0] + path.suffix)}'?" if close else ""
