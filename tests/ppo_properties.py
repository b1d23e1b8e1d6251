"""The properties of PPO, each with the tests that hold it. docs/ppo-properties.md is made from this table.

A test is `file::function` below tests/; a `check_` of tests/objectives runs through test_objectives.py, and there also
against a copy of the code with every small mistake planted in it.
"""

from __future__ import annotations

from typing import NamedTuple


class Holds(NamedTuple):
    """What holds, and what would notice if it did not."""

    says: str
    tests: tuple[str, ...]


OBJ, R, S = "objectives/", "rollouts/", "stages/"
ADVANTAGE, ESTIMATOR, KL, POLICY = (
    f"{OBJ}{name}_checks.py::check_" for name in ("advantage", "estimator", "kl", "policy")
)
BOOTSTRAP, MASKED, LOGPROB, LAGRANGE = (
    f"{OBJ}{name}_checks.py::check_" for name in ("bootstrap", "masked", "logprob", "lagrange")
)
EXPERIENCE = f"{OBJ}experience_checks.py::check_"
LAWS, TOKENS = f"{OBJ}test_policy_properties.py::test_", f"{OBJ}test_token_properties.py::test_"
DRAWN, SAMPLED, ENGINES = (f"{R}test_{name}.py::test_" for name in ("generate", "sampling", "engines"))
ROLLED, MEASURED, REWARDS = (f"{R}test_{name}.py::test_" for name in ("ppo_properties", "experience", "rewards"))
STEPPED, LOSSES, METHODS, CRITIC = (
    f"{S}test_ppo_{name}.py::test_" for name in ("properties", "losses", "methods", "critic")
)
LAYOUTS, ENGINE, ROLES = (
    "properties/test_layouts.py::test_",
    "properties/test_engine.py::test_",
    "models/test_roles.py::test_",
)

