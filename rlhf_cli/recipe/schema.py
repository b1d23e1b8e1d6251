"""The recipe as pydantic models: every key, type, bound and default a user can write. No torch.

Objectives, estimators and controllers come from the catalogue; their blocks are `{name: ..., settings...}`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, create_model, model_validator

from rlhf_cli.catalog import (
    CONTROLLERS,
    ESTIMATORS,
    OBJECTIVES,
    REWARDS,
    Entry,
    Finite,
    NonNegative,
    Positive,
    Settings,
    Share,
    objectives_of,
)

Count = Annotated[int, Field(ge=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "fp4", "int8"]
Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd"]


def block(entries: Iterable[Entry], default: str | None = None, *, mix: str | None = None) -> Any:
    """The type of a `{name: ..., settings...}` block that may hold any of these entries; without a name, the default.

    mix: the name of a further member, `{terms: [...]}`: a weighted sum of those entries that work on pairs.
    """
    entries = list(entries)
    members = [Annotated[_named(entry, "block", default), Tag(entry.name)] for entry in entries]
    if mix is not None:
        pairs = [_named(e, "term", weight=(Weight, 1.0)) for e in entries if getattr(e, "data", "") == "comparison"]
        term: Any = Annotated[reduce(or_, pairs), Field(discriminator="name")]
        terms: Any = (Annotated[list[term], Field(min_length=2)], ...)
        whole = create_model(mix, __base__=Settings, __doc__="A weighted sum of objectives.", terms=terms)
        members.append(Annotated[whole, Tag("a mix")])

    def tag(value: Any) -> Any:
        if isinstance(value, dict):
            return "a mix" if mix is not None and "terms" in value else value.get("name", default)
        return getattr(value, "name", "a mix")

    return members[0] if len(members) == 1 else Annotated[reduce(or_, members), Discriminator(tag)]


def _named(entry: Any, kind: str, default: str | None = None, **more: Any) -> Any:
    """The settings of an entry with its name."""
    name: Any = (Literal[entry.name], entry.name if entry.name == default else ...)
    return create_model(f"{entry.name}_{kind}", __base__=entry.settings, __doc__=entry.help, name=name, **more)


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False, description="Factor of this term in the sum.")]


def terms_of(objective: Any) -> list[tuple[float, Any]]:
    """(weight, block) of each objective of a recipe: one, or those of a mix."""
    terms = getattr(objective, "terms", None)
    return [(1.0, objective)] if terms is None else [(term.weight, term) for term in terms]


def _as_mapping(key: str, settings: type[Settings]) -> BeforeValidator:
    """A bare string stands for `{key: string}`."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=str | settings
    )


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class ModelSettings(Settings):
    name_or_path: str
    """A hub id, a folder, or the directory of an earlier run."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Dtype = "auto"
    """Dtype of frozen weights and of the computation. `auto`: bfloat16 on a device that has it, else float32.
    Trained weights are always kept in float32."""
    quantization: Quantization = "none"
    """Quantise the frozen base with bitsandbytes; needs `lora`."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """`auto` computes attention segment by segment (packing, shared prompts) where the architecture allows it."""
    chat_template: str | None = None
    """A file with a Jinja template, or the template itself; default: the tokenizer's."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""


class LoraSettings(Settings):
    r: Count = 16
    """Rank."""
    alpha: Positive = 32.0
    """Scale: updates are multiplied by alpha / r (by alpha / sqrt(r) with use_rslora)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input. Used by sft; the other stages compare the model with itself and switch it off."""
    target_modules: str | list[str] = "all-linear"
    """Which layers: all-linear, a list of names, or a regular expression."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    use_rslora: bool = False
    """Rank-stabilised scale (arXiv:2312.03732)."""


class SourceSettings(Settings):
    path: str
    """A file (.jsonl, .json, .parquet, .txt, each also .gz), a folder of such files, or a hub data set."""
    format: str = "auto"
    """How a row is read: auto detects it from the columns and says what it took."""
    columns: dict[str, str | list[str]] = {}
    """Names of your columns for the names of the format, for instance {prompt: question, chosen: good}. A list of
    columns becomes a list of their values, and `a.b` is b inside the objects of column a."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    limit: Count | None = None
    """Use only the first rows."""
    weight: Positive = 1.0
    """How often an epoch passes over this source: 2 twice, 0.5 a random half."""


