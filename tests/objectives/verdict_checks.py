"""Objectives on single labelled completions. B examples, u = policy - reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import verdict
from tests.objectives.preference_support import (
    LOG2,
    holds,
    moves_only_the_policy,
    sigma,
    softplus,
    survives,
    upcasts,
)
from tests.objectives.support import Check, checks_of, close, differentiates, doubles, gradients, leaf, untouched

KTO = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 2.0}


def check_half_precision_is_upcast(m: Any) -> None:
    upcasts(m)
    running = torch.tensor([0.71875, -1.2109375, 3.0, 4.0])
    exact = m.reward_shift(running, "mean")
    low = m.reward_shift(running.to(torch.bfloat16), "mean")
    assert low.dtype == torch.float32
    close(low, exact)
    # Running means are kept in float64; rows in float32 stay so.
    row = torch.tensor([-1.0])
    assert m.bco(row, row, row < 0, running.double(), **KTO, shift="mean").loss.dtype == torch.float32


def check_only_the_policy_moves(m: Any) -> None:
    moves_only_the_policy(m)


def check_extremes(m: Any) -> None:
    survives(m)


# --- KTO -----------------------------------------------------------------------------------------------


def _kto(m: Any, kl: Tensor) -> tuple[Any, list[Tensor]]:
    """u = 2.5 and -1.5 with a KL of 0.5 and beta 0.5: sigma of 1 and -1; desirable, undesirable, desirable."""
    policy, reference = leaf(doubles(-5, -9, -5)), leaf(doubles(-7.5, -7.5, -7.5))
    return m.kto(policy, reference, torch.tensor([True, False, True]), kl, **KTO), [policy, reference]


def check_kto_by_hand(m: Any) -> None:
    # 1.5 (1 - sigma(1)) = 1.5 x 0.2689414 and 2 (1 - sigma(0.5 (0.5 + 1.5))) = 2 x 0.2689414
    for kl in (doubles(0.5).squeeze(), doubles(0.5, 0.5, 0.5)):
        judged, _ = _kto(m, kl)
        close(judged.loss, [0.4034121, 0.5378828, 0.4034121], 1e-7)
        close(judged.rewards, [[1.25], [-0.75], [1.25]])
        assert not judged.rewards.requires_grad
        assert judged.likelihood == 0


def check_kto_gradient(m: Any) -> None:
    # -w beta s (1 - s) for desirable rows, + for the others; s (1 - s) = 0.1966119 at +-1.
    kl = leaf(doubles(0.5).squeeze())
    judged, (policy, reference) = _kto(m, kl)
    assert untouched(judged.loss, reference, kl)
    (g,) = gradients(judged.loss, policy)
    close(g, [-1.5 * 0.5 * 0.1966119, 2 * 0.5 * 0.1966119, -1.5 * 0.5 * 0.1966119], 1e-7)
    good, bad = torch.tensor([True, True]), torch.tensor([False, False])
    for label in (good, bad):
        assert differentiates(
            lambda p, d=label: m.kto(p, doubles(-7, -7), d, doubles(0.5).squeeze(), **KTO).loss, doubles(-5, -9)
        )


def check_kto_limits(m: Any) -> None:
    labels = torch.tensor([True, False, True, False])
    same = torch.tensor([-1.0, -2.0, -30.0, 0.0])
    start = m.kto(leaf(same), same, labels, torch.zeros(()), **KTO)
    close(start.loss, [0.75, 1.0, 0.75, 1.0])  # half the weight
    close(start.rewards, torch.zeros(4, 1))
    policy = leaf(torch.tensor([-1e4, -1e4, 1e4, 1e4]))
    far = m.kto(policy, torch.zeros(4), labels, torch.zeros(()), **KTO)
    close(far.loss, [1.5, 0.0, 0.0, 2.0])
    assert holds(far, [policy])


def check_kto_digits(m: Any) -> None:
    # 17 nats away 1 - sigmoid has no digits left in float32.
    for label, u in ((True, 17.0), (False, -17.0)):
        policy = leaf(torch.tensor([u]))
        judged = m.kto(policy, torch.zeros(1), torch.tensor([label]), torch.zeros(()), **(KTO | {"beta": 1.0}))
        weight = 1.5 if label else 2.0
        close(judged.loss * 1e8, [weight * 4.1399376], 1e-4)
        assert float(gradients(judged.loss, policy)[0].abs()) > 0


def check_kto_rows_are_alone(m: Any) -> None:
    # A row's loss knows nothing of how many rows of each kind there are: the mean is over the mixed batch.
    policy, reference = doubles(-5, -9, -5, -6), doubles(-7, -7, -7, -7)
    labels = torch.tensor([True, False, True, True])
    whole = m.kto(policy, reference, labels, doubles(0.5).squeeze(), **KTO)
    for i in range(4):
        one = slice(i, i + 1)
        alone = m.kto(policy[one], reference[one], labels[one], doubles(0.5).squeeze(), **KTO)
        close(alone.loss, whole.loss[one])


# --- BCO -----------------------------------------------------------------------------------------------


def check_reward_shift(m: Any) -> None:
    # (3 x 2 + 5 x -1) / 8, (2 - 1) / 2; a class that has not been seen does not pull towards 0.
    table = [
        ((2.0, -1.0, 3.0, 5.0), 0.125, 0.5),
        ((2.0, 0.0, 3.0, 0.0), 2.0, 2.0),
        ((0.0, -1.0, 0.0, 5.0), -1.0, -1.0),
        ((2.0, -1.0, 1.0, 0.0), 2.0, 2.0),
        ((0.0, 0.0, 0.0, 0.0), 0.0, 0.0),
    ]
    for running, mean, middle in table:
        values = leaf(doubles(*running))
        for shift, expected in (("none", 0.0), ("mean", mean), ("midpoint", middle)):
            d = m.reward_shift(values, shift)
            assert d.shape == ()
            assert not d.requires_grad
            close(d, expected)


def check_bco(m: Any) -> None:
    # beta u = 1.25, -0.75, 1.25; d = 0.5
    policy, reference = leaf(doubles(-5, -9, -5)), leaf(doubles(-7.5, -7.5, -7.5))
    labels, running = torch.tensor([True, False, False]), leaf(doubles(2, -1, 3, 1))
    judged = m.bco(policy, reference, labels, running, **KTO, shift="midpoint")
    close(judged.loss, [1.5 * softplus(-0.75), 2 * softplus(-1.25), 2 * softplus(0.75)])
    close(judged.rewards, [[1.25], [-0.75], [1.25]])
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0
    assert untouched(judged.loss, reference, running)
    (g,) = gradients(judged.loss, policy)
    close(g, [-1.5 * 0.5 * sigma(-0.75), 2 * 0.5 * sigma(-1.25), 2 * 0.5 * sigma(0.75)])
    plain = m.bco(policy, reference, labels, running, **KTO, shift="none")
    close(plain.loss, [1.5 * softplus(-1.25), 2 * softplus(-0.75), 2 * softplus(1.25)])


def check_bco_start(m: Any) -> None:
    same, labels = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([True, False, True])
    for shift in ("none", "mean", "midpoint"):
        start = m.bco(leaf(same), same, labels, torch.zeros(4), **KTO, shift=shift)
        close(start.loss, [1.5 * LOG2, 2 * LOG2, 1.5 * LOG2])
        close(start.rewards, torch.zeros(3, 1))


MODULE = verdict
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("kto: means of the classes", check_kto_rows_are_alone,
     "torch.where(desirable, good, bad), (beta * u)",
     "torch.where(desirable, good / desirable.sum(), bad / (~desirable).sum().clamp(min=1)) * len(u), (beta * u)"),
    ("kto: KL takes gradients", check_kto_gradient, "kl_point.detach()", "kl_point"),
    ("kto: reference takes gradients", check_kto_gradient, "u = policy - reference.detach()", "u = policy - reference"),
    ("kto: labels swapped", check_kto_by_hand, "torch.where(desirable, good, bad), (beta * u)",
     "torch.where(desirable, bad, good), (beta * u)"),
    ("kto: KL with the wrong sign", check_kto_by_hand, "(u - kl_point", "(u + kl_point"),
    ("kto: a log-sigmoid", check_kto_by_hand, "desirable_weight * torch.sigmoid(-away)",
     "-desirable_weight * F.logsigmoid(away)"),
    ("kto: 1 - sigmoid", check_kto_digits, "desirable_weight * torch.sigmoid(-away)",
     "desirable_weight * (1 - torch.sigmoid(away))"),
    ("bco: shift takes gradients", check_reward_shift, "full_precision(running.detach())", "full_precision(running)"),
    ("bco: middle for a class not seen", check_reward_shift, '"midpoint": counts.sign()',
     '"midpoint": torch.ones_like(counts)'),
    ("bco: mean of means", check_reward_shift, '"mean": counts', '"mean": counts.sign()'),
    ("bco: shift of one class alone", check_bco, "F.logsigmoid(-away)", "F.logsigmoid(-rewards)"),
    ("bco: reference takes gradients", check_bco, "beta * (policy - reference.detach())",
     "beta * (policy - reference)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
