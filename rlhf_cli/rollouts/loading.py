"""The rewards of a recipe: all checked before any weights are read, then opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.examples import Task
from rlhf_cli.errors import DataError, ModelError, RecipeError
from rlhf_cli.models.base import Base, Text, check_length, load_text
from rlhf_cli.models.build import frozen_role
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.model_path import Kept, read_json, resolve_model
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.rollouts.functions import FunctionReward, load_function
from rlhf_cli.rollouts.normalise import scaling_of
from rlhf_cli.rollouts.places import retokenise
from rlhf_cli.rollouts.rewards import STATISTICS, Reward
from rlhf_cli.rollouts.rules import RuleReward, load_rule
from rlhf_cli.rollouts.scorers import Cut, ModelReward, ProcessReward, tokens_of


@dataclass(frozen=True)
class Judge:
    """A reward model of which all but the weights is known."""

    settings: RewardSettings
    text: Text
    mean: float
    std: float
    objective: dict[str, Any] | None
    """Of a process reward model: the objective it was trained with."""
    cut: Cut | None
    """Of a process reward model: where its steps end."""


Checked = FunctionReward | RuleReward | Judge


def check_rewards(
    settings: Sequence[RewardSettings], model: ModelSettings, policy: Text, tasks: Sequence[Task], longest: int
) -> list[Checked]:
    """Everything about the rewards that can be known without weights. `tasks`: of training and evaluation; `longest`:
    tokens of a prompt with its completion.

    Functions are imported and called once, rules look at their columns, reward models show tokenizer, configuration,
    statistics and how their steps end; a prompt that a reward model's own template cannot render is refused. Raises
    RecipeError, DataError or ModelError.
    """
    checked = [_check(one, model, policy, tasks, f"rewards.{i}") for i, one in enumerate(settings)]
    for judge in checked:
        if isinstance(judge, Judge):
            check_length(judge.text, longest, f"data.max_length (reward model {judge.settings.run})")
    return checked


def _check(settings: RewardSettings, model: ModelSettings, policy: Text, tasks: Sequence[Task], key: str) -> Checked:
    if settings.function is not None:
        return load_function(settings, tasks, policy.template, f"{key}.function")
    if settings.rule is not None:
        return load_rule(settings, tasks, key)
    return check_run(settings, model, policy, tasks)


def check_run(settings: RewardSettings, model: ModelSettings, policy: Text, tasks: Sequence[Task]) -> Judge:
    """A reward model without its weights. Raises RecipeError, DataError or ModelError."""
    assert settings.run is not None
    trained = _trained_as(settings.run)
    objective = None if trained is None else trained["objective"]
    kinds: dict[str, Kept] = {"step_labels": "process", "two_token": "policy"}
    kind = kinds.get(objective["name"] if objective else "", settings.role)
    costs: tuple[Kept, ...] = ("reward",) if kind == "cost" else ("cost",) if settings.weight < 0 else ()
    own = model.model_copy(update={"name_or_path": settings.run, "revision": None})
    text = load_text(own, kind, *(costs if kind == settings.role else ()))
    if kind == settings.role:
        objective = None
        if settings.place == "steps":
            raise RecipeError("this reward model scores whole completions: it knows no steps",
                              f"rewards.place of {settings.run}",
                              "name a train-rm run with objective step_labels or two_token")  # fmt: skip
    mean, std = statistics(settings, text)
    if text.template.digest != policy.template.digest:
        for task in tasks:
            _readable(text, task, settings.run)
    cut = None if trained is None or objective is None else _cut_of(trained["data"], settings.run)
    return Judge(settings, text, mean, std, objective, cut)


def _readable(text: Text, task: Task, run: str) -> None:
    """DataError when a reward model's own template cannot render a prompt."""
    try:
        retokenise(text.template, task, "Yes.", finished=True)
    except DataError as error:
        problem = error.problems[0]
        raise DataError(f"the reward model {run} cannot read this prompt: {problem.message}", problem.where,
                        problem.hint) from error  # fmt: skip


def _trained_as(name: str) -> dict[str, Any] | None:
    """The recipe of a `train-rm` run, as its run.json has it; None for any other model."""
    run = resolve_model(name).run
    return run["recipe"] if run is not None and run.get("stage") == "train-rm" else None


def _cut_of(data: dict[str, Any], where: str) -> Cut:
    """How the data of a process reward model were cut: into segments where its recipe says so, else into steps."""
    if data.get("segments") is not None:
        return Cut(data["step_separator"], data["segments"]["by"])
    if not data["step_separator"]:
        raise RecipeError("it was trained with an empty data.step_separator, so steps cannot be told apart",
                          f"rewards.run {where}", "train it with one")  # fmt: skip
    return Cut(data["step_separator"])


def statistics(settings: RewardSettings, text: Text) -> tuple[float, float]:
    """Mean and deviation to normalise a reward model by. RecipeError when they are wanted and absent."""
    if not settings.by_statistics:
        return 0.0, 1.0
    file = None if text.path.weights is None else text.path.weights / STATISTICS
    if file is None or not file.is_file():
        raise RecipeError(f"no {STATISTICS} beside the reward model", f"rewards.run {settings.run}",
                          "name a train-rm run, or set normalize: false")  # fmt: skip
    stored = read_json(file)
    mean, std = stored.get("mean"), stored.get("std")
    if not (isinstance(mean, int | float) and isinstance(std, int | float) and math.isfinite(mean + std) and std > 0):
        raise ModelError(f"has no usable mean and std: {mean!r} and {std!r}", str(file),
                         "the file is damaged; restore it, or set normalize: false")  # fmt: skip
    return float(mean), float(std)


def open_rewards(checked: Sequence[Checked], model: ModelSettings, shared: Base | None, text: Text) -> list[Reward]:
    """All rewards in the order of the recipe; reward models as frozen roles, on `shared` where they belong to it, or on
    the base of one before them. `text`: of the policy."""
    rewards: list[Reward] = []
    for i, one in enumerate(checked):
        if isinstance(one, Judge):
            own = model.model_copy(update={"revision": None})
            role = frozen_role(f"reward-{i}", own, one.text, shared)
            shared = role.base if shared is None and role.adapter is not None else shared
            rewards.append(opened(one, role, text))
        else:
            rewards.append(one)
    return rewards


def opened(judge: Judge, model: Role, policy: Text) -> ModelReward | ProcessReward:
    """A reward model with its weights."""
    settings, template = judge.settings, judge.text.template
    other = None if template.digest == policy.template.digest else template
    head = settings.title(), settings.weight, settings.role, scaling_of(settings, judge.mean, judge.std), model
    if judge.objective is None or judge.cut is None:
        return ModelReward(*head, other)
    objective = judge.objective
    words = [objective[key] for key in ("good", "bad")] if objective["name"] == "two_token" else []
    return ProcessReward(
        *head, objective, tokens_of(template, words), judge.cut, policy.template, other,
        settings.place, settings.step_value, settings.baseline,
    )  # fmt: skip