Source = Annotated[SourceSettings, _as_mapping("path", SourceSettings)]
Sources = Annotated[
    list[Source], BeforeValidator(_as_list, json_schema_input_type=Source | list[Source]), Field(min_length=1)
]


class DataSettings(Settings):
    train: Sources
    """A path, or a list of paths or of {path, format, columns, name, split, limit, weight}."""
    eval: Sources | None = None
    """Held-out data in the same forms; null: no evaluation."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence (prompt and completion) in tokens."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """What happens to longer ones. left cuts the start of the prompt, right the end of the completion; the header
    before the completion is never cut. The counts are always shown."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be used (empty completion, equal pair, wrong columns): stop, or drop and count it."""


class SFTDataSettings(DataSettings):
    train_on_prompt: bool = False
    """Also train on the prompt's tokens."""


class SegmentSettings(Settings):
    by: Literal["sub_sentence", "sentence", "answer"]
    """Where a completion is cut: at commas too, at the ends of sentences, or nowhere."""
    categories: Annotated[list[str], Field(min_length=1)] | None = None
    """Only errors of these categories count; null: all."""


class RatingSettings(Settings):
    method: Literal["bradley_terry", "elo"] = "bradley_terry"
    """bradley_terry fits all games at once; elo goes through them in their order."""
    k: Positive = 32.0
    """Points a game can move; only read with `method: elo`."""
    start: Annotated[float, Field(allow_inf_nan=False)] = 1500.0
    """Rating before the first game."""
    shuffles: Count = 1
    """Orders of the games that elo is averaged over; 1: the order of the file."""
    l2: Positive = 0.1
    """Pull towards the mean, so that whoever never lost has a finite rating; only read with `method: bradley_terry`."""
    target: Literal["zscore", "minmax", "logit"] = "zscore"
    """Ratings as targets: mean 0 and deviation 1, between 0 and 1, or in logits around their mean."""
    scope: Literal["dataset", "prompt"] = "dataset"
    """What is scaled together: all ratings, or those of a prompt."""


class RewardDataSettings(DataSettings):
    step_separator: Annotated[str, Field(min_length=1)] = "\n"
    """Put after each step that does not end with it already; the label of a step sits on its last token."""
    segments: SegmentSettings | None = None
    """How the format `spans` cuts completions into pieces; it needs this."""
    ratings: RatingSettings = RatingSettings()
    """How the format `games` makes scores of games."""


class TrainingSettings(Settings):
    learning_rate: Positive
    """Peak learning rate."""
    batch_size: Count = 32
    """Examples (sequences, pairs, completions) in one optimiser step."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=8)] = "auto"
    """Tokens in memory at once. Never changes the result; halved by itself when memory runs out."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """packed: examples share rows and pairs share their prompt; padded: a row a sequence. Never changes the result."""
    num_epochs: Positive = 1.0
    """Passes over the data."""
    max_steps: Count | None = None
    """Stop after so many steps, whatever num_epochs says."""
    lr_scheduler: Scheduler = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: Share = 0.0
    """Share of the steps over which the learning rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps; instead of warmup_ratio."""
    optimizer: Optimizer = "adamw"
    """adamw, its 8-bit and paged forms (bitsandbytes), adafactor or sgd."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient to this norm; null: do not clip."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; never on biases and norms."""

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingSettings:
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        return self


class LoggingSettings(Settings):
    every: Count = 10
    """Print and send to trackers every so many steps; metrics.jsonl has every step."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers, through their own libraries."""


class CheckpointSettings(Settings):
    every: Count | None = 200
    """Steps between checkpoints; null: only at the end and when stopped."""
    keep: Count = 2
    """How many to keep."""


class EvaluationSettings(Settings):
    every: Count | None = 200
    """Steps between evaluations; null: only before the first and after the last step."""
    samples: Annotated[int, Field(ge=0)] = 4
    """How many held-out prompts to complete at each evaluation, for samples.jsonl and the report."""
    max_new_tokens: Count = 128
    """Length limit of those samples; ppo samples with rollout.max_new_tokens."""


class Recipe(Settings):
    """What all stages share."""

    stage: str
    """The command this recipe is for."""
    model: Annotated[ModelSettings, _as_mapping("name_or_path", ModelSettings)]
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


