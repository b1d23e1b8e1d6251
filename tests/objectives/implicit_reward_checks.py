"""Objectives that judge each completion's implicit reward. B examples; u = policy - reference, z = beta D."""

from __future__ import annotations

import math
from typing import Any

import torch

from rlhf_cli.objectives import implicit_reward
from tests.objectives.preference_support import (
    LOG2,
    at,
    equal,
    moves_only_the_policy,
    pair,
    sigma,
    softplus,
    survives,
    two,
    upcasts,
)
from tests.objectives.support import Check, checks_of, close, doubles, gradients, leaf, untouched

NOTHING_YET = torch.zeros(4)


def bell(x: float) -> float:
    """s (1 - s), s = sigma(x)."""
    return sigma(x) * sigma(-x)


def check_half_precision_is_upcast(m: Any) -> None:
    upcasts(m)


def check_only_the_policy_moves(m: Any) -> None:
    moves_only_the_policy(m)


def check_extremes(m: Any) -> None:
    survives(m)


def check_all_pair_rewards(m: Any) -> None:
    policy, reference, _ = two()
    everything = [
        m.exo(policy, reference, beta=0.5, label_smoothing=0.1),
        m.bco_pair(policy, reference, torch.tensor([1.0, 2.0, 3.0, 4.0]), beta=0.5, shift="mean"),
        m.discopop(policy, reference, beta=0.5, temperature=0.05),
        *(f(policy, reference, beta=0.5) for f in (m.nca, m.sppo, m.apo_zero, m.apo_down)),
    ]
    for judged in everything:
        close(judged.rewards, [[0.5, -0.5], [0.0, 1.0]])
        assert judged.likelihood == 0


# --- exo -----------------------------------------------------------------------------------------------


def check_exo(m: Any) -> None:
    # z = 1, eps 0.1: 0.7310586 (-0.3132617 + 0.1053605) + 0.2689414 (-1.3132617 + 2.3025851) = 0.1140820
    policy, reference, leaves = two()
    judged = m.exo(policy, reference, beta=0.5, label_smoothing=0.1)
    close(judged.loss[0], 0.1140820, 2e-7)
    right = sigma(-1) * (math.log(sigma(-1)) - math.log(0.9))
    close(judged.loss[1], right + sigma(1) * (math.log(sigma(1)) - math.log(0.1)))
    # beta s (1 - s) (z - log((1 - eps) / eps))
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [0.5 * bell(1) * (1 - math.log(9)), 0.5 * bell(1) * (-1 - math.log(9))])
    close(h, -g)
    # The minimum, 0, lies at sigma(z) = 1 - eps.
    policy, reference, leaves = at(math.log(9) / 0.5, 0)
    lowest = m.exo(policy, reference, beta=0.5, label_smoothing=0.1)
    close(lowest.loss, [0.0])
    close(gradients(lowest.loss, *leaves)[0], [0.0])


def check_exo_limits(m: Any) -> None:
    close(m.exo(*equal(), beta=0.1, label_smoothing=1e-3).loss, [2.761230] * 3, 1e-6)
    # A preference that is certain: -log of the share that the target gives it.
    for u, share in ((-1e4, 0.1), (1e4, 0.9)):
        policy, reference, _ = at(u, 0)
        close(m.exo(policy, reference, beta=0.5, label_smoothing=0.1).loss, [-math.log(share)])
    # log(1 - eps) of a tiny eps keeps its digits: sigma(z) = 1 here, and -log(1 - 1e-17) = 1e-17.
    policy, reference, _ = at(1e4, 0)
    close(m.exo(policy, reference, beta=0.5, label_smoothing=1e-17).loss * 1e17, [1.0])


# --- nca, bco ------------------------------------------------------------------------------------------


def check_nca(m: Any) -> None:
    # beta u = 0.5, -0.5: 0.4740770 + 0.9740770 / 2 + 0.4740770 / 2; 0, 1: log 2 + log 2 / 2 + 1.3132617 / 2
    policy, reference, leaves = two()
    judged = m.nca(policy, reference, beta=0.5)
    close(judged.loss, [1.1981540, 1.6963516], 1e-7)
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [-0.5 * (sigma(-0.5) - sigma(0.5) / 2), -0.5 * (0.5 - 0.25)])
    close(h, [0.5 * sigma(-0.5) / 2, 0.5 * sigma(1) / 2])
    close(m.nca(*equal(), beta=0.1).loss, [2 * LOG2] * 3, 1e-6)
    # Chosen rests where sigma(beta u) = 2/3.
    policy, reference, leaves = at(LOG2 / 0.5, 0)
    close(gradients(m.nca(policy, reference, beta=0.5).loss, *leaves)[0], [0.0])


