"""Many examples to samples, a few hundred at a time, so that the tokenizer can use its threads."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from rlhf_cli.data.examples import Example
from rlhf_cli.data.samples import Pile, Places, Samples
from rlhf_cli.data.template import NO_TEMPLATE, Template
from rlhf_cli.data.tokens import Sample, Truncation, Unfit, ask_sample, check_different, cut, length, score_all
from rlhf_cli.errors import DataError

TOGETHER = 256
"""Examples that are tokenised at a time."""


@dataclass(frozen=True)
class Tokenized:
    """What became of some examples."""

    samples: Samples
    kept: np.ndarray
    """Index of each sample's example: (len(samples),) int64."""
    dropped: list[tuple[int, str]] = field(default_factory=list)
    """Index of each example left out, and the reason."""
    refused: list[tuple[int, str]] = field(default_factory=list)
    """Likewise of each that the chat template refuses."""
    shortened: int = 0
    """How many of the samples were cut."""
    labels_cut: int = 0
    """How many step labels lay beyond the cuts."""


def tokenize(
    examples: Iterable[Example],
    template: Template,
    max_length: int,
    truncation: Truncation = "drop",
    train_on_prompt: bool = False,
    *,
    strict: bool = True,
) -> Tokenized:
    """Examples as samples of at most `max_length` tokens (prompt and longest completion together).

    `drop` leaves longer ones out. `left` cuts tokens off the start of the prompt, after BOS; the template's header
    before the completion stays. `right` cuts the end of the completions. Raises DataError, with the row, when there is
    no chat template though one is needed, and if `strict` when it refuses a conversation.
    """
    pile, places, dropped, refused = Pile(), Places(), [], []
    kept, shortened, labels_cut = array("q"), 0, 0
    most = max_length if truncation == "drop" else None
    for index, (example, whole) in enumerate(_whole(examples, template, most)):
        try:
            if isinstance(whole, DataError):
                raise whole
            fits = length(whole) <= max_length
            sample = whole if fits else cut(whole, example, template, max_length, truncation)
            check_different(sample, fits)
        except Unfit as reason:
            dropped.append((index, str(reason)))
            continue
        except DataError as error:
            (problem,) = error.problems
            if strict or problem.message == NO_TEMPLATE:
                raise
            refused.append((index, problem.message))
            continue
        pile.add(score_all(sample) if train_on_prompt else sample)
        places.append(sample.where)
        kept.append(index)
        shortened += not fits
        labels_cut += _labels(whole) - _labels(sample)
    return Tokenized(pile.samples(places), np.array(kept, dtype=np.int64), dropped, refused, shortened, labels_cut)


def _whole(
    examples: Iterable[Example], template: Template, most: int | None
) -> Iterator[tuple[Example, Sample | DataError]]:
    """Each example with its sample, whole, or why there is none. most: as `Encoder.together`."""
    rest = iter(examples)
    while some := list(islice(rest, TOGETHER)):
        made = template.encoder.together([ask_sample(example, template) for example in some], most)
        yield from zip(some, made, strict=True)


def _labels(sample: Sample) -> int:
    return sum(len(c.labels) for c in sample.completions if c.labels is not None)
