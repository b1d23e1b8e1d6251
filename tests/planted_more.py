"""More of planted_bugs.py: mistakes in credit, in the KL, and in the roles."""

from __future__ import annotations

from tests.planted_bugs import CHECK, IN_LOSSES_AND_ROLLOUTS, ROLES, ROLLED, STEPPED, Planted

METHODS = "tests/stages/test_ppo_methods.py::"

CREDIT = (
    Planted(
        "advantages run into the pads",
        (("objectives/advantage.py", "here = mask[:, t]", "here = torch.ones_like(mask[:, t])"),
         ("objectives/advantage.py", "    return torch.where(mask, x, torch.zeros_like(x))\n", "    return x\n")),
        (f"{CHECK}[gae_is_the_loop]", f"{CHECK}[gae_rows_are_alone]", f"{CHECK}[gae_holes_are_deleted]"), usual=True,
    ),
    Planted(
        "the score on the slot after the end token",
        (("rollouts/experience.py", "rewards[rows, experience.lengths - 1] +=",
          "rewards[rows, experience.lengths.clamp(max=rewards.shape[1] - 1)] +="),),
        ("tests/rollouts/test_experience.py::test_the_score_lies_on_the_last_token", f"{CHECK}[token_rewards_by_hand]"),
        usual=True,
    ),
    Planted(
        "empty completions index the end of the row",
        (("rollouts/experience.py", 'assert bool((experience.lengths > 0).all()), "', '_ = "'),),
        (f"{CHECK}[token_rewards_empty_row]",),
    ),
    Planted(
        "the value of what was cut on top of its score",
        (("rollouts/experience.py", '"bootstrap": torch.zeros_like(scores)', '"bootstrap": scores'),),
        (f"{CHECK}[settled_by_hand]",),
    ),
    Planted(
        "shift_mean turned round",
        (("objectives/masked.py", "    if not shift_mean:\n", "    if shift_mean:\n"),),
        (f"{CHECK}[whiten_by_hand]", f"{CHECK}[whiten_statistics]"),
    ),
    Planted(
        "a critic that learns whitened returns",
        (("stages/ppo.py", "targets, metrics = [(rolled.reward.values, returns)], {}",
          "values = rolled.reward.values\n"
          "        returns = returns if values is None else whiten(advantages, experience.mask) + values\n"
          "        targets, metrics = [(values, returns)], {}"),),
        (f"{STEPPED}test_critics_learn_returns_that_nobody_whitened",),
    ),
    Planted(
        "a group of one is paid its raw score",
        (("objectives/advantage.py", "torch.where(differs, whole - mean, torch.zeros_like(whole))",
          "torch.where(same.sum(1) > 1, whole - mean, whole)"),),
        (f"{CHECK}[groups_without_contrast]",),
    ),
    Planted(
        "neighbours taken for a group",
        (("objectives/advantage.py", "return (group[:, None] == group)",
          "at = torch.arange(len(group)) // 2\n    return (at[:, None] == at)"),),
        (f"{CHECK}[groups_are_named]", "tests/objectives/test_policy_properties.py::"
         "test_rloo_is_the_mean_of_the_others"),
    ),
    Planted(
        "a completion without a score in the baseline",
        (("stages/ppo_rollout.py", "return rolled.only(valid)", "return rolled"),),
        ("tests/stages/test_ppo_truncation.py::test_a_completion_without_a_score_is_as_if_it_were_not_there",),
    ),
    Planted(
        "the greedy completion of another prompt",
        (("stages/ppo_rollout.py", "greedy=scores[group])", "greedy=scores[group.flip(0)])"),),
        (f"{METHODS}test_a_reward_of_the_prompt_teaches_nothing[remax]",),
    ),
)  # fmt: skip