class ORPORecipe(Recipe):
    stage: Literal["orpo"]
    objective: block(objectives_of("orpo"), "orpo") = Field(default_factory=dict, validate_default=True)  # type: ignore[valid-type]
    """What is minimised."""


SimPOBlock: Any = block(objectives_of("simpo"), "simpo", mix="simpo_mix")


class SimPORecipe(Recipe):
    stage: Literal["simpo"]
    objective: SimPOBlock = Field(default_factory=dict, validate_default=True)
    """What is minimised: simpo unless another name is given; or `{terms: [...]}`, several with weights."""


class RewardSettings(Settings):
    run: str | None = None
    """A `train-rm` run (or a folder with a sequence-classification model of one label)."""
    function: str | None = None
    """`file.py:function`, called as function(prompts=..., completions=..., **columns) -> list of numbers."""
    rule: block(REWARDS.values()) | None = None  # type: ignore[valid-type]
    """A built-in rule, `{name: ..., settings...}`."""
    name: str | None = None
    """Name in the metrics; default: the run's folder, the function's name or the rule's."""
    weight: Finite = 1.0
    """Factor in the sum of all rewards of its role."""
    role: Literal["reward", "cost"] = "reward"
    """A cost is not maximised but held below a threshold (ppo.lagrange)."""
    normalize: bool | Literal["running"] | None = None
    """true: shift and scale by the mean and standard deviation that a reward model stored on held-out data. running:
    divide by the standard deviation of all scores of the run so far. false: neither. null: true for reward models,
    false for costs, functions, rules and `place: steps`."""
    shift: bool = False
    """Also subtract the running mean; only read with `normalize: running`."""
    clip: Positive | None = None
    """Clip the score, and each reward inside a completion, to +-clip, after normalising."""
    place: Literal["end", "steps"] = "end"
    """Of a process reward model: the score of the whole completion at its last token, or a reward at the last token of
    each step."""
    step_value: Literal["probability", "sign"] = "probability"
    """What a step earns: the probability that it is right, less `baseline`; or 1 when that is over one half, else -1.
    Only read with `place: steps`."""
    baseline: Finite = 0.5
    """Subtracted from the probability of each step, so that more steps are not better by themselves."""
    timeout: Positive = 60.0
    """Seconds one call of a function, or a regex rule over one rollout, may take."""

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardSettings:
        if sum(source is not None for source in (self.run, self.function, self.rule)) != 1:
            raise ValueError("give exactly one of run, function and rule")
        return self

    @model_validator(mode="after")
    def _settings_are_read(self) -> RewardSettings:
        if self.normalize is True and (self.run is None or self.place == "steps"):
            what = "place: steps has rewards of steps" if self.run else "only a run has stored statistics"
            raise ValueError(f"normalize: true does not fit here, {what}: use running or false")
        if self.normalize and self.role == "cost":
            raise ValueError("normalize would move a cost against its threshold: leave it out for role: cost")
        plain = RewardSettings.model_fields
        for key, read, words in (
            ("shift", self.normalize == "running", "normalize: running"), ("place", self.run is not None, "run"),
            ("step_value", self.place == "steps", "place: steps"), ("baseline", self.place == "steps", "place: steps"),
        ):  # fmt: skip
            if not read and getattr(self, key) != plain[key].default:
                raise ValueError(f"{key} is only read with {words}")
        return self

    def title(self) -> str:
        """Its name in the metrics."""
        own = "" if self.rule is None else self.rule.name
        return (
            self.name
            or (self.run or "").rstrip("/").rpartition("/")[2]
            or (self.function or "").rpartition(":")[2]
            or own
        )

    @property
    def by_statistics(self) -> bool:
        """Whether scores are shifted and scaled by what a reward model stored."""
        if self.normalize is None:
            return self.run is not None and self.role == "reward" and self.place == "end"
        return self.normalize is True


