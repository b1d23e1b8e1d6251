"""The classical mistakes, planted one at a time: the check of that function must notice.

The second test plants every small mistake there is (an operator turned, a constant moved, a `where` swapped ...) and
demands that some check fails. What it may leave alive is listed: changes that change no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest

from rlhf_cli.objectives import advantage, kl, likelihood, logprob, masked, policy, preference
from rlhf_cli.rollouts import experience
from tests.objectives import advantage_checks as a
from tests.objectives import experience_checks as e
from tests.objectives import kl_checks as k
from tests.objectives import likelihood_checks as li
from tests.objectives import logprob_checks as lo
from tests.objectives import masked_checks as ma
from tests.objectives import policy_checks as po
from tests.objectives import preference_checks as pr
from tests.objectives import reference_checks as re
from tests.objectives.mutation import mutants
from tests.objectives.support import Check, compiled, mutated
from tests.objectives.test_objectives import CHECKED

Mistake = tuple[str, ModuleType, Check, str, str]
CLASSICAL: list[Mistake] = [
    ("dpo: sign", preference, re.check_dpo_by_hand, "z = beta * (chosen - rejected)\n    loss = -(1",
     "z = beta * (rejected - chosen)\n    loss = -(1"),
    ("dpo: reference forgotten", preference, re.check_dpo_by_hand, "return pc - rc.detach(), pr - rr.detach()",
     "return pc, pr"),
    ("dpo: reference takes gradients", preference, re.check_dpo_gradient,
     "return pc - rc.detach(), pr - rr.detach()", "return pc - rc, pr - rr"),
    ("dpo: reference swapped", preference, re.check_dpo_by_hand, "return pc - rc.detach(), pr - rr.detach()",
     "return pc - rr.detach(), pr - rc.detach()"),
    ("dpo: beta outside", preference, re.check_dpo_by_hand, "loss = -(1 - label_smoothing) * F.logsigmoid(z) ",
     "loss = -beta * (1 - label_smoothing) * F.logsigmoid(z / beta) "),
    ("dpo: smoothing ignored", preference, re.check_dpo_by_hand, " - label_smoothing * F.logsigmoid(-z)", ""),
    ("dpo: log of a sigmoid", preference, re.check_dpo_limits, "loss = -(1 - label_smoothing) * F.logsigmoid(z) ",
     "loss = -(1 - label_smoothing) * torch.log(torch.sigmoid(z)) "),
    ("dpo: 1 - sigmoid", preference, re.check_dpo_limits, "loss = -(1 - label_smoothing) * F.logsigmoid(z) ",
     "loss = -(1 - label_smoothing) * torch.log(1 - (1 - torch.sigmoid(z))) "),
    ("bradley-terry: margin added", preference, pr.check_bradley_terry_by_hand,
     "F.logsigmoid(chosen - rejected - margin)",
     "F.logsigmoid(chosen - rejected + margin)"),
    ("bradley-terry: centring of the difference", preference, pr.check_bradley_terry_by_hand,
     "(chosen + rejected).square()", "(chosen - rejected).square()"),
    ("bradley-terry: overflow", preference, pr.check_bradley_terry_limits, "-F.logsigmoid(chosen - rejected - margin)",
     "torch.log(1 + torch.exp(rejected - chosen + margin))"),
    ("ipo: summed", preference, re.check_ipo_by_hand, "    if average:\n", "    if False:\n"),
    ("ipo: one length for both", preference, re.check_ipo_by_hand, "rejected / policy.rejected_length",
     "rejected / policy.chosen_length"),
    ("ipo: beta twice", preference, re.check_ipo_by_hand, "(h - 1 / (2 * beta))", "(beta * h - 1 / (2 * beta))"),
    ("kto: means of the classes", preference, re.check_kto_rows_are_alone, "torch.where(desirable, good, bad)",
     "torch.where(desirable, good / desirable.sum(), bad / (~desirable).sum().clamp(min=1)) * len(u)"),
    ("kto: KL takes gradients", preference, re.check_kto_gradient, "kl_point.detach()", "kl_point"),
    ("kto: labels swapped", preference, re.check_kto_by_hand, "torch.where(desirable, good, bad)",
     "torch.where(desirable, bad, good)"),
    ("kto: KL inside with the wrong sign", preference, re.check_kto_by_hand, "(u - kl_point", "(u + kl_point"),
    ("odpo: offset times beta", preference, re.check_odpo_by_hand, "shift = alpha *", "shift = beta * alpha *"),
    ("odpo: offset added", preference, re.check_odpo_by_hand, "F.logsigmoid(z - torch.where(free",
     "F.logsigmoid(z + torch.where(free"),
    ("odpo: empty gap as no offset", preference, re.check_odpo_empty_gap,
     "torch.where(free, torch.zeros_like(loss), loss)", "loss"),
    ("orpo: log1p(-exp) alone", preference, pr.check_orpo_certain, "    near_zero = x > -math.log(2.0)\n",
     "    return torch.log1p(-torch.exp(x))\n"),
    ("orpo: one where only", preference, pr.check_log1mexp, "torch.full_like(x, -1.0), x)", "x, x)"),
    ("orpo: summed", preference, pr.check_orpo_by_hand, "average = torch.stack(policy.average())",
     "average = torch.stack(policy[:2])"),
    ("orpo: the notes' sign", preference, pr.check_orpo_by_hand, "loss = -beta * F.logsigmoid(odds[0]",
     "loss = beta * F.logsigmoid(odds[0]"),
    ("orpo: probabilities for odds", preference, pr.check_orpo_by_hand, "odds = average - log1mexp(average)",
     "odds = average"),
    ("orpo: no likelihood", preference, pr.check_orpo_by_hand, "likelihood=1.0", "likelihood=0.0"),
    ("simpo: ratio taken as gamma", preference, pr.check_simpo_margin,
     "gamma = beta * (0.25 if gamma_beta_ratio is None else gamma_beta_ratio)",
     "gamma = 0.25 if gamma_beta_ratio is None else gamma_beta_ratio"),
    ("simpo: a gamma of 0 taken as none", preference, pr.check_simpo_margin, "    if gamma is None:\n",
     "    if not gamma:\n"),
    ("simpo: margin inside beta", preference, pr.check_simpo_by_hand, "(beta * (chosen - rejected) - gamma)",
     "(beta * (chosen - rejected - gamma))"),
    ("average in half precision", preference, pr.check_half_precision_is_upcast,
     "chosen, rejected = _float(self.chosen, self.rejected)", "chosen, rejected = self.chosen, self.rejected"),
    ("ppo: maximum", policy, po.check_clip_table, "torch.minimum(plain, clipped)", "torch.maximum(plain, clipped)"),
    ("ppo: sign", policy, po.check_clip_table, "return -surrogate", "return surrogate"),
    ("ppo: clip on the log-ratio", policy, po.check_clip_table, "torch.clamp(rho, 1.0 - clip_low, 1.0 + clip_high)",
     "torch.exp(torch.clamp(torch.log(rho), -clip_low, clip_high))"),
    ("ppo: clip sides swapped", policy, po.check_clip_table, "1.0 - clip_low, 1.0 + clip_high",
     "1.0 - clip_high, 1.0 + clip_low"),
    ("ppo: dual clip for all", policy, po.check_clip_table, "torch.where(advantages < 0, torch.maximum(",
     "torch.where(advantages == advantages, torch.maximum("),
    ("ppo: unclamped ratio", policy, po.check_policy_extremes,
     "torch.exp(torch.clamp(logp - old_logp, -20.0, 20.0))", "torch.exp(logp - old_logp)"),
    ("ppo: old log-probs take gradients", policy, po.check_policy_takes_the_only_gradient, "old_logp.detach()",
     "old_logp"),
    ("ppo: advantages take gradients", policy, po.check_policy_takes_the_only_gradient,
     "advantages = advantages.detach()", "advantages = advantages"),
    ("value: minimum", policy, po.check_value_by_hand, "0.5 * torch.maximum(plain, clipped)",
     "0.5 * torch.minimum(plain, clipped)"),
    ("value: clipped around the target", policy, po.check_value_by_hand, "near = old_values + ", "near = returns + "),
    ("value: returns take gradients", policy, po.check_value_takes_the_only_gradient, "returns = returns.detach()",
     "returns = returns"),
    ("value: rounding counted as a clip", policy, po.check_value_inside_is_never_clipped,
     "outside & (clipped > plain)", "clipped > plain"),
    ("gae: without the mask", advantage, a.check_gae_is_the_loop, "        here = mask[:, t]\n",
     "        here = torch.ones_like(mask[:, t])\n"),
    ("gae: values of masked slots", advantage, a.check_gae_is_the_loop,
     "next_value = torch.where(here, values[:, t], next_value)", "next_value = values[:, t]"),
    ("gae: lambda forgotten", advantage, a.check_gae_by_hand, "gamma * lam * carried", "gamma * carried"),
    ("gae: values one late", advantage, a.check_gae_by_hand, "gamma * next_value - values[:, t]",
     "gamma * values[:, t] - next_value"),
    ("gae: returns are the advantages", advantage, a.check_gae_by_hand, "torch.where(mask, advantages + values,",
     "torch.where(mask, advantages,"),
    ("k1: sign", kl, k.check_expectation_is_the_kl, "return logp - other", "return other - logp"),
    ("k3: sign", kl, k.check_expectation_is_the_kl, "torch.expm1(-x) + x", "torch.expm1(x) - x"),
    ("k3: cancellation", kl, k.check_k3_numbers, "torch.expm1(-x) + x", "torch.exp(-x) - 1 + x"),
    ("proportional: not clipped", kl, k.check_proportional,
     "min(max(kl_per_sequence / self.target - 1.0, -0.2), 0.2)", "kl_per_sequence / self.target - 1.0"),
    ("proportional: inverted", kl, k.check_proportional, "kl_per_sequence / self.target - 1.0",
     "1.0 - kl_per_sequence / self.target"),
    ("doubling: without bounds", kl, k.check_doubling, "min(coef * 2.0, 1e3)", "coef * 2.0"),
    ("whiten: shift inverted", masked, ma.check_whiten_by_hand, "    if not shift_mean:\n", "    if shift_mean:\n"),
    ("whiten: mean over padding", masked, ma.check_whiten_by_hand, "    mean = masked_mean(x, mask)\n",
     "    mean = x.mean()\n"),
    ("whiten: deviation for variance", masked, ma.check_whiten_by_hand, "torch.rsqrt(variance + 1e-8)",
     "torch.rsqrt(variance.sqrt() + 1e-8)"),
    ("masked: multiplied away", masked, ma.check_masked_sum, "torch.where(mask, x, torch.zeros_like(x)).sum()",
     "(x * mask).sum()"),
    ("masked: mean over all slots", masked, ma.check_masked_mean, "mask.sum().clamp(min=1)", "mask.numel()"),
    ("logp: in half precision", logprob, lo.check_half_precision_is_upcast, "head(hidden).float()", "head(hidden)"),
    ("logp: temperature forgotten", logprob, lo.check_token_logp_by_hand, ".float() / temperature", ".float()"),
    ("logp: logits kept for the backward pass", logprob, lo.check_logits_are_never_whole,
     "if torch.is_grad_enabled():", "if False:"),
    ("cross-entropy: smoothing of the wrong part", likelihood, li.check_cross_entropy_by_hand,
     "-(1 - label_smoothing) * logp - label_smoothing * mean",
     "-label_smoothing * logp - (1 - label_smoothing) * mean"),
    ("rewards: KL added", experience, e.check_token_rewards_by_hand, "rewards = -kl_coef *", "rewards = kl_coef *"),
    ("rewards: score at the end of the row", experience, e.check_token_rewards_by_hand,
     "rewards[rows, experience.lengths - 1]", "rewards[rows, -1]"),
    ("rewards: score one late", experience, e.check_token_rewards_by_hand, "experience.lengths - 1]",
     "(experience.lengths).clamp(max=rewards.shape[1] - 1)]"),
    ("rewards: coefficient on the score", experience, e.check_token_rewards_by_hand, "+= scores.to(rewards.dtype)",
     "+= kl_coef * scores.to(rewards.dtype)"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "check", "old", "new"), [c[1:] for c in CLASSICAL], ids=[c[0] for c in CLASSICAL])
def test_classical_mistake(module: ModuleType, check: Check, old: str, new: str) -> None:
    check(module)
    wrong = mutated(module, old, new)
    with pytest.raises((AssertionError, RuntimeError)):
        check(wrong)


NO_RESULT_CHANGES = {
    # the last of two dimensions
    "_chunk: sign: -1 -> +1",
    # parts that are empty anyway
    "token_logp: operator: hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32) -> "
    "hidden.sum() * 0.0 - hidden.new_zeros(0, dtype=torch.float32)",
    "token_logp: operator: hidden.sum() * 0.0 -> hidden.sum() / 0.0",
    "token_logp: name: hidden.new_zeros(0, dtype=torch.float32) -> hidden.new_ones(0, dtype=torch.float32)",
    "token_logp: dropped: empty.detach() -> _same(empty)",
    "token_logp: name: hidden.sum() -> hidden.mean()",
    "token_logp: constant: 0.0 -> 1.0",
    # zip(strict=) of two splits of one length; the state of a generator that nothing draws from
    "token_logp: constant: True -> False",
    "token_logp: constant: False -> True",
    # where both forms of log(1 - exp(x)) keep their digits, and what stands in for an argument that is not used
    "log1mexp: boundary: x > -math.log(2.0) -> x >= -math.log(2.0)",
    "log1mexp: name: math.log(2.0) -> math.log1p(2.0)",
    "log1mexp: constant: 2.0 -> 2.5",
    "log1mexp: dropped: torch.where(near_zero, x, torch.full_like(x, -0.1)) -> _same(x)",
    "log1mexp: sign: -0.1 -> +0.1",
    "log1mexp: sign: -1.0 -> +1.0",
    "log1mexp: constant: 0.1 -> 0.125",
    "log1mexp: constant: 1.0 -> 1.25",
    # what stands under a mask that is put on again
    "odpo: name: torch.zeros_like(shift) -> torch.ones_like(shift)",
    "whiten: name: torch.zeros_like(x) -> torch.ones_like(x)",
    "gae: dropped: torch.where(mask, rewards, torch.zeros_like(rewards)) -> _same(rewards)",
    "gae: dropped: torch.where(mask, values, torch.zeros_like(values)) -> _same(values)",
    "gae: name: torch.zeros_like(rewards) -> torch.ones_like(rewards)",
    "gae: name: torch.zeros_like(values) -> torch.ones_like(values)",
    "gae: dropped: torch.where(mask, advantages + values, torch.zeros_like(values)) -> _same(advantages + values)",
    # both sides agree at the boundary
    "clipped_policy: boundary: advantages < 0 -> advantages <= 0",
    "clipped_value: boundary: (values - old_values).abs() > value_clip -> (values - old_values).abs() >= value_clip",
    "clipped_value: boundary: clipped > plain -> clipped >= plain",
    # assigning to a float32 tensor converts
    "pad: dropped: part.detach().float() -> _same(part.detach())",
}


def survivors(module: ModuleType, checks: Sequence[Check]) -> list[str]:
    """The planted mistakes that no check of the module notices."""
    left = []
    for mutant in mutants(module):
        function = mutant.place.split(":", 1)[0].strip("_")
        if function == "collect":
            continue  # needs a model: tests/stages
        nearest = sorted(checks, key=lambda check: function.removeprefix("clipped_") not in check.__name__)
        if not any(fails(check, compiled(module, mutant.tree)) for check in nearest):
            left.append(mutant.place)
    return left


def fails(check: Check, module: ModuleType) -> bool:
    """Whether the check notices; an error of any kind counts."""
    try:
        check(module)
    except Exception:
        return True
    return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "checks"), CHECKED, ids=[module.__name__.split(".")[-1] for module, _ in CHECKED])
def test_every_small_mistake_is_noticed(module: ModuleType, checks: Sequence[Check]) -> None:
    assert set(survivors(module, checks)) <= NO_RESULT_CHANGES
