"""Rankings. B prompts, K completions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import ranking
from tests.objectives.preference_support import LOG2, holds, sigma, softplus
from tests.objectives.support import (
    INF,
    NAN,
    Check,
    checks_of,
    close,
    differentiates,
    doubles,
    gradients,
    leaf,
    refuses,
)

RRHF: dict[str, Any] = {"rank_weight": 1.0, "sft_reduction": "token_mean"}
STABLE: dict[str, Any] = {"margin": 1.0, "rating_scale": 7.0, "ratio": 0.5, "reduction": "mean"}
SCORES = ("k_wise", "choice", "plackett_luce")


def ranked(
    m: Any, values: Tensor, gold: list[list[float]], length: list[list[int]] | None = None, absent: float | None = None
) -> Any:
    """All present; with `absent`, two slots more, in front and at the end, that hold it and are not."""
    tensors = [values, torch.tensor(length or [[1] * values.shape[1]] * len(values)), torch.tensor(gold).to(values)]
    present = torch.ones_like(values, dtype=torch.bool)
    if absent is None:
        return m.Ranked(*tensors, present)
    junk = torch.full_like(values[:, :1], absent)
    sides = [junk, torch.zeros_like(tensors[1][:, :1]), junk]
    padded = [torch.cat([side, x, side], dim=1) for side, x in zip(sides, tensors, strict=True)]
    nothing = torch.zeros_like(present[:, :1])
    return m.Ranked(*padded, torch.cat([nothing, present, nothing], dim=1))


def everything(m: Any, of: Any) -> list[Any]:
    """What every function says of rankings without ties."""
    return [
        *(getattr(m, name)(of, centring=c) for name in SCORES for c in (0.0, 0.1)),
        *(m.rrhf(of, rank_weight=2.0, sft_reduction=s) for s in ("token_mean", "sum")),
        *(m.stable_alignment(of, **(STABLE | {"reduction": r})) for r in ("mean", "max", "sum")),
    ]


# --- all of them ---------------------------------------------------------------------------------------


def check_helpers(m: Any) -> None:
    gold = torch.tensor([[1.0, 3.0, 3.0, 9.0], [NAN, -5.0, -5.0, INF], [2.0, NAN, 1.0, 2.0]])
    present = torch.tensor([[True, True, True, False], [False, True, True, False], [True, False, True, True]])
    close(m.best_of(gold, present), [1, 1, 0])
    assert m.best_of(gold, present).dtype == torch.int64
    assert m.informative(gold, present).tolist() == [True, False, True]
    pairs = [[tuple(p) for p in rows.nonzero().tolist()] for rows in m.better(gold, present)]
    assert pairs == [[(1, 0), (2, 0)], [], [(0, 2), (3, 2)]]


def check_ranking_of_one_is_refused(m: Any) -> None:
    of = ranked(m, doubles(1, 2)[:, None], [[1], [2]])
    padded = m.Ranked(*(torch.tensor([[1.0, 2.0], [3.0, 4.0]]),) * 3, torch.tensor([[True, True], [False, True]]))
    for wrong in (of, padded):
        for name in SCORES:
            assert refuses(ValueError, getattr(m, name), wrong, centring=0.0)
        assert refuses(ValueError, m.rrhf, wrong, **RRHF)
        assert refuses(ValueError, m.stable_alignment, wrong, **STABLE)


def check_ranking_slots_that_are_not_present(m: Any) -> None:
    values, gold, length = doubles(-5, -2, -9)[None].repeat(2, 1), [[2, 1, 3], [3, 2, 1]], [[2, 3, 9], [1, 4, 3]]
    plain, junk = leaf(values), leaf(values)
    for absent in (NAN, INF, -INF, 7.0, 1e30):
        there = everything(m, ranked(m, plain, gold, length))
        padded = everything(m, ranked(m, junk, gold, length, absent))
        for one, other in zip(there, padded, strict=True):
            close(other.loss, one.loss, 1e-12)
            close(other.rewards[:, 1:-1], one.rewards, 1e-12)
            close(other.rewards[:, [0, -1]], torch.zeros(2, 2))
            close(gradients(other.loss, junk)[0], gradients(one.loss, plain)[0], 1e-12)
    # Nothing flows into the slots themselves.
    whole = leaf(torch.tensor([[NAN, 1.0, 2.0]]))
    present = torch.tensor([[False, True, True]])
    of = m.Ranked(whole, torch.tensor([[NAN, 2.0, 3.0]]), torch.tensor([[NAN, 1.0, 2.0]]), present)
    for judged in everything(m, of):
        assert float(gradients(judged.loss, whole)[0][0, 0]) == 0.0
        assert float(judged.rewards[0, 0]) == 0.0


def check_ranking_extremes(m: Any) -> None:
    values = leaf(torch.tensor([[-1e4, 0.0, -1e4, -3.0], [0.0, 0.0, 0.0, 0.0], [1e4, -1e4, 1e4, 0.0]]))
    of = ranked(m, values, [[4, 3, 2, 1], [1, 2, 3, 4], [1, 4, 2, 3]], [[1, 7, 0, 3], [0, 0, 0, 0], [1, 1, 2, 5]])
    for judged in everything(m, of):
        assert holds(judged, [values])
        assert not judged.rewards.requires_grad


def check_ranking_half_precision(m: Any) -> None:
    numbers, gold, length = [[-1040.0, -5.0, -7.0], [-300.0, -1.0, -42.0]], [[1, 3, 2], [5, 1, 6]], [[7, 3, 3]] * 2
    for half in (torch.bfloat16, torch.float16):
        low, exact = (ranked(m, torch.tensor(numbers, dtype=d), gold, length) for d in (half, torch.float64))
        for one, other in zip(everything(m, low), everything(m, exact), strict=True):
            assert one.loss.dtype == one.rewards.dtype == torch.float32
            close(one.loss, other.loss.float(), 1e-6)
            close(one.rewards, other.rewards.float(), 1e-6)
    # Ratings in another precision than the values do not raise the loss to theirs.
    mixed = ranked(m, torch.tensor(numbers), gold, length)
    mixed = mixed._replace(gold=mixed.gold.double())
    assert {judged.loss.dtype for judged in everything(m, mixed)} == {torch.float32}


# --- scores --------------------------------------------------------------------------------------------


def check_k_wise_by_hand(m: Any) -> None:
    # Scores 2, 0, 1 of places 1, 2, 3: pairs (2, 0), (2, 1), (0, 1).
    # log(1 + e^-2) = 0.1269280, log(1 + e^-1) = 0.3132617, log(1 + e^1) = 1.3132617; sum / 3 = 0.5844838
    r = leaf(doubles(2, 0, 1)[None])
    judged = m.k_wise(ranked(m, r, [[3, 2, 1]]), centring=0.0)
    close(judged.loss, [0.5844838], 1e-7)
    close(judged.rewards, r)
    assert judged.likelihood == 0
    # -(sigma(-2) + sigma(-1)) / 3; (sigma(-2) - sigma(1)) / 3; (sigma(-1) + sigma(1)) / 3 = 1 / 3
    wanted = [-(sigma(-2) + sigma(-1)) / 3, (sigma(-2) - sigma(1)) / 3, 1 / 3]
    close(gradients(judged.loss, r)[0], [wanted], 1e-9)
    # centring 0.3 x (3 / 3)^2, with 2 x 0.3 x 1 / 3 of gradient for each
    centred = m.k_wise(ranked(m, r, [[3, 2, 1]]), centring=0.3)
    close(centred.loss, [0.8844838], 1e-7)
    close(gradients(centred.loss, r)[0], [[w + 0.2 for w in wanted]], 1e-9)
    assert differentiates(
        lambda x: m.k_wise(ranked(m, x, [[3, 2, 2, 1], [1, 1, 2, 3]]), centring=0.1).loss,
        torch.stack([doubles(0.5, -1, 2, 0), doubles(3, 1, 0, -2)]),
    )


def check_k_wise_ties(m: Any) -> None:
    # Of 2, 0, 1 the first two are level: pairs (2, 1) and (0, 1) only.
    r = leaf(doubles(2, 0, 1)[None])
    judged = m.k_wise(ranked(m, r, [[3, 3, 1]]), centring=0.0)
    close(judged.loss, [(softplus(-1) + softplus(1)) / 2])
    # Level throughout: nothing to learn, centring or not.
    for c in (0.0, 0.1):
        level = m.k_wise(ranked(m, r, [[3, 3, 3]]), centring=c)
        assert float(level.loss) == 0.0
        assert not gradients(level.loss, r)[0].any()


def check_k_wise_counts_prompts_alike(m: Any) -> None:
    for k in (2, 3, 7):
        r = torch.full((1, k), 1.5)
        close(m.k_wise(ranked(m, r, [list(range(k))]), centring=0.0).loss, [LOG2], 1e-6)
        close(m.k_wise(ranked(m, r, [list(range(k))], absent=NAN), centring=2.0).loss, [LOG2 + 2 * 2.25], 1e-6)


def check_choice_by_hand(m: Any) -> None:
    # log(e^1 + e^0 + e^2 + e^-1) = 2.4401897, less the chosen one's 1
    r = leaf(doubles(1, 0, 2, -1)[None])
    judged = m.choice(ranked(m, r, [[1, 0, 0, 0]]), centring=0.0)
    close(judged.loss, [1.4401897], 1e-7)
    close(judged.rewards, r)
    assert judged.likelihood == 0
    chosen = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    close(gradients(judged.loss, r)[0], torch.softmax(r, 1) - chosen)  # softmax - [the chosen one]
    # centring 0.5 x (2 / 4)^2
    close(m.choice(ranked(m, r, [[1, 0, 0, 0]]), centring=0.5).loss, [1.4401897 + 0.125], 1e-7)
    close(m.choice(ranked(m, torch.zeros(1, 4), [[0, 0, 5, 1]]), centring=0.5).loss, [math.log(4)])
    # The top of the other ratings is not the only thing seen: the order below does not matter.
    close(m.choice(ranked(m, r, [[9, 3, 4, 5]]), centring=0.0).loss, judged.loss)
    assert differentiates(lambda x: m.choice(ranked(m, x, [[1, 5, 2]]), centring=0.1).loss, doubles(0.5, -1, 2)[None])


def check_choice_refuses_two_at_the_top(m: Any) -> None:
    r = doubles(1, 0, 2)[None]
    assert refuses(ValueError, m.choice, ranked(m, r, [[2, 1, 2]]), centring=0.0)
    m.choice(ranked(m, r, [[2, 1, 1]]), centring=0.0)
    m.choice(ranked(m, r, [[2, 1, 1]], absent=2.0), centring=0.0)


def check_plackett_luce_by_hand(m: Any) -> None:
    # Order 0, 1, 2 with scores 2, 0, 1: log(e^2 + e^0 + e^1) - 2 = 0.4076060; log(e^0 + e^1) - 0 = 1.3132617
    r = leaf(doubles(2, 0, 1)[None])
    judged = m.plackett_luce(ranked(m, r, [[3, 2, 1]]), centring=0.0)
    close(judged.loss, [1.7208676], 1e-7)
    close(judged.rewards, r)
    assert judged.likelihood == 0
    first, second = torch.softmax(doubles(2, 0, 1), 0), torch.softmax(doubles(0, 1), 0)
    close(gradients(judged.loss, r)[0], [[first[0] - 1, first[1] + second[0] - 1, first[2] + second[1]]])
    close(m.plackett_luce(ranked(m, r, [[3, 2, 1]]), centring=0.5).loss, [2.2208676], 1e-7)
    close(m.plackett_luce(ranked(m, torch.ones(1, 4), [[2, 1, 4, 3]]), centring=0.0).loss, [math.log(24)])
    assert differentiates(
        lambda x: m.plackett_luce(ranked(m, x, [[3, 4, 2, 1]]), centring=0.1).loss, doubles(0.5, -1, 2, 0)[None]
    )


def check_plackett_luce_refuses_ties(m: Any) -> None:
    r = doubles(1, 0, 2)[None]
    for gold in ([[2, 1, 1]], [[1, 2, 2]], [[3, 1, 3]]):
        assert refuses(ValueError, m.plackett_luce, ranked(m, r, gold), centring=0.0)
    m.plackett_luce(ranked(m, r, [[1, 3, 2]], absent=3.0), centring=0.0)


# --- log-probabilities ---------------------------------------------------------------------------------


def check_rrhf_by_hand(m: Any) -> None:
    # Averages -2, -1, -3 of ratings 3, 2, 1: only (0, 1) is turned round, by 1; the best is the first: NLL 8.
    sums, length = leaf(doubles(-8, -2, -9)[None]), [[4, 2, 3]]
    of = ranked(m, sums, [[3, 2, 1]], length)
    judged = m.rrhf(of, rank_weight=3.0, sft_reduction="token_mean")
    close(judged.loss, [3.0])
    close(judged.rewards, [[-2.0, -1.0, -3.0]])
    assert judged.likelihood == 1.0
    close(gradients(judged.loss, sums)[0], [[-3 / 4, 3 / 2, 0.0]])  # - / |y_0|, + / |y_1|
    summed = m.rrhf(of, rank_weight=3.0, sft_reduction="sum")
    close(summed.loss, [11.0])
    assert summed.likelihood == 0.0
    close(gradients(summed.loss, sums)[0], [[-3 / 4 - 1, 3 / 2, 0.0]])
    for sft in ("token_mean", "sum"):
        assert differentiates(
            lambda x, sft=sft: m.rrhf(ranked(m, x, [[3, 2, 1]], length), rank_weight=2.0, sft_reduction=sft).loss,
            doubles(-8, -2, -5)[None],
        )


def check_rrhf_pairs(m: Any) -> None:
    # Averages -3, -2, -1 in the wrong order: gaps 1, 2 and 1, added up. Ties make no pair, and the rest is as given.
    sums = doubles(-3, -2, -1)[None]
    close(m.rrhf(ranked(m, sums, [[3, 2, 1]]), **RRHF).loss, [4.0])
    close(m.rrhf(ranked(m, sums, [[3, 3, 1]]), **RRHF).loss, [3.0])
    close(m.rrhf(ranked(m, sums, [[1, 1, 1]]), **RRHF).loss, [0.0])
    close(m.rrhf(ranked(m, sums, [[1, 2, 3]]), **RRHF).loss, [0.0])
    # The first of two at the top is the one to imitate.
    for gold, nll in (([[3, 3, 1]], 3.0), ([[1, 3, 3]], 2.0)):
        close(m.rrhf(ranked(m, sums, gold), rank_weight=0.0, sft_reduction="sum").loss, [nll])


def check_stable_alignment_by_hand(m: Any) -> None:
    # n = 2, 1, 3 (8 / 4, 2 / 2, 9 / 3), ratings 7, 6, 2, margin 3.5 / 7 = 0.5 a point:
    # t_1 = 2 - 1 + 0.5 x 1 = 1.5, t_2 = 2 - 3 + 0.5 x 5 = 1.5
    sums, length = leaf(doubles(-8, -2, -9)[None]), [[4, 2, 3]]
    settings = STABLE | {"margin": 3.5, "ratio": 0.2}
    judged = m.stable_alignment(ranked(m, sums, [[7, 6, 2]], length), **settings)
    close(judged.loss, [2.3])  # 2 + 0.2 x 1.5
    close(judged.rewards, [[-2.0, -1.0, -3.0]])
    assert judged.likelihood == 0.0
    # n_0: 1 + 0.2, n_1 and n_2: -0.2 / 2; n = -S / length
    close(gradients(judged.loss, sums)[0], [[-1.2 / 4, 0.1 / 2, 0.1 / 3]])


def check_stable_alignment_reductions(m: Any) -> None:
    # The best is the last: n = 1, 4, 2, ratings 3, 5, 7, scale 4, margin 2: t = 2 - 1 + 2 = 3 and 2 - 4 + 1 = -1.
    sums = leaf(doubles(-1, -4, -2)[None])
    settings = STABLE | {"margin": 2.0, "rating_scale": 4.0, "ratio": 0.5}

    def at(reduction: str, gold: list[list[float]] | None = None) -> Tensor:
        of = ranked(m, sums, gold or [[3, 5, 7]])
        return m.stable_alignment(of, **(settings | {"reduction": reduction})).loss

    close(at("mean"), [2.5])  # 2 + 0.5 x (3 - 1) / 2
    close(at("max"), [3.5])
    close(at("sum"), [3.5])
    close(gradients(at("mean"), sums)[0], [[0.25, 0.25, -1.5]])
    close(gradients(at("max"), sums)[0], [[0.5, 0.0, -1.5]])
    close(gradients(at("sum"), sums)[0], [[0.5, 0.0, -1.5]])
    # A best that is far ahead (n = 1 against 4 and 2, t = -2 and -0.25) asks for nothing but likelihood.
    for reduction in ("mean", "max", "sum"):
        close(at(reduction, [[7, 5, 5.5]]), [1.0])
        close(gradients(at(reduction, [[7, 5, 5.5]]), sums)[0], [[-1.0, 0.0, 0.0]])
        of = [[3.0, 5.0, 7.0]]
        assert differentiates(
            lambda x, r=reduction, of=of: m.stable_alignment(ranked(m, x, of), **(settings | {"reduction": r})).loss,
            doubles(-1, -1.3, -2)[None],
        )
    # All positive: t = 3 and 2 - 1.5 + 1 = 1.5.
    sums = leaf(doubles(-1, -1.5, -2)[None])
    close(torch.cat([at("mean"), at("max"), at("sum")]), [3.125, 3.5, 4.25])
    assert refuses(KeyError, at, "median")


def check_stable_alignment_ratings_stay_with_their_completion(m: Any) -> None:
    # Sorted or not, each completion keeps its own rating.
    sums, gold = doubles(-8, -2, -9, -5), [7.0, 6.0, 2.0, 4.0]
    for order in ([0, 1, 2, 3], [2, 3, 1, 0], [3, 0, 2, 1]):
        of = ranked(m, sums[order][None], [[gold[i] for i in order]])
        # n_best 8, margins 1/7, 5/7, 3/7: t = 6 + 1/7, -1 + 5/7, 3 + 3/7, mean (8 + 9/7) / 3
        close(m.stable_alignment(of, **STABLE).loss, [8 + 0.5 * (8 + 9 / 7) / 3])


MODULE = ranking
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("k-wise: summed over pairs", check_k_wise_counts_prompts_alike,
     ".sum(dim=(1, 2)) / count.clamp(min=1)", ".sum(dim=(1, 2))"),
    ("k-wise: divided by all pairs, ties too", check_k_wise_ties, "count.clamp(min=1)", "(r.shape[1] * 2 - 3)"),
    ("k-wise: ties as pairs", check_k_wise_ties, "gold[:, :, None] > gold[:, None, :]",
     "gold[:, :, None] >= gold[:, None, :]"),
    ("k-wise: padding as pairs", check_ranking_slots_that_are_not_present, "return there & (", "return ("),
    ("k-wise: ranks for scores", check_k_wise_by_hand, "gold[:, :, None] > gold[:, None, :]",
     "gold[:, :, None] < gold[:, None, :]"),
    ("k-wise: centring of prompts that are all ties", check_k_wise_ties,
     "Judged(torch.where(count > 0, losses, torch.zeros_like(losses)), r.detach())", "Judged(losses, r.detach())"),
    ("k-wise: masked after the loss", check_ranking_slots_that_are_not_present,
     "return torch.where(ranked.present, values, torch.zeros_like(values))", "return values"),
    ("k-wise: multiplied away", check_ranking_slots_that_are_not_present,
     "torch.where(ranked.present, values, torch.zeros_like(values))", "values * ranked.present"),
    ("k-wise: centring of each score", check_k_wise_by_hand, "(scores.sum(dim=1) / present.sum(dim=1)).square()",
     "(scores.square().sum(dim=1) / present.sum(dim=1))"),
    ("k-wise: centring over padding", check_ranking_slots_that_are_not_present, "/ present.sum(dim=1)).square()",
     "/ present.shape[1]).square()"),
    ("choice: padding in the sum", check_ranking_slots_that_are_not_present,
     "torch.where(present, r, -torch.inf).logsumexp(dim=1)", "r.logsumexp(dim=1)"),
    ("choice: log of a softmax", check_ranking_extremes,
     "torch.where(present, r, -torch.inf).logsumexp(dim=1)", "torch.where(present, r, -torch.inf).exp().sum(1).log()"),
    ("choice: a best picked among equals", check_choice_refuses_two_at_the_top, "(tops.sum(dim=1) > 1).any()",
     "(tops.sum(dim=1) > 9).any()"),
    ("plackett-luce: worst first", check_plackett_luce_by_hand, "left = above | itself", "left = above.mT | itself"),
    ("plackett-luce: the chosen one left out", check_ranking_extremes, "left = above | itself", "left = above"),
    ("plackett-luce: only the first choice", check_plackett_luce_by_hand, "chain.sum(dim=1)", "chain.amax(dim=1)"),
    ("rrhf: sums compared", check_rrhf_by_hand, "p = _averages(policy)", "p = _values(policy)"),
    ("rrhf: hinge turned round", check_rrhf_by_hand, "F.relu(p[:, None, :] - p[:, :, None])",
     "F.relu(p[:, :, None] - p[:, None, :])"),
    ("rrhf: mean over pairs", check_rrhf_pairs, "torch.zeros_like(hinges)).sum(dim=(1, 2))",
     "torch.zeros_like(hinges)).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2))"),
    ("rrhf: with a margin", check_rrhf_pairs, "F.relu(p[:, None, :] - p[:, :, None])",
     "F.relu(1 + p[:, None, :] - p[:, :, None])"),
    ("rrhf: likelihood weighed as the ranking", check_rrhf_by_hand, "return Judged(loss - _at(",
     "return Judged(loss - rank_weight * _at("),
    ("rrhf: likelihood twice", check_rrhf_by_hand, "p.detach(), likelihood=1.0)",
     "p.detach(), likelihood=2.0)"),
    ("stable alignment: another's rating", check_stable_alignment_ratings_stay_with_their_completion,
     "(_at(gold, best)[:, None] - gold) / rating_scale",
     "(_at(gold, best)[:, None] - gold.sort(dim=1, descending=True).values) / rating_scale"),
    ("stable alignment: margin turned round", check_stable_alignment_by_hand,
     "(_at(gold, best)[:, None] - gold) / rating_scale", "(gold - _at(gold, best)[:, None]) / rating_scale"),
    ("stable alignment: the best against itself", check_stable_alignment_by_hand,
     "t.sum(dim=1) / others.sum(dim=1)", "t.sum(dim=1) / policy.present.sum(dim=1)"),
    ("stable alignment: hinges before the mean", check_stable_alignment_reductions,
     "F.relu(t.sum(dim=1) / others.sum(dim=1))", "F.relu(t).sum(dim=1) / others.sum(dim=1)"),
    ("stable alignment: summed log-probabilities", check_stable_alignment_by_hand, "n = -_averages(policy)",
     "n = -_values(policy)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "_averages: constant: 1 -> 2": "the length of a slot that holds 0 anyway",
    "k_wise: dropped: count.clamp(min=1) -> _same(count)": "a prompt without pairs is set to 0 just after",
}
