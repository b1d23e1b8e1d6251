"""What pydantic says of a recipe, in plain words and with places. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.errors import Problem, did_you_mean
from rlhf_cli.recipe.contradictions import contradiction
from rlhf_cli.recipe.hints import foreign_key, foreign_value
from rlhf_cli.recipe.keys import blocks_of, known_at, stages_with
from rlhf_cli.recipe.schema import RECIPES
from rlhf_cli.recipe.settings.blocks import Contradictions
from rlhf_cli.recipe.tree import Found, Node, Path, Place, entries, shorten

LONGEST_WORD = 60
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class _Complaint:
    """An error of pydantic, with the node it is about."""

    type: str
    path: Path
    node: Node
    context: dict[str, Any]
    last: str


def explain(errors: Iterable[Any], root: Node, stage: str) -> list[Found]:
    """The problems behind the errors of a recipe for that stage, in no special order."""
    objectives = _wrong_objectives(root, stage)
    complaints = [_locate(error, root) for error in errors]
    groups: dict[Path, list[_Complaint]] = {}
    for complaint in complaints:
        if not (objectives and complaint.path[:1] == ("objective",)) and _counts(complaint):
            groups.setdefault(complaint.path, []).append(complaint)
    parents = {path[:length] for path in groups for length in range(len(path))}
    found = list(objectives)
    for path, group in groups.items():
        missing = [c for c in group if c.type == "missing"]
        found += [_missing(c, root) for c in missing]
        rest = [c for c in group if c.type != "missing"]
        if rest and not (path in parents and rest[0].type in _WANTED):
            found += _explain_group(rest, root, stage)
    return found


def _locate(error: Any, root: Node) -> _Complaint:
    """Follow pydantic's location through the tree; the names of union members in it lead nowhere and are skipped."""
    node = root
    path: Path = ()
    for step in error["loc"]:
        items = node.value if isinstance(node.value, list) else []
        inside = entries(node).get(step) or (items[step] if isinstance(step, int) and step < len(items) else None)
        if inside:
            node, path = inside, (*path, step)
    last = str(error["loc"][-1]) if error["loc"] else ""
    return _Complaint(error["type"], path, node, {**error.get("ctx", {}), "msg": error["msg"]}, last)


def _counts(complaint: _Complaint) -> bool:
    return not complaint.node.broken or complaint.type in ("extra_forbidden", "missing")


def _found(place: Place, path: Path, message: str, hint: str = "") -> Found:
    return Found(place, Problem(message, place.key(path), hint))


def _missing(complaint: _Complaint, root: Node) -> Found:
    place = complaint.node.key_place
    hint = ""
    if complaint.last == "objective":
        hint = "for instance `objective: {name: dpo}`"
    return _found(place, (*complaint.path, complaint.last), "this key is missing", hint)


def _explain_group(group: Sequence[_Complaint], root: Node, stage: str) -> list[Found]:
    """The problems behind all that was said of one value: every member of a union complains for itself."""
    first = group[0]
    if first.type == "value_error":
        error = first.context.get("error", first.context["msg"])
        messages = error.messages if isinstance(error, Contradictions) else [str(error)]
        return [contradiction(message, first.node, first.path, root) for message in messages]
    if first.type == "extra_forbidden":
        return [_unknown_key(first, root, stage)]
    return [_wrong_name(first) if first.type.startswith("union_tag") else _one_of(group)]


def _one_of(group: Sequence[_Complaint]) -> Found:
    """A value that no member of its union takes."""
    first = group[0]
    bound = next((c for c in group if c.type in _BOUNDS), None)
    wanted = [_WANTED[c.type] for c in group if c.type in _WANTED]
    choices = [choice for c in group if c.type == "literal_error" for choice in _quoted(c.context["expected"])]
    short = next((c for c in group if c.type in ("too_short", "string_too_short")), None)
    long = next((c for c in group if c.type == "too_long"), None)
    if (wanted or choices) and not (bound or short or long):
        return _wrong_value(first.node, first.path, choices, wanted)
    message, hint = str(first.context["msg"]), ""
    if bound:
        key, words = _BOUNDS[bound.type]
        message = f"must be {words} {bound.context[key]:.15g}, found {first.node.written}"
    elif short and short.type == "string_too_short":
        message = "the text is empty"
    elif short:
        least = short.context["min_length"]
        message = "the list is empty" if least == 1 else f"the list has {short.context['actual_length']} of {least}"
        hint = "give at least one" if least == 1 else f"give at least {least}"
    elif long:
        most = long.context["max_length"]
        message, hint = f"the list has {long.context['actual_length']} entries", f"give {most} at most"
    return _found(first.node.place, first.path, message, hint)


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _wrong_name(complaint: _Complaint) -> Found:
    """A block of the catalogue without a name, or with one that it does not know."""
    named = entries(complaint.node).get("name")
    choices = _quoted(complaint.context.get("expected_tags", ""))
    if named:
        return _wrong_value(named, (*complaint.path, "name"), choices, [] if choices else ["text"])
    if isinstance(complaint.node.value, dict):
        return _found(complaint.node.key_place, (*complaint.path, "name"), "this key is missing")
    return _wrong_value(complaint.node, complaint.path, [], ["a mapping"])


