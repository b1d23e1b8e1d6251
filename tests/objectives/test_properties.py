"""Laws that hold whatever the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.objectives.advantage import gae
from rlhf_cli.objectives.kl import k3
from rlhf_cli.objectives.masked import masked_mean, whiten
from rlhf_cli.objectives.policy import clipped_policy, clipped_value
from rlhf_cli.objectives.preference import Pair, dpo, ipo, kto, orpo, simpo
from tests.objectives.support import INF, NAN, close, finite

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
logps = st.floats(-300, -0.01)
Row = tuple[float, float, float, float, int, int, float]
rows: st.SearchStrategy[list[Row]] = st.lists(
    st.tuples(logps, logps, logps, logps, st.integers(1, 40), st.integers(1, 40), st.floats(0, 5)),
    min_size=1,
    max_size=6,
)


def pairs(drawn: list[Row]) -> tuple[Pair, Pair, Tensor]:
    """policy, reference, scores (B, 2)."""
    pc, pr, rc, rr = (torch.tensor([row[i] for row in drawn], dtype=torch.float64) for i in range(4))
    first, second = (torch.tensor([row[i] for row in drawn]) for i in (4, 5))
    gap = torch.tensor([row[6] for row in drawn], dtype=torch.float64)
    return Pair(pc, pr, first, second), Pair(rc, rr, first, second), torch.stack([1 + gap, torch.ones_like(gap)], dim=1)


def swapped(pair: Pair) -> Pair:
    """Chosen and rejected exchanged."""
    return Pair(pair.rejected, pair.chosen, pair.rejected_length, pair.chosen_length)


def picked(pair: Pair, order: Tensor) -> Pair:
    """Some rows, in that order."""
    return Pair(*(x[order] for x in pair))


def of_pairs(policy: Pair, reference: Pair, scores: Tensor) -> dict[str, Any]:
    """What every pair objective says, with its default settings."""
    out: dict[str, Any] = {}
    for entry in OBJECTIVES.values():
        if entry.stage not in ("dpo", "orpo", "simpo") or entry.data != "comparison":
            continue
        arguments: dict[str, Any] = {"reference": reference} if "reference" in entry.needs else {}
        arguments |= {"scores": scores} if "scores" in entry.needs else {}
        out[entry.name] = entry.load()(policy, **arguments, **entry.settings().model_dump())
    return out


@given(rows)
@quick
def test_swapping_turns_the_margin(drawn: list[Row]) -> None:
    policy, reference, scores = pairs(drawn)
    there, back = of_pairs(policy, reference, scores), of_pairs(swapped(policy), swapped(reference), scores)
    assert set(there) == {"dpo", "ipo", "odpo", "orpo", "simpo"}
    for name, judged in there.items():
        margin = judged.rewards[:, 0] - judged.rewards[:, 1]
        close(back[name].rewards[:, 0] - back[name].rewards[:, 1], -margin, 1e-9)


@given(rows, st.randoms(use_true_random=False))
@quick
def test_rows_are_alone(drawn: list[Row], random: Any) -> None:
    policy, reference, scores = pairs(drawn)
    whole = of_pairs(policy, reference, scores)
    order = torch.tensor(random.sample(range(len(drawn)), random.randint(1, len(drawn))))
    part = of_pairs(picked(policy, order), picked(reference, order), scores[order])
    for name, judged in whole.items():
        close(part[name].loss, judged.loss[order], 1e-12)
        close(part[name].rewards, judged.rewards[order], 1e-12)


@given(rows)
@quick
def test_everything_is_finite(drawn: list[Row]) -> None:
    policy, reference, scores = pairs(drawn)
    for judged in of_pairs(policy, reference, scores).values():
        assert finite(judged.loss, judged.rewards)
        assert bool((judged.loss >= 0).all())


@given(rows, st.floats(0.01, 2), st.floats(0.1, 10), st.floats(0, 0.49))
@quick
def test_dpo_sees_beta_times_the_difference(drawn: list[Row], beta: float, scale: float, eps: float) -> None:
    policy, reference, _ = pairs(drawn)
    zero = Pair(*(torch.zeros_like(x) for x in reference))
    difference = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    shrunk = Pair(difference / scale, torch.zeros_like(difference), *policy[2:])
    one = dpo(policy, reference, beta=beta, label_smoothing=eps)
    two = dpo(shrunk, zero, beta=beta * scale, label_smoothing=eps)
    close(two.loss, one.loss, 1e-9)


@given(rows, st.floats(0.01, 1), st.floats(-50, 50))
@quick
def test_a_shift_of_both_models_changes_nothing(drawn: list[Row], beta: float, shift: float) -> None:
    policy, reference, _ = pairs(drawn)
    moved = [Pair(p.chosen + shift, p.rejected - shift, *p[2:]) for p in (policy, reference)]
    for average in (True, False):
        there = ipo(policy, reference, beta=beta, average=average).loss
        close(ipo(*moved, beta=beta, average=average).loss, there, 1e-6)
    for eps in (0.0, 0.3):
        there = dpo(policy, reference, beta=beta, label_smoothing=eps).loss
        close(dpo(*moved, beta=beta, label_smoothing=eps).loss, there, 1e-6)


@given(rows, st.integers(2, 5))
@quick
def test_averages_do_not_see_repetition(drawn: list[Row], times: int) -> None:
    policy, _, _ = pairs(drawn)
    longer = Pair(*(x * times for x in policy))
    close(orpo(longer, beta=0.1).loss, orpo(policy, beta=0.1).loss, 1e-9)
    plain: dict[str, Any] = {"beta": 2.0, "gamma": None, "gamma_beta_ratio": 0.25, "sft_weight": 0.0}
    close(simpo(longer, **plain).loss, simpo(policy, **plain).loss, 1e-9)


@given(st.lists(st.tuples(logps, logps, st.booleans()), min_size=1, max_size=8), st.floats(0, 5), st.floats(0.1, 3))
@quick
def test_kto_is_bounded_and_turns_with_the_label(
    drawn: list[tuple[float, float, bool]], point: float, weight: float
) -> None:
    policy, reference = (torch.tensor([row[i] for row in drawn], dtype=torch.float64) for i in (0, 1))
    label = torch.tensor([row[2] for row in drawn])
    weights = {"beta": 0.1, "desirable_weight": weight, "undesirable_weight": weight}
    kl = torch.tensor(point, dtype=torch.float64)
    one, other = kto(policy, reference, label, kl, **weights), kto(policy, reference, ~label, kl, **weights)
    assert bool(((one.loss >= 0) & (one.loss <= weight)).all())
    close(one.loss + other.loss, torch.full_like(one.loss, weight), 1e-12)
    close(other.rewards, one.rewards)


@given(st.floats(-30, 30), st.floats(-30, 30))
@quick
def test_k3_is_never_negative(one: float, other: float) -> None:
    assert float(k3(torch.tensor(one), torch.tensor(other))) >= 0
    assert math.isfinite(float(k3(torch.tensor(one), torch.tensor(other))))


masks = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5)


def noise(mask: Tensor, seed: int) -> Tensor:
    """Numbers of the shape of a mask."""
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@given(masks, st.integers(0, 1000), st.sampled_from([NAN, INF, -INF, 1e30]))
@quick
def test_what_stands_under_a_mask_changes_nothing(drawn: list[list[bool]], seed: int, junk: float) -> None:
    mask = torch.tensor(drawn)
    x, values = noise(mask, seed), noise(mask, seed + 1)
    functions: list[Callable[[Tensor, Tensor], Any]] = [
        lambda a, b: masked_mean(a, mask),
        lambda a, b: whiten(a, mask),
        lambda a, b: whiten(a, mask, shift_mean=False),
        lambda a, b: gae(a, b, mask, None, gamma=0.99, lam=0.9).advantages,
        lambda a, b: gae(a, b, mask, None, gamma=0.99, lam=0.9).returns,
    ]
    for function in functions:
        close(function(torch.where(mask, x, junk), torch.where(mask, values, junk)), function(x, values), 1e-12)


@given(st.floats(-4, 4), st.floats(-5, 5), st.floats(0.01, 0.9), st.floats(0.01, 3), st.floats(1.01, 5))
@quick
def test_the_clipped_loss_is_pessimistic(log_ratio: float, advantage: float, low: float, high: float, c: float) -> None:
    x, a = torch.tensor(log_ratio, dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    loss, decided = clipped_policy(x, zero, a, clip_low=low, clip_high=high, dual_clip=None)
    plain = -torch.exp(x) * a
    assert float(loss) >= float(plain) - 1e-12
    assert bool(decided) == (float(loss) > float(plain))
    dual, _ = clipped_policy(x, zero, a, clip_low=low, clip_high=high, dual_clip=c)
    assert float(dual) <= float(loss)
    if advantage >= 0:
        assert float(dual) == float(loss)
    else:
        assert float(dual) <= -c * advantage + 1e-12


@given(st.floats(-4, 4), st.floats(-4, 4), st.floats(-4, 4), st.floats(0.01, 3))
@quick
def test_the_clipped_value_is_pessimistic(value: float, old: float, target: float, clip: float) -> None:
    v, o, r = (torch.tensor(x, dtype=torch.float64) for x in (value, old, target))
    loss, decided = clipped_value(v, o, r, value_clip=clip)
    plain, _ = clipped_value(v, o, r, value_clip=None)
    assert float(loss) >= float(plain)
    close(plain, 0.5 * (v - r) ** 2, 1e-12)
    if bool(decided):
        assert abs(value - old) > clip
        assert float(loss) > float(plain)
