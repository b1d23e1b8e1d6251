"""The card of a finished model: README.md as the hub reads it, with front matter. No torch.

Made of what lies in the run directory, without a date: the same run writes the same card, resumed or not. Names that
users chose are quoted so that neither YAML, Markdown nor HTML takes them for its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli.runs.display import HEADLINES
from rlhf_cli.runs.licence import LONGEST, OTHER, is_hub_id
from rlhf_cli.runs.metrics import number
from rlhf_cli.runs.opening import Model, code

FILE = "README.md"
_KNOWN = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_KINDS = {
    "policy": ("language model", "text-generation"),
    "reward": ("reward model", "text-classification"),
    "cost": ("cost model", "text-classification"),
    "process": ("process reward model", "token-classification"),
}
_MEANING = {
    "reward": "It gives a conversation one number: the higher, the better the last answer.",
    "cost": "It gives a conversation one number: above 0, the last answer is harmful.",
    "process": "It judges the steps of an answer, each at its last token.",
}
_VERSIONS = ("rlhf-cli", "python", "torch", "transformers", "peft", "bitsandbytes")
_ABSENT = "not installed"


@dataclass(frozen=True)
class Story:
    """What a card tells besides the model itself."""

    title: str
    summary: str
    """A sentence or two on how it was made, in Markdown."""
    base: str
    """Folder or hub id of the weights it was made from."""
    relation: str
    """adapter, finetune or merge, as the hub calls them."""
    tags: Sequence[str]
    run: Mapping[str, Any]
    """run.json, or as much of it as there is."""
    lineage: Sequence[str]
    """Links of the chain, in Markdown, the base first."""
    versions: Mapping[str, str]
    recipe: str = ""
    data: Sequence[Mapping[str, Any]] = ()
    """Sources, as data-report.json lists them."""
    metrics: Sequence[tuple[str, float]] = ()


def of_run(
    path: str, run: Mapping[str, Any], model: Model, recipe: str, report: Mapping[str, Any], metrics: Mapping[str, Any]
) -> str:
    """The card of the final/ of a run.

    Args:
        path: the run directory, as the recipe names it.
        run: its run.json.
        model: what final/ holds.
        recipe: its recipe.yaml.
        report: its data-report.json.
        metrics: the last value of each metric.
    """
    settings, stage = run["recipe"], str(run["stage"])
    base = str(run["lineage"]["base"]["name"])
    objective = _objective(settings)
    how = f"Trained with `rlhf {stage}`" + (f", objective {quoted(objective)}" if objective else "")
    how += f", on {quoted(base)}: {_trained(settings, model)}."
    story = Story(
        title=Path(path).name, summary=how, base=base, relation="adapter" if model.adapter else "finetune",
        tags=["rlhf", stage, *(["lora"] if model.adapter else [])], run=run,
        lineage=list(_chain(path, run, objective)), versions=run.get("versions", {}), recipe=recipe,
        data=[dict(source, hash=run.get("inputs", {}).get(source["path"], "")) for source in report.get("sources", [])],
        metrics=list(_figures(stage, metrics)),
    )  # fmt: skip
    return card(story, model)


def card(story: Story, model: Model) -> str:
    """Front matter and body."""
    kind = _KINDS[model.kind][0]
    license_ = story.run.get("license") or story.run.get("base_license")
    parts = [
        f"---\n{_front(story, model, license_)}---",
        f"# {escaped(story.title)}",
        f"A {kind}. {_MEANING.get(model.kind, '')} {story.summary}".replace("  ", " "),
        "## How to load it",
        fenced(code(model), "python"),
        _where(story, model),
        _section("Lineage", [f"{n}. {link}" for n, link in enumerate(story.lineage, start=1)]),
        _table("Data", ("file", "split", "rows", "kept", "content"), map(_source, story.data)),
        _table("Metrics at the end", ("metric", "value"),
               ((f"`{name}`", f"{value:.4g}") for name, value in story.metrics)),
        _section("Licence", [_licence(story, license_)]),
        _table("Versions", ("package", "version"),
               ((name, quoted(v)) for name in _VERSIONS if (v := story.versions.get(name, _ABSENT)) != _ABSENT)),
        _recipe(story.recipe),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


# --- front matter ----------------------------------------------------------------------------------------


def _front(story: Story, model: Model, license_: str | None) -> str:
    """What the hub sorts by; nothing that is not known, and no name that is not the hub's."""
    front: dict[str, Any] = {}
    if is_hub_id(story.base):
        front |= {"base_model": story.base, "base_model_relation": story.relation}
    front["library_name"] = "peft" if model.adapter else "transformers"
    front["pipeline_tag"] = "text-generation" if model.tokens else _KINDS[model.kind][1]
    front["tags"] = list(story.tags)
    if license_ and _KNOWN.fullmatch(license_):
        front["license"] = license_
    elif license_:
        front |= {"license": OTHER, "license_name": license_}
    if language := list(story.run.get("base_language") or []):
        front["language"] = language
    if found := list(story.run.get("hub_data") or []):
        front["datasets"] = found
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=LONGEST)