PROPERTIES: dict[int, Holds] = {
    1: Holds("On the first pass the ratio of new to old policy is exactly 1 when the micro-batches are those of the "
                "rollout, and 1 within 1e-5 when they are others.",
                (f"{STEPPED}the_first_ratio_is_one", f"{POLICY}first_pass",
                 f"{MEASURED}micro_batches_do_not_change_a_rollout")),
    2: Holds("Before the first step every estimate of the KL to the reference is exactly 0, however the policy "
                "started: fresh adapter, trained adapter, whole model.",
                (f"{ROLLED}at_the_start_every_estimate_of_the_kl_is_zero", f"{LAWS}estimates_of_the_kl",
                 f"{MEASURED}the_same_reference_gives_no_kl_at_all")),
    3: Holds("Log-probabilities noted while sampling are those recomputed afterwards, at any temperature.",
                (f"{DRAWN}sampled_logp_is_recomputed_logp", f"{MEASURED}a_rollout")),
    4: Holds("Log-probabilities and values equal a plain forward of one row, token by token.",
                (f"{LAYOUTS}logp_is_the_models_own", f"{LAYOUTS}a_value_is_of_the_state_before_its_token",
                 f"{LOGPROB}token_logp_by_hand")),
    5: Holds("Padding on the left of prompts or on the right of completions changes no log-probability, value, "
                "advantage or loss, with rotary and with absolute positions.",
                (f"{ROLLED}longer_neighbours_change_nothing", f"{LAYOUTS}neighbours_and_padding_do_not_matter",
                 f"{LAWS}padding_does_not_matter", f"{LOSSES}an_update_is_the_same_however_it_is_cut")),
    6: Holds("What stands in masked slots changes nothing, NaN included.",
                (f"{STEPPED}nothing_in_masked_slots_reaches_a_loss",
                 f"{TOKENS}what_stands_under_a_mask_changes_nothing",
                 f"{LAYOUTS}what_stands_in_the_padding_does_not_matter", f"{EXPERIENCE}token_rewards_garbage",
                 f"{ESTIMATOR}estimators_garbage", f"{R}test_figures.py::test_what_is_masked_counts_nowhere")),
    7: Holds("An end token that is also the pad keeps its mask, log-probability, KL and gradient; prompt tokens equal "
                "to the pad are attended to.",
                (f"{ROLLED}an_end_token_that_also_pads_is_a_token_like_any_other", f"{DRAWN}pad_may_be_the_end_token")),
    8: Holds("Of several stop tokens the first ends a row; a row without one is not finished.",
                (f"{DRAWN}the_first_stop_token_ends_a_row_and_belongs_to_it", f"{SAMPLED}further_stop_tokens",
                 f"{DRAWN}nobody_stops")),
    9: Holds("Completions of one token work, also when all rows end at once; there are no empty ones.",
                (f"{DRAWN}every_row_stops_at_once", f"{ROLLED}no_completion_is_empty",
                 f"{ROLLED}the_smallest_rollouts_are_finite", f"{EXPERIENCE}token_rewards_empty_row")),
    10: Holds("A rollout of one completion, and one that was cut, work and give finite numbers.",
                 (f"{STEPPED}a_rollout_of_one_token", f"{ROLLED}the_smallest_rollouts_are_finite")),
    11: Holds("GAE with lambda 1 is the rewards to go less the value.", (f"{ADVANTAGE}gae_lam_one",)),
    12: Holds("GAE with lambda 0 is the one-step error.", (f"{ADVANTAGE}gae_lam_zero",)),
    13: Holds("GAE over a batch is a loop over each row of its own length.", (f"{ADVANTAGE}gae_is_the_loop",)),
    14: Holds("Advantages of a short row do not depend on the length of others.",
                 (f"{ADVANTAGE}gae_rows_are_alone", f"{LAWS}padding_does_not_matter")),
    15: Holds("A mask inside a row is as if those tokens were deleted.", (f"{ADVANTAGE}gae_holes_are_deleted",)),
    16: Holds("Bootstrapping: nothing paid and constant values give advantage 0; rows that finished ignore the value "
                 "after them.",
                 (f"{BOOTSTRAP}bootstrapped_constant_values", f"{BOOTSTRAP}bootstrapped_finished_rows",
                  f"{S}test_ppo_truncation.py::test_a_rule_for_completions_that_were_cut")),
    17: Holds("A critic that is right leaves no advantage.", (f"{ADVANTAGE}gae_perfect_critic",)),
    18: Holds("The score stands at the last token of a completion, and token rewards sum to the score less what the "
                 "KL costs.",
                 (f"{MEASURED}the_score_lies_on_the_last_token", f"{EXPERIENCE}token_rewards_by_hand",
                  f"{EXPERIENCE}token_rewards_sum")),
    19: Holds("RLOO is the score less the mean of the others: groups sum to 0, rows may be permuted, equal scores and "
                 "a group of one give exactly 0.",
                 (f"{LAWS}rloo_is_the_mean_of_the_others", f"{LAWS}the_order_of_the_rows_does_not_matter",
                  f"{ESTIMATOR}groups_sum_to_zero", f"{ESTIMATOR}groups_without_contrast")),
    20: Holds("GRPO does not see level and scale of the scores, RLOO not their level.",
                 (f"{LAWS}groups_do_not_see_the_level_of_the_scores",)),
    21: Holds("ReMax: a completion that scores as the greedy one has advantage 0.",
                 (f"{ESTIMATOR}remax_by_hand", f"{METHODS}a_reward_of_the_prompt_teaches_nothing")),
    22: Holds("Whitening gives mean 0 and variance 1 over tokens that count, keeps the mean when asked, leaves zeros "
                 "at pads, and constants become zeros; critics learn returns that were not whitened.",
                 (f"{MASKED}whiten_statistics", f"{MASKED}whiten_by_hand", f"{MASKED}whiten_garbage",
                  f"{MASKED}whiten_degenerate", f"{STEPPED}critics_learn_returns_that_nobody_whitened")),
    23: Holds("A completion that cannot be scored teaches nothing, and its neighbours' baseline is as if it were not "
                 "there.",
                 (f"{S}test_ppo_truncation.py::test_a_completion_without_a_score_is_as_if_it_were_not_there",
                  f"{EXPERIENCE}only", f"{REWARDS}a_row_that_one_reward_cannot_score_is_not_valid_in_any_sum")),
    24: Holds("The clip bounds value and gradient exactly where it should: above, inside and below, both signs, "
                 "unequal sides; the dual clip only for negative advantages.",
                 (f"{POLICY}clip_table", f"{TOKENS}the_clipped_loss_is_pessimistic")),
    25: Holds("At ratio 1 the gradient is the policy gradient.", (f"{POLICY}first_pass", f"{POLICY}clip_table")),
    26: Holds("The clipped value error is the larger one, plain at the first pass and without a clip.",
                 (f"{POLICY}value_by_hand", f"{POLICY}value_first_pass", f"{TOKENS}the_clipped_value_is_pessimistic")),
    27: Holds("k2 and k3 in the loss, and k1 in the reward, have the gradient of the KL; other pairs are refused.",
                 (f"{KL}k2_belongs_in_the_loss", f"{KL}k1_belongs_in_the_reward", f"{KL}k3_plus_by_hand",
                  f"{STEPPED}a_kl_in_the_loss_has_the_gradient_of_k2", f"{METHODS}what_does_not_fit_is_refused")),
    28: Holds("The gradient of a step does not depend on micro-batches and packing, for every way to average.",
                 (f"{LOSSES}an_update_is_the_same_however_it_is_cut", f"{METHODS}micro_batches_do_not_change_a_method",
                  f"{ENGINE}budget_and_layout_do_not_change_a_step")),
    29: Holds("Means over tokens, over completions and by a constant differ by the weights of the lengths.",
                 (f"{POLICY}aggregates", f"{LOSSES}an_update_by_hand")),
    30: Holds("The entropy is that of the distribution, in value and gradient, in chunks of any size and with "
                 "soft-capped logits.",
                 (f"{LOGPROB}token_logp_chunks", f"{LOGPROB}entropy_gradient", f"{LOGPROB}token_logp_by_hand")),
    31: Holds("With other text along the gradient is the sum of both.",
                 (f"{LOSSES}another_part_adds_its_gradient", f"{LOSSES}ptx_by_hand")),
    32: Holds("A sequence ratio is the exponential of the mean log-ratio.",
                 (f"{POLICY}sequence_log_ratio", f"{POLICY}sequence_ratio_clips_whole_completions")),
    33: Holds("The proportional controller rests at its target, moves by at most a fifth, scales with completions over "
                 "horizon, and is told nats per completion.",
                 (f"{KL}proportional", f"{STEPPED}the_controller_is_told_nats_per_completion")),
    34: Holds("The doubling controller doubles, halves or keeps its coefficient within bounds; its state comes back.",
                 (f"{KL}doubling", f"{KL}policy_penalty_doubling", f"{KL}controllers_resume")),
    35: Holds("The multiplier rises when the cost is above its threshold, falls below, has a ceiling, and leaves the "
                 "weight of the KL alone.",
                 (f"{LAGRANGE}follow_goes_the_right_way", f"{LAGRANGE}follow_has_a_ceiling",
                  f"{LAGRANGE}mixed_pays_the_kl_once",
                  f"{S}test_ppo_lagrange.py::test_the_kl_weighs_the_same_whatever_the_multiplier")),
    36: Holds("Training leaves base, reference, reward and cost bitwise as they were and moves every tensor of policy "
                 "and critics, heads included.",
                 (f"{S}test_ppo_roles.py::test_only_policy_and_critics_change",
                  f"{ROLES}training_a_role_moves_nothing_else")),
    37: Holds("Policy, critic, policy: both stay trainable.", (f"{ROLES}switching_back_and_forth_keeps_both_trainable",
                                                                  f"{ROLES}training_a_role_moves_nothing_else")),
    38: Holds("Recomputed activations change no gradient, on a shared base either; switching with a graph open "
                 "raises.",
                 (f"{ROLES}checkpointing_changes_no_gradient", f"{ROLES}one_base_is_two_bases",
                  f"{ROLES}switching_with_an_open_graph_is_refused",
                  f"{S}test_ppo_roles.py::test_checkpointing_changes_nothing")),
    39: Holds("A critic that starts from a reward model says what it pays: its score shifted, scaled and weighted.",
                 (f"{STEPPED}a_critic_starts_as_its_reward_model", f"{CRITIC}where_a_critic_starts")),
    40: Holds("Adapters of a run say the same in plain peft and transformers.",
                 (f"{STEPPED}an_adapter_of_ppo_says_the_same_in_plain_peft",
                  "models/test_save.py::test_a_lora_policy_with_its_text")),
    41: Holds("Greedy, the own loop gives the tokens of `generate`.",
                 (f"{DRAWN}greedy_is_generate", f"{DRAWN}greedy_of_an_adapter_is_generate")),
    42: Holds("The seed alone decides: dropping finished rows, splitting batches and the order of rows change no "
                 "token.",
                 (f"{DRAWN}when_finished_rows_are_dropped_does_not_matter", f"{DRAWN}max_batch_does_not_matter",
                  f"{ROLLED}the_order_of_rows_in_a_batch_does_not_matter", f"{DRAWN}sampling_is_the_definition")),
    43: Holds("A prompt read once for n completions is the prompt n times.",
                 (f"{DRAWN}several_completions_are_repeated_prompts",)),
    44: Holds("Dropping finished rows changes no token and no log-probability.",
                 (f"{DRAWN}when_finished_rows_are_dropped_does_not_matter",)),
    45: Holds("Prompts sorted by length come back in their order, with their groups.",
                 (f"{ROLLED}rows_come_back_with_their_prompt_and_group", f"{DRAWN}the_order_of_prompts_is_kept")),
    46: Holds("An engine that returns another number of completions is an error.",
                 (f"{DRAWN}an_engine_that_returns_too_few_or_too_many",
                  f"{ENGINES}continuous_batching_that_fails_or_loses_rows")),
    47: Holds("Functions as rewards: None, NaN, wrong lengths and types, exceptions, numpy numbers, coroutines.",
                 (f"{REWARDS}none_and_nan_are_rows_without_a_score", f"{REWARDS}faults", f"{REWARDS}kinds_of_numbers",
                  f"{REWARDS}an_async_function", f"{S}test_reward_functions.py::test_a_fault_at_the_first_call")),
    48: Holds("Ends of segments find their token: characters of several tokens, several characters in one, white "
                 "space at the end; the sum of the scores is kept.",
                 (f"{REWARDS}a_character_of_several_tokens_ends_in_its_last",
                  f"{REWARDS}white_space_in_the_token_of_the_next_word", f"{REWARDS}every_character_has_its_token",
                  f"{REWARDS}rewards_inside_completions_keep_their_sum")),
    49: Holds("A weighted sum is the sum of its weighted parts; the state of a normaliser is saved.",
                 (f"{REWARDS}total", f"{REWARDS}token_rewards_are_weighted_and_added",
                  f"{R}test_normalise.py::test_a_checkpoint_goes_on_exactly",
                  f"{S}test_reward_functions.py::test_running_statistics_are_in_the_checkpoint")),
    50: Holds("Every estimator solves a toy task, and PPO raises a true reward.",
                 (f"{LAWS}a_bandit_is_solved", f"{S}test_commands.py::test_the_true_reward_rises")),
    51: Holds("A run that was stopped and goes on equals the run that was not, bit for bit.",
                 (f"{S}test_interrupted.py::test_a_stopped_ppo_goes_on_exactly",
                  f"{S}test_ppo_lagrange.py::test_a_stopped_run_goes_on_exactly",
                  f"{METHODS}a_stopped_run_without_critic_goes_on_exactly", f"{CRITIC}a_stopped_run_goes_on_exactly")),
    52: Holds("Killed at any moment of a save, a run has a whole checkpoint.",
                 ("runs/test_crash.py::test_any_operation", "runs/test_crash.py::test_kill_at_random_moments")),
    53: Holds("A loss or score that is not finite ends the run before the optimiser's step, exit code 5; the last "
                 "whole checkpoint stays and the run can go on from it.",
                 (f"{STEPPED}a_number_that_is_not_finite_ends_the_run_before_its_step",
                  f"{ENGINE}a_number_that_is_not_finite_is_not_applied",
                  f"{REWARDS}a_model_score_that_is_not_finite_is_named")),
}  # fmt: skip
