"""A constitution: the principles by which a judge compares, or a model revises. No torch."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.work import Work


def read_principles(name: str, key: str) -> tuple[str, ...]:
    """The lines of a constitution. Raises RecipeError naming `key`."""
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"cannot be read: {reason}", f"{key} {name}", "a text file, a principle a line"
                          ) from error  # fmt: skip
    found = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not found:
        raise RecipeError("holds no principle", f"{key} {name}", "write one a line")
    return found


def check_principles(recipe: Work) -> None:
    """Those that a recipe names. Raises RecipeError."""
    for key in ("judge", "revise"):
        if (name := getattr(getattr(recipe, key, None), "principles", None)) is not None:
            read_principles(name, f"{key}.principles")
