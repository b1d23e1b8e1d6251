"""Laws of rankings and ratings that hold whatever the numbers are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.objectives.judged import Judged, Ranked
from rlhf_cli.objectives.process import aggregate
from rlhf_cli.objectives.ranking import best_of, choice, informative, k_wise, plackett_luce, rrhf, stable_alignment
from rlhf_cli.objectives.ratings import bradley_terry_mle, components, elo, normalise
from rlhf_cli.objectives.reward import bradley_terry, cost
from tests.objectives.support import INF, NAN, close, gradients, leaf

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
Objective = Callable[[Ranked], Judged]
OF_RANKINGS: dict[str, Objective] = {
    "k_wise": lambda of: k_wise(of, centring=0.1),
    "choice": lambda of: choice(of, centring=0.1),
    "plackett_luce": lambda of: plackett_luce(of, centring=0.1),
    "rrhf": lambda of: rrhf(of, rank_weight=2.0, sft_reduction="token_mean"),
    "rrhf sum": lambda of: rrhf(of, rank_weight=2.0, sft_reduction="sum"),
    **{
        f"stable_alignment {how}": lambda of, how=how: stable_alignment(
            of, margin=1.0, rating_scale=7.0, ratio=0.5, reduction=how
        )
        for how in ("mean", "max", "sum")
    },
}
every = pytest.mark.parametrize("objective", OF_RANKINGS.values(), ids=OF_RANKINGS.keys())
scores = st.floats(-50, 50).map(lambda x: round(x, 3))


@st.composite
def rankings(draw: st.DrawFn, ties: bool = False) -> Ranked:
    """Prompts with 2 to 5 completions, padded to the longest, some slots between left empty."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    slots = max(sizes) + draw(st.integers(0, 2))
    table = torch.zeros(3, len(sizes), slots, dtype=torch.float64)
    present = torch.zeros(len(sizes), slots, dtype=torch.bool)
    for row, size in enumerate(sizes):
        at = torch.tensor(draw(st.permutations(range(slots)))[:size])
        grade = st.integers(1, 3) if ties else st.integers(-9, 9)
        table[0, row, at] = torch.tensor(draw(st.lists(scores, min_size=size, max_size=size)), dtype=torch.float64)
        table[1, row, at] = torch.tensor(draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))).double()
        gold = draw(st.lists(grade, min_size=size, max_size=size, unique=not ties))
        table[2, row, at] = torch.tensor(gold).double()
        present[row, at] = True
    return Ranked(table[0], table[1], table[2], present)


