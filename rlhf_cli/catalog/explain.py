"""What an entry of the catalogue means: the parts of its docstring, its settings, what it needs, all in words.

Docstrings are read from the source files, so that nothing here imports torch. `rlhf explain` and docs/objectives.md
are both made from this.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from rlhf_cli.catalog.entries import LARGEST, NEEDS, Controller, Data, Entry, Estimator, Head, Need, Objective, Settings
from rlhf_cli.catalog.rules import Rule

Named = Objective | Estimator | Controller | Rule
PARTS = ("Symbols", "Source", "Step 0", "Traps")
DATA: dict[Data, str] = {
    "demonstration": "demonstrations: conversations, prompts with a completion, or plain text",
    "comparison": "comparisons: a prompt with a chosen and a rejected completion",
    "verdict": "verdicts: a prompt with one completion, labelled good or bad",
    "task": "prompts; the completions are sampled",
    "ranking": "rankings: a prompt with several completions, ranked or scored",
    "rated": "ratings: a prompt with one completion and a number",
    "steps": "solutions cut into steps, with a label for each",
}
COLUMNS: dict[Need, str] = {
    "scores": "columns chosen_score and rejected_score, or the format scored",
    "target": "column target",
    "safety": "columns chosen_safe and rejected_safe",
}
"""Where the data have what some objectives need."""
HEADS: dict[Head, str] = {
    "score": "trains a head that gives one number at the last token of a completion",
    "tokens": "trains a head that is read at tokens",
    "language": "trains the language model's own head",
}
SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
WORDS: dict[type, str] = {bool: "true or false", float: "number", int: "whole number", str: "text", type(None): "null"}
SHARED: dict[type[Named], dict[str, str]] = {
    Objective: {
        "u": "summed log-probability of a completion under the policy less that under the reference",
        "D": "u of the chosen completion less u of the rejected one",
        "z": "beta D",
    },
    Estimator: {
        "A": "advantage",
        "S": "sum of a completion's token rewards",
        "G": "sum of a completion's token rewards from token t on, discounted by gamma a token",
    },
    Controller: {"KL": "KL to the reference in nats, summed over a completion, mean over the rollout"},
    Rule: {"s": "score of a completion"},
}
"""Symbols of formulas that stand for the same in all objectives with a reference, in all entries of another kind."""


@dataclass(frozen=True)
class Explained:
    """The parts of a docstring."""

    formula: str
    notes: str
    """May be empty."""
    symbols: tuple[str, ...]
    """`symbol: meaning` each; may be empty."""
    source: str
    step_0: str
    traps: str


@dataclass(frozen=True)
class Setting:
    """A key of an entry's block."""

    name: str
    default: Any
    allowed: str
    help: str


def explain(entry: Named) -> Explained:
    """The parts of the docstring behind an entry, with the shared symbols that its formula uses.

    Raises ValueError when there is no docstring or a part is missing.
    """
    found = parse(docstring(entry), entry.path)
    shared = SHARED[type(entry)]
    if isinstance(entry, Objective) and "reference" not in entry.needs:
        return found
    own = {name for symbol in found.symbols for name in re.findall(r"[A-Za-z]+", symbol.split(":")[0])[:1]}
    used = set(re.findall(r"[A-Za-z]+", found.formula))
    for name in reversed(shared):
        if name in used - own:
            used |= set(re.findall(r"[A-Za-z]+", shared[name])) & set(shared)
    symbols = tuple(f"{name}: {meaning}" for name, meaning in shared.items() if name in used - own)
    return replace(found, symbols=(*found.symbols, *symbols))


