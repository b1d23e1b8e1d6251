"""Where settings stand that do not go together: the keys that a rule's sentence names, and their lines. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf_cli.errors import Problem
from rlhf_cli.recipe.tree import Found, Node, Path, Place


def contradiction(message: str, node: Node, path: Path, root: Node) -> Found:
    """A rule's sentence about a block: placed at the first written key that it names, with the lines of the others."""
    named = _named(message, node, path, root)
    if not named:
        place = node.key_place if isinstance(node.value, dict) else node.place
        return Found(place, Problem(message, place.key(path)))
    (first, at), *others = named.items()
    elsewhere = [
        f"{'.'.join(map(str, other))} {_on_line(there.key_place)}"
        for other, there in others
        if _line(there.key_place) != _line(at.key_place)
    ]
    hint = f"see {', '.join(elsewhere)}" if elsewhere else ""
    return Found(at.key_place, Problem(message, at.key_place.key(first), hint))


def _line(place: Place) -> tuple[int, str]:
    return place.line, place.where.rpartition(":")[0]


def _on_line(place: Place) -> str:
    return f"in {place.where}" if place.where.startswith("--set ") else f"on line {place.line}"


def _named(message: str, node: Node, path: Path, root: Node) -> dict[Path, Node]:
    """The written keys that a sentence names, in the block or from the top. A single word that is the name of a whole
    block may be just a word, and counts only when there is no other."""
    found: dict[Path, Node] = {}
    blocks: dict[Path, Node] = {}
    for dotted in re.findall(r"[a-z_][a-z0-9_]*(?:\.[a-z0-9_]+)*", message):
        for start, above in ((node, path), (root, ())):
            at = _follow(start, dotted.split("."))
            if at is not None and (start is node or "." in dotted):
                block = isinstance(at[1].value, dict) and "." not in dotted
                (blocks if block else found).setdefault((*above, *at[0]), at[1])
                break
    return found or blocks


def _follow(node: Node, steps: Sequence[str]) -> tuple[Path, Node] | None:
    """The node at the end of a path, as far as a list on its way; None when it is not written."""
    path: Path = ()
    for step in steps:
        if isinstance(node.value, list) and step.isdigit() and int(step) < len(node.value):
            node, path = node.value[int(step)], (*path, int(step))
        elif isinstance(node.value, dict) and step in node.value:
            node, path = node.value[step], (*path, step)
        elif isinstance(node.value, dict) or not path:
            return None
    return path, node
