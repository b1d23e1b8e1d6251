"""YAML as a tree in which every key and value knows its place. No torch.

Only parser events of a safe loader are used and nothing is ever constructed. Anchors, aliases, merge keys and tags are
refused: a recipe says everything itself. Scalars follow the YAML 1.2 core rules: `1e-5` is a number, `on` is text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml

from rlhf_cli.errors import Problem, RecipeError

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 20_000
WRITE_OUT = "no includes or interpolation: write it out"

Scalar: TypeAlias = str | int | float | bool | None
Path: TypeAlias = tuple[str | int, ...]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULLS = ("", "~", "null", "Null", "NULL")
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SYNTAX = (
    ("mapping values are not allowed", "a ': ' stands where none can be", "quote text that holds ': ', or indent"),
    ("expected key", "this line does not fit the lines above it", "check the indentation and the ':' after the key"),
    ("expected '-' indicator", "this line does not fit the list above it", "check the indentation and the '-'"),
    ("expected <block end>", "this line does not fit the lines above it", "check the indentation and the quotes"),
    (
        "expected ',' or",
        "a ',' is missing, or the bracket opened on line {context} is not closed",
        "one to a line helps",
    ),
    ("expected ':'", "a ':' is missing after the key", "write `key: value`"),
    ("unexpected end of stream", "the quote opened on line {context} is never closed", "add the closing quote"),
    ("unexpected document indicator", "the quote opened on line {context} is never closed", "add the closing quote"),
    ("unknown escape character", "this escape is not known in double quotes", "use single quotes, or double the \\"),
    ("invalid Unicode character escape", "this escape names no character", "write the character itself"),
    ("undefined tag handle", "tags are not used in recipes", WRITE_OUT),
    ("block sequence entries are not allowed", "a list item stands where none can be", "start the list on a new line"),
    ("block mapping entries are not allowed", "a '?' key stands where none can be", "write `key: value`"),
    ("document start", "text follows after the end of the recipe", "a recipe is one document"),
)


@dataclass(frozen=True)
class Place:
    """Where something was written."""

    where: str
    """`file:line:column`, or the `--set ...` it comes from."""
    line: int
    column: int

    def key(self, path: Path) -> str:
        """The place with the key path after it, as problems show it."""
        dotted = ".".join(map(str, path))
        said = not dotted or self.where.startswith(f"--set {dotted}=")
        return self.where if said else f"{self.where} {dotted}"


@dataclass(frozen=True)
class Node:
    """A value of the recipe."""

    value: dict[str, Node] | list[Node] | Scalar
    place: Place
    """Where the value starts."""
    key_place: Place
    """Where the key before it starts; for values without a key the same as `place`."""
    written: str = ""
    """A scalar as it was written."""
    broken: bool = False
    """Something in this value was refused and reported; what the schema says of it is of no interest."""


@dataclass(frozen=True)
class Found:
    """A problem and where it belongs in the order of the file."""

    place: Place
    problem: Problem


@dataclass(frozen=True)
class _Reader:
    events: Iterator[Any]
    at: Callable[[int, int], Place]
    found: list[Found]
    count: Iterator[int]


def read_scalar(text: str) -> Scalar:
    """What a plain scalar means. Raises ValueError on numbers that no setting can hold."""
    if text in _NULLS:
        return None
    if text in _TRUTHS:
        return _TRUTHS[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if not _FLOAT.fullmatch(text):
        return text
    whole = _INTEGER.fullmatch(text) is not None
    number = float(text)
    if abs(number) == float("inf") or (whole and abs(number) > 2.0**64):
        raise ValueError(f"{shorten(text)} is too large a number")
    return int(text) if whole else number


def shorten(text: str, limit: int = 60) -> str:
    """The text on one line, its middle left out when it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 16]} ... {text[-10:]}"


def parse(text: str, file: str) -> tuple[Node, list[Found]]:
    """The tree of one YAML document, and the problems that do not stop the reading. Raises RecipeError otherwise."""

    def at(line: int, column: int) -> Place:
        return Place(f"{file}:{line + 1}:{column + 1}", line + 1, column + 1)

    return parse_at(text, at)


def parse_at(text: str, at: Callable[[int, int], Place]) -> tuple[Node, list[Found]]:
    """The same, with places of the caller's making for a line and a column that count from 0."""
    bad = _UNPRINTABLE.search(text)
    if bad:
        line_start = text.rfind("\n", 0, bad.start()) + 1
        place = at(text.count("\n", 0, bad.start()), bad.start() - line_start)
        message = f"a control character (U+{ord(bad[0]):04X}) that no text file should hold"
        raise RecipeError(Problem(message, place.where, "delete it, or save the file as UTF-8 text"))
    found: list[Found] = []
    try:
        events = iter(yaml.parse(text, Loader=_LOADER))
        reader = _Reader(events, at, found, itertools.count())
        next(events)
        start = next(events)
        if isinstance(start, yaml.StreamEndEvent):
            raise RecipeError(Problem("the recipe is empty", _place(start, at).where, "start with `stage: ...`"))
        root = _build(next(events), reader, ())
        next(events)
        extra = next(events)
        if not isinstance(extra, yaml.StreamEndEvent):
            message = "a second document starts here; a recipe is one document"
            hint = "delete the `---`, or make two files"
            found.append(Found(_place(extra, at), Problem(message, _place(extra, at).where, hint)))
    except yaml.YAMLError as error:
        raise RecipeError([*(f.problem for f in found), _syntax_problem(error, at, text)]) from None
    except RecipeError as error:
        raise RecipeError([*(f.problem for f in found), *error.problems]) from None
    return root, found


