"""`--set key.path=value` put into the tree of a recipe. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from rlhf_cli.errors import Problem, RecipeError
from rlhf_cli.recipe.tree import MAX_DEPTH, Node, Place, parse_at, read_scalar, shorten


def override(root: Node, text: str, number: int) -> Node:
    """The tree with `key.path=value` put into it. Raises RecipeError when that cannot be done.

    A value that starts with a bracket, brace or quote is flow YAML; anything else is one plain scalar as it stands, so
    that `:`, `#`, `@` and `*` in paths need no care.
    """
    place = Place(f"--set {shorten(text)}", 2**31 + number, 0)
    path, equals, written = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise RecipeError(Problem("this is not an override", place.where, "write key.path=value"))
    try:
        new = _value(written.strip(), place)
        return _put(root, keys, replace(new, place=place, key_place=place), ())
    except ValueError as error:
        raise RecipeError(Problem(str(error), place.where)) from None


def _value(written: str, place: Place) -> Node:
    if "\0" in written or any("\ud800" <= c <= "\udfff" for c in written):
        raise ValueError("the value is not UTF-8 text")
    if written[:1] not in ("[", "{", '"', "'"):
        return Node(read_scalar(written), place, place, written=written)
    node, found = parse_at(written, lambda line, column: place)
    if found:
        raise RecipeError([replace(f.problem, where=place.where) for f in found])
    return node


def _put(node: Node | None, keys: Sequence[str], new: Node, walked: tuple[str, ...]) -> Node:
    if not keys:
        return new
    head, rest, here = keys[0], keys[1:], ".".join(walked)
    if node is None or node.value is None:
        node = Node({}, new.place, new.place)
    if walked == ("model",) and isinstance(node.value, str):
        node = replace(node, value={"name_or_path": node})
    if isinstance(node.value, dict):
        child = _put(node.value.get(head), rest, new, (*walked, head))
        return replace(node, value={**node.value, head: child})
    if not isinstance(node.value, list):
        raise ValueError(
            f"{here} is the value {shorten(node.written)!r} and has no key '{head}'; set {here} as a whole"
        )
    if not re.fullmatch(r"[0-9]{1,9}", head) or int(head) >= len(node.value):
        last = f"a number from 0 to {len(node.value) - 1}" if node.value else "the whole list"
        raise ValueError(f"{here} is a list of {len(node.value)}; write {last}, not '{shorten(head)}'")
    index = int(head)
    items = [_put(item, rest, new, (*walked, head)) if i == index else item for i, item in enumerate(node.value)]
    return replace(node, value=items)
