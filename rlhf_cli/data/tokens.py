"""An example as a sample: token ids of a prompt and its completions, cut where they are too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import combinations
from typing import Any, Literal

import numpy as np

from rlhf_cli.data.encoder import Asking
from rlhf_cli.data.examples import Comparison, Demonstration, Example, Ranking, Rated, Steps, Task, Verdict
from rlhf_cli.data.template import Template
from rlhf_cli.errors import DataError

Truncation = Literal["drop", "left", "right"]

TOO_LONG = "longer than max_length"
NOTHING_LEFT = "nothing left to train on after truncation"
CUT_ALIKE = "chosen and rejected are the same after truncation"
ALIKE = "chosen and rejected have the same tokens"
RANKED_ALIKE = "completions with different scores have the same tokens"
RANKED_CUT_ALIKE = "completions with different scores are the same after truncation"
NO_STEP_LEFT = "no labelled step left after truncation"


@dataclass(frozen=True)
class Completion:
    """What follows a prompt."""

    ids: np.ndarray  # (L,) int32
    scored: np.ndarray  # (L,) bool, tokens an objective counts, the end token included; of steps the last token of each
    gold: float = math.nan
    """Its score in the data; nan: unknown."""
    labels: np.ndarray | None = None  # (scored tokens,) float32, of steps: the label of each


@dataclass(frozen=True)
class Sample:
    """A tokenised example. The first token of a completion is predicted from the last of the prompt, so a prompt holds
    at least one token when a completion is there."""

    prompt: np.ndarray  # (P,) int32
    completions: tuple[Completion, ...]
    """None for a task, one for a demonstration, verdict, rated completion or steps, chosen and rejected for a
    comparison, all of a ranking."""
    numbers: dict[str, float]
    """Of a comparison `margin`, `target`, and when known `chosen_score`, `rejected_score`, `chosen_safe` and
    `rejected_safe` (1 or 0); of a verdict `desirable` (1 or 0)."""
    where: str


class Unfit(Exception):
    """Why an example makes no sample."""


def length(sample: Sample) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(sample.prompt) + max((len(c.ids) for c in sample.completions), default=0)


@singledispatch
def ask_sample(example: Any, template: Template) -> Asking[Sample]:
    """One example as token ids, whole. Raises DataError when the chat template refuses it."""
    raise TypeError(f"no such kind of example: {type(example).__name__}")


@ask_sample.register
def _demonstration(example: Demonstration, template: Template) -> Asking[Sample]:
    if example.completion is None:
        assert isinstance(example.prompt, tuple)
        ids, scored = yield from template.ask_conversation(example.prompt, example.where)
    else:
        ids = yield from template.ask_prompt(example.prompt, example.where)
        completion, mask = yield from template.ask_completion(example.prompt, example.completion, example.where)
        ids, scored = ids + completion, [False] * len(ids) + mask
    scored[0] = False  # nothing predicts the first token
    if not any(scored):
        raise DataError("no token can be trained on", example.where)
    first, end = scored.index(True), len(scored) - scored[::-1].index(True)
    return Sample(_ids(ids[:first]), (_completion(ids[first:end], scored[first:end]),), {}, example.where)


@ask_sample.register
def _comparison(example: Comparison, template: Template) -> Asking[Sample]:
    numbers = {"margin": example.margin, "target": example.target}
    if example.scores is not None:
        numbers |= {"chosen_score": example.scores[0], "rejected_score": example.scores[1]}
    if example.safety is not None:
        numbers |= {"chosen_safe": float(example.safety[0]), "rejected_safe": float(example.safety[1])}
    return (yield from _answered(example, (example.chosen, example.rejected), numbers, template))


@ask_sample.register
def _verdict(example: Verdict, template: Template) -> Asking[Sample]:
    return (yield from _answered(example, (example.completion,), {"desirable": float(example.desirable)}, template))


@ask_sample.register
def _ranking(example: Ranking, template: Template) -> Asking[Sample]:
    sample = yield from _answered(example, example.completions, {}, template)
    completions = (replace(c, gold=s) for c, s in zip(sample.completions, example.scores, strict=True))
    return replace(sample, completions=tuple(completions))


@ask_sample.register
def _rated(example: Rated, template: Template) -> Asking[Sample]:
    sample = yield from _answered(example, (example.completion,), {}, template)
    return replace(sample, completions=(replace(sample.completions[0], gold=example.score),))


@ask_sample.register
def _steps(example: Steps, template: Template) -> Asking[Sample]:
    ids, ends = yield from template.ask_pieces(example.prompt, example.steps, example.where)
    # A piece that a template strips away has no token of its own.
    starts = [0, *ends[:-1]]
    labelled = {
        end - 1: label
        for start, end, label in zip(starts, ends, example.labels, strict=True)
        if label is not None and end > start
    }
    if not labelled:
        raise DataError("no labelled step has a token", example.where)
    completion = Completion(
        _ids(ids),
        np.array([i in labelled for i in range(len(ids))], dtype=bool),
        labels=np.array([labelled[i] for i in sorted(labelled)], dtype=np.float32),
    )
    prompt = _ids((yield from template.ask_prompt(example.prompt, example.where)))
    return Sample(prompt, (completion,), {}, example.where)


@ask_sample.register
def _task(example: Task, template: Template) -> Asking[Sample]:
    return (yield from _answered(example, (), {}, template))


def _answered(
    example: Comparison | Verdict | Ranking | Rated | Task,
    completions: tuple[str, ...],
    numbers: dict[str, float],
    template: Template,
) -> Asking[Sample]:
    made = []
    for completion in completions:
        made.append(_completion(*(yield from template.ask_completion(example.prompt, completion, example.where))))
    prompt = _ids((yield from template.ask_prompt(example.prompt, example.where)))
    return Sample(prompt, tuple(made), numbers, example.where)


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _completion(ids: Sequence[int], scored: Sequence[bool]) -> Completion:
    return Completion(_ids(ids), np.array(scored, dtype=bool))


def score_all(sample: Sample) -> Sample:
    """The same tokens, each but the first scored, in one completion."""
    ids = np.concatenate([sample.prompt, sample.completions[0].ids])
    return Sample(ids[:1], (Completion(ids[1:], np.ones(len(ids) - 1, dtype=bool)),), sample.numbers, sample.where)


# --- truncation ------------------------------------------------------------------------------------------


def cut(sample: Sample, example: Example, template: Template, max_length: int, truncation: Truncation) -> Sample:
    """The sample cut to `max_length`. Raises Unfit when that leaves nothing."""
    return CUTS[truncation](sample, example, template, max_length)


def _drop(sample: Sample, example: Example, template: Template, max_length: int) -> Sample:
    raise Unfit(TOO_LONG)


def _left(sample: Sample, example: Example, template: Template, max_length: int) -> Sample:
    first = template.first_length(sample.prompt)
    header = _header(sample, example, template)
    surplus = length(sample) - max_length
    removable = len(sample.prompt) - first - header
    # A prompt without BOS and header keeps one token: it predicts the completion.
    if surplus > removable - (first + header == 0):
        raise Unfit(TOO_LONG)
    prompt = np.concatenate([sample.prompt[:first], sample.prompt[first + surplus :]])
    return replace(sample, prompt=prompt)


def _header(sample: Sample, example: Example, template: Template) -> int:
    """Tokens at the end of the sample's prompt that must stay."""
    if isinstance(example.prompt, str):
        return 0
    prompt = example.prompt
    if isinstance(example, Demonstration) and example.completion is None:
        prompt = prompt[: next(i for i, m in enumerate(prompt) if m.role == "assistant")]
    return min(len(sample.prompt), template.header_length(prompt, example.where))