def told(objective: Objective, of: Ranked) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (B,), rewards (B, K), gradient (B, K)."""
    values = leaf(of.values)
    judged = objective(of._replace(values=values))
    return judged.loss, judged.rewards, gradients(judged.loss, values)[0]


def test_every_objective_of_rankings_is_here() -> None:
    names = {name for name, entry in OBJECTIVES.items() if getattr(entry, "data", None) == "ranking"}
    assert names == {name.split()[0] for name in OF_RANKINGS}


@every
@given(rankings(), st.randoms(use_true_random=False))
@quick
def test_the_order_of_completions_and_prompts_is_nothing(objective: Objective, of: Ranked, draw: Any) -> None:
    loss, rewards, gradient = told(objective, of)
    columns = torch.tensor(draw.sample(range(of.values.shape[1]), of.values.shape[1]))
    rows = torch.tensor(draw.sample(range(len(of.values)), draw.randint(1, len(of.values))))
    moved = told(objective, Ranked(*(x[rows][:, columns] for x in of)))
    for there, here in zip(moved, (loss[rows], rewards[rows][:, columns], gradient[rows][:, columns]), strict=True):
        close(there, here, 1e-10)


@every
@given(rankings(), st.sampled_from([NAN, INF, -INF, 1e30, -3.0]))
@quick
def test_what_stands_in_empty_slots_is_nothing(objective: Objective, of: Ranked, junk: float) -> None:
    filled = Ranked(*(torch.where(of.present, x, junk) for x in of[:3]), of.present)
    for there, here in zip(told(objective, filled), told(objective, of), strict=True):
        close(there, here, 1e-12)
    assert not told(objective, filled)[2][~of.present].any()


@given(rankings(ties=True), st.floats(-9, 9))
@quick
def test_k_wise_sees_differences_only(of: Ranked, shift: float) -> None:
    loss, _, gradient = told(lambda x: k_wise(x, centring=0.0), of)
    close(gradient.sum(dim=1), torch.zeros(len(loss)), 1e-12)
    close(k_wise(of._replace(values=of.values + shift), centring=0.0).loss, loss, 1e-9)
    counts = informative(of.gold, of.present)
    assert not loss[~counts].any()
    assert not gradient[~counts].any()
    assert bool((loss[counts] > 0).all())


@given(rankings())
@quick
def test_gradients_of_choices_sum_to_zero(of: Ranked) -> None:
    for objective in (choice, plackett_luce):
        _, _, gradient = told(lambda x, f=objective: f(x, centring=0.0), of)
        close(gradient.sum(dim=1), torch.zeros(len(gradient)), 1e-12)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=5), st.floats(0, 1))
@quick
def test_two_completions_are_a_pair(drawn: list[tuple[float, float]], centring: float) -> None:
    values = torch.tensor(drawn, dtype=torch.float64)
    ones = torch.ones(len(values), dtype=torch.float64)
    pair = bradley_terry(values[:, 1], values[:, 0], 0 * ones, ones, centring=centring / 4)  # mean^2 = sum^2 / 4
    gold = torch.tensor([[1.0, 2.0]]).repeat(len(values), 1)
    of = Ranked(values, torch.ones_like(values), gold, torch.ones_like(values, dtype=torch.bool))
    for objective in (k_wise, choice, plackett_luce):
        close(objective(of, centring=centring).loss, pair.loss, 1e-10)


@given(rankings())
@quick
def test_a_ranking_is_a_chain_of_choices(of: Ranked) -> None:
    left, total = of, torch.zeros(len(of.values), dtype=torch.float64)
    while bool((left.present.sum(dim=1) > 1).any()):
        rows = left.present.sum(dim=1) > 1
        total[rows] += choice(Ranked(*(x[rows] for x in left)), centring=0.0).loss
        taken = torch.nn.functional.one_hot(best_of(left.gold, left.present), left.gold.shape[1]).bool()
        left = left._replace(present=left.present & ~taken)
    close(plackett_luce(of, centring=0.0).loss, total, 1e-9)


@given(rankings(ties=True))
@quick
def test_a_policy_in_order_has_no_ranking_loss(of: Ranked) -> None:
    ordered = of._replace(values=(of.gold - 10) * of.length)  # averages gold - 10
    assert not rrhf(ordered, rank_weight=1.0, sft_reduction="token_mean").loss.any()
    reversed_ = of._replace(values=(-of.gold - 10) * of.length)
    worse = rrhf(reversed_, rank_weight=1.0, sft_reduction="token_mean").loss
    assert torch.equal(worse > 0, informative(of.gold, of.present))


@given(st.lists(st.tuples(scores, scores, st.booleans(), st.booleans()), min_size=1, max_size=5))
@quick
def test_harm_turned_round_is_safety(drawn: list[tuple[float, float, bool, bool]]) -> None:
    one, two = (torch.tensor([row[i] for row in drawn], dtype=torch.float64) for i in (0, 1))
    safety = torch.tensor([row[2:] for row in drawn])
    there = cost(one, two, safety, l2=0.1)
    back = cost(-two, -one, ~safety.flip(1), l2=0.1)
    close(back.loss, there.loss, 1e-10)


# --- steps ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 3)), min_size=1, max_size=12), st.randoms())
@quick
def test_scores_of_solutions(drawn: list[tuple[float, int]], draw: random.Random) -> None:
    p, owner = torch.tensor([x[0] for x in drawn], dtype=torch.float64), torch.tensor([x[1] for x in drawn])
    product, low, mean, last = (aggregate(p, owner, 5, how) for how in ("product", "min", "mean", "last"))
    for who in range(5):
        own = p[owner == who]
        if not len(own):
            assert bool(torch.stack([product, low, mean, last])[:, who].isnan().all())
            continue
        close(
            torch.stack([product, low, mean, last])[:, who], torch.stack([own.prod(), own.min(), own.mean(), own[-1]])
        )
    order = torch.tensor(draw.sample(range(len(p)), len(p)))
    for how, there in (("product", product), ("min", low), ("mean", mean)):
        moved = aggregate(p[order], owner[order], 5, how)
        torch.testing.assert_close(moved, there, equal_nan=True)


# --- ratings -------------------------------------------------------------------------------------------

played = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0])).filter(lambda g: g[0] != g[1]),
    min_size=1,
    max_size=30,
)
Game = tuple[int, int, float]


def columns(drawn: list[Game]) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, outcome."""
    a, b, outcome = zip(*drawn, strict=True)
    return torch.tensor(a), torch.tensor(b), torch.tensor(outcome, dtype=torch.float64)


