"""Laws of preference objectives that hold whatever the numbers are; most run over every one in the catalogue."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.catalog import OBJECTIVES, Objective
from rlhf_cli.objectives.judged import Judged, Pair
from rlhf_cli.objectives.preference import dpo
from rlhf_cli.objectives.verdict import kto
from tests.objectives.preference_support import PREFERENCE, VARIANTS, Case, case, judge
from tests.objectives.support import close, finite, gradients, leaf, start

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
brief = settings(max_examples=25, deadline=None, derandomize=True, database=None)
logps = st.floats(-300, -0.01)
sizes = st.integers(1, 40)
Row = tuple[float, float, float, float, int, int, float]
rows: st.SearchStrategy[list[Row]] = st.lists(
    st.tuples(logps, logps, logps, logps, sizes, sizes, st.floats(0, 5)), min_size=1, max_size=6
)
edges = st.sampled_from([-1e4, -700.0, -88.5, -17.0, -1e-7, 0.0])
extreme_rows: st.SearchStrategy[list[Row]] = st.lists(
    st.tuples(
        edges, edges, edges, edges, st.sampled_from([0, 1, 10]), st.sampled_from([0, 1, 10]),
        st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    ),
    min_size=1, max_size=6,
)  # fmt: skip
every = pytest.mark.parametrize("entry", PREFERENCE, ids=lambda e: e.name)
with_reference = [e for e in PREFERENCE if "reference" in e.needs]


def step(drawn: list[Row], dtype: torch.dtype = torch.float64) -> Case:
    """The rows as tensors."""
    pc, pr, rc, rr, gap = (torch.tensor([row[i] for row in drawn], dtype=dtype) for i in (0, 1, 2, 3, 6))
    lengths = [row[4] for row in drawn], [row[5] for row in drawn]
    return case((pc, pr, rc, rr), lengths, gap)


def swapped(data: Case) -> Case:
    """Chosen and rejected exchanged; scores stay."""

    def other(of: Pair) -> Pair:
        turned = [None if x is None else x.flip(1) for x in (of.common, of.certainty)]
        return Pair(of.rejected, of.chosen, of.rejected_length, of.chosen_length, *turned)

    return replace(data, policy=other(data.policy), reference=other(data.reference))


def home(entry: Objective) -> ModuleType:
    """The module that an objective lives in."""
    return importlib.import_module(f"rlhf_cli.{entry.path.split(':')[0]}")


def said(entry: Objective, data: Case) -> Iterator[Judged]:
    """What an objective says of a step, under each of its variants."""
    for changed in VARIANTS.get(entry.name, [{}]):
        yield judge(home(entry), entry, data, **changed)


@every
@given(rows)
@brief
def test_swapping_turns_the_margin(entry: Objective, drawn: list[Row]) -> None:
    if entry.data == "verdict":
        return
    data = step(drawn)
    for there, back in zip(said(entry, data), said(entry, swapped(data)), strict=True):
        margin = there.rewards[:, 0] - there.rewards[:, 1]
        close(back.rewards[:, 0] - back.rewards[:, 1], -margin, 1e-9)


@every
@given(rows, st.randoms(use_true_random=False))
@brief
def test_rows_are_alone(entry: Objective, drawn: list[Row], random: Any) -> None:
    data = step(drawn)
    size = len(drawn) if "whole_step" in entry.needs else random.randint(1, len(drawn))
    order = torch.tensor(random.sample(range(len(drawn)), size))
    for whole, part in zip(said(entry, data), said(entry, data.rows(order)), strict=True):
        close(part.rewards, whole.rewards[order], 1e-12)
        if "whole_step" in entry.needs:
            close(part.loss.mean(), whole.loss.mean(), 1e-12)
        else:
            close(part.loss, whole.loss[order], 1e-12)


@every
@given(rows, st.integers(1, 5))
@brief
def test_a_step_in_parts_has_the_same_sum(entry: Objective, drawn: list[Row], cut: int) -> None:
    if "whole_step" in entry.needs:
        return
    data, index = step(drawn), torch.arange(len(drawn))
    parts = [said(entry, data.rows(i)) for i in (index[:cut], index[cut:]) if len(i)]
    for whole, *pieces in zip(said(entry, data), *parts, strict=True):
        close(sum((p.loss.sum() for p in pieces), torch.zeros(())), whole.loss.sum(), 1e-9)


@every
@given(rows)
@brief
def test_losses_have_a_floor(entry: Objective, drawn: list[Row]) -> None:
    for judged in said(entry, step(drawn)):
        assert judged.loss.shape == (len(drawn),)
        assert judged.rewards.shape == (len(drawn), 1 if entry.data == "verdict" else 2)
        assert entry.name == "robust" or bool((judged.loss >= -1e-12).all())


@every
@given(extreme_rows)
@brief
def test_extremes_are_finite(entry: Objective, drawn: list[Row]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        data = step(drawn, dtype)
        leaves = [leaf(x) for x in (data.policy.chosen, data.policy.rejected, data.policy.common)]
        own = data.policy._replace(chosen=leaves[0], rejected=leaves[1], common=leaves[2])
        for judged in said(entry, replace(data, policy=own)):
            assert judged.loss.dtype == judged.rewards.dtype == torch.float32
            assert finite(judged.loss, judged.rewards)
            if judged.loss.requires_grad:
                assert finite(*gradients(judged.loss, *leaves))


@pytest.mark.parametrize("entry", with_reference, ids=lambda e: e.name)
@given(rows, st.floats(-50, 50))
@brief
def test_a_shift_of_both_models_changes_nothing(entry: Objective, drawn: list[Row], shift: float) -> None:
    data, numbers = step(drawn), [[row[i] for row in drawn] for i in (0, 1, 2, 3)]
    moved = [torch.tensor(n, dtype=torch.float64) + s for n, s in zip(numbers, (shift, -shift) * 2, strict=True)]
    lengths = [row[4] for row in drawn], [row[5] for row in drawn]
    shifted = replace(case(tuple(moved), lengths), scores=data.scores)
    there, here = judge(home(entry), entry, data), judge(home(entry), entry, shifted)
    close(here.loss, there.loss, 1e-6)
    close(here.rewards, there.rewards, 1e-6)


@given(rows)
@quick
def test_the_first_step_is_what_the_docstring_says(drawn: list[Row]) -> None:
    data = step([(*row[:2], *row[:2], *row[4:]) for row in drawn])
    data = replace(data, running=torch.zeros(4), kl_point=torch.zeros(()))
    known = {entry.name: start(entry) for entry in with_reference}
    assert {name for name, value in known.items() if value is None} == {"odpo", "r_dpo", "wpo"}
    for name, value in known.items():
        judged = judge(home(OBJECTIVES[name]), OBJECTIVES[name], data)
        close(judged.rewards, torch.zeros_like(judged.rewards), 1e-6)
        if value is not None:
            close(judged.loss, torch.full((len(drawn),), value), 1e-6)


@given(rows, st.floats(0.01, 2), st.floats(0.1, 10), st.floats(0, 0.49))
@quick
def test_dpo_sees_beta_times_the_difference(drawn: list[Row], beta: float, scale: float, eps: float) -> None:
    data = step(drawn)
    policy, reference = data.policy, data.reference
    zero = Pair(*(torch.zeros_like(x) for x in reference[:4]))
    difference = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    shrunk = Pair(difference / scale, torch.zeros_like(difference), *policy[2:4])
    one = dpo(policy, reference, beta=beta, label_smoothing=eps)
    two = dpo(shrunk, zero, beta=beta * scale, label_smoothing=eps)
    close(two.loss, one.loss, 1e-9)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "orpo", "simpo", "alphapo"])
@given(rows, st.integers(2, 5))
@brief
def test_averages_do_not_see_repetition(name: str, drawn: list[Row], times: int) -> None:
    data, entry = step(drawn), OBJECTIVES[name]

    def longer(of: Pair) -> Pair:
        return Pair(*(x * times for x in of[:4]))

    again = replace(data, policy=longer(data.policy), reference=longer(data.reference))
    close(judge(home(entry), entry, again).loss, judge(home(entry), entry, data).loss, 1e-9)


@pytest.mark.parametrize("name", ["dpo", "robust", "hinge", "odpo", "r_dpo", "spin", "wpo", "aot", "exo", "discopop"])
@given(rows)
@brief
def test_what_chosen_gains_rejected_loses(name: str, drawn: list[Row]) -> None:
    data = step(drawn)
    leaves = [leaf(x) for x in (data.policy.chosen, data.policy.rejected)]
    own = replace(data, policy=data.policy._replace(chosen=leaves[0], rejected=leaves[1]))
    for judged in said(OBJECTIVES[name], own):
        g, h = gradients(judged.loss, *leaves)
        close(h, -g, 1e-12)


@given(st.lists(st.tuples(logps, logps, st.booleans()), min_size=1, max_size=8), st.floats(0, 5), st.floats(0.1, 3))
@quick
def test_kto_is_bounded_and_turns_with_the_label(
    drawn: list[tuple[float, float, bool]], point: float, weight: float
) -> None:
    policy, reference = (torch.tensor([row[i] for row in drawn], dtype=torch.float64) for i in (0, 1))
    label = torch.tensor([row[2] for row in drawn])
    weights = {"beta": 0.1, "desirable_weight": weight, "undesirable_weight": weight}
    kl: Tensor = torch.tensor(point, dtype=torch.float64)
    one, other = kto(policy, reference, label, kl, **weights), kto(policy, reference, ~label, kl, **weights)
    assert bool(((one.loss >= 0) & (one.loss <= weight)).all())
    close(one.loss + other.loss, torch.full_like(one.loss, weight), 1e-12)
    close(other.rewards, one.rewards)
