"""From a recipe file and overrides to a checked recipe, and back to text. No torch.

Every problem of a recipe is reported at once, in the order of the file: `file:line:column key.path: what (what to do)`.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ValidationError

from rlhf_cli.errors import Problem, RecipeError, did_you_mean
from rlhf_cli.recipe.glance import stage_of
from rlhf_cli.recipe.hints import foreign_value
from rlhf_cli.recipe.keys import stages_with
from rlhf_cli.recipe.overrides import override
from rlhf_cli.recipe.problems import explain
from rlhf_cli.recipe.schema import RECIPES, Recipe
from rlhf_cli.recipe.tree import MAX_BYTES, Node, Scalar, entries, parse, plain, read_scalar, shorten
from rlhf_cli.recipe.work import Work

MOST_PROBLEMS = 50
_BARE = re.compile(r"[A-Za-z0-9_./]([A-Za-z0-9_./+ -]*[A-Za-z0-9_./+-])?")


def read_recipe(path: str | Path, overrides: Sequence[str], stage: str | None) -> Any:
    """The recipe in that file with `key.path=value` overrides applied, checked for the command `stage`.

    With stage None the recipe's own `stage:` decides. Raises RecipeError with every problem found.
    """
    try:
        return _read(_read_text(path), str(path), overrides, stage)
    except RecipeError as error:
        if len(error.problems) <= MOST_PROBLEMS:
            raise
        more = Problem(f"and {len(error.problems) - MOST_PROBLEMS} more problems")
        raise RecipeError([*error.problems[:MOST_PROBLEMS], more]) from None


def _read(text: str, path: str, overrides: Sequence[str], stage: str | None) -> Work:
    root, found = parse(text, path)
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else f"'{shorten(root.written)}'" if root.written else "empty"
        problem = Problem(f"the recipe is {kind}", root.place.where, "it must be `key: value` lines")
        raise RecipeError([*(f.problem for f in found), problem])
    failed: list[Problem] = []
    for number, assignment in enumerate(overrides):
        try:
            root = override(root, assignment, number)
        except RecipeError as error:
            failed += error.problems
    try:
        chosen = _stage(root, stage)
    except RecipeError as error:
        raise RecipeError([*(f.problem for f in found), *failed, *error.problems]) from None
    if stage not in (None, chosen):
        message = f"this is a recipe for `rlhf {chosen}`, not for `rlhf {stage}`"
        raise RecipeError(Problem(message, entries(root)["stage"].place.key(("stage",))))
    recipe = None
    try:
        recipe = RECIPES[chosen].model_validate(plain(root))
    except ValidationError as error:
        found += explain(error.errors(include_url=False, include_input=False), root, chosen)
    found.sort(key=lambda f: (f.place.line, f.place.column))
    problems = [f.problem for f in found] + failed
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def _read_text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(Problem("no such recipe", str(path), _neighbour(Path(path)))) from None
    except IsADirectoryError:
        inside = Path(path) / "recipe.yaml"
        hint = f"did you mean {inside}?" if inside.is_file() else "name the .yaml file"
        raise RecipeError(Problem("this is a folder, not a recipe", str(path), hint)) from None
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else str(error)
        raise RecipeError(Problem(f"cannot be read: {reason}", str(path).replace("\0", "\\0"))) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(Problem("larger than 1 MiB; this is no recipe", str(path)))
    return _decode(raw, str(path))


def _decode(raw: bytes, path: str) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(Problem("this file is UTF-16", path, "save it as UTF-8"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        start = raw.rfind(b"\n", 0, error.start) + 1
        column = len(raw[start : error.start].decode("utf-8-sig", errors="replace")) + 1
        byte = f"0x{raw[error.start]:02x}"
        problem = Problem(f"byte {byte} is not UTF-8", f"{path}:{line}:{column}", "save the file as UTF-8")
        raise RecipeError(problem) from None


def _neighbour(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if stage_of(p) is not None)
    except (OSError, ValueError):
        return f"the folder {path.parent} does not exist"
    stems = {name.rpartition(".")[0]: name for name in names}
    close = difflib.get_close_matches(_stem(path.name), stems, n=1)
    if close:
        return f"did you mean '{path.parent / stems[close[0]]}'?"
    return f"recipes in that folder: {', '.join(names[:8])}" if names else ""


def _stem(name: str) -> str:
    """Without the ending that all recipes have, which makes every name look alike."""
    return name.removesuffix(".yaml").removesuffix(".yml")


def _stage(root: Node, stage: str | None) -> str:
    """The command the recipe is for. Raises RecipeError when it names none; the command given only helps the hint."""
    node = entries(root).get("stage")
    if node is None:
        raise RecipeError(Problem("this key is missing", root.place.key(("stage",)), _missing_stage(root, stage)))
    written = shorten(node.written)
    if not isinstance(node.value, str) or node.value not in RECIPES:
        hint = foreign_value("stage", written) or did_you_mean(written, RECIPES)
        message = f"'{written}' is not one of {', '.join(RECIPES)}"
        raise RecipeError([] if node.broken else [Problem(message, node.place.key(("stage",)), hint)])
    return node.value


def _missing_stage(root: Node, stage: str | None) -> str:
    """What to write; keys that only one command knows together give the recipe away."""
    if stage is not None:
        return f"write `stage: {stage}`"
    known = [stages for key in entries(root) if (stages := stages_with(key, ""))]
    told = [stage for stage in RECIPES if all(stage in stages for stages in known)]
    return f"write `stage: {told[0]}`" if len(told) == 1 else f"write one of {', '.join(RECIPES)}"


# --- back to text ----------------------------------------------------------------------------------------


def dump_recipe(recipe: Work) -> str:
    """The recipe as YAML with every default filled in; reading it again gives an equal recipe."""
    shared = [key for kind in (Work, Recipe) for key in kind.model_fields if key not in Work.LAST]
    own = [key for key in type(recipe).model_fields if key not in (*shared, *Work.LAST)]
    order = [key for key in dict.fromkeys(shared) if key in type(recipe).model_fields]
    at = order.index("data") + 1
    return "".join(_dump_entry(key, getattr(recipe, key), 0) for key in [*order[:at], *own, *order[at:], *Work.LAST])


def _dump_entry(key: str, value: Any, depth: int) -> str:
    pad, name = "  " * depth, quote(key)
    entries = _entries(value)
    if entries:
        return f"{pad}{name}:\n" + "".join(_dump_entry(k, v, depth + 1) for k, v in entries.items())
    if isinstance(value, list) and any(_entries(item) for item in value):
        return f"{pad}{name}:\n" + "".join(_dump_item(item, depth + 1) for item in value)
    return f"{pad}{name}: {_dump_flow(value)}\n"


def _entries(value: Any) -> dict[str, Any]:
    """Keys and values of a mapping; the name of a catalogue entry comes before its settings."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, BaseModel):
        return {}
    fields = type(value).model_fields
    named = "name" in fields and get_origin(fields["name"].annotation) is Literal
    keys = ["name", *(key for key in fields if key != "name")] if named else list(fields)
    return {key: getattr(value, key) for key in keys}


def _dump_item(item: Any, depth: int) -> str:
    text = "".join(_dump_entry(key, value, depth + 1) for key, value in _entries(item).items())
    return "  " * depth + "- " + text[2 * (depth + 1) :]


def _dump_flow(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, list):
        return f"[{', '.join(_dump_flow(item) for item in value)}]"
    if isinstance(value, dict | BaseModel):
        return "{}"
    return quote(value) if isinstance(value, str) else str(value)


def quote(text: str) -> str:
    """The text as a YAML scalar that reads as exactly this text."""
    if _BARE.fullmatch(text) and isinstance(_scalar_or_none(text), str):
        return text
    return f'"{"".join(_escape(character) for character in text)}"'


def _scalar_or_none(text: str) -> Scalar:
    try:
        return read_scalar(text)
    except ValueError:
        return None


def _escape(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character == "\n":
        return "\\n"
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