class RolloutSettings(Settings):
    max_new_tokens: Count = 128
    """Length limit of a completion."""
    temperature: Positive = 1.0
    """Sampling temperature; it is part of the policy, so all log-probabilities use it too."""
    completions_per_prompt: Count = 1
    """Completions sampled for each prompt."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion, besides the model's end tokens. They are found in its text, wherever the borders
    of the tokens fall: the token that completes one is the last, and stays whole. One that spells a token added to the
    vocabulary (`<|end|>`) is that token."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """A stop that comes earlier is read over. Its probability is not touched, so that what is sampled stays the
    policy's own distribution."""
    top_k: Count | None = None
    """Sample from the k likeliest tokens only; biased, see allow_biased_sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the fewest tokens that together have this probability; biased."""
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample only tokens with at least this share of the likeliest token's probability; biased."""
    allow_biased_sampling: bool = False
    """Let top_k, top_p and min_p be set. Learning reads the log-probabilities of the whole distribution, which is then
    not the one that was sampled: KL and ratios are biased, and the KL may be negative."""
    engine: Literal["own", "generate", "continuous"] = "own"
    """own: reads each prompt once for all its completions and drops finished ones; generate: transformers' `generate`,
    for models that the own loop cannot take, with the same draws; continuous: transformers' continuous batching, with
    draws of its own."""
    max_batch: Count = 64
    """Completions sampled at once. Never changes the result (of continuous: it does); halved by itself when memory runs
    out."""

    @model_validator(mode="after")
    def _unbiased_unless_asked(self) -> RolloutSettings:
        wanted = {"top_k": self.top_k, "top_p": None if self.top_p == 1 else self.top_p, "min_p": self.min_p}
        biased = [f"rollout.{name}" for name, value in wanted.items() if value is not None]
        if biased and not self.allow_biased_sampling:
            raise ValueError(
                f"{', '.join(biased)} would sample from another distribution than the policy whose log-probabilities "
                f"are learned from: remove it, or set rollout.allow_biased_sampling: true"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens = {self.min_new_tokens} is more than rollout.max_new_tokens = "
                f"{self.max_new_tokens}"
            )
        if self.engine == "continuous" and self.min_new_tokens:
            raise ValueError("rollout.engine: continuous knows no rollout.min_new_tokens: use own or generate")
        return self


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


class LagrangeSettings(Settings):
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
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

    @model_validator(mode="after")
    def _starts_within(self) -> LagrangeSettings:
        if self.init > self.max:
            raise ValueError(f"init {self.init:g} lies above max {self.max:g}")
        return self


class ReferenceUpdateSettings(Settings):
    every: Count
    """Rollouts between two moves."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """reference <- (1 - alpha) reference + alpha policy; with LoRA the factors of the adapters are mixed."""


class PPOSettings(Settings):
    epochs: Count = 2
    """Passes over each rollout."""
    mini_batches: Count = 4
    """Optimiser steps per pass: a rollout holds training.batch_size x mini_batches completions."""
    clip_low: Positive = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: Positive = 0.2
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
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
    truncated_score: Annotated[float, Field(allow_inf_nan=False)] = -1.0
    """The score of a completion that was cut; only read with `truncation: replace`."""
    lagrange: LagrangeSettings | None = None
    """PPO-Lag: keep the mean of the rewards with `role: cost` below a threshold, by a multiplier that adapts."""
    reference_update: ReferenceUpdateSettings | None = None
    """Let the reference follow the policy; null: it stays where the policy started."""
    target_kl: Positive | None = None
    """Stop a rollout's updates when the KL per token to its policy passes 1.5 times this; null: never."""

    @model_validator(mode="after")
    def _kl_has_its_place(self) -> PPOSettings:
        if self.kl_in == "reward" and self.kl_estimator in ("k2", "k3"):
            raise ValueError(
                f"kl_estimator {self.kl_estimator} does not belong in the reward, where only k1 gives the gradient of "
                f"the KL: use k1, or kl_in: loss"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 does not belong in the loss, where its gradient is zero on average: use k2 or k3, or "
                "kl_in: reward"
            )
        return self

    @model_validator(mode="after")
    def _truncation_is_one_rule(self) -> PPOSettings:
        if self.truncation == "bootstrap" and not ESTIMATORS[self.advantage.name].critic:
            raise ValueError(
                f"truncation bootstrap asks a critic what a cut completion would still have earned, and advantage "
                f"{self.advantage.name} has none: use gae, or another rule"
            )
        for key, rule in (("missing_eos_penalty", "penalty"), ("truncated_score", "replace")):
            if self.truncation != rule and getattr(self, key) != PPOSettings.model_fields[key].default:
                raise ValueError(f"{key} is only read with truncation: {rule}, and truncation is {self.truncation}")
        return self