def _wrong_value(node: Node, path: Path, choices: list[str], wanted: list[str]) -> Found:
    word = node.written
    key = next((step for step in reversed(path) if isinstance(step, str)), "")
    hint = foreign_value(key, word) or (did_you_mean(word, choices) if len(word) < LONGEST_WORD else "")
    if not hint:
        hint = _type_hint(node, key, wanted)
    if not wanted:
        return _found(node.place, path, f"{_describe(node)} is not one of {', '.join(choices)}", hint)
    wishes = " or ".join(dict.fromkeys([*choices, *wanted]))
    return _found(node.place, path, f"found {_describe(node)}, wanted {wishes}", hint)


def _describe(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if isinstance(node.value, str):
        return f"the text '{shorten(node.value)}'"
    return "nothing" if node.value is None else node.written


def _type_hint(node: Node, key: str, wanted: list[str]) -> str:
    value, hint = node.value, ""
    if "a mapping" in wanted and isinstance(value, str) and key in ("objective", "kl", "advantage"):
        hint = f"write `{key}: {{name: {shorten(value)}}}`"
    elif "true or false" in wanted and node.written.lower() in ("on", "off", "yes", "no", "y", "n", "0", "1"):
        hint = "write true or false"
    elif "a whole number" in wanted and isinstance(value, float) and value.is_integer():
        hint = f"write {int(value)}"
    elif isinstance(value, str) and {"a number", "a whole number"} & set(wanted):
        hint = _number_hint(value)
    return hint


def _number_hint(text: str) -> str:
    if len(text) < LONGEST_WORD and re.fullmatch(r"[0-9]+([_,][0-9]{3})+", text):
        return f"write {re.sub('[_,]', '', text)}"
    if len(text) < LONGEST_WORD and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", text):
        return "without quotes it is a number"
    return ""


def _unknown_key(complaint: _Complaint, root: Node, stage: str) -> Found:
    key, block = str(complaint.path[-1]), complaint.path[:-1]
    place = complaint.node.key_place
    if block == () and key == "objective":
        return _found(place, complaint.path, f"the command {stage} has no objective of its own")
    return _found(place, complaint.path, "unknown key", _key_hint(key, block, root, stage))


def _key_hint(key: str, block: Path, root: Node, stage: str) -> str:
    """The best guess at what was meant, from the surest kind of evidence to the weakest."""
    if len(key) > LONGEST_WORD:
        return ""
    here = ".".join(step for step in block if isinstance(step, str))
    known = known_at(RECIPES[stage], root, block)
    foreign = _foreign_hint(key, stage)
    blocks = [b for b in blocks_of(stage).get(key, ()) if b != "objective.terms"]
    others = [other for other in stages_with(key, here) if other != stage]
    belongs = f"it belongs {' or '.join(f'under {b}' if b else 'at the top' for b in blocks)}"
    guesses = (
        foreign if foreign.startswith(f"it is called {here}.") else "",
        belongs if 0 < len(blocks) <= 3 and here not in blocks else "",
        foreign,
        did_you_mean(key, known),
        f"it belongs to the command {' or '.join(others)}" if others else "",
        _elsewhere(key, stage) if key not in blocks_of(stage) else "",
        f"known here: {', '.join(k for k in known if k != 'name')}" if set(known) - {"name"} else "",
    )
    return next(filter(None, guesses), "")


def _elsewhere(key: str, stage: str) -> str:
    blocks = blocks_of(stage)
    close = difflib.get_close_matches(key, blocks, n=1, cutoff=0.75)
    paths = [f"{block}.{close[0]}" for block in blocks[close[0]] if block] if close else []
    return f"did you mean '{paths[0]}'?" if len(paths) == 1 else ""


def _foreign_hint(key: str, stage: str) -> str:
    hint = foreign_key(key)
    head = re.match(r"it is called ([a-z_]+)[. :]", hint)
    if not head or head[1] in RECIPES[stage].model_fields:
        return hint
    others = stages_with(head[1], "")
    return f"{hint}, in the command {' or '.join(others)}" if others else hint


def _wrong_objectives(root: Node, stage: str) -> list[Found]:
    """Names of objectives that do not exist or belong to another command, alone or in a mix."""
    block = entries(root).get("objective")
    name, terms = (entries(block).get(key) for key in ("name", "terms"))
    if name and terms:
        return [
            _found(name.place, ("objective", "name"), "give a name or terms, not both: a mix has no name of its own")
        ]
    found = [_wrong_objective(name, ("objective", "name"), stage)]
    for i, term in enumerate(terms.value if terms and isinstance(terms.value, list) else []):
        found.append(_wrong_objective(entries(term).get("name"), ("objective", "terms", i, "name"), stage))
    return [one for one in found if one]


def _wrong_objective(name: Node | None, path: Path, stage: str) -> Found | None:
    if not name or not isinstance(name.value, str) or name.broken:
        return None
    if name.value not in OBJECTIVES:
        known = ", ".join(o.name for o in OBJECTIVES.values() if o.stage == stage)
        close = did_you_mean(name.value, OBJECTIVES) if len(name.value) < LONGEST_WORD else ""
        hint = foreign_value("name", name.value) or close or (f"known for {stage}: {known}" if known else "")
        return _found(name.place, path, f"no objective is called '{shorten(name.value)}'", hint)
    entry = OBJECTIVES[name.value]
    if entry.stage != stage:
        hint = f"run it with `rlhf {entry.stage} ...` and `stage: {entry.stage}`"
        return _found(name.place, path, f"'{name.value}' belongs to the command {entry.stage}", hint)
    if "terms" in path and entry.data != "comparison":
        return _found(
            name.place, path, f"'{name.value}' works on {entry.data} data: a mix is made of objectives on pairs"
        )
    return None
