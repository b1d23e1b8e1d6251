"""What bends DPO's margin. B examples; u = policy - reference, D = u chosen - u rejected, z = beta D."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import preference
from rlhf_cli.objectives.judged import Pair
from tests.objectives.preference_support import LOG2, at, equal, pair, sigma, softplus, two
from tests.objectives.support import Check, checks_of, close, doubles, gradients, leaf, untouched

# --- lengths -------------------------------------------------------------------------------------------


def check_r_dpo(m: Any) -> None:
    # z = 1 and -1; lengths 5 against 3 and 2 against 6: z + 0.05 x 2 = 1.1, z - 0.05 x 4 = -1.2
    policy, reference, leaves = two()
    policy = Pair(policy.chosen, policy.rejected, torch.tensor([5, 2]), torch.tensor([3, 6]))
    judged = m.r_dpo(policy, reference, beta=0.5, alpha=0.05)
    close(judged.loss, [softplus(-1.1), softplus(1.2)])
    close(judged.rewards, [[0.5, -0.5], [0.0, 1.0]])
    assert judged.likelihood == 0
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [-0.5 * sigma(-1.1), -0.5 * sigma(1.2)])
    close(h, -g)
    # `equal` has lengths 1, 2, 3 against 4, 3, 2
    close(m.r_dpo(*equal(), beta=0.5, alpha=0.1).loss, [softplus(0.3), softplus(0.1), softplus(-0.1)], 1e-6)


def check_sigmoid_norm(m: Any) -> None:
    # u = 4 over 2 tokens and -6 over 3: 2 + 2 = 4, beta 0.25: z = 1
    policy, reference, leaves = at(4, -6, (2, 3))
    judged = m.sigmoid_norm(policy, reference, beta=0.25)
    close(judged.loss, [0.3132617], 1e-7)
    close(judged.rewards, [[0.5, -0.5]])
    assert judged.likelihood == 0
    close(torch.cat(gradients(judged.loss, *leaves)), [-0.25 * sigma(-1) / 2, 0.25 * sigma(-1) / 3])
    close(m.sigmoid_norm(*equal(), beta=5.0).loss, [LOG2] * 3, 1e-6)
    # No token, and one token, count as one.
    for lengths, z in (((0, 0), 10), ((1, 1), 10), ((2, 0), 8), ((0, 3), 6), ((1, 3), 6)):
        close(m.sigmoid_norm(*at(4, -6, lengths)[:2], beta=1.0).loss, [softplus(-z)])


def ld(common: bool = True) -> tuple[Pair, Pair, list[Tensor]]:
    """Policy: chosen -10, of which -6 is common, rejected -4, wholly common; reference -9, -7 and -6."""
    leaves = [leaf(doubles(v)) for v in (-10, -4)] + [leaf(doubles(-6, -4).view(1, 2))]
    policy = pair(*leaves[:2])._replace(common=leaves[2])
    reference = pair(doubles(-9), doubles(-6))._replace(common=doubles(-7, -6).view(1, 2))
    return policy, reference, leaves


def check_ld_dpo_by_hand(m: Any) -> None:
    policy, reference, leaves = ld()
    # chosen -6 - 4 / 2 = -8 against -7 - 2 / 2 = -8; rejected -4 against -6: 0.5 (0 - 2) = -1
    judged = m.ld_dpo(policy, reference, beta=0.5, alpha=0.5, on_reference=True)
    close(judged.loss, [1.3132617], 1e-7)
    close(judged.rewards, [[0.0, 1.0]])
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0
    # DPO's, alpha of it through the whole sum and 1 - alpha through the common part
    quarter = m.ld_dpo(policy, reference, beta=0.5, alpha=0.25, on_reference=True)
    z = 0.5 * (-7 + 7.5 - 2)
    close(quarter.loss, [softplus(-z)])
    g, h, common = gradients(quarter.loss, *leaves)
    slope = 0.5 * sigma(-z)
    close(torch.cat([g, h]), [-0.25 * slope, 0.25 * slope])
    close(common, [[-0.75 * slope, 0.75 * slope]])


def check_ld_dpo_limits(m: Any) -> None:
    policy, reference, _ = ld()
    # The reference whole: -8 + 9 - 2 = -1
    close(m.ld_dpo(policy, reference, beta=0.5, alpha=0.5, on_reference=False).loss, [softplus(0.5)])
    # alpha 1 is DPO, -1 - 2; alpha 0 leaves the common parts, 1 - 2
    close(m.ld_dpo(policy, reference, beta=0.5, alpha=1.0, on_reference=True).loss, [softplus(1.5)])
    close(m.ld_dpo(policy, reference, beta=0.5, alpha=0.0, on_reference=True).loss, [softplus(0.5)])
    for alpha in (0.0, 0.3):
        close(m.ld_dpo(policy, policy, beta=0.5, alpha=alpha, on_reference=True).loss, [LOG2])
    watched = reference._replace(common=leaf(doubles(-7, -6).view(1, 2)), chosen=leaf(doubles(-9)))
    loss = m.ld_dpo(policy, watched, beta=0.5, alpha=0.5, on_reference=True).loss
    assert untouched(loss, watched.common, watched.chosen)


# --- weights and penalties -----------------------------------------------------------------------------


def check_dpop(m: Any) -> None:
    # u = -1, -2: D = 1, lambda 3: 0.5 (1 - 3) = -1
    policy, reference, leaves = at(-1, -2)
    judged = m.dpop(policy, reference, beta=0.5, penalty=3.0)
    close(judged.loss, [1.3132617], 1e-7)
    close(judged.rewards, [[-0.5, -1.0]])
    assert judged.likelihood == 0
    close(torch.cat(gradients(judged.loss, *leaves)), [-0.5 * sigma(1) * 4, 0.5 * sigma(1)])
    # Chosen above or at its reference: DPO, gradient and all.
    for u in (1.0, 0.0):
        policy, reference, leaves = at(u, u - 2)
        judged = m.dpop(policy, reference, beta=0.5, penalty=3.0)
        close(judged.loss, [0.3132617], 1e-7)
        close(torch.cat(gradients(judged.loss, *leaves)), [-0.5 * sigma(-1), 0.5 * sigma(-1)])
    close(m.dpop(*equal(), beta=0.3, penalty=50.0).loss, [LOG2] * 3, 1e-6)


def check_wpo(m: Any) -> None:
    policy, reference, leaves = two()
    certainty = leaf(doubles(-0.25, -0.5, 1.0, -0.5).view(2, 2))
    policy = policy._replace(certainty=certainty)
    low, high = math.exp(-0.75), math.exp(0.5)
    for clamp, weight in ((True, [low, 1.0]), (False, [low, high])):
        judged = m.wpo(policy, reference, beta=0.5, label_smoothing=0.0, clamp=clamp)
        close(judged.loss, [weight[0] * softplus(-1), weight[1] * softplus(1)])
        close(judged.rewards, [[0.5, -0.5], [0.0, 1.0]])
        assert judged.likelihood == 0
        assert untouched(judged.loss, certainty)
        g, h = gradients(judged.loss, *leaves[:2])
        close(g, [-0.5 * weight[0] * sigma(-1), -0.5 * weight[1] * sigma(1)])
        close(h, -g)
    smooth = m.wpo(policy, reference, beta=0.5, label_smoothing=0.1, clamp=True)
    close(smooth.loss, [low * 0.4132617, 1.2132617], 1e-7)
    # exp(1e4) is infinite: the exponent is held, not the weight.
    sure = policy._replace(certainty=torch.full((2, 2), 1e4))
    close(m.wpo(sure, reference, beta=0.5, label_smoothing=0.0, clamp=True).loss, [softplus(-1), softplus(1)])
    start = equal()
    start[0].chosen.requires_grad_()
    weighed = start[0]._replace(certainty=torch.full((3, 2), -0.5))
    close(m.wpo(weighed, start[1], beta=0.1, label_smoothing=0.0, clamp=True).loss, [LOG2 / math.e] * 3, 1e-6)


# --- divergences ---------------------------------------------------------------------------------------


def check_f_dpo_by_hand(m: Any) -> None:
    # u = 1, -1 and 0, 2. js: log sigmoid(u) - log sigmoid(-u) = u, so 1; log sigmoid(0) - log sigmoid(2) = -0.5662192.
    # forward_kl: e - 1/e = 2.3504024; e^-2 - 1. alpha 1/2: -2 (e^-1/2 - e^1/2) = 2.0843812; 2 (e^-1 - 1) = -1.2642411.
    expected = {
        "reverse_kl": (2.0, -2.0), "js": (1.0, -0.5662192), "forward_kl": (2.3504024, -0.8646647),
        "alpha": (2.0843812, -1.2642411),
    }  # fmt: skip
    slopes = {
        "reverse_kl": lambda u: 1.0, "js": lambda u: sigma(-u), "forward_kl": lambda u: math.exp(-u),
        "alpha": lambda u: math.exp(-0.5 * u),
    }  # fmt: skip
    policy, reference, leaves = two()
    for divergence, (one, other) in expected.items():
        judged = m.f_dpo(policy, reference, beta=0.5, divergence=divergence, alpha=0.5)
        close(judged.loss, [softplus(-0.5 * one), softplus(-0.5 * other)], 1e-7)
        close(judged.rewards, [[0.5, -0.5], [0.0, 1.0]])
        assert judged.likelihood == 0
        g, h = gradients(judged.loss, *leaves[:2])
        slope = slopes[divergence]
        close(g, [-0.5 * sigma(-0.5 * one) * slope(1), -0.5 * sigma(-0.5 * other) * slope(0)], 1e-7)
        close(h, [0.5 * sigma(-0.5 * one) * slope(-1), 0.5 * sigma(-0.5 * other) * slope(2)], 1e-7)
        close(m.f_dpo(*equal(), beta=0.5, divergence=divergence, alpha=0.5).loss, [LOG2] * 3, 1e-6)


def check_f_dpo_bounds(m: Any) -> None:
    def loss(divergence: str, *u: float, alpha: float = 0.5, beta: float = 1e-9) -> tuple[Tensor, Tensor]:
        policy, reference, leaves = at(*u)
        judged = m.f_dpo(policy, reference, beta=beta, divergence=divergence, alpha=alpha)
        return judged.loss, torch.cat(gradients(judged.loss, *leaves))

    # Exponents end at 20: exp(20) = 4.852e8 where u = -30, and nothing is asked of that completion.
    value, slope = loss("forward_kl", -30, -19)
    x = 1e-9 * (math.exp(20) - math.exp(19))
    close(value, [softplus(x)])
    close(slope, [0.0, 1e-9 * sigma(x) * math.exp(19)])
    value, slope = loss("alpha", -60, -38)
    x = 2e-9 * (math.exp(20) - math.exp(19))
    close(value, [softplus(x)])
    close(slope, [0.0, 1e-9 * sigma(x) * math.exp(19)])
    # The other end, exp(-20), shows in differences of u > 20: none is left.
    for divergence, u in (("forward_kl", (30, 25)), ("alpha", (60, 50))):
        value, slope = loss(divergence, *u, beta=1e9)
        close(value, [LOG2])
        close(slope, [0.0, 0.0])
        inside = loss(divergence, u[0] * 0.6, u[1] * 0.6, beta=1e6)[0]
        assert abs(inside.item() - LOG2) > 1e-3
    # Towards alpha = 1 the divisor goes to 0 and the digits must stay: reverse_kl.
    policy, reference, _ = two(torch.float32)
    near = m.f_dpo(policy, reference, beta=0.5, divergence="alpha", alpha=0.999999)
    close(near.loss, [softplus(-1), softplus(1)], 2e-6)


# --- optimal transport ---------------------------------------------------------------------------------


def check_aot(m: Any) -> None:
    # policy margins 5, -1, 2 and reference margins 0, 3, 1; sorted -1, 2, 5 and 0, 1, 3: -1, 1, 2
    leaves = [leaf(doubles(*v)) for v in ((-5, -6, -8), (-10, -5, -10), (-7, -2, -9), (-7, -5, -10))]
    judged = m.aot(pair(*leaves[:2]), pair(*leaves[2:]), beta=0.5)
    close(judged.loss, [softplus(-1), softplus(0.5), softplus(-0.5)])
    close(judged.rewards, [[1.0, -1.5], [-2.0, 0.0], [0.5, 0.0]])
    assert judged.likelihood == 0
    assert untouched(judged.loss, *leaves[2:])
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [-0.5 * sigma(-1), -0.5 * sigma(0.5), -0.5 * sigma(-0.5)])
    close(h, -g)
    close(m.aot(*equal(), beta=0.5).loss, [LOG2] * 3, 1e-6)


def check_aot_unpaired(m: Any) -> None:
    # u of chosen 1, -2, 0.5, of rejected 3, 0, -1; sorted -2, 0.5, 1 and -1, 0, 3: -1, 0.5, -2
    leaves = [leaf(doubles(*v)) for v in ((-6, -4, -8.5), (-7, -5, -11), (-7, -2, -9), (-10, -5, -10))]
    judged = m.aot_unpaired(pair(*leaves[:2]), pair(*leaves[2:]), beta=0.5)
    close(judged.loss, [softplus(1), softplus(0.5), softplus(-0.25)])
    close(judged.rewards, [[0.5, 1.5], [-1.0, 0.0], [0.25, -0.5]])
    assert judged.likelihood == 0
    assert untouched(judged.loss, *leaves[2:])
    g, h = gradients(judged.loss, *leaves[:2])
    close(g, [-0.5 * sigma(1), -0.5 * sigma(0.5), -0.5 * sigma(-0.25)])
    close(h, [0.5 * sigma(1), 0.5 * sigma(-0.25), 0.5 * sigma(0.5)])
    close(m.aot_unpaired(*equal(), beta=0.5).loss, [LOG2] * 3, 1e-6)


MODULE = preference
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("r-dpo: minus", check_r_dpo, "+ alpha * (policy.chosen_length", "- alpha * (policy.chosen_length"),
    ("r-dpo: alpha times beta", check_r_dpo, "+ alpha * (policy.chosen_length",
     "+ beta * alpha * (policy.chosen_length"),
    ("r-dpo: averaged", check_r_dpo, "z = beta * (chosen - rejected) + alpha *",
     "z = beta * (chosen / policy.chosen_length - rejected / policy.rejected_length) + alpha *"),
    ("sigmoid_norm: summed", check_sigmoid_norm, "beta * (chosen / policy.chosen_length.clamp(min=1))",
     "beta * chosen"),
    ("sigmoid_norm: one length for both", check_sigmoid_norm, "beta * (rejected / policy.rejected_length",
     "beta * (rejected / policy.chosen_length"),
    ("dpop: penalty outside beta", check_dpop, "beta * (chosen - rejected - penalty * F.relu(-chosen))",
     "beta * (chosen - rejected) - penalty * F.relu(-chosen)"),
    ("dpop: penalty on the rejected", check_dpop, "F.relu(-chosen)", "F.relu(-rejected)"),
    ("dpop: penalty for gaining", check_dpop, "F.relu(-chosen)", "F.relu(chosen)"),
    ("dpop: gradient at the boundary", check_dpop, "F.relu(-chosen)", "(-chosen).clamp(min=0)"),
    ("ld-dpo: reference always whole", check_ld_dpo_by_hand, "alpha if on_reference else 1.0", "1.0"),
    ("ld-dpo: weights swapped", check_ld_dpo_by_hand, "first + alpha * (whole - first)",
     "alpha * first + (whole - first)"),
    ("wpo: gradient through the weight", check_wpo, "policy.certainty.detach()", "policy.certainty"),
    ("wpo: weight clamped after exp", check_wpo, "torch.exp(exponent.clamp(max=0) if clamp else exponent)",
     "torch.exp(exponent).clamp(min=1)"),
    ("wpo: only one completion", check_wpo, "certainty.sum(dim=1)", "certainty[:, 0]"),
    ("f-dpo: forward sign", check_f_dpo_by_hand, "lambda u: -torch.exp(torch.clamp(-u,",
     "lambda u: torch.exp(torch.clamp(-u,"),
    ("f-dpo: g of the difference", check_f_dpo_by_hand, "(g(chosen) - g(rejected))", "g(chosen - rejected)"),
    ("f-dpo: unbounded", check_f_dpo_bounds, "-torch.exp(torch.clamp(-u, -20.0, 20.0))", "-torch.exp(-u)"),
    ("aot: reference unsorted", check_aot, "torch.sort(low).values", "low"),
    ("aot: one descending", check_aot, "torch.sort(low).values", "torch.sort(low, descending=True).values"),
    ("aot: losses at the wrong pairs", check_aot, "loss[torch.argsort(ascending.indices)]", "loss"),
    ("aot: paired by policy alone", check_aot, "_sorted_logistic(pc - pr, (rc - rr).detach(), beta)",
     "_sorted_logistic(chosen, rejected, beta)"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "f_dpo: name: torch.exp(torch.clamp(-u, -20.0, 20.0)) -> torch.expm1(torch.clamp(-u, -20.0, 20.0))":
        "a constant that goes out with the difference",
}  # fmt: skip