# --- body ------------------------------------------------------------------------------------------------


def _objective(settings: Mapping[str, Any]) -> str:
    objective = settings.get("objective") or {}
    if settings.get("stage") == "ppo":
        objective = (settings.get("ppo") or {}).get("advantage") or {}
    return " + ".join(str(term["name"]) for term in objective.get("terms") or [objective] if term.get("name"))


def _trained(settings: Mapping[str, Any], model: Model) -> str:
    lora, quantization = settings.get("lora") or {}, settings["model"].get("quantization", "none")
    if not model.adapter:
        return "all weights"
    weights = f" over {quantization} weights" if quantization != "none" else ""
    return f"a {'DoRA' if lora.get('use_dora') else 'LoRA'} adapter of rank {lora.get('r')}{weights}"


def _chain(path: str, run: Mapping[str, Any], objective: str) -> Iterable[str]:
    """From the base to this run; then what it used besides."""
    before = run.get("ancestry") or []
    first = before[0].get("base") if before else run["lineage"]["base"]["name"]
    yield f"base: {quoted(str(first))}" if first else "base: not known any more"
    for entry in before:
        more = f", {quoted(entry['objective'])}" if entry.get("objective") else ""
        digest = f", digest `{entry['digest'][:12]}`" if entry.get("digest") else ""
        yield f"{quoted(entry['name'])}" + (f": `rlhf {entry['stage']}`{more}{digest}" if entry.get("stage") else "")
    named = f", {quoted(objective)}" if objective else ""
    yield f"**{quoted(path)}**: `rlhf {run['stage']}`{named}, digest `{str(run['digest'])[:12]}`"
    rewards = [str(r.get("run") or r.get("function")) for r in run["recipe"].get("rewards") or []
               if r.get("run") or r.get("function")]  # fmt: skip
    others = [*rewards, *filter(None, [run["recipe"].get("reference")])]
    if others:
        yield f"with {', '.join(quoted(str(name)) for name in others)}"


def _figures(stage: str, metrics: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """The numbers that matter for the command, on held-out data too; no clocks."""
    names = [name for name in metrics if name in HEADLINES.get(stage, ()) or name.startswith("eval/")]
    for name in names:
        value = number(metrics[name])
        if value is not None and math.isfinite(value) and not re.search(r"second|time/|mem/", name):
            yield name, value


def _where(story: Story, model: Model) -> str:
    if model.adapter and not is_hub_id(story.base):
        return f"The adapter looks for its base at {quoted(story.base)}, from the working directory."
    return ""


def _source(source: Mapping[str, Any]) -> Sequence[str]:
    content = str(source.get("hash", ""))
    return (quoted(str(source["path"])), escaped(str(source["split"])), f"{source['rows']:,}", f"{source['kept']:,}",
            quoted(content) if content else "")  # fmt: skip


def _licence(story: Story, license_: str | None) -> str:
    own, base = story.run.get("license"), story.run.get("base_license")
    lines = [f"This model: {quoted(own)}." if own else "This model: not declared; it is derived from its base."]
    if license_ is None:
        lines = ["This model: not declared."]
    lines.append(f"Its base: {quoted(base)}." if base else "Its base: not declared.")
    licenses = story.run.get("data_licenses") or {}
    lines += [f"Data {quoted(name)}: {quoted(value) if value else 'not declared'}." for name, value in licenses.items()]
    return "\n".join(f"- {line}" for line in lines)


def _recipe(text: str) -> str:
    if not text:
        return ""
    return f"## Recipe\n\n<details><summary>Every setting</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"


def _section(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines) if lines else ""


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return _section(title, [*head, *body] if body else [])


# --- quoting ---------------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """A text that users chose, as code: nothing in it is Markdown or HTML."""
    plain = _one_line(text)
    longest = max((len(run) for run in re.findall(r"`+", plain)), default=0)
    fence, space = "`" * (longest + 1), " " if plain[:1] == "`" or plain[-1:] == "`" or not plain.strip() else ""
    return f"{fence}{space}{plain}{space}{fence}"


def escaped(text: str) -> str:
    """The same as prose."""
    plain = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", plain) if re.search(r"[^\w .,:/-]", plain) else plain


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _one_line(text: str) -> str:
    """Without line breaks, control characters and what turns the direction of text around."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+", " ", text)