KL = (
    Planted(
        "the KL turned round",
        (("objectives/kl.py", "    return logp - other\n", "    return other - logp\n"),),
        (f"{CHECK}[expectation_is_the_kl]", f"{CHECK}[k1_belongs_in_the_reward]", f"{CHECK}[token_rewards_by_hand]"),
    ),
    Planted(
        "k3 of the other distribution's samples",
        (("objectives/kl.py", "torch.expm1(-x) + x", "torch.expm1(x) - x"),),
        (f"{CHECK}[expectation_is_the_kl]",),
    ),
    Planted(
        "a KL per token for a target per completion",
        (("stages/ppo.py", 'self.kl.update(metrics["objective/kl"],',
          'self.kl.update(metrics["objective/kl"] / metrics["completions/mean_length"],'),),
        (f"{STEPPED}test_the_controller_is_told_nats_per_completion",),
    ),
    Planted(
        "the cost pays the KL with the reward's sign",
        (("stages/ppo.py", "self.estimate(experience, rolled.cost, -coef, warming)",
          "self.estimate(experience, rolled.cost, coef, warming)"),),
        ("tests/stages/test_ppo_lagrange.py::test_the_kl_weighs_the_same_whatever_the_multiplier[rloo-1.0]",),
    ),
    Planted(
        "the KL coefficient is lost on resume",
        (("stages/ppo.py", 'engine.kept |= {"kl": self.kl, "progress": self.progress}',
          'engine.kept |= {"progress": self.progress}'),),
        (f"{METHODS}test_a_stopped_run_without_critic_goes_on_exactly",),
    ),
    Planted(
        "lambda is lost on resume",
        (("stages/ppo.py", 'engine.kept["lagrange"] = self.lagrange', "pass"),),
        ("tests/stages/test_ppo_lagrange.py::test_a_stopped_run_goes_on_exactly[grpo]",),
    ),
    Planted(
        "running statistics of a reward are lost on resume",
        (("rollouts/normalise.py", 'int(state["count"]), float(state["mean"]), float(state["squares"])',
          "0, 0.0, 0.0"),),
        ("tests/rollouts/test_normalise.py::test_a_checkpoint_goes_on_exactly",),
    ),
)  # fmt: skip

ROLE = (
    Planted(
        "a critic without the scale of the score",
        (("stages/ppo_roles.py", "weight, bias = head.weight * scale, -reward.scaling.mean * scale",
          "weight, bias = head.weight, 0.0 * scale"),),
        (f"{STEPPED}test_a_critic_starts_as_its_reward_model[True]",
         f"{STEPPED}test_a_critic_starts_as_its_reward_model[False]"),
    ),
    Planted(
        "adapters off as the reference of a trained adapter",
        (("models/build.py", 'if text.path.kind == "full" and not moves:', "if not moves:"),),
        (f"{ROLES}test_the_reference_of_a_policy_that_started_from_an_adapter",
         f"{ROLLED}test_at_the_start_every_estimate_of_the_kl_is_zero[adapter]"), usual=True,
    ),
    Planted(
        "a switch of roles freezes what is trained",
        (("models/roles.py", "if parameter.requires_grad != wanted:", "if parameter.requires_grad and not wanted:"),),
        (f"{STEPPED}test_the_first_ratio_is_one[lora-True]",),
    ),
    Planted(
        "what is trained is read off requires_grad, which a switch clears",
        (("models/roles.py", "= adapter_parameters(self.base, self.adapter)",
          "= [p for p in adapter_parameters(self.base, self.adapter) if p[1].requires_grad]"),),
        (f"{ROLES}test_training_a_role_moves_nothing_else",),
    ),
    Planted(
        "adapters are switched before the backward pass",
        (("models/roles.py", "if owing is not None and owing is not self:", "if False:"),),
        (f"{ROLES}test_switching_with_an_open_graph_is_refused",),
    ),
    Planted(
        "the reference learns with the policy",
        (("models/build.py", 'return Role("reference", base, "reference"), f"{words}',
          'return Role("reference", base, policy.adapter), f"{words}'),),
        (f"{ROLLED}test_at_the_start_every_estimate_of_the_kl_is_zero[adapter]",),
    ),
)  # fmt: skip

PLANTED: tuple[Planted, ...] = (*IN_LOSSES_AND_ROLLOUTS, *CREDIT, *KL, *ROLE)
