"""The algorithm of a PPO recipe and its critic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_cli.catalog import CONTROLLERS, ESTIMATORS, AboveOne, Finite, NonNegative, Positive, Settings
from rlhf_cli.catalog.entries import LARGEST
from rlhf_cli.recipe.settings.blocks import Checked, Count, block
from rlhf_cli.recipe.settings.data import Sources


class PenaltySettings(Settings):
    coef: Positive = 1.0
    """Coefficient at the start."""
    target_kl: Positive = 0.01
    """Wanted KL per token between the policy before and after a rollout's updates; the coefficient follows it."""
    controller: Literal["doubling", "proportional"] = "doubling"
    """doubling: twice or half the coefficient outside 1/1.5 to 1.5 times the target; proportional: up to 2 % a
    rollout, in proportion to the error."""


class PtxSettings(Settings):
    data: Sources
    """Plain text or demonstrations, in the forms of data.train."""
    coef: Positive = 27.8
    """Factor of their negative log-likelihood, a mean over the scored tokens of the step."""
    batch_size: Count | None = None
    """Examples in each update of the policy; null: training.batch_size."""


class LagrangeSettings(Checked):
    threshold: Finite = 0.0
    """What a completion may cost on average."""
    init: Positive = 1.0
    """The multiplier at the start."""
    learning_rate: Positive = 0.1
    """How far its logarithm moves: learning_rate x multiplier x (mean cost - threshold) a rollout."""
    max: Positive = 5.0
    """It never grows beyond this."""
    window: Count = 128
    """Completions whose costs are averaged, the newest ones."""
    delay_steps: Annotated[int, Field(ge=0)] = 0
    """Rollouts before it starts to move."""

    def contradictions(self) -> Iterator[str]:
        if self.init > self.max:
            yield f"init {self.init:g} lies above max {self.max:g}"