class CriticSettings(Settings):
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
    completions (no value_clip, lambda 1)."""

    @model_validator(mode="after")
    def _one_trunk_or_two(self) -> CriticSettings:
        plain = CriticSettings.model_fields
        for keys, read in ((("coef", "detach"), self.shared), (("start", "learning_rate"), not self.shared)):
            odd = [key for key in keys if not read and getattr(self, key) != plain[key].default]
            if odd:
                raise ValueError(f"{odd[0]} is only read with shared: {str(not self.shared).lower()}")
        return self


Action = Literal["ignore", "warn", "pause", "rollback"]


class WireSettings(Settings):
    kl: Action = "warn"
    """The KL to the reference is over its limit."""
    negative_kl: Action = "warn"
    """The KL stays below zero: what is scored is not what was sampled."""
    hacking: Action = "warn"
    """The score rises while the KL is over its limit."""
    eos_rate: Action = "warn"
    """Completions no longer end by themselves."""
    length: Action = "warn"
    """Completions have become many times longer or shorter than at the start."""
    repetition: Action = "warn"
    """Completions repeat themselves."""
    entropy: Action = "warn"
    """The policy has become almost deterministic."""
    explained_variance: Action = "warn"
    """The critic stays worse than a constant."""
    length_correlation: Action = "warn"
    """The score is little more than the length, and the length grows."""
    clip_fraction: Action = "warn"
    """Most tokens are clipped: updates are too large."""
    ratio: Action = "warn"
    """Probabilities of single tokens change by large factors within a rollout's updates."""
    contrast: Action = "warn"
    """Almost all prompts have completions of equal score: nothing to learn from."""
    unscorable: Action = "warn"
    """Many completions could not be scored."""


class ThresholdSettings(Settings):
    kl: Positive | None = None
    """Nats summed over a completion; null: 3 times the target of ppo.kl, 30 where it has none."""
    negative_kl: Positive = 0.05
    """The mean of `patience` negative KLs below minus this."""
    truncated: Share = 0.9
    """Share of completions cut by the length limit, `patience` steps in a row."""
    eos_drop: Share = 0.25
    """Share of the end-token rate of the start that must be left."""
    length_growth: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    """Mean length over that of the start."""
    length_shrink: Share = 0.25
    """Mean length over that of the start."""
    repetition: Share = 0.5
    """Share of 4-grams of tokens that stood in the same completion before, `patience` steps in a row."""
    entropy: Share = 0.1
    """Entropy over that of the start, `patience` steps in a row."""
    explained_variance: Annotated[float, Field(lt=1, allow_inf_nan=False)] = 0.0
    """Below it for twice `patience` steps."""
    length_correlation: Share = 0.9
    """Correlation of score and length over a rollout, `patience` steps in a row."""
    clip_fraction: Share = 0.5
    """Share of clipped tokens, `patience` steps in a row."""
    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10.0
    """Largest ratio of new to old probability of a token, or one over it; the mean ratio may be off by a tenth of
    it."""
    contrast: Share = 0.95
    """Share of prompts without contrast, `patience` steps in a row."""
    unscorable: Share = 0.2
    """Share of completions of a rollout without a score."""
    patience: Count = 5
    """Steps that a figure must stay bad, where one step says little; a finding is over when it stays away as long."""


class TripwireSettings(Settings):
    enabled: bool = True
    """Look at the figures of every rollout and say in words what is wrong."""
    wires: WireSettings = WireSettings()
    """What a finding does: ignore it, warn, pause (checkpoint, stop with exit code 5; the same command goes on), or
    roll back to the newest checkpoint written in good health, with smaller learning rates."""
    thresholds: ThresholdSettings = ThresholdSettings()
    """When a finding is one."""
    rollback_lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Each rollback multiplies all learning rates by this."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 3
    """The run stops with exit code 5 when one more would be needed."""


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
        critic = self.critic
        if not estimator.critic and (critic.shared or critic.pretrain_steps):
            key = "shared" if critic.shared else "pretrain_steps"
            raise ValueError(f"critic.{key} asks for a critic, and ppo.advantage {estimator.name} has none: use gae")
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
