"""`rlhf data`: examples of a recipe as the model gets them, what is trained in them, and how long they are.

1. Read, check and tokenise all data, as the stage would;
2. cut the first examples of each source into stretches of one kind: prompt, trained, not trained, end token, cut off;
3. show these, a histogram of the lengths, and the data report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from rlhf_cli.data.examples import Example
from rlhf_cli.data.prepare import Prepared, data_needs, load_examples, prepare
from rlhf_cli.data.reading import Wanted
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokens import Completion, Sample, Unfit, ask_sample, cut, length
from rlhf_cli.errors import DataError
from rlhf_cli.models.base import Text, check_length, load_text
from rlhf_cli.recipe.schema import PPORecipe, Recipe
from rlhf_cli.recipe.settings.data import DataSettings, RewardDataSettings
from rlhf_cli.report.parts import write_page

Kind = Literal["prompt", "trained", "silent", "end", "cut"]
KINDS: dict[Kind, str] = {
    "prompt": "prompt", "trained": "trained", "silent": "not trained", "end": "end token, trained", "cut": "cut off",
}  # fmt: skip
STYLES: dict[Kind, str] = {
    "prompt": "dim", "trained": "green", "silent": "", "end": "reverse green", "cut": "strike red",
}  # fmt: skip
_CSS = """<style>.t span { white-space: pre-wrap; border-radius: 3px; } .prompt { color: var(--soft); }
.trained { background: color-mix(in srgb, var(--hue2) 22%, transparent); }
.end { background: var(--hue2); color: var(--back); } .cut { color: var(--bad); text-decoration: line-through; }
.t { overflow-wrap: anywhere; }</style>"""
LOOKED_AT = 64
"""Rows of a source that examples are taken from."""


class Stretch(NamedTuple):
    """Text of one kind."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class Shown:
    """An example as the model gets it."""

    split: str
    where: str
    fate: str
    """What becomes of it: its tokens, or why it is left out."""
    kept: bool
    prompt: list[Stretch]
    completions: list[tuple[str, list[Stretch]]]
    """Each with its name."""


@dataclass(frozen=True)
class View:
    """All there is to show."""

    examples: list[Shown]
    lengths: dict[str, np.ndarray]
    """By split, tokens of each example (its prompt and longest completion)."""
    limit: int
    lines: list[str]
    """The data report."""


def view(recipe: Recipe, rows: int) -> View:
    """Read everything and take the first `rows` examples of each split. Raises RlhfError."""
    text = load_text(recipe.model)
    data, (kind, needs) = recipe.data, data_needs(recipe)
    limit = data.max_length
    if isinstance(recipe, PPORecipe):
        limit -= recipe.rollout.max_new_tokens
    check_length(text, data.max_length, "data.max_length")
    prepared = prepare(data, kind, text.template, needs=needs, max_length=limit)
    wanted = Wanted(needs)
    if isinstance(data, RewardDataSettings):
        wanted = Wanted(needs, data.step_separator, data.segments, data.ratings)
    found = []
    for split, sources in (("train", data.train), ("eval", data.eval or [])):
        few = [source.model_copy(update={"limit": min(source.limit or LOOKED_AT, LOOKED_AT)}) for source in sources]
        items = load_examples(few, kind, "drop", wanted, split)[0].items if few else []
        found += _first(items, rows, partial(shown, split, text=text, data=data, limit=limit))
    return View(found, _lengths(prepared), limit, prepared.report.lines())


def _first(items: Sequence[Example], rows: int, show: Callable[[Example], Shown]) -> list[Shown]:
    """The first of them; one that is kept stands in front where there is one."""
    found = [show(items[i]) for i in range(min(rows, len(items)))]
    if not found or found[0].kept:
        return found
    others = (one for i in range(len(items)) if (one := found[i] if i < rows else show(items[i])).kept)
    good = next(others, found[0])
    return [good, *(one for one in found if one is not good)][:rows]


def _lengths(prepared: Prepared) -> dict[str, np.ndarray]:
    splits = {"train": prepared.train, "eval": prepared.eval}
    return {name: np.array([length(s) for s in samples]) for name, samples in splits.items() if samples is not None}


# --- one example -----------------------------------------------------------------------------------------