@given(played, st.sampled_from([1e-3, 0.1, 5.0]), st.randoms(use_true_random=False))
@quick
def test_ratings_do_not_depend_on_the_order_of_games(drawn: list[Game], l2: float, draw: Any) -> None:
    a, b, outcome = columns(drawn)
    theta = bradley_terry_mle(a, b, outcome, 6, l2=l2)
    moved = bradley_terry_mle(*columns(draw.sample(drawn, len(drawn))), 6, l2=l2)
    close(moved, theta, 1e-10)
    close(bradley_terry_mle(b, a, 1 - outcome, 6, l2=l2), theta, 1e-10)
    # At the maximum; each component has the mean 0.
    surprise = outcome - torch.sigmoid(theta[a] - theta[b])
    close(torch.zeros(6).double().index_add(0, a, surprise).index_add(0, b, -surprise), l2 * theta, 1e-9)
    component = components(a, b, 6)
    for one in component.unique():
        close(theta[component == one].mean(), 0.0, 1e-9)
    assert bool((component[a] == component[b]).all())


@given(played, st.integers(1, 3))
@quick
def test_elo_hands_points_over(drawn: list[Game], shuffles: int) -> None:
    a, b, outcome = columns(drawn)
    options: dict[str, Any] = {"k": 32.0, "start": 1500.0, "shuffles": shuffles, "seed": 3}
    there = elo(a, b, outcome, 6, **options)
    close(there.sum(), 9000.0, 1e-12)
    close(elo(b, a, 1 - outcome, 6, **options), there, 1e-12)
    close(elo(a, b, 1 - outcome, 6, **options), 3000 - there, 1e-12)


@given(st.lists(st.tuples(scores, st.integers(0, 2)), min_size=1, max_size=12), st.floats(0.1, 9), st.floats(-50, 50))
@quick
def test_targets_do_not_depend_on_the_scale(drawn: list[tuple[float, int]], scale: float, shift: float) -> None:
    x, group = torch.tensor([d[0] for d in drawn], dtype=torch.float64), torch.tensor([d[1] for d in drawn])
    z, unit, centred = (normalise(x, group, target=t) for t in ("zscore", "minmax", "logit"))
    close(normalise(scale * x + shift, group, target="zscore"), z, 1e-6)
    close(normalise(scale * x + shift, group, target="minmax"), unit, 1e-6)
    close(normalise(scale * x + shift, group, target="logit"), scale * centred, 1e-6)
    for one in group.unique():
        close(z[group == one].mean(), 0.0, 1e-9)
        constant = bool((x[group == one] == x[group == one][0]).all())
        close(z[group == one].square().mean(), 0.0 if constant else 1.0, 1e-9)
        assert bool(((unit >= 0) & (unit <= 1)).all())
