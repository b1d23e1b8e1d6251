"""What a user should look at though it can be trained on: examples that contradict or repeat one another, special
tokens spelled out in text, turns that the chat template leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlhf_cli.data.examples import Comparison, Demonstration, Example, Ranking, Rated, Steps, Task, Verdict
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.rendering import left_out
from rlhf_cli.data.template import Template

CLASHES = {
    Comparison: "the same pair the other way round",
    Verdict: "the same completion with the other label",
    Ranking: "the same completions with other scores",
    Rated: "the same completion with another score",
    Steps: "the same steps with other labels",
}
REPEATED = "the same example again"
SPELLED = "special tokens spelled out in text, which are read as text"
SILENT = "the chat template writes nothing of a {} turn"


def contradictions(items: Sequence[Example]) -> list[Dropped]:
    """Examples that are there already, judged otherwise or alike. Each is told against the first of its kind."""
    first: dict[int, int] = {}
    found = []
    for index, item in enumerate(items):
        if isinstance(item, Task):
            continue
        asked, judged = _judged(item)
        before = first.setdefault(hash(asked), index)
        if before == index:
            continue
        other, other_judged = _judged(items[before])
        if other == asked:
            reason = REPEATED if judged == other_judged else CLASHES[type(item)]
            found.append(Dropped(reason, f"{item.where} against {items[before].where.rpartition(':')[2]}"))
    return found


def _judged(item: Example) -> tuple[Any, Any]:
    """What is judged, and how."""
    match item:
        case Comparison():
            pair = (item.chosen, item.rejected)
            return (item.prompt, *sorted(pair)), pair
        case Verdict():
            return (item.prompt, item.completion), item.desirable
        case Ranking():
            return (item.prompt, item.completions), item.scores
        case Rated():
            return (item.prompt, item.completion), item.score
        case Steps():
            return (item.prompt, item.steps), item.labels
    return (item.prompt, getattr(item, "completion", None)), None


def spelled_out(items: Iterable[Example], template: Template) -> list[Dropped]:
    """Examples in whose text a special token is spelled out."""
    encoder = template.encoder
    starts = {spelling[0] for spelling in encoder.control}
    found = []
    for item in items:
        for text in _texts(item):
            if any(start in text for start in starts) and (token := encoder.pattern.search(text)) is not None:
                found.append(Dropped(f"{SPELLED}: {token[0]}", item.where))
                break
    return found


def _texts(item: Example) -> Iterator[str]:
    if isinstance(item.prompt, str):
        yield item.prompt
    else:
        yield from (message.content for message in item.prompt)
    match item:
        case Comparison():
            yield from (item.chosen, item.rejected)
        case Ranking():
            yield from item.completions
        case Steps():
            yield from item.steps
        case Demonstration() | Verdict() | Rated():
            yield item.completion or ""


def silent_turns(items: Iterable[Example], template: Template) -> list[Dropped]:
    """Examples with turns that the chat template leaves out."""
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    found = []
    for item in items:
        if template.chat is None or isinstance(item.prompt, str):
            continue
        roles = tuple(message.role for message in item.prompt)
        if roles not in known:
            known[roles] = left_out(template.tokenizer, template.chat, roles)
        found += [Dropped(SILENT.format(role), item.where) for role in known[roles]]
    return found