class ReferenceUpdateSettings(Settings):
    every: Count
    """Rollouts between two moves."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """reference <- (1 - alpha) reference + alpha policy, tensor by tensor. With LoRA these are the factors A and B,
    whose product lies -alpha (1 - alpha) (B_policy - B_reference) (A_policy - A_reference) beside the mixture of
    products."""


class ImportanceSettings(Settings):
    cap: Annotated[float, Field(ge=1, le=LARGEST, allow_inf_nan=False)] = 2.0
    """The largest weight of a token (C of the paper)."""


class PPOSettings(Checked):
    epochs: Count = 2
    """Passes over each rollout."""
    mini_batches: Count = 4
    """Optimiser steps per pass: a rollout holds training.batch_size x mini_batches completions."""
    clip_low: Positive = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: Positive = 0.2
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: AboveOne | None = None
    """Bound the loss of a bad action at dual_clip x its advantage; null: off."""
    value_clip: Positive | None = 0.2
    """Clip the change of a value to +-value_clip; null: off."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    ratio: Literal["token", "sequence"] = "token"
    """Ratio of new to old policy that is clipped: each token's, or one of the completion, its geometric mean over the
    tokens (GSPO; clip_low and clip_high are then some 1e-4)."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """How the policy's loss is averaged over an optimiser step: over tokens; over completions, each the mean of its
    tokens; or summed over tokens and divided by completions x rollout.max_new_tokens (Dr. GRPO)."""
    kl: block(CONTROLLERS.values()) = Field(default_factory=lambda: {"name": "fixed"}, validate_default=True)  # type: ignore[valid-type]
    """Coefficient of the KL to the reference; fixed, proportional or doubling."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference stands: subtracted from the reward of every token, or added to the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """How it is estimated; null: k1 in the reward, k2 in the loss. The reward takes k1 alone. The loss takes k2, or k3,
    whose value is unbiased but whose gradient is not: k2's gradient is taken for it."""
    ptx: PtxSettings | None = None
    """PPO-ptx: also add the likelihood of other text to each update of the policy; null: off."""
    penalty: PenaltySettings | None = None
    """PPO-penalty: also add the KL to the rollout's policy to the loss, with a coefficient that adapts."""
    advantage: block(ESTIMATORS.values(), "gae") = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]
    """The advantage estimator and its settings."""
    whiten_advantages: bool | None = None
    """Shift and scale the advantages of a rollout to mean 0 and variance 1; null: as the estimator is published (gae
    and reinforce: yes; those that compare completions of one prompt, and reinforce_pp, which does it itself: no)."""
    whiten_rewards: bool = False
    """Scale the token rewards of a rollout to variance 1, keeping their mean; only with a critic, since what others
    compare must stay on one scale."""
    truncation: Literal["score", "penalty", "replace", "bootstrap", "drop"] = "penalty"
    """A completion that was cut by the length limit: scored as any other; scored less missing_eos_penalty; given
    truncated_score instead; not scored, the critic's value of where it was cut in place of what would have followed;
    or not learned from."""
    missing_eos_penalty: NonNegative = 1.0
    """Subtracted from the score of a completion that was cut; only read with `truncation: penalty`."""
    truncated_score: Finite = -1.0
    """The score of a completion that was cut; only read with `truncation: replace`."""
    lagrange: LagrangeSettings | None = None
    """PPO-Lag: keep the mean of the rewards with `role: cost` below a threshold, by a multiplier that adapts."""
    reference_update: ReferenceUpdateSettings | None = None
    """Let the reference follow the policy; null: it stays where the policy started."""
    target_kl: Positive | None = None
    """Stop a rollout's updates when the KL per token to its policy passes 1.5 times this; null: never."""
    importance_correction: ImportanceSettings | None = None
    """Weigh each token's policy loss by min(p / q, cap), p its probability under the policy as trained, q as the engine
    sampled it; null: off. For engines whose numbers are not those of the training (vllm)."""

    def contradictions(self) -> Iterator[str]:
        critic = ESTIMATORS[self.advantage.name].critic
        if self.kl_in == "reward" and self.kl_estimator in ("k2", "k3"):
            yield (
                f"kl_estimator {self.kl_estimator} does not belong in the reward, where only k1 gives the gradient of "
                f"the KL: use k1, or kl_in: loss"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            yield (
                "kl_estimator k1 does not belong in the loss, where its gradient is zero on average: use k2 or k3, or "
                "kl_in: reward"
            )
        if self.kl.name != "fixed" and self.kl.coef == 0:
            yield (
                f"kl.coef 0 stays 0 with kl.name {self.kl.name}, which multiplies it: give one to start from, or "
                f"name: fixed for none"
            )
        if self.truncation == "bootstrap" and not critic:
            yield (
                f"truncation bootstrap asks a critic what a cut completion would still have earned, and advantage "
                f"{self.advantage.name} has none: use gae, or another rule"
            )
        yield from self.unread(("missing_eos_penalty",), "truncation", "penalty")
        yield from self.unread(("truncated_score",), "truncation", "replace")
        for key in self.changed("value_clip") if not critic else ():
            yield f"{key} is only read with a critic, and advantage {self.advantage.name} has none"


class CriticSettings(Checked):
    start: Literal["auto", "reward", "policy", "zero"] = "auto"
    """Weights the critic starts from: the first reward model with its head; or, with a zero head, the policy, or
    nothing learned (zero: a fresh adapter; without lora the policy). auto: the reward model when there is one."""
    learning_rate: Positive | None = None
    """Peak learning rate; null: the policy's."""
    shared: bool = False
    """One trunk for both: the values are a zero head on the policy's hidden states, trained in the same step from the
    same forward."""
    coef: Positive = 0.1
    """Weight of the value loss in that step; only read with `shared`."""
    detach: bool = False
    """Keep the gradient of the value loss off the trunk; only read with `shared`."""
    pretrain_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the start of the run in which the policy stands still and the values are fitted to the returns of its
    completions (no value_clip, lambda 1). The policy's learning-rate schedule starts after them."""

    def contradictions(self) -> Iterator[str]:
        unread = ("start", "learning_rate") if self.shared else ("coef", "detach")
        for key in self.changed(*unread):
            yield f"{key} is only read with shared: {str(not self.shared).lower()}"
