"""The recipes of the commands that make data: sample, score, select. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field

from rlhf_cli.catalog import SELECTIONS
from rlhf_cli.recipe.settings.blocks import Checked, as_mapping, block
from rlhf_cli.recipe.settings.data import Sources, SourceSettings
from rlhf_cli.recipe.settings.distributed import DistributedSettings
from rlhf_cli.recipe.settings.judge import JudgeSettings
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.recipe.settings.revise import ReviseSettings
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.recipe.settings.rollout import MOST, SamplingSettings
from rlhf_cli.recipe.work import Work


class GateSettings(Checked):
    """What is done with rows that cannot be used."""

    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be used: stop, or drop and count it. The rows dropped are written to bad-rows.jsonl in the run
    directory, each with its place and the reason."""
    max_bad_rows: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """At most so many rows (a whole number) or such a share of them (below 1) may be dropped as bad: more stop the run
    after all. null: any number. Only read with `on_bad_row: drop`."""

    def contradictions(self) -> Iterator[str]:
        yield from self.unread(("max_bad_rows",), "on_bad_row", "drop")
        for key in ("prompts", "completions"):
            sources = getattr(self, key, None) or []
            for i, one in enumerate(sources):
                if one in sources[:i]:
                    yield f"{key}.{i} is the same source as {key}.{sources.index(one)}: name it once"
                if one.weight != 1:
                    yield f"{key}.{i}.weight is not read: it says how often an epoch of training passes over a source"


class PromptDataSettings(GateSettings):
    prompts: Sources
    """Where the prompts are: a path, or a list of paths or of {path, format, columns, name, split, limit}. The other
    columns of a prompt's row are kept with its completions."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest prompt with its completion, in tokens."""
    truncation: Literal["drop", "left"] = "drop"
    """What happens to prompts that leave no room for rollout.max_new_tokens; the counts are always shown."""


class CompletionDataSettings(GateSettings):
    completions: Sources
    """Runs of `rlhf sample` or `rlhf score`, or files with columns prompt and completion (and score), or prompt,
    completions (and scores); in the forms of a source of training data."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt with its completion, in tokens of `model`: a longer one is a row that cannot be used. null: any
    that the reward models take."""


class SelectedDataSettings(GateSettings):
    completions: Sources
    """Runs of `rlhf score`, or files with columns prompt, completion and score, or prompt, completions and scores; in
    the forms of a source of training data. Several of them are one pool."""
    finished_only: bool = False
    """Leave out completions that the length limit cut."""


class SampleRecipe(Work):
    stage: Literal["sample"]
    model: Annotated[ModelSettings, as_mapping("name_or_path", ModelSettings)]
    """The model that writes."""
    data: PromptDataSettings
    """The prompts."""
    rollout: SamplingSettings = SamplingSettings()
    """How it writes."""
    rewards: list[RewardSettings] = []
    """What scores the completions; only read with best_of."""
    best_of: Annotated[int, Field(ge=2, le=MOST)] | None = None
    """Sample so many completions of each prompt and keep the one with the highest score."""
    revise: ReviseSettings | None = None
    """Have the model criticise each completion by a principle and write it anew; what comes last is the completion."""
    token_ids: bool = True
    """Also write the tokens of prompt and completion, so that `rlhf score` reads exactly what was sampled (not of
    revised completions, whose tokens follow another conversation)."""
    distributed: DistributedSettings = DistributedSettings()
    """Several processes, started by torchrun."""

    def data_read(self) -> list[SourceSettings]:
        return self.data.prompts

    def models_read(self) -> list[tuple[str, str | None]]:
        return [(self.model.name_or_path, self.model.revision)]

    def texts_read(self) -> list[str]:
        texts = [self.model.chat_template, None if self.revise is None else self.revise.principles]
        return [text for text in texts if text is not None]

    def rewards_read(self) -> list[RewardSettings]:
        return self.rewards

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.rollout.max_new_tokens >= self.data.max_length:
            yield (
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens} leaves no room for a prompt in "
                f"data.max_length = {self.data.max_length}"
            )
        if self.best_of is None and self.rewards:
            yield "rewards are only read with best_of: give it, or score the completions with `rlhf score`"
        if self.best_of is not None:
            if not self.rewards:
                yield "best_of needs rewards to choose by"
            if self.rollout.completions_per_prompt > 1:
                yield "best_of keeps one completion of a prompt: leave rollout.completions_per_prompt out"
            if self.rollout.temperature == 0:
                yield "best_of has nothing to choose from: rollout.temperature is 0, which gives the same every time"
            if self.revise is not None:
                yield "revise does not go together with best_of: sample, revise, then `rlhf score` and `rlhf select`"
        yield from scored_once(self.rewards)
        yield from shared_out(self.distributed, {"model": self.model}, self.rollout)