def check_bco_pair(m: Any) -> None:
    # beta u = 0.5, -0.5 and 0, 1; d = (3 x 2 + 1) / 4 = 1.75, or (2 + 1) / 2 = 1.5
    running = leaf(doubles(2, 1, 3, 1))
    policy, reference, leaves = two()
    for shift, d in (("none", 0.0), ("mean", 1.75), ("midpoint", 1.5)):
        judged = m.bco_pair(policy, reference, running, beta=0.5, shift=shift)
        close(judged.loss, [softplus(d - 0.5) + softplus(-0.5 - d), softplus(d) + softplus(1 - d)])
        assert untouched(judged.loss, running)
        g, h = gradients(judged.loss, *leaves[:2])
        close(g, [-0.5 * sigma(d - 0.5), -0.5 * sigma(d)])
        close(h, [0.5 * sigma(-0.5 - d), 0.5 * sigma(1 - d)])
        start = m.bco_pair(*equal(), NOTHING_YET, beta=0.1, shift=shift)
        close(start.loss, [2 * LOG2] * 3, 1e-6)


# --- sppo, apo -----------------------------------------------------------------------------------------


def check_sppo(m: Any) -> None:
    # The targets are +-2: (1 - 2)^2 + (-1 + 2)^2 and (0 - 2)^2 + (2 + 2)^2
    policy, reference, leaves = two()
    judged = m.sppo(policy, reference, beta=0.25)
    close(judged.loss, [2.0, 20.0])
    close(torch.stack(gradients(judged.loss, *leaves[:2])), [[-2.0, -4.0], [2.0, 8.0]])
    close(m.sppo(*equal(), beta=0.1).loss, [50.0] * 3, 1e-6)
    close(m.sppo(*equal(), beta=1e-3).loss, [5e5] * 3, 1e-6)


def check_apo_zero(m: Any) -> None:
    # beta u = 0.5, -0.5 and 0, 1
    policy, reference, leaves = two()
    judged = m.apo_zero(policy, reference, beta=0.5)
    close(judged.loss, [2 * sigma(-0.5), 0.5 + sigma(1)])
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [-0.5 * bell(0.5), -0.5 * 0.25])
    close(h, [0.5 * bell(0.5), 0.5 * bell(1)])
    close(m.apo_zero(*equal(), beta=0.1).loss, [1.0] * 3, 1e-6)


def check_apo_down(m: Any) -> None:
    # beta u = 0.5, z = 1 and 0, z = -1
    policy, reference, leaves = two()
    judged = m.apo_down(policy, reference, beta=0.5)
    close(judged.loss, [sigma(0.5) + sigma(-1), 0.5 + sigma(1)])
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [0.5 * (bell(0.5) - bell(1)), 0.5 * (0.25 - bell(1))])
    close(h, [0.5 * bell(1), 0.5 * bell(1)])
    close(m.apo_down(*equal(), beta=0.1).loss, [1.0] * 3, 1e-6)
    policy, reference, leaves = at(0, 0)
    close(torch.cat(gradients(m.apo_down(policy, reference, beta=0.1).loss, *leaves)), [0.0, 0.1 / 4])


def check_apo_digits(m: Any) -> None:
    # 17 nats from the anchor sigma (1 - sigma) = 4.14e-8, which 1 - sigmoid(17) in float32 has lost.
    chosen, rejected, zero = leaf(torch.tensor([17.0])), leaf(torch.tensor([-17.0])), torch.zeros(1)
    judged = m.apo_zero(pair(chosen, rejected), pair(zero, zero), beta=1.0)
    close(judged.loss * 1e8, [2 * 4.1399376], 1e-5)
    close(torch.cat(gradients(judged.loss, chosen, rejected)) * 1e8, [-4.1399376, 4.1399376], 1e-4)
    rejected = leaf(torch.tensor([-17.0]))
    judged = m.apo_down(pair(leaf(zero), rejected), pair(zero, zero), beta=1.0)
    close(gradients(judged.loss, rejected)[0] * 1e8, [4.1399376], 1e-4)


# --- discopop ------------------------------------------------------------------------------------------


