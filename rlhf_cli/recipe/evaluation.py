"""The recipe of `rlhf eval`: a reward model on data that is judged already, or language models on prompts. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rlhf_cli.recipe.data_stages import GateSettings, scored_once, shared_out
from rlhf_cli.recipe.model_path import resolve_model
from rlhf_cli.recipe.settings.blocks import Name, as_list, as_mapping
from rlhf_cli.recipe.settings.data import SegmentSettings, Sources, SourceSettings
from rlhf_cli.recipe.settings.distributed import DistributedSettings
from rlhf_cli.recipe.settings.judge import JudgeSettings
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.recipe.settings.rollout import SamplingSettings
from rlhf_cli.recipe.work import Work

JUDGED = ("pairs", "rankings", "scored", "steps")
"""Keys of `data` that a reward model is measured on."""
SPOKEN = ("demonstrations", "prompts")
"""Keys of `data` that a language model is measured on."""


class EvalDataSettings(GateSettings):
    pairs: Sources | None = None
    """For reward models: chosen and rejected completions, in any format of pairs that train-rm reads."""
    rankings: Sources | None = None
    """For reward models: several completions of a prompt with their scores or their order."""
    scored: Sources | None = None
    """For reward models: single completions with a score."""
    steps: Sources | None = None
    """For process reward models: completions in labelled steps, cut as in the training of the model."""
    demonstrations: Sources | None = None
    """For language models: texts whose perplexity is measured."""
    prompts: Sources | None = None
    """For language models: what completions are sampled of. The other columns of a row go to the rewards."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest prompt with its completion, in tokens."""
    truncation: Literal["drop", "left"] = "drop"
    """What happens to longer ones: left cuts the start of the prompt. The counts are always shown."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        given = self.given()
        for key, sources in given.items():
            for i, one in enumerate(sources if key != "prompts" else []):
                if one.weight != 1:
                    yield f"{key}.{i}.weight is not read: it says how often an epoch of training passes over a source"
        if not given:
            yield f"there is nothing to evaluate on: give one of {', '.join((*JUDGED, *SPOKEN))}"
        judged, spoken = ([key for key in keys if key in given] for keys in (JUDGED, SPOKEN))
        if judged and spoken:
            yield f"{judged[0]} is for reward models and {spoken[0]} for language models: a recipe evaluates one kind"

    def given(self) -> dict[str, list[SourceSettings]]:
        """The sources of each key that is there."""
        return {key: found for key in (*JUDGED, *SPOKEN) if (found := getattr(self, key)) is not None}


class EvalRecipe(Work):
    stage: Literal["eval"]
    model: Annotated[ModelSettings, as_mapping("name_or_path", ModelSettings)]
    """What is evaluated: a reward model, a process reward model or a language model."""
    data: EvalDataSettings
    """On what; which keys there are follows from the model."""
    rollout: SamplingSettings = SamplingSettings()
    """How completions of data.prompts are sampled, by every model alike."""
    reference: Name | None = None
    """A language model with the same tokenizer: the KL to it is estimated on the completions."""
    rewards: list[RewardSettings] = []
    """What scores the completions: reward models, functions and rules. A rule of right or wrong gives the accuracy."""
    against: Annotated[list[Name], BeforeValidator(as_list, json_schema_input_type=Name | list[Name])] = []
    """Language models that are measured alike and compared with `model` on the same prompts, by the judge when there is
    one, else by the rewards."""
    judge: JudgeSettings | None = None
    """A language model that says which of two completions is better; only read with against."""
    distributed: DistributedSettings = DistributedSettings()
    """Several processes, started by torchrun."""

    def data_read(self) -> list[SourceSettings]:
        return [one for sources in self.data.given().values() for one in sources]

    def models_read(self) -> list[tuple[str, str | None]]:
        models = [(self.model.name_or_path, self.model.revision), *((name, None) for name in self.against)]
        if self.reference is not None:
            models.append((self.reference, None))
        return models + ([] if self.judge is None else [(self.judge.model.name_or_path, self.judge.model.revision)])

    def texts_read(self) -> list[str]:
        judge = [] if self.judge is None else [self.judge.model.chat_template, self.judge.principles]
        return [text for text in (self.model.chat_template, *judge) if text is not None]

    def rewards_read(self) -> list[RewardSettings]:
        return self.rewards

    def trained(self) -> dict[str, Any]:
        """The recipe that `model` was trained with, of a run of `rlhf train-rm`; else empty. Raises ModelError."""
        run = resolve_model(self.model.name_or_path).run or {}
        found: dict[str, Any] = run["recipe"] if run.get("stage") == "train-rm" else {}
        return found

    def cut(self) -> dict[str, Any]:
        """How data.steps are cut: as in that training. Settings of reward data."""
        data = self.trained().get("data", {})
        found: dict[str, Any] = {"step_separator": data["step_separator"]} if "step_separator" in data else {}
        return found | ({"segments": SegmentSettings(**data["segments"])} if data.get("segments") else {})

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        models = {"model": self.model, "judge.model": None if self.judge is None else self.judge.model}
        yield from shared_out(self.distributed, models, self.rollout)
        if self.data.prompts is None:
            for key in self.changed("rollout", "reference", "rewards", "against", "judge"):
                yield f"{key} is only read with data.prompts, which are completed"
            return
        if self.rollout.max_new_tokens >= self.data.max_length:
            yield (
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens} leaves no room for a prompt in "
                f"data.max_length = {self.data.max_length}"
            )
        yield from self._compared()
        yield from self._own_distribution()
        yield from scored_once(self.rewards)

    def _compared(self) -> Iterator[str]:
        names = [os.path.normpath(name) for name in (self.model.name_or_path, *self.against)]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield (
                    f"against names {self.against[i - 1]} twice"
                    if name != names[0]
                    else (f"against names {self.against[i - 1]}, which is the model itself")
                )
        if self.against and not self.rewards and self.judge is None:
            yield "against needs rewards or a judge to say which completion wins"
        if self.judge is not None and not self.against:
            yield "judge is only read with against: it compares the completions of two models"
        if self.judge is not None and any(self.judge.changed("opponents")):
            yield "judge.opponents is only read by `rlhf score`: here the completions of two models meet"

    def _own_distribution(self) -> Iterator[str]:
        """A KL that is estimated from samples needs samples of the distribution that it is about."""
        if self.reference is None:
            return
        if self.rollout.temperature == 0:
            yield "reference: the KL needs sampled completions, and rollout.temperature is 0: give it, or no reference"
        for key in ("top_k", "top_p", "min_p"):
            value = getattr(self.rollout, key)
            if value is not None and (key, value) != ("top_p", 1):
                yield f"reference: the KL needs completions of the whole distribution: leave rollout.{key} out"