class ScoreRecipe(Work):
    stage: Literal["score"]
    model: Annotated[ModelSettings, as_mapping("name_or_path", ModelSettings)] | None = None
    """The model that wrote the completions: rewards read texts with its tokenizer and template. Its weights are not
    loaded. Only read with rewards."""
    data: CompletionDataSettings
    """The completions."""
    rewards: list[RewardSettings] = []
    """Reward models, functions and rules; the score of a completion is the weighted sum of those with role: reward."""
    judge: JudgeSettings | None = None
    """Instead of rewards: a language model that compares the completions of a prompt two by two; the score of each is
    the mean probability that it is the better one."""
    distributed: DistributedSettings = DistributedSettings()
    """Several processes, started by torchrun."""

    def data_read(self) -> list[SourceSettings]:
        return self.data.completions

    def models_read(self) -> list[tuple[str, str | None]]:
        models = [self.model, None if self.judge is None else self.judge.model]
        return [(model.name_or_path, model.revision) for model in models if model is not None]

    def texts_read(self) -> list[str]:
        models = [self.model, None if self.judge is None else self.judge.model]
        templates = [model.chat_template for model in models if model is not None and model.chat_template is not None]
        return templates + ([self.judge.principles] if self.judge and self.judge.principles else [])

    def rewards_read(self) -> list[RewardSettings]:
        return self.rewards

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if bool(self.rewards) == (self.judge is not None):
            yield "give rewards or a judge, one of them"
        elif self.rewards and self.model is None:
            yield "rewards need model, the model that wrote the completions: its tokens are scored"
        elif self.judge is not None and self.model is not None:
            yield "model is only read with rewards: the judge has its own"
        if self.judge is not None and self.data.max_length is not None:
            yield "data.max_length is only read with rewards"
        yield from scored_once(self.rewards)
        models = {"model": self.model, "judge.model": None if self.judge is None else self.judge.model}
        yield from shared_out(self.distributed, models)


class SelectRecipe(Work):
    stage: Literal["select"]
    data: SelectedDataSettings
    """The scored completions."""
    selection: block(SELECTIONS.values())  # type: ignore[valid-type]
    """What becomes of them: `{name: ..., settings...}`."""
    distributed: DistributedSettings = DistributedSettings()
    """Several processes, started by torchrun: the first one selects."""

    def data_read(self) -> list[SourceSettings]:
        return self.data.completions

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for key in self.distributed.model_fields_set & {"shard", "sequence_parallel", "cpu_offload"}:
            if getattr(self.distributed, key) != type(self.distributed).model_fields[key].default:
                yield f"distributed.{key} is only read where models are, and rlhf select loads none"


def shared_out(
    asked: DistributedSettings, models: Mapping[str, ModelSettings | None], rollout: SamplingSettings | None = None
) -> Iterator[str]:
    """What does not go together with layers that are held in parts. models: by their keys."""
    if asked.sequence_parallel > 1:
        yield "distributed.sequence_parallel is only read by the commands that train"
    if asked.shard == "none":
        yield from asked.unshared()
        return
    for key, model in models.items():
        if model is not None and model.quantization == "int8":
            yield (
                f"distributed.shard {asked.shard} cannot share out {key}.quantization int8: use nf4, or set one of "
                "them to none"
            )
    if rollout is not None and rollout.engine == "continuous":
        yield f"distributed.shard {asked.shard} cannot go with rollout.engine continuous: use own or generate"


def scored_once(rewards: list[RewardSettings]) -> Iterator[str]:
    """What does not go together in the rewards of completions that are scored once and not learned from."""
    for reward in rewards:
        if reward.normalize == "running":
            yield "rewards.normalize: running needs a run that goes on: use true or false"
    weights = [reward.weight for reward in rewards if reward.role == "reward"]
    if rewards and not any(weights):
        yield "rewards.weight is 0, or role is cost, for all of them, which leaves no score: change one of them"
    titles = [reward.title() for reward in rewards]
    if len(set(titles)) < len(titles):
        yield f"two rewards have the same name ({', '.join(titles)}): give each a `name`"