def _right(sample: Sample, example: Example, template: Template, max_length: int) -> Sample:
    room = max(0, max_length - len(sample.prompt))
    cut = tuple(_first(c, room) for c in sample.completions)
    if not cut:
        raise Unfit(TOO_LONG)
    if not all(c.scored.any() for c in cut):
        raise Unfit(NOTHING_LEFT if cut[0].labels is None else NO_STEP_LEFT)
    return replace(sample, completions=cut)


def _first(completion: Completion, count: int) -> Completion:
    """A completion's first tokens."""
    scored = completion.scored[:count]
    labels = None if completion.labels is None else completion.labels[: int(scored.sum())]
    return replace(completion, ids=completion.ids[:count], scored=scored, labels=labels)


CUTS: dict[Truncation, Callable[[Sample, Example, Template, int], Sample]] = {
    "drop": _drop,
    "left": _left,
    "right": _right,
}


def check_different(sample: Sample, whole: bool) -> None:
    """Completions that are compared must differ; those of a ranking may be the same at the same score."""
    for one, other in combinations(sample.completions, 2):
        if np.array_equal(one.ids, other.ids) and one.gold != other.gold:
            if math.isnan(one.gold):
                raise Unfit(ALIKE if whole else CUT_ALIKE)
            raise Unfit(RANKED_ALIKE if whole else RANKED_CUT_ALIKE)