def check_discopop_by_hand(m: Any) -> None:
    # tau 1: sigma(z) e^-z = sigma(-z). z = 1: 0.2689414 + 0.2689414 x 0.3132617; z = -1: 0.7310586 (1 + 1.3132617)
    policy, reference, leaves = two()
    judged = m.discopop(policy, reference, beta=0.5, temperature=1.0)
    close(judged.loss, [0.3531904, 1.6911298], 1e-7)
    # d/dz of sigma(-z) (1 + log(1 + e^-z)): -s (1 - s) (1 + log(1 + e^-z)) - sigma(-z)^2
    g, h = gradients(judged.loss, *leaves[:2])
    slope = [-bell(z) * (1 + softplus(-z)) - sigma(-z) ** 2 for z in (1, -1)]
    close(g, [0.5 * slope[0], 0.5 * slope[1]])
    close(h, -g)
    # tau 0.5 and z = 1: m = sigma(2)
    half = m.discopop(policy, reference, beta=0.5, temperature=0.5)
    close(half.loss[0], sigma(2) / math.e + sigma(-2) * softplus(-1))


def check_discopop_limits(m: Any) -> None:
    close(m.discopop(*equal(), beta=0.1, temperature=0.05).loss, [(1 + LOG2) / 2] * 3, 1e-6)
    # The bump at the start: beta ((1 - log 2) / (4 tau) - 3/4), upwards.
    policy, reference, leaves = at(0, 0)
    judged = m.discopop(policy, reference, beta=0.1, temperature=0.05)
    close(gradients(judged.loss, *leaves)[0], [0.1 * ((1 - LOG2) / 0.2 - 0.75)])
    # Far below, sigma(z / tau) e^-z is 0 x infinity; what is left is -log sigmoid.
    chosen, zero = leaf(torch.tensor([-1e4, -100.0])), torch.zeros(2)
    far = m.discopop(pair(chosen, zero), pair(zero, zero), beta=1.0, temperature=0.05)
    close(far.loss, [1e4, 100.0])
    close(gradients(far.loss, chosen)[0], [-1.0, -1.0])
    # tau 2: log sigmoid(z / 2) - z passes 20 from z = -40 on.
    low = m.discopop(*at(-60, 0)[:2], beta=1.0, temperature=2.0)
    close(low.loss, [math.exp(20) + 60 * sigma(30)])
    near = m.discopop(*at(-38, 0)[:2], beta=1.0, temperature=2.0)
    close(near.loss, [sigma(-19) * math.exp(38) + sigma(19) * 38])


MODULE = implicit_reward
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("exo: eps swapped", check_exo, "math.log1p(-label_smoothing))", "math.log(label_smoothing))"),
    ("exo: the KL of conservative DPO", check_exo,
     "right = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))",
     "right = -(1 - label_smoothing) * F.logsigmoid(z)"),
    ("nca: without the pull on chosen", check_nca, " - 0.5 * F.logsigmoid(-chosen)", ""),
    ("nca: whole weights", check_nca, " - 0.5 * F.logsigmoid(-chosen) - 0.5 *", " - F.logsigmoid(-chosen) -"),
    ("bco: DPO under its name", check_bco_pair, "-F.logsigmoid(chosen - d) - F.logsigmoid(d - rejected)",
     "-F.logsigmoid(chosen - rejected)"),
    ("bco: shift added to rejected", check_bco_pair, "F.logsigmoid(d - rejected)", "F.logsigmoid(-d - rejected)"),
    ("sppo: targets swapped", check_sppo, "(chosen - target).square() + (rejected + target)",
     "(chosen + target).square() + (rejected - target)"),
    ("sppo: beta inside", check_sppo, "(chosen - target).square()", "(beta * chosen - target).square()"),
    ("sppo: target 1 / beta", check_sppo, "1 / (2 * beta)", "1 / beta"),
    ("apo_zero: is apo_down", check_apo_zero, "torch.sigmoid(-chosen) + torch.sigmoid(rejected)",
     "torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)"),
    ("apo_zero: 1 - sigmoid", check_apo_digits, "torch.sigmoid(-chosen) + ", "1 - torch.sigmoid(chosen) + "),
    ("apo_down: chosen raised", check_apo_down, "torch.sigmoid(chosen) + ", "torch.sigmoid(-chosen) + "),
    ("discopop: 0 x infinity", check_discopop_limits, "torch.exp((F.logsigmoid(z / temperature) - z).clamp(max=20.0))",
     "torch.sigmoid(z / temperature) * torch.exp(-z)"),
    ("discopop: shares swapped", check_discopop_by_hand, "torch.sigmoid(-z / temperature) *",
     "torch.sigmoid(z / temperature) *"),
    ("discopop: temperature times the margin", check_discopop_by_hand, "(F.logsigmoid(z / temperature)",
     "(F.logsigmoid(z * temperature)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
