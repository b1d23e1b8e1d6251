"""The recipe of each command: every key, type, bound and default a user can write. No torch.

Objectives, estimators and controllers come from the catalogue; their blocks are `{name: ..., settings...}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_cli.catalog import ESTIMATORS, OBJECTIVES, Settings, objectives_of
from rlhf_cli.recipe.settings.blocks import as_mapping, block
from rlhf_cli.recipe.settings.data import DataSettings, RewardDataSettings, SFTDataSettings
from rlhf_cli.recipe.settings.doctor import TripwireSettings
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings
from rlhf_cli.recipe.settings.ppo import CriticSettings, PPOSettings
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.recipe.settings.rollout import RolloutSettings
from rlhf_cli.recipe.settings.training import CheckpointSettings, EvaluationSettings, LoggingSettings, TrainingSettings


class Recipe(Settings):
    """What all stages share."""

    stage: str
    """The command this recipe is for."""
    model: Annotated[ModelSettings, as_mapping("name_or_path", ModelSettings)]
    """The model to start from."""
    lora: LoraSettings | None = None
    """Train an adapter; null: full fine-tuning."""
    data: DataSettings
    """Where the examples come from."""
    training: TrainingSettings
    """The optimisation."""
    logging: LoggingSettings = LoggingSettings()
    """What is shown, and where."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """When to save."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """When to evaluate."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Decides the data order, initial heads and adapters, dropout and sampling."""
    output_dir: str
    """The run directory."""

    @model_validator(mode="after")
    def _quantised_needs_lora(self) -> Recipe:
        if self.model.quantization != "none" and self.lora is None:
            raise ValueError(
                "model.quantization is set but lora is null: a quantised base cannot be trained itself; "
                "add `lora: {}` or set `quantization: none`"
            )
        if self.model.quantization == "int8" and self.lora is not None and self.lora.use_dora:
            raise ValueError("lora.use_dora does not work on model.quantization int8: use nf4, or use_dora: false")
        return self


class SFTRecipe(Recipe):
    stage: Literal["sft"]
    data: SFTDataSettings
    objective: block(objectives_of("sft"), "cross_entropy") = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]
    """What is minimised."""


class RewardRecipe(Recipe):
    stage: Literal["train-rm"]
    data: RewardDataSettings
    objective: block(objectives_of("train-rm"), "bradley_terry") = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]
    """What is minimised: bradley_terry unless another name is given."""

    @model_validator(mode="after")
    def _data_settings_are_read(self) -> RewardRecipe:
        name = self.objective.name
        kind, plain = OBJECTIVES[name].data, RewardDataSettings.model_fields
        for key, wanted in (("ratings", "rated"), ("segments", "steps"), ("step_separator", "steps")):
            if kind != wanted and getattr(self.data, key) != plain[key].default:
                readers = ", ".join(o.name for o in objectives_of("train-rm") if o.data == wanted)
                raise ValueError(f"data.{key} is only read by {readers}, and objective.name is {name}")
        return self


class DPORecipe(Recipe):
    stage: Literal["dpo"]
    objective: block(objectives_of("dpo"), mix="dpo_mix")  # type: ignore[valid-type]
    """Which objective, and its settings; or `{terms: [...]}`, several with weights."""
    reference: str | None = None
    """Another frozen model as reference; null: the model the policy starts from."""
    reference_cache: Literal["auto", "off"] = "auto"
    """auto: the reference's log-probabilities are kept for later runs on the same data and weights, in the folder
    RLHF_CACHE (default: rlhf in the user's cache), and taken from there. off: neither. Never changes the result."""


class ORPORecipe(Recipe):
    stage: Literal["orpo"]
    objective: block(objectives_of("orpo"), "orpo") = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]
    """What is minimised."""


SimPOBlock: Any = block(objectives_of("simpo"), "simpo", mix="simpo_mix")


