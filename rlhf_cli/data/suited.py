"""Which examples an objective cannot use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rlhf_cli.data.examples import Comparison, Example, Ranking, Rated, Steps, Verdict
from rlhf_cli.data.formats_ranked import TIED
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.heap import Heap
from rlhf_cli.data.reading import Wanted


def suited(items: Iterable[Example], wanted: Wanted) -> tuple[Heap, list[Dropped], list[Dropped]]:
    """The examples that can be used, those that are bad rows, and those that are left out though they are right."""
    good = Heap()
    bad: list[Dropped] = []
    left: list[Dropped] = []
    for found in items:
        item = found
        if isinstance(found, Steps) and "firm" in wanted.needs and 0 in found.labels:
            left.append(Dropped("neutral steps of a solution", item.where))
            item = replace(found, labels=tuple(None if label == 0 else label for label in found.labels))
        wrong, unused = _wrong(item, wanted), _unused(item, wanted)
        if wrong is not None:
            bad.append(Dropped(wrong, item.where))
        elif unused is not None:
            left.append(Dropped(unused, item.where))
        else:
            good.extend((item,))
    return good, bad, left


def _wrong(item: Example, wanted: Wanted) -> str | None:
    if isinstance(item, Comparison):
        return _wrong_pair(item, wanted)
    if isinstance(item, Steps) and "hard" in wanted.needs:
        soft = next((label for label in item.labels if label not in (None, -1, 0, 1)), None)
        return None if soft is None else f"a label is {soft:g}, a probability: only two_token takes those"
    if isinstance(item, Ranking) and "grades" in wanted.needs and not item.graded:
        return "only an order is given, and this objective computes with scores"
    return None


def _wrong_pair(item: Comparison, wanted: Wanted) -> str | None:
    if "scores" in wanted.needs:
        if item.scores is None:
            return "no scores of chosen and rejected (chosen_score, rejected_score)"
        if item.scores[0] < item.scores[1]:
            return "labels contradict scores: chosen has the lower one"
    if "safety" in wanted.needs:
        if item.safety is None:
            return "not said whether chosen and rejected are safe (chosen_safe, rejected_safe)"
        if item.safety == (False, True):
            return "labels contradict safety: chosen is unsafe and rejected safe"
    return None


def _unused(item: Example, wanted: Wanted) -> str | None:
    if isinstance(item, Comparison) and item.target == 0.5 and "target" not in wanted.needs:
        return "neither completion is the better one (target 0.5)"
    if isinstance(item, Steps) and all(label is None for label in item.labels):
        return "no step with a label"
    if isinstance(item, Ranking):
        if len(set(item.scores)) == 1:
            return TIED
        if "best" in wanted.needs and item.scores.count(max(item.scores)) > 1:
            return "several completions share the best score"
        if "strict" in wanted.needs and len(set(item.scores)) < len(item.scores):
            return "two completions have the same score"
    return None


def nothing_to_learn(items: Sequence[Example]) -> list[str]:
    """A warning where all labels or scores of several examples are the same."""
    seen: set[float | None] = set()
    for item in items:
        if isinstance(item, Verdict):
            seen.add(float(item.desirable))
        elif isinstance(item, Rated):
            seen.add(item.score)
        elif isinstance(item, Steps):
            seen.update(label for label in item.labels if label is not None)
    return ["every label is the same, so there is nothing to tell apart"] if len(items) > 1 and len(seen) == 1 else []