def docstring(entry: Entry) -> str:
    """The docstring of an entry's function or class, read from its file."""
    for node in ast.parse(source_file(entry).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == entry.path.split(":")[1]:
            return ast.get_docstring(node) or ""
    raise ValueError(f"{entry.path} is not there")


def source_file(entry: Entry) -> Path:
    """The file that an entry's path names; only empty packages are imported to find it."""
    module = entry.path.split(":")[0]
    spec = importlib.util.find_spec(f"rlhf_cli.{module}")
    if spec is None or spec.origin is None:
        raise ValueError(f"no module rlhf_cli.{module}")
    return Path(spec.origin)


def parse(text: str, where: str) -> Explained:
    """A docstring in its parts: the formula up to the first blank line, paragraphs of words, and labelled parts.

    Only `Symbols:` may be missing: not every formula has symbols of its own. Raises ValueError otherwise.
    """
    formula, _, rest = text.partition("\n\n")
    parts: dict[str, str] = {}
    notes: list[str] = []
    for label, block in _blocks(rest):
        if label in parts:
            raise ValueError(f"{where}: its docstring has two `{label}:`")
        if label:
            parts[label] = block
        else:
            notes.append(block)
    missing = [f"{label}:" for label in PARTS if not parts.get(label) and label != "Symbols"]
    if not formula or missing:
        raise ValueError(f"{where}: its docstring lacks {', '.join(missing) or 'a formula'}")
    symbols = tuple(filter(None, re.split(r"; (?=[^;]*: )", parts.get("Symbols", ""))))
    return Explained(
        formula.removesuffix("."), "\n\n".join(notes), symbols, parts["Source"], parts["Step 0"], parts["Traps"]
    )


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(label, words on one line) of each part; unlabelled paragraphs have an empty label."""
    starts = "|".join(PARTS)
    for paragraph in re.split(r"\n\s*\n", text):
        for block in re.split(rf"^(?=(?:{starts}):)", paragraph, flags=re.MULTILINE):
            found = re.match(rf"({starts}):", block)
            label = found.group(1) if found else ""
            words = " ".join(block[found.end() if found else 0 :].split())
            words = words.removesuffix(".") if label else words
            if words or label:
                yield label, words


# --- what the entry itself says --------------------------------------------------------------------------


def command_of(entry: Named) -> str:
    """The command that runs it."""
    return entry.stage if isinstance(entry, Objective) else "ppo"


def data_of(entry: Named) -> Data:
    """The kind of example it is computed on."""
    return entry.data if isinstance(entry, Objective) else "task"


def needs_of(entry: Named) -> list[str]:
    """What it needs besides its data, in words."""
    if isinstance(entry, Objective):
        head = [HEADS[entry.head]] if entry.head else []
        return [*(f"{NEEDS[n]} ({COLUMNS[n]})" if n in COLUMNS else NEEDS[n] for n in entry.needs), *head]
    if isinstance(entry, Controller):
        return [NEEDS["reference"]]
    if isinstance(entry, Rule):
        return [f"the column of the data that `{entry.reads}` names"] if entry.reads else []
    return [
        *(["a critic"] if entry.critic else []),
        *([f"at least {entry.group} completions of each prompt"] if entry.group > 1 else []),
        *(["the score of a greedy completion of each prompt"] if entry.greedy else []),
    ]


def recipe_of(entry: Named) -> dict[str, Any]:
    """The part of a recipe that names it, with its defaults."""
    block = {"name": entry.name} | entry.settings().model_dump(mode="json")
    if isinstance(entry, Objective):
        return {"stage": entry.stage, "objective": block}
    if isinstance(entry, Controller):
        return {"stage": "ppo", "ppo": {"kl": block}}
    if isinstance(entry, Rule):
        return {"stage": "ppo", "rewards": [{"rule": block}]}
    rollout = {"rollout": {"completions_per_prompt": entry.group}} if entry.group > 1 else {}
    return {"stage": "ppo", **rollout, "ppo": {"advantage": block}}


def settings_of(settings: type[Settings]) -> list[Setting]:
    """The settings of a block, in order."""
    return [
        Setting(name, field.default, allowed(field.annotation, field.metadata), _line(field.description))
        for name, field in settings.model_fields.items()
    ]


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def allowed(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """The values that an annotation allows, in words."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return allowed(inner, [m for e in extra for m in getattr(e, "metadata", [e])])
    if get_origin(annotation) is Literal:
        return ", ".join(get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {allowed(get_args(annotation)[0])}"
    if kinds := get_args(annotation):
        return " or ".join(allowed(kind, metadata) for kind in kinds)
    known = ((sign, getattr(m, name)) for name, sign in SIGNS for m in metadata if hasattr(m, name))
    bounds = [f"{sign} {bound:g}" for sign, bound in known if abs(bound) != LARGEST]  # which all numbers have
    return " ".join([WORDS[annotation], " and ".join(bounds)]).strip()
