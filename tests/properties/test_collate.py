"""Batches against a slow reference, micro-batches and the order of the data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.batch import Batch, collate, micro_batches, size
from rlhf_cli.data.loader import Loader
from rlhf_cli.data.tokens import Completion, Sample
from tests.models.worlds import make_sample


@st.composite
def samples(draw: st.DrawFn, smallest: int = 1) -> list[Sample]:
    """Samples of all shapes, their ids all different, so that a token tells where it came from."""
    made, number = [], 1
    for i in range(draw(st.integers(smallest, 5))):
        prompt = draw(st.integers(0, 6))
        count = draw(st.integers(0 if prompt else 1, 3))
        completions = []
        after = number + prompt
        for _ in range(count):
            n = draw(st.integers(1 if prompt else 2, 5))
            scored = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
            scored[0] &= prompt > 0
            # A label tells which token it belongs to; a gold score tells the first token of its completion.
            ids = np.arange(after, after + n, dtype=np.int32)
            labels = ids[scored] / np.float32(1000) if draw(st.booleans()) else None
            gold = float(after) if draw(st.booleans()) else float("nan")
            completions.append(Completion(ids, scored, gold, labels))
            after += n
        ids = np.arange(number, number + prompt, dtype=np.int32)
        made.append(Sample(ids, tuple(completions), {"margin": float(i)}, f"row {i}"))
        number = after
    return made


def expected(made: list[Sample]) -> list[dict[str, list[int]]]:
    """Of each sequence, spelled out: its tokens, its scored tokens and the token before each of them."""
    out = []
    for b, sample in enumerate(made):
        for completion in sample.completions or [Completion(np.zeros(0, np.int32), np.zeros(0, bool))]:
            whole = [*sample.prompt.tolist(), *completion.ids.tolist()]
            at = [len(sample.prompt) + i for i in range(len(completion.ids)) if completion.scored[i]]
            out.append({"whole": whole, "scored": [whole[i] for i in at], "before": [whole[i - 1] for i in at],
                        "example": [b]})  # fmt: skip
    return out


def gold_and_labels(made: list[Sample]) -> tuple[list[float], list[float]]:
    """Of each sequence its score, of each scored token its label, nan where there is none."""
    gold, labels = [], []
    for sample in made:
        for completion in sample.completions or [Completion(np.zeros(0, np.int32), np.zeros(0, bool))]:
            gold.append(completion.gold)
            given = completion.labels is not None
            labels += [i / 1000 if given else float("nan") for i in completion.ids[completion.scored].tolist()]
    return gold, labels


def seen_by(batch: Batch, flat: int) -> list[int]:
    """Ids a token may attend to, in the order of their positions: of the parent, then of its own segment."""
    width = batch.ids.shape[1]
    span = batch.spans[int(batch.segment.view(-1)[flat])]
    columns = list(range(span.start, flat - span.row * width + 1))
    if span.parent >= 0:
        above = batch.spans[span.parent]
        assert above.row == span.row
        columns = list(range(above.start, above.end)) + columns
    assert batch.position[span.row, columns].tolist() == list(range(len(columns)))
    return batch.ids[span.row, columns].tolist()


@settings(max_examples=80, deadline=None)
@given(samples(), st.booleans())
def test_against_a_slow_reference(made: list[Sample], packed: bool) -> None:
    batch, wanted = collate(made, packed=packed), expected(made)
    flat = batch.ids.view(-1)
    assert batch.sequences == len(wanted)
    assert batch.examples == len(made)
    assert batch.example.tolist() == [w["example"][0] for w in wanted]
    assert batch.where == tuple(s.where for s in made)
    assert batch.numbers["margin"].tolist() == [float(i) for i in range(len(made))]
    assert flat[batch.targets].tolist() == [t for w in wanted for t in w["scored"]]
    assert flat[batch.predictors].tolist() == [t for w in wanted for t in w["before"]]
    assert batch.owners.tolist() == [n for n, w in enumerate(wanted) for _ in w["scored"]]
    for n, w in enumerate(wanted):
        assert seen_by(batch, int(batch.last[n])) == w["whole"]
    for predictor, target in zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True):
        whole = wanted[int(batch.sequence.view(-1)[target])]["whole"]
        assert seen_by(batch, predictor) == whole[: whole.index(int(flat[target]))]


@settings(max_examples=80, deadline=None)
@given(samples(), st.booleans())
def test_scores_and_labels_lie_where_they_belong(made: list[Sample], packed: bool) -> None:
    batch = collate(made, packed=packed).to(torch.device("cpu"))
    gold, labels = gold_and_labels(made)
    assert batch.gold.dtype == batch.labels.dtype == torch.float64
    assert batch.gold.tolist() == pytest.approx(gold, nan_ok=True)
    assert batch.labels.tolist() == pytest.approx(labels, nan_ok=True)
    assert len(batch.labels) == len(batch.targets) == len(batch.owners)
    known = ~batch.labels.isnan()
    assert (batch.ids.view(-1)[batch.targets[known]] / 1000).tolist() == pytest.approx(batch.labels[known].tolist())


def test_scores_and_labels_move_with_the_batch() -> None:
    ids = np.arange(1, 4, dtype=np.int32)
    steps = Completion(ids, np.array([True, False, True]), labels=np.array([1, -1], dtype=np.float32))
    made = [Sample(ids, (steps, Completion(ids, np.ones(3, dtype=bool), gold=2.0)), {}, "row 0")]
    for packed in (True, False):
        batch = collate(made, packed=packed)
        assert torch.equal(batch.labels.nan_to_num(9), torch.tensor([1, -1, 9, 9, 9], dtype=torch.float64))
        assert torch.equal(batch.gold.nan_to_num(9), torch.tensor([9, 2], dtype=torch.float64))
        moved = batch.to(torch.device("meta"))
        assert moved.gold.device.type == moved.labels.device.type == "meta"
        assert batch.with_numbers(x=torch.zeros(1)).labels is batch.labels


def test_an_empty_batch_has_no_scores_and_no_labels() -> None:
    for packed in (True, False):
        batch = collate([], packed=packed)
        assert (batch.gold.shape, batch.labels.shape) == ((0,), (0,))


@settings(max_examples=60, deadline=None)
@given(samples())
def test_every_token_once_when_packed(made: list[Sample]) -> None:
    batch = collate(made, packed=True)
    everything = [t for s in made for t in [*s.prompt.tolist(), *(i for c in s.completions for i in c.ids.tolist())]]
    assert len(batch.ids) == 1
    assert batch.ids[batch.segment >= 0].tolist() == everything
    assert batch.tokens == len(everything) == sum(size(s, packed=True) for s in made)
    assert not bool((batch.segment < 0).any())


@settings(max_examples=60, deadline=None)
@given(samples())
def test_a_row_a_sequence_when_padded(made: list[Sample]) -> None:
    batch, wanted = collate(made, packed=False), expected(made)
    rows = [row[segment >= 0].tolist() for row, segment in zip(batch.ids, batch.segment, strict=True)]
    assert rows == [w["whole"] for w in wanted]
    real = batch.segment >= 0
    assert bool((real[:, 1:] <= real[:, :-1]).all()), "padding only at the right end"
    assert not bool(batch.scored[~real].any())
    assert batch.tokens == sum(size(s, packed=False) for s in made)


@settings(max_examples=80, deadline=None)
@given(samples(), st.integers(1, 60), st.booleans())
def test_micro_batches_hold_everything_once(made: list[Sample], budget: int, packed: bool) -> None:
    groups = micro_batches(made, budget, packed=packed)
    assert sorted(i for g in groups for i in g) == list(range(len(made)))
    assert all(g == sorted(g) and g for g in groups)
    for group in groups:
        batch = collate([made[i] for i in group], packed=packed)
        assert batch.ids.numel() <= budget or len(group) == 1


def test_micro_batches_put_similar_lengths_together() -> None:
    random = np.random.default_rng(0)
    made = [make_sample(random, p, 10) for p in (90, 5, 88, 6, 91, 7)]
    groups = micro_batches(made, 310, packed=False)
    assert sorted(groups) == [[0, 2, 4], [1, 3, 5]]
    assert micro_batches(made, 310, packed=False) == groups


def test_a_prompt_is_computed_once_for_all_its_samples() -> None:
    random = np.random.default_rng(1)
    prompt, other = (make_sample(random, n) for n in (50, 40))
    owners = [prompt, other, prompt, prompt, other, prompt]
    made = [replace(make_sample(random, 1, 10), prompt=owner.prompt.copy()) for owner in owners]
    batch = collate(made, packed=True)
    assert batch.tokens == batch.ids.numel() == 50 + 40 + 6 * 10
    assert collate(made, packed=False).tokens == 4 * 60 + 2 * 50
    assert batch.example.tolist() == [0, 1, 2, 3, 4, 5]
    assert micro_batches(made, 150, packed=True) == [[0, 1, 2, 3, 4, 5]]
    assert micro_batches(made, 90, packed=True) == [[0, 2, 3, 5], [1, 4]]
    assert micro_batches(made, 80, packed=True) == [[0, 2, 3], [5], [1, 4]]
    assert micro_batches(made, 5, packed=True) == [[0], [2], [3], [5], [1], [4]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 200), st.booleans())
def test_all_completions_of_a_prompt_stay_together(counts: list[int], budget: int, packed: bool) -> None:
    random = np.random.default_rng(len(counts))
    made = [make_sample(random, 3, *random.integers(1, 9, count).tolist()) for count in counts]
    for group in micro_batches(made, budget, packed=packed):
        batch = collate([made[i] for i in group], packed=packed)
        assert batch.example.bincount().tolist() == [counts[i] for i in group]


def test_only_numbers_that_all_samples_have_are_carried() -> None:
    random = np.random.default_rng(0)
    made = [make_sample(random, 3, 2, margin=1.0, chosen_score=2.0), make_sample(random, 3, 2, margin=3.0)]
    batch = collate(made, packed=True)
    assert {k: v.tolist() for k, v in batch.numbers.items()} == {"margin": [1.0, 3.0]}
    more = batch.with_numbers(reference=torch.tensor([5.0, 6.0]))
    assert set(more.numbers) == {"margin", "reference"}
    assert set(batch.numbers) == {"margin"}


# --- Loader ------------------------------------------------------------------------------------------------


def epoch(loader: Loader) -> list[int]:
    """Indices of one epoch."""
    return np.concatenate([loader.next() for _ in range(loader.steps_per_epoch)]).tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 11), seed=st.integers(0, 2**62))
def test_each_epoch_passes_over_everything_once(n: int, batch: int, seed: int) -> None:
    loader = Loader(np.zeros(n, dtype=np.int64), [1.0], batch, seed)
    first, second = epoch(loader), epoch(loader)
    assert sorted(first) == sorted(second) == list(range(n))
    assert loader.position == 2.0
    again = Loader(np.zeros(n, dtype=np.int64), [1.0], batch + 3, seed)
    assert epoch(again) == first, "the order depends on seed and epoch, not on the batch size"


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 11), steps=st.integers(0, 25), seed=st.integers(0, 2**62))
def test_a_cursor_goes_on_where_it_stood(n: int, batch: int, steps: int, seed: int) -> None:
    source = np.arange(n) % 2
    loader, other = (Loader(source, [1.0, 0.5], batch, seed) for _ in range(2))
    for _ in range(steps):
        loader.next()
    other.load_state_dict(loader.state_dict())
    assert other.position == loader.position
    for _ in range(9):
        assert loader.next().tolist() == other.next().tolist()


def test_the_last_batch_of_an_epoch_is_kept() -> None:
    loader = Loader(np.zeros(10, dtype=np.int64), [1.0], 4, 0)
    assert loader.steps_per_epoch == 3
    assert [len(loader.next()) for _ in range(6)] == [4, 4, 2, 4, 4, 2]


def test_epochs_and_seeds_differ() -> None:
    source = np.zeros(50, dtype=np.int64)
    loader = Loader(source, [1.0], 50, 3)
    first, second = epoch(loader), epoch(loader)
    other = epoch(Loader(source, [1.0], 50, 4))
    assert first != second
    assert first != other


@pytest.mark.parametrize(("weight", "wanted"), [(2.0, 40), (0.5, 10), (1.0, 20), (1.5, 30), (3.0, 60)])
def test_weights(weight: float, wanted: int) -> None:
    """Source 0 has 20 examples and the weight, source 1 has 8 and weight 1."""
    source = np.array([0] * 20 + [1] * 8)
    loader = Loader(source, [weight, 1.0], 7, 1)
    halves = []
    for _ in range(2):
        count = Counter(epoch(loader))
        own = {i: c for i, c in count.items() if i < 20}
        assert sum(own.values()) == wanted
        assert set(own.values()) <= {int(weight), int(np.ceil(weight))}
        assert [count[i] for i in range(20, 28)] == [1] * 8
        halves.append(frozenset(i for i, c in own.items() if c == max(own.values())))
    if weight in {0.5, 1.5}:
        assert halves[0] != halves[1], "each epoch takes another random half"