class SimPORecipe(Recipe):
    stage: Literal["simpo"]
    objective: SimPOBlock = Field(default_factory=dict, validate_default=True)
    """What is minimised: simpo unless another name is given; or `{terms: [...]}`, several with weights."""


class PPORecipe(Recipe):
    stage: Literal["ppo"]
    rewards: Annotated[list[RewardSettings], Field(min_length=1)]
    """Reward models and functions; the score of a completion is their weighted sum."""
    rollout: RolloutSettings = RolloutSettings()
    """Sampling."""
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    """The algorithm."""
    critic: CriticSettings = CriticSettings()
    """The value model; only estimators that read values have one (gae)."""
    doctor: TripwireSettings = TripwireSettings()
    """Watches training: findings in plain words, and what they set off."""

    @model_validator(mode="after")
    def _settings_are_read(self) -> PPORecipe:
        if self.evaluation.max_new_tokens != type(self.evaluation).model_fields["max_new_tokens"].default:
            raise ValueError(
                "evaluation.max_new_tokens is not read by ppo, which samples with rollout.max_new_tokens there too: "
                "leave it out"
            )
        weights = [reward.weight for reward in self.rewards if reward.role == "reward"]
        if weights and not any(weights):
            raise ValueError(
                "rewards.weight is 0 for all that have role: reward, which leaves nothing to maximise: give one of "
                "them another weight"
            )
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> PPORecipe:
        rollout, each = self.training.batch_size * self.ppo.mini_batches, self.rollout.completions_per_prompt
        if rollout % each:
            raise ValueError(
                f"a rollout of training.batch_size x ppo.mini_batches = {rollout} completions cannot be shared out in "
                f"groups of rollout.completions_per_prompt = {each}"
            )
        estimator = ESTIMATORS[self.ppo.advantage.name]
        if each < estimator.group:
            raise ValueError(
                f"ppo.advantage {estimator.name} compares the completions of one prompt: "
                f"rollout.completions_per_prompt must be at least {estimator.group}, found {each}"
            )
        if self.ppo.whiten_rewards and not estimator.critic:
            raise ValueError(
                f"ppo.whiten_rewards shifts what ppo.advantage {estimator.name} compares: use gae, or false"
            )
        changed = [k for k, f in CriticSettings.model_fields.items() if getattr(self.critic, k) != f.default]
        if changed and not estimator.critic:
            raise ValueError(
                f"critic.{changed[0]} asks for a critic, and ppo.advantage {estimator.name} has none: use gae"
            )
        costs = [reward.title() for reward in self.rewards if reward.role == "cost"]
        if costs and self.ppo.lagrange is None:
            raise ValueError(f"the reward '{costs[0]}' has role: cost; say how it is held down: ppo.lagrange: {{}}")
        if self.ppo.lagrange is not None and self.ppo.whiten_rewards:
            raise ValueError(
                "ppo.whiten_rewards scales reward and cost apart, and ppo.lagrange weighs them: false for one"
            )
        if self.ppo.lagrange is not None and not costs:
            raise ValueError("ppo.lagrange holds down a cost: give one of the rewards role: cost")
        if len(costs) == len(self.rewards):
            raise ValueError("all rewards have role: cost; at least one must be a reward")
        titles = [reward.title() for reward in self.rewards]
        if len(set(titles)) < len(titles):
            raise ValueError(f"two rewards have the same name ({', '.join(titles)}): give each a `name`")
        if self.rollout.max_new_tokens >= self.data.max_length:
            raise ValueError(
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens} leaves no room for a prompt in "
                f"data.max_length = {self.data.max_length}"
            )
        return self


RECIPES: dict[str, type[Recipe]] = {
    "sft": SFTRecipe,
    "train-rm": RewardRecipe,
    "ppo": PPORecipe,
    "dpo": DPORecipe,
    "orpo": ORPORecipe,
    "simpo": SimPORecipe,
}
