"""The recipe of each command: every key, type, bound and default a user can write. No torch.

Objectives, estimators and controllers come from the catalogue; their blocks are `{name: ..., settings...}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf_cli.catalog import ESTIMATORS, OBJECTIVES, Objective, objectives_of
from rlhf_cli.recipe.data_stages import SampleRecipe, ScoreRecipe, SelectRecipe
from rlhf_cli.recipe.evaluation import EvalRecipe
from rlhf_cli.recipe.settings.blocks import Name, as_mapping, block, terms_of
from rlhf_cli.recipe.settings.data import DataSettings, RewardDataSettings, SFTDataSettings, SourceSettings
from rlhf_cli.recipe.settings.distributed import DistributedSettings
from rlhf_cli.recipe.settings.doctor import TripwireSettings
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings
from rlhf_cli.recipe.settings.ppo import CriticSettings, PPOSettings
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.recipe.settings.rollout import HIGHEST_RANK, RolloutSettings
from rlhf_cli.recipe.settings.training import CheckpointSettings, EvaluationSettings, LoggingSettings, TrainingSettings
from rlhf_cli.recipe.work import Work


class Recipe(Work):
    """What all commands that train share."""

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
    license: Name | None = None
    """Of the result, for its card: an id of the hub (apache-2.0) or a name; null: that of its base, where it is
    declared."""
    distributed: DistributedSettings = DistributedSettings()
    """Several processes, started by torchrun."""

    def data_read(self) -> list[SourceSettings]:
        return [*self.data.train, *(self.data.eval or [])]

    def models_read(self) -> list[tuple[str, str | None]]:
        return [(self.model.name_or_path, self.model.revision)]

    def texts_read(self) -> list[str]:
        return [] if self.model.chat_template is None else [self.model.chat_template]

    @property
    def trackers(self) -> list[str]:
        return list(self.logging.report_to)

    @property
    def max_steps(self) -> int | None:
        return self.training.max_steps

    def contradictions(self) -> Iterator[str]:
        if self.model.quantization != "none" and self.lora is None:
            yield (
                "model.quantization is set but lora is null: a quantised base cannot be trained itself; "
                "add `lora: {}` or set `quantization: none`"
            )
        if self.model.quantization == "int8" and self.lora is not None and self.lora.use_dora:
            yield "lora.use_dora does not work on model.quantization int8: use nf4, or use_dora: false"
        if self.training.layout == "packed" and self.model.attn_implementation not in ("auto", "flex_attention"):
            yield (
                f"training.layout packed needs attention by segments, and model.attn_implementation "
                f"{self.model.attn_implementation} has none: set one of them to auto"
            )
        yield from self._sharded()
        for entry in self.objectives() if self.training.batch_size < 2 else ():
            if {"kl_point", "whole_step"} & set(entry.needs):
                yield f"training.batch_size is 1, and objective {entry.name} compares those of a step: two at least"

    def _sharded(self) -> Iterator[str]:
        by_segments = self.training.layout != "padded" and self.model.attn_implementation in ("auto", "flex_attention")
        if self.distributed.sequence_parallel > 1 and not by_segments:
            yield (
                "distributed.sequence_parallel needs attention by segments: set training.layout and "
                "model.attn_implementation to auto"
            )
        if self.distributed.shard == "none":
            yield from self.distributed.unshared()
            return
        shard, training = f"distributed.shard {self.distributed.shard}", "trains parts of tensors, and cannot go with"
        if self.model.quantization == "int8":
            yield f"{shard} cannot share out model.quantization int8: use nf4, or set one of them to none"
        if self.lora is None and self.training.optimizer not in ("adamw", "sgd"):
            yield (
                f"{shard} {training} training.optimizer {self.training.optimizer} while lora is null: use adamw or sgd"
            )
        if self.lora is None and self.model.dtype == "float16":
            yield f"{shard} {training} model.dtype float16 while lora is null: use bfloat16"
        if self.lora is not None and self.lora.use_dora:
            yield f"{shard} cannot go with lora.use_dora, which reads whole weights: use_dora: false"

    def objectives(self) -> list[Objective]:
        """What is minimised, term by term; none for ppo."""
        block: Any = getattr(self, "objective", None)
        return [] if block is None else [OBJECTIVES[term.name] for _, term in terms_of(block)]


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

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        name = self.objective.name
        for key, wanted in (("ratings", "rated"), ("segments", "steps"), ("step_separator", "steps")):
            if OBJECTIVES[name].data != wanted and any(self.data.changed(key)):
                readers = ", ".join(o.name for o in objectives_of("train-rm") if o.data == wanted)
                yield f"data.{key} is only read by {readers}, and objective.name is {name}"


class DPORecipe(Recipe):
    stage: Literal["dpo"]
    objective: block(objectives_of("dpo"), mix="dpo_mix")  # type: ignore[valid-type]
    """Which objective, and its settings; or `{terms: [...]}`, several with weights."""
    reference: Name | None = None
    """Another frozen model as reference; null: the model the policy starts from."""
    reference_cache: Literal["auto", "off"] = "auto"
    """auto: the reference's log-probabilities are kept for later runs on the same data and weights, in the folder
    RLHF_CACHE (default: rlhf in the user's cache), and taken from there. off: neither. Never changes the result."""

    def models_read(self) -> list[tuple[str, str | None]]:
        return super().models_read() + ([] if self.reference is None else [(self.reference, None)])

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        names = [entry.name for entry in self.objectives() if "reference" not in entry.needs]
        if self.reference is not None and len(names) == len(self.objectives()):
            yield f"reference is not read by objective {', '.join(names)}: leave it out"


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

    def data_read(self) -> list[SourceSettings]:
        return super().data_read() + (self.ppo.ptx.data if self.ppo.ptx else [])

    def rewards_read(self) -> list[RewardSettings]:
        return self.rewards

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from self._unread()
        yield from self._groups()
        yield from self._rewards()
        if self.distributed.shard != "none" and self.rollout.engine == "continuous":
            shard = self.distributed.shard
            yield f"distributed.shard {shard} cannot go with rollout.engine continuous: use own or generate"
        if self.rollout.max_new_tokens >= self.data.max_length:
            yield (
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens} leaves no room for a prompt in "
                f"data.max_length = {self.data.max_length}"
            )
        yield from self._served()
        if self.data.truncation == "right":
            yield "data.truncation right cuts completions, and ppo's data have none: use left or drop"
        steps = self.training.max_steps
        if steps is not None and steps <= self.critic.pretrain_steps:
            yield (
                f"critic.pretrain_steps = {self.critic.pretrain_steps} would be all of training.max_steps = {steps}: "
                f"the policy would never be trained"
            )

    def _served(self) -> Iterator[str]:
        if self.rollout.engine != "vllm":
            return
        if self.lora is None:
            yield (
                "rollout.engine vllm is handed an adapter after each step, and lora is null: "
                "add `lora: {}`, or use engine own"
            )
        elif self.lora.use_dora:
            yield "rollout.engine vllm knows no lora.use_dora: use_dora: false, or engine own"
        elif self.lora.r > HIGHEST_RANK:
            yield f"lora.r = {self.lora.r} is more than rollout.engine vllm takes, {HIGHEST_RANK}: lower it"

    def _unread(self) -> Iterator[str]:
        estimator = ESTIMATORS[self.ppo.advantage.name]
        for key in self.evaluation.changed("max_new_tokens"):
            yield (
                f"evaluation.{key} is not read by ppo, which samples with rollout.max_new_tokens there too: "
                "leave it out"
            )
        if not estimator.critic:
            for key in self.critic.changed(*CriticSettings.model_fields):
                yield f"critic.{key} asks for a critic, and ppo.advantage {estimator.name} has none: use gae"
            if any(self.doctor.wires.changed("explained_variance")):
                yield (
                    f"doctor.wires.explained_variance watches a critic, and ppo.advantage {estimator.name} has none: "
                    f"leave it out"
                )

    def _groups(self) -> Iterator[str]:
        rollout, each = self.training.batch_size * self.ppo.mini_batches, self.rollout.completions_per_prompt
        estimator = ESTIMATORS[self.ppo.advantage.name]
        if rollout % each:
            yield (
                f"a rollout of training.batch_size x ppo.mini_batches = {rollout} completions cannot be shared out in "
                f"groups of rollout.completions_per_prompt = {each}"
            )
        if each < estimator.group:
            yield (
                f"ppo.advantage {estimator.name} compares the completions of one prompt: "
                f"rollout.completions_per_prompt must be at least {estimator.group}, found {each}"
            )
        if self.ppo.whiten_rewards and not estimator.critic:
            yield f"ppo.whiten_rewards shifts what ppo.advantage {estimator.name} compares: use gae, or false"

    def _rewards(self) -> Iterator[str]:
        weights = [reward.weight for reward in self.rewards if reward.role == "reward"]
        if weights and not any(weights):
            yield (
                "rewards.weight is 0 for all that have role: reward, which leaves nothing to maximise: give one of "
                "them another weight"
            )
        costs = [reward.title() for reward in self.rewards if reward.role == "cost"]
        if len(costs) == len(self.rewards):
            yield "all rewards have role: cost; at least one must be a reward"
        elif costs and self.ppo.lagrange is None:
            yield f"rewards holds '{costs[0]}' with role: cost; say how it is held down: ppo.lagrange: {{}}"
        if self.ppo.lagrange is not None and self.ppo.whiten_rewards:
            yield "ppo.whiten_rewards scales reward and cost apart, and ppo.lagrange weighs them: false for one"
        if self.ppo.lagrange is not None and not costs:
            yield "ppo.lagrange holds down a cost: give one of the rewards role: cost"
        titles = [reward.title() for reward in self.rewards]
        if len(set(titles)) < len(titles):
            yield f"two rewards have the same name ({', '.join(titles)}): give each a `name`"


RECIPES: dict[str, type[Work]] = {
    "sft": SFTRecipe,
    "train-rm": RewardRecipe,
    "ppo": PPORecipe,
    "dpo": DPORecipe,
    "orpo": ORPORecipe,
    "simpo": SimPORecipe,
    "sample": SampleRecipe,
    "score": ScoreRecipe,
    "select": SelectRecipe,
    "eval": EvalRecipe,
}
