"""Mistakes that PPO code is known to make, as edits of this project, and the tests that must notice: see planted.py.

Most were met in the field: ratios that are not 1, a negative KL from sampling options, entropy over padding, a score on
the pad slot, a KL per token against a target per completion, state lost on resume, adapters switched too early.
"""

from __future__ import annotations

from dataclasses import dataclass

Edit = tuple[str, str, str]
"""A file below rlhf_cli/, its old text, the new one."""


@dataclass(frozen=True)
class Planted:
    """A mistake."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    """Node ids; every one of them must fail."""
    usual: bool = False
    """Whether the test suite plants it every time; the others wait for `make planted`."""


CHECK = "tests/objectives/test_objectives.py::test_objective"
DRAWN = "tests/rollouts/test_generate.py::"
ROLLED = "tests/rollouts/test_ppo_properties.py::"
STEPPED = "tests/stages/test_ppo_properties.py::"
LAYOUTS = "tests/properties/test_layouts.py::"
ROLES = "tests/models/test_roles.py::"
LOSSES = "tests/stages/test_ppo_losses.py::"

LOSS = (
    Planted(
        "the sign of the policy's loss",
        (("objectives/policy.py", "return -surrogate, clipped < plain", "return surrogate, clipped < plain"),),
        (f"{CHECK}[clip_table]", f"{LOSSES}test_an_update_by_hand[token]"), usual=True,
    ),
    Planted(
        "the smaller of the two value errors",
        (("objectives/policy.py", "0.5 * torch.maximum(plain, clipped), outside",
          "0.5 * torch.minimum(plain, clipped), outside"),),
        (f"{CHECK}[value_by_hand]", f"{LOSSES}test_an_update_of_the_critic_by_hand"),
    ),
    Planted(
        "micro-batches averaged one by one",
        (("train/passes.py", "parts = [value / max(counts[unit], 1) for",
          "parts = [value / max(batch.tokens, 1) for"),),
        (f"{LOSSES}test_an_update_is_the_same_however_it_is_cut", "tests/properties/test_engine.py::"
         "test_budget_and_layout_do_not_change_a_step[lora-sft]"),
    ),
    Planted(
        "new log-probabilities on another path than the old",
        (
            ("stages/ppo_losses.py", "said = policy.logp(batch, lesson.temperature, statistics",
             "said = policy.logp(batch, statistics"),
        ),
        (f"{STEPPED}test_the_first_ratio_is_one[full-True]", f"{STEPPED}test_the_first_ratio_is_one[lora-False]"),
        usual=True,
    ),
    Planted(
        "the sampler's log-probabilities as the old ones",
        (("rollouts/experience.py", "logp=pad([o[:, 0] for o in own])[0],", "logp=sampled,"),),
        (f"{STEPPED}test_the_first_ratio_is_one[full-True]",),
    ),
    Planted(
        "k3 in the loss with its own, biased gradient",
        (("stages/ppo_losses.py", '"k3": k3_plus}', '"k3": k3}'),),
        (f"{STEPPED}test_a_kl_in_the_loss_has_the_gradient_of_k2",),
    ),
    Planted(
        "a loss that is not finite is learned from",
        (("train/passes.py", "if not bool(torch.isfinite(part)):", "if False:"),
         ("train/passes.py", "if learner.skipped > (", "if False and learner.skipped > (")),
        (f"{STEPPED}test_a_number_that_is_not_finite_ends_the_run_before_its_step[loss]",
         "tests/properties/test_engine.py::test_a_number_that_is_not_finite_is_not_applied"),
    ),
)  # fmt: skip

LOGP = (
    Planted(
        "log-probabilities read one token early, old and new",
        (("models/roles.py", "return said(hidden[batch.predictors], slice(None))",
          "return said(hidden[(batch.predictors - 1).clamp(min=0)], slice(None))"),),
        (f"{DRAWN}test_sampled_logp_is_recomputed_logp[1.0-llama]", f"{LAYOUTS}test_logp_is_the_models_own[1.0-gpt2]"),
        usual=True,
    ),
    Planted(
        "scored at temperature 1, sampled at another",
        (("models/roles.py", "return self._logp(self.hidden(batch), batch, temperature, statistics, upstream)",
          "return self._logp(self.hidden(batch), batch, 1.0, statistics, upstream)"),),
        (f"{DRAWN}test_sampled_logp_is_recomputed_logp[0.5-llama]",
         "tests/rollouts/test_experience.py::test_a_rollout"), usual=True,
    ),
    Planted(
        "values read one token late",
        (("models/roles.py", "return self._scalar(self.hidden(batch), batch, batch.predictors)",
          "return self._scalar(self.hidden(batch), batch, batch.targets)"),),
        ("tests/stages/test_ppo_critic.py::test_one_forward_says_what_two_say",
         f"{LAYOUTS}test_a_value_is_of_the_state_before_its_token"), usual=True,
    ),
    Planted(
        "the entropy before the temperature",
        (("objectives/logprob.py", "rows += [total - (torch.softmax(logits, dim=-1) * logits).sum(-1),",
          "rows += [torch.distributions.Categorical(logits=logits * temperature).entropy(),"),),
        (f"{CHECK}[token_logp_chunks]",),
    ),
    Planted(
        "the entropy of the padding",
        (("rollouts/figures.py", "masked_mean(experience.entropy, mask)", "experience.entropy.mean()"),),
        ("tests/rollouts/test_figures.py::test_what_is_masked_counts_nowhere",),
    ),
    Planted(
        "positions that count the left padding",
        (("rollouts/generate.py", "position = (mask.cumsum(1) - 1).clamp(min=0)",
          "position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)"),),
        (f"{DRAWN}test_greedy_is_generate[gpt2]", f"{ROLLED}test_longer_neighbours_change_nothing[gpt2-True]"),
    ),
    Planted(
        "attention to the left padding",
        (("rollouts/engines.py", "mask = torch.zeros(len(prompts), width, dtype=torch.int64)",
          "mask = torch.ones(len(prompts), width, dtype=torch.int64)"),),
        (f"{DRAWN}test_greedy_is_generate[llama]", f"{ROLLED}test_longer_neighbours_change_nothing[llama-True]"),
    ),
)  # fmt: skip

ROLLOUT = (
    Planted(
        "the end token is not part of the completion",
        (("rollouts/rows.py", "self.length[now] = self.at", "self.length[now] = max(self.at - 1, 1)"),),
        (f"{DRAWN}test_the_first_stop_token_ends_a_row_and_belongs_to_it[stops0]",),
    ),
    Planted(
        "a mask made from the pad id, which is the end token",
        (("rollouts/experience.py", "sampled, mask = pad(drawn.logp)",
          "sampled, mask = pad(drawn.logp)\n    mask = pad([torch.from_numpy(s.completions[0].ids != 2) "
          "for s in samples])[0].bool()"),),
        (f"{ROLLED}test_an_end_token_that_also_pads_is_a_token_like_any_other[llama]",),
    ),
    Planted(
        "only the first stop id ends a completion",
        (("rollouts/rows.py", "torch.tensor(sorted({*stop_ids, *sampling.stop_ids}), device=device)",
          "torch.tensor(sorted({*stop_ids, *sampling.stop_ids})[:1], device=device)"),),
        (f"{DRAWN}test_the_first_stop_token_ends_a_row_and_belongs_to_it[stops1]",),
    ),
    Planted(
        "top_p outside of the scored distribution, unasked",
        (("recipe/settings/rollout.py", "if biased and not self.allow_biased_sampling:", "if False:"),),
        ("tests/rollouts/test_sampling.py::test_settings_that_are_refused",),
    ),
    Planted(
        "penalties and filters of the model's generation settings",
        (("rollouts/engines.py", "own, model.generation_config = model.generation_config, GenerationConfig()",
          "own = model.generation_config"),),
        ("tests/rollouts/test_engines.py::test_what_a_model_brings_along_is_not_used[generate]",),
    ),
    Planted(
        "uniform numbers by the place in the batch",
        (("rollouts/rows.py", "uniforms(seed, numbers, self.limit)",
          "uniforms(seed, range(len(prompts)), self.limit)"),),
        (f"{DRAWN}test_max_batch_does_not_matter[llama]", f"{ROLLED}test_the_order_of_rows_in_a_batch_does_not_matter"),
    ),
    Planted(
        "completions in the order they were decoded in",
        (("rollouts/generate.py", "out[i] += completed[place", "out[start + place] += completed[place"),),
        (f"{DRAWN}test_the_order_of_prompts_is_kept", f"{ROLLED}test_rows_come_back_with_their_prompt_and_group"),
    ),
    Planted(
        "dropout is left on",
        (("models/roles.py", "module.p = 0.0", "module.p = module.p"),),
        (f"{ROLES}test_dropout_is_disabled",),
    ),
    Planted(
        "training mode in the rollout",
        (("models/roles.py", "base.model.train(train)", "base.model.train()"),),
        (f"{ROLES}test_dropout_is_off_outside_training", f"{DRAWN}test_sampling_while_checkpointing"),
    ),
)  # fmt: skip

IN_LOSSES_AND_ROLLOUTS = (*LOSS, *LOGP, *ROLLOUT)
