"""Estimates of KL divergences, and controllers of coefficients."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from rlhf_cli.objectives import kl
from tests.objectives.support import Check, checks_of, close, differentiates, doubles, finite, gradients, leaf

P, Q = doubles(0.5, 0.3, 0.2), doubles(0.2, 0.5, 0.3)


def check_k1_k3_by_hand(m: Any) -> None:
    x, zero = doubles(math.log(2), -math.log(2), 0), doubles(0, 0, 0)
    close(m.k1(x, zero), [0.69314718, -0.69314718, 0.0])
    # 1/2 - 1 + log 2 and 2 - 1 - log 2
    close(m.k3(x, zero), [0.19314718, 0.30685282, 0.0])
    assert float(m.k3(x, x).abs().sum()) == 0.0


def check_expectation_is_the_kl(m: Any) -> None:
    log_p, log_q = P.log(), Q.log()
    for p, log_own, log_other in ((P, log_p, log_q), (Q, log_q, log_p)):
        exact = float((p * (log_own - log_other)).sum())
        close((p * m.k1(log_own, log_other)).sum(), exact, 1e-12)
        close((p * m.k3(log_own, log_other)).sum(), exact, 1e-12)
    assert bool((m.k3(log_p, log_q) > 0).all())


def check_k1_belongs_in_the_reward(m: Any) -> None:
    # As a reward, E[k1 grad log p] is the gradient of the KL; as a loss, E[grad k1] is zero.
    logits = leaf(P.log())
    log_q = Q.log()
    exact = (torch.softmax(logits, -1) * (torch.log_softmax(logits, -1) - log_q)).sum()
    (wanted,) = gradients(exact, logits)
    log_p = torch.log_softmax(logits, -1)
    (as_reward,) = gradients(P * m.k1(log_p, log_q).detach() * log_p, logits)
    close(as_reward, wanted, 1e-9)
    (as_loss,) = gradients(P * m.k1(torch.log_softmax(logits, -1), log_q), logits)
    close(as_loss, torch.zeros(3), 1e-9)


def check_k3_numbers(m: Any) -> None:
    x = torch.tensor([1e-3, -1e-3])
    close(m.k3(x, torch.zeros(2)) * 1e6, [0.4998, 0.5002], 2e-3)  # x^2 / 2 -+ x^3 / 6
    far = leaf(torch.tensor([1e4, -1e4]))
    out = m.k3(far, torch.zeros(2))
    close(out, [20.0 - 1, math.exp(20) - 1 - 20], 1e-6)
    assert finite(out, *gradients(out, far))
    inside = m.k3(doubles(19.9, -19.9), doubles(0, 0))
    close(inside, [math.exp(-19.9) + 18.9, math.exp(19.9) - 20.9], 1e-9)


def check_k3_gradient(m: Any) -> None:
    # On samples of the old policy: d k3(old, new) / d new = ratio - 1.
    old, new = doubles(-1, -2), leaf(doubles(-1.5, -1.2))
    (g,) = gradients(m.k3(old, new), new)
    close(g, torch.exp(new - old) - 1)
    assert differentiates(m.k3, doubles(-1, -2, -3), doubles(-1.5, -1.2, -3.0))
    assert differentiates(m.k1, doubles(-1, -2), doubles(-1.5, -1.2))


def check_k2_by_hand(m: Any) -> None:
    x, zero = doubles(math.log(2), -math.log(2), 0), doubles(0, 0, 0)
    close(m.k2(x, zero), [0.24022651, 0.24022651, 0.0])  # 0.69314718 ** 2 / 2
    assert differentiates(m.k2, doubles(-1, -2), doubles(-1.5, -1.2))
    half, far = torch.tensor([1e4, -1e4]), torch.zeros(2)
    for estimate in (m.k2, m.k3, m.k3_plus):
        new = leaf(half)
        assert finite(estimate(new, far), *gradients(estimate(new, far), new))


def check_k2_belongs_in_the_loss(m: Any) -> None:
    # On samples of the policy E[grad k2] is the gradient of the KL, so is that of k3_plus; that of k3 is not.
    logits = leaf(P.log())
    log_q = Q.log()
    exact = (torch.softmax(logits, -1) * (torch.log_softmax(logits, -1) - log_q)).sum()
    (wanted,) = gradients(exact, logits)
    for estimate in (m.k2, m.k3_plus):
        (found,) = gradients(P * estimate(torch.log_softmax(logits, -1), log_q), logits)
        close(found, wanted, 1e-9)
    (biased,) = gradients(P * m.k3(torch.log_softmax(logits, -1), log_q), logits)
    assert float((biased - wanted).abs().max()) > 0.01


def check_k3_plus_by_hand(m: Any) -> None:
    # The value of k3, 1 - log 2; the gradient of k2, the log-ratio itself.
    new = leaf(doubles(-math.log(2), 0))
    found = m.k3_plus(new, doubles(0, 0))
    close(found, [0.30685282, 0.0])
    close(gradients(found, new)[0], [-0.69314718, 0.0])
    far, zero = torch.tensor([5000.0]), torch.zeros(1)
    close(m.k3_plus(far, zero), m.k3(far, zero))  # the square must not swallow it


def check_fixed(m: Any) -> None:
    controller = m.FixedKL(coef=0.05)
    for seen in (0.0, 100.0, -5.0):
        controller.update(seen, 64)
    assert controller.coef == 0.05


def check_proportional(m: Any) -> None:
    settings = {"coef": 0.2, "target_kl_per_sequence": 6.0, "horizon": 1000.0}

    def after(seen: float, episodes: int) -> float:
        controller = m.ProportionalKL(**settings)
        controller.update(seen, episodes)
        return controller.coef

    assert after(6.0, 64) == 0.2, "at the target nothing changes"
    assert math.isclose(after(6.6, 64), 0.2 * (1 + 0.1 * 64 / 1000))  # 10 % too high
    assert math.isclose(after(5.4, 64), 0.2 * (1 - 0.1 * 64 / 1000))
    for seen in (7.3, 60.0, 1e6):
        assert math.isclose(after(seen, 64), 0.2 * (1 + 0.2 * 64 / 1000)), "the error is clipped at 0.2"
    for seen in (4.7, 0.0, -50.0):
        assert math.isclose(after(seen, 64), 0.2 * (1 - 0.2 * 64 / 1000))
    controller = m.ProportionalKL(**settings)
    for _ in range(8):
        controller.update(6.6, 4)
    assert math.isclose(controller.coef, after(6.6, 32), rel_tol=1e-5), "8 calls of 4 are about one of 32"
    assert after(0.0, 10**6) == 0.1, "a horizon shorter than the step must not turn the penalty into a bonus"


def check_doubling(m: Any) -> None:
    def after(seen: float, coef: float = 0.1) -> float:
        controller = m.DoublingKL(coef=coef, target_kl_per_sequence=6.0)
        controller.update(seen, 64)
        return controller.coef

    assert after(9.0) == after(1e9) == 0.2  # 1.5 x 6 = 9
    assert after(4.0) == after(-3.0) == 0.05  # 6 / 1.5 = 4
    assert after(8.99) == after(6.0) == after(4.01) == 0.1
    assert after(9.0, coef=700.0) == 1e3
    assert after(4.0, coef=1.5e-4) == 1e-4
    assert after(9.0, coef=500.0) == 1e3
    assert after(4.0, coef=4e-4) == 2e-4


def after(m: Any, controller: str, kl: float, coef: float = 1.0) -> float:
    """PPO-penalty's coefficient after a rollout's updates."""
    penalty = m.PolicyPenalty(coef=coef, target_kl=0.01, controller=controller)
    penalty.follow(kl)
    return penalty.coef


def check_policy_penalty_doubling(m: Any) -> None:
    assert after(m, "doubling", 0.02) == 2.0
    assert after(m, "doubling", 0.005) == 0.5
    assert after(m, "doubling", 0.0145) == after(m, "doubling", 0.01) == after(m, "doubling", 0.0068) == 1.0
    assert after(m, "doubling", 0.02, coef=700.0) == 1e3
    assert after(m, "doubling", 0.0, coef=1.5e-4) == 1e-4


def check_policy_penalty_proportional(m: Any) -> None:
    # 10 % too high or low: 1 % more or less; from 20 % on: 2 %.
    assert after(m, "proportional", 0.01) == 1.0
    assert math.isclose(after(m, "proportional", 0.011), 1.01)
    assert math.isclose(after(m, "proportional", 0.009, coef=3.0), 2.97)
    assert math.isclose(after(m, "proportional", 0.5), 1.02)
    assert math.isclose(after(m, "proportional", 0.0), 0.98)
    assert after(m, "proportional", 0.5, coef=999.0) == 1e3
    assert after(m, "proportional", 0.0, coef=1.005e-4) == 1e-4


def check_controllers_resume(m: Any) -> None:
    def fresh() -> list[Any]:
        return [
            m.FixedKL(coef=0.3),
            m.ProportionalKL(coef=0.3, target_kl_per_sequence=6.0, horizon=100.0),
            m.DoublingKL(coef=0.3, target_kl_per_sequence=6.0),
        ]

    penalty = m.PolicyPenalty(coef=0.3, target_kl=1.0, controller="doubling")
    penalty.load_state_dict({"coef": 0.7})
    assert penalty.state_dict() == {"coef": 0.7}

    for going, resumed in zip(fresh(), fresh(), strict=True):
        going.update(10.0, 16)
        resumed.load_state_dict(json.loads(json.dumps(going.state_dict())))
        assert resumed.coef == going.coef
        going.update(3.0, 16)
        resumed.update(3.0, 16)
        assert resumed.coef == going.coef


MODULE = kl
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("k1: sign", check_expectation_is_the_kl, "return logp - other", "return other - logp"),
    ("k3: sign", check_expectation_is_the_kl, "torch.expm1(-x) + x", "torch.expm1(x) - x"),
    ("k3: cancellation", check_k3_numbers, "torch.expm1(-x) + x", "torch.exp(-x) - 1 + x"),
    ("k2: no half", check_k2_by_hand, "0.5 * (logp - other).square()", "(logp - other).square()"),
    ("k3_plus: the biased gradient of k3", check_k2_belongs_in_the_loss,
     "return k3(logp, other).detach() + (gradient - gradient.detach())", "return k3(logp, other)"),
    ("k3_plus: the biased value of k2", check_k3_plus_by_hand,
     "return k3(logp, other).detach() + (gradient - gradient.detach())", "return gradient"),
    ("k2 in the loss: k1, whose gradient vanishes", check_k2_belongs_in_the_loss,
     "return 0.5 * (logp - other).square()", "return logp - other"),
    ("proportional: not clipped", check_proportional, "min(max(kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0"),
    ("proportional: inverted", check_proportional, "kl / target - 1.0", "1.0 - kl / target"),
    ("proportional: a mean per token for a sum", check_proportional, "_error(kl_per_sequence, self.target)",
     "_error(kl_per_sequence / 10, self.target)"),
    ("penalty: the controllers exchanged", check_policy_penalty_doubling,
     '{"doubling": doubled, "proportional": nudged}', '{"doubling": nudged, "proportional": doubled}'),
    ("doubling: without bounds", check_doubling, "min(coef * 2.0, 1e3)", "coef * 2.0"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {}