def shown(split: str, item: Example, text: Text, data: DataSettings, limit: int) -> Shown:
    """An example, whole, with what truncation takes away."""
    template = text.template
    try:
        whole = template.encoder.now(ask_sample(item, template))
    except DataError as error:
        return Shown(split, item.where, f"refused: {error.problems[0].message}", False, [], [])
    tokens = length(whole)
    fate, kept = f"{tokens} tokens", whole
    if tokens > limit:
        try:
            kept = cut(whole, item, template, limit, data.truncation)
            fate = f"{tokens} tokens, cut to {length(kept)} (truncation: {data.truncation})"
        except Unfit as reason:
            fate = f"{tokens} tokens, left out: {reason} {limit}"
            return Shown(split, item.where, fate, False, *_stretches(template, whole, None))
    return Shown(split, item.where, fate, True, *_stretches(template, whole, kept))


def _stretches(
    template: Template, whole: Sample, kept: Sample | None
) -> tuple[list[Stretch], list[tuple[str, list[Stretch]]]]:
    """Prompt and completions in stretches. kept: what is left after truncation, None: nothing."""
    prompt = np.full(len(whole.prompt), "prompt", dtype=object)
    if kept is None:
        prompt[:] = "cut"
    elif len(kept.prompt) < len(whole.prompt):
        first = template.first_length(whole.prompt)
        prompt[first : first + len(whole.prompt) - len(kept.prompt)] = "cut"
    completions = []
    names = _names(whole)
    for k, (name, completion) in enumerate(zip(names, whole.completions, strict=True)):
        left = 0 if kept is None else len(kept.completions[k].ids)
        kinds = _kinds(completion, left, template.stop_ids)
        completions.append((name, _joined(template, completion.ids, kinds, whole.prompt)))
    return _joined(template, whole.prompt, prompt, ()), completions


def _kinds(completion: Completion, left: int, stop_ids: Sequence[int]) -> np.ndarray:
    """What each token is: (L,)."""
    kinds = np.where(completion.scored, "trained", "silent").astype(object)
    ends = completion.scored & np.isin(completion.ids, stop_ids)
    kinds[ends] = "end"
    kinds[left:] = "cut"
    return kinds


def _joined(
    template: Template, ids: np.ndarray, kinds: np.ndarray, before: Sequence[int] | np.ndarray
) -> list[Stretch]:
    """Tokens of one kind in a row as text, special ones spelled out."""
    out, at = [], 0
    known = [int(i) for i in before]
    for kind, members in groupby(kinds.tolist()):
        count = len(list(members))
        part = [int(i) for i in ids[at : at + count]]
        out.append(Stretch(template.decode(part, skip_special=False, after=known), kind))
        known, at = known + part, at + count
    return out


def _names(sample: Sample) -> list[str]:
    """What the completions are called."""
    count = len(sample.completions)
    if "margin" in sample.numbers and count == 2:
        return ["chosen", "rejected"]
    if "desirable" in sample.numbers:
        return ["wanted" if sample.numbers["desirable"] else "not wanted"]
    gold = [c.gold for c in sample.completions]
    return [f"completion {k + 1}" + ("" if np.isnan(g) else f", score {g:g}") for k, g in enumerate(gold)]


# --- for people ------------------------------------------------------------------------------------------


def histogram(lengths: np.ndarray, limit: int, bins: int = 12, width: int = 40) -> Iterator[str]:
    """Bars: how many examples have how many tokens."""
    low, top = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low - 1, top, min(bins, top - low + 1) + 1).round())
    counts, _ = np.histogram(lengths, edges)
    for below, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(width * count / counts.max())
        yield f"{int(below) + 1:>7} to {int(high):>6}  {count:>7}  {bar}"
    yield f"max_length leaves {limit} tokens; longest example {top}"


def page(target: str, title: str, found: View) -> str:
    """Write everything as one HTML file; its path. Raises ModelError when the disk refuses."""
    from pathlib import Path

    legend = " ".join(f'<span class="{kind}">{escape(words)}</span>' for kind, words in KINDS.items())
    parts = [_CSS, f"<h1>{escape(title)}</h1>", f'<p class="t">{legend}</p>']
    for one in found.examples:
        lines = [("prompt", one.prompt), *one.completions] if one.prompt else one.completions
        body = "".join(
            f'<h3>{escape(name)}</h3><p class="t">'
            + "".join(f'<span class="{s.kind}">{escape(s.text)}</span>' for s in stretches)
            + "</p>"
            for name, stretches in lines
        )
        parts.append(f'<div class="sample"><h3>{escape(f"{one.split} {one.where}: {one.fate}")}</h3>{body}</div>')
    for split, lengths in found.lengths.items():
        bars = "\n".join(histogram(lengths, found.limit))
        parts.append(f"<h2>Lengths, {split}</h2><pre>{escape(bars)}</pre>")
    parts.append(f'<h2>Report</h2><pre class="wrap">{escape(chr(10).join(found.lines))}</pre>')
    return str(write_page(Path(target), title, parts))