def _syntax_problem(error: Any, at: Callable[[int, int], Place], text: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read")
    where = at(mark.line, mark.column).where if mark else at(0, 0).where
    opened = getattr(error, "context_mark", None)
    if "cannot start any token" in said and mark:
        line = text.splitlines()[mark.line : mark.line + 1]
        found = line[0][mark.column : mark.column + 1] if line else ""
        if found == "\t":
            return Problem("a tab cannot indent a line", where, "use spaces")
        return Problem(f"a value cannot start with '{found}'", where, "put the text in quotes")
    for sign, message, hint in _SYNTAX:
        if sign in said:
            return Problem(message.format(context=opened.line + 1 if opened else "?"), where, hint)
    return Problem(f"this is not YAML: {said}", where)


def _place(event: Any, at: Callable[[int, int], Place]) -> Place:
    return at(event.start_mark.line, event.start_mark.column)


def _build(event: Any, reader: _Reader, path: Path) -> Node:
    place = _place(event, reader.at)
    if next(reader.count) >= MAX_VALUES:
        raise RecipeError(Problem(f"more than {MAX_VALUES} values; this is no recipe", place.where))
    if isinstance(event, yaml.AliasEvent):
        _refuse(reader, f"the alias *{shorten(str(event.anchor))}", place, path)
        return Node(None, place, place, broken=True)
    if event.anchor:
        _refuse(reader, f"the anchor &{shorten(str(event.anchor))}", place, path)
    if event.tag:
        _refuse(reader, f"the tag {shorten(event.tag.replace('tag:yaml.org,2002:', '!!'))}", place, path)
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, reader, place, path)
    if len(path) >= MAX_DEPTH:
        raise RecipeError(Problem(f"values are nested more than {MAX_DEPTH} deep; no recipe is", place.where))
    value = _items(reader, path) if isinstance(event, yaml.SequenceStartEvent) else _entries(reader, path)
    children = value if isinstance(value, list) else value.values()
    return Node(value, place, place, broken=bool(event.tag) or any(child.broken for child in children))


def _refuse(reader: _Reader, what: str, place: Place, path: Path) -> None:
    reader.found.append(Found(place, Problem(f"{what} is refused", place.key(path), WRITE_OUT)))


def _scalar(event: Any, reader: _Reader, place: Place, path: Path) -> Node:
    value: Scalar = event.value
    broken = bool(event.tag)
    try:
        if event.implicit[0]:
            value = read_scalar(event.value)
        elif "\0" in event.value:
            raise ValueError("the text holds a NUL character")
    except ValueError as error:
        reader.found.append(Found(place, Problem(str(error), place.key(path))))
        broken = True
    return Node(value, place, place, written=event.value, broken=broken)


def _items(reader: _Reader, path: Path) -> list[Node]:
    items: list[Node] = []
    while not isinstance(event := next(reader.events), yaml.SequenceEndEvent):
        items.append(_build(event, reader, (*path, len(items))))
    return items


def _entries(reader: _Reader, path: Path) -> dict[str, Node]:
    known: dict[str, Node] = {}
    while not isinstance(event := next(reader.events), yaml.MappingEndEvent):
        before = len(reader.found)
        key = _build(event, reader, path)
        name = key.written if isinstance(event, yaml.ScalarEvent) else ""
        value = _build(next(reader.events), reader, (*path, name))
        wrong = None
        if not isinstance(event, yaml.ScalarEvent):
            wrong = Problem("a key must be one word", key.place.key(path), "write `key: value`")
        elif name == "<<" and event.implicit[0]:
            wrong = Problem("the merge key << is refused", key.place.key(path), WRITE_OUT)
        elif name in known:
            first = known[name].key_place
            message = f"the key is given twice, first on line {first.line}"
            wrong = Problem(message, key.place.key((*path, name)), "keep one of them")
        if wrong:
            del reader.found[before:]
            reader.found.append(Found(key.place, wrong))
        else:
            known[name] = replace(value, key_place=key.place)
    return known


def entries(node: Node | None) -> dict[str, Node]:
    """Keys and values of a mapping; empty for anything else."""
    return node.value if node and isinstance(node.value, dict) else {}


def plain(node: Node) -> Any:
    """The values without their places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value
