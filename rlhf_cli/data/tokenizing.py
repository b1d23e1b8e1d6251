"""Many examples to samples, a few hundred at a time, so that the tokenizer can use its threads."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from rlhf_cli.data.examples import Example
from rlhf_cli.data.samples import Pile, Places, Samples
from rlhf_cli.data.template import Template
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
) -> Tokenized:
    """Examples as samples of at most `max_length` tokens (prompt and longest completion together).

    `drop` leaves longer ones out. `left` cuts tokens off the start of the prompt, after BOS; the template's header
    before the completion stays. `right` cuts the end of the completions. Raises DataError, with the row, when the chat
    template refuses a conversation or there is none.
    """
    pile, places, dropped = Pile(), Places(), []
    kept, shortened, labels_cut = array("q"), 0, 0
    for index, (example, whole) in enumerate(_whole(examples, template)):
        fits = length(whole) <= max_length
        try:
            sample = whole if fits else cut(whole, example, template, max_length, truncation)
            check_different(sample, fits)
        except Unfit as reason:
            dropped.append((index, str(reason)))
            continue
        pile.add(score_all(sample) if train_on_prompt else sample)
        places.append(sample.where)
        kept.append(index)
        shortened += not fits
        labels_cut += _labels(whole) - _labels(sample)
    return Tokenized(pile.samples(places), np.array(kept, dtype=np.int64), dropped, shortened, labels_cut)


def _whole(examples: Iterable[Example], template: Template) -> Iterator[tuple[Example, Sample]]:
    """Each example with its sample, whole."""
    rest = iter(examples)
    while some := list(islice(rest, TOGETHER)):
        made = template.encoder.together([ask_sample(example, template) for example in some])
        for example, sample in zip(some, made, strict=True):
            if isinstance(sample, DataError):
                raise sample
            yield example, sample


def _labels(sample: Sample) -> int:
    return sum(len(c.labels) for c in sample.completions if c.labels is not None)
