"""Rewards by Python functions of the user: imported, checked, called with a time limit, their answers taken apart."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np

from rlhf_cli.data.examples import Task
from rlhf_cli.data.template import Template
from rlhf_cli.errors import ModelError, RecipeError, did_you_mean
from rlhf_cli.models import processes
from rlhf_cli.recipe.function_path import function_file
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.rollouts.answers import Answer, Malformed, taken_apart
from rlhf_cli.rollouts.foreign import called, rehearse, trace_deaths
from rlhf_cli.rollouts.normalise import Running, Scaling, scaling_of
from rlhf_cli.rollouts.places import retokenise, spread
from rlhf_cli.rollouts.rewards import Infer, Rollout, Scores, at_the_end
from rlhf_cli.rollouts.user_code import imported, invoke

GIVEN = ("prompts", "completions", "completion_ids")
"""What a function may ask for besides the columns of the data."""


@dataclass(frozen=True)
class FunctionReward:
    """`file.py:function`, called as function(prompts=..., completions=..., **columns) with the arguments it takes."""

    name: str
    weight: float
    role: Literal["reward", "cost"]
    scaling: Scaling
    function: Callable[..., Any]
    where: str
    timeout: float
    template: Template
    """Of the policy: tells in which token a character lies."""

    @property
    def state(self) -> Running | None:
        """Running statistics, when it is normalised by them."""
        return self.scaling.running

    def __call__(self, rollout: Rollout, infer: Infer | None = None) -> Scores:
        """ModelError naming function and row: it raised, took too long, or returned what is no score."""
        answer = self.ask(rollout)
        scores = at_the_end(answer.numbers)
        log = {f"{part}/mean": float(np.nanmean(v)) for part, v in answer.parts.items() if not np.isnan(v).all()}
        if answer.pairs is None:
            return replace(scores, log=log)
        rows = zip(rollout.samples, rollout.completions, answer.pairs, strict=True)
        return replace(scores, tokens=[spread(self.template, sample, text, pairs) for sample, text, pairs in rows])

    def ask(self, rollout: Rollout) -> Answer:
        """The function's answer, in order and in bounds: the first of several processes asks for all. Raises ModelError
        as a call does."""
        if processes.count() == 1:
            return self._ask(rollout)

        def asked() -> list[Any]:
            numbers, pairs, parts = self._ask(rollout)
            return [numbers.tolist(), pairs, {name: values.tolist() for name, values in parts.items()}]

        numbers, pairs, parts = processes.first(asked, f"asking {self.where}")
        whole = None if pairs is None else [[(int(end), score) for end, score in row] for row in pairs]
        return Answer(np.array(numbers), whole, {name: np.array(values) for name, values in parts.items()})

    def _ask(self, rollout: Rollout) -> Answer:
        arguments = arguments_of(rollout)
        result = called(lambda: invoke(self.function, arguments), self.where, self.timeout)
        try:
            answer = taken_apart(result, [task.where for task in rollout.tasks])
        except Malformed as error:
            raise ModelError(str(error), self.where) from error
        self._check(answer, rollout)
        return answer

    def _check(self, answer: Answer, rollout: Rollout) -> None:
        """ModelError for a number that is infinite, or a place beyond the text."""
        for i, task in enumerate(rollout.tasks):
            pairs, length = answer.pairs[i] if answer.pairs else [], len(rollout.completions[i])
            numbers = [answer.numbers[i], *(v[i] for v in answer.parts.values()), *(score for _, score in pairs)]
            for number in numbers:
                if math.isinf(number):
                    raise ModelError(f"returned {number} for {task.where}", self.where)
            for end, _ in pairs:
                if not 0 <= end <= length:
                    raise ModelError(f"returned a score after character {end} of a completion of {length}, for "
                                     f"{task.where}", self.where)  # fmt: skip


# --- before any model is loaded ----------------------------------------------------------------------------------


def load_function(
    settings: RewardSettings, tasks: Sequence[Task], template: Template, key: str = "rewards.function"
) -> FunctionReward:
    """Import the file, check the signature, and call it once on made-up completions: before any model is loaded.

    All of it is done in a process of its own first. `key` is its place in the recipe. Raises RecipeError: no such file
    or function, wrong signature; ModelError as calling it does, and when it kills its process.
    """
    assert settings.function is not None
    name, where = settings.function, f"{key} {settings.function}"
    path = function_file(name, key)
    few, text = list(tasks[:2]), "A short answer."
    samples = [retokenise(template, task, text, finished=True) for task in few]
    rollout = Rollout(few, [text for _ in few], samples, [True for _ in few])
    rehearse(path, name.rpartition(":")[2], where, settings.timeout, arguments_of(rollout))
    trace_deaths()
    module = called(lambda: imported(path), name, settings.timeout, doing="importing it ", kind=RecipeError)
    function = _found(module, path, name.rpartition(":")[2], where)
    reward = FunctionReward(settings.title(), settings.weight, settings.role, scaling_of(settings), function,
                            name, settings.timeout, template)  # fmt: skip
    _check_signature(reward, tasks)
    reward.ask(rollout)
    return reward


def _found(module: ModuleType, path: Path, attribute: str, where: str) -> Callable[..., Any]:
    """The function of that name. Raises RecipeError."""
    function = getattr(module, attribute, None)
    if function is None or not callable(function):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise RecipeError(f"{path} has no function {attribute}", where, did_you_mean(attribute, known))
    if inspect.isclass(function):
        raise RecipeError(f"{attribute} is a class, not a function", where,
                          f"make one, `scorer = {attribute}(...)`, and name that")  # fmt: skip
    assert callable(function)
    return cast("Callable[..., Any]", function)


def _check_signature(reward: FunctionReward, tasks: Sequence[Task]) -> None:
    """RecipeError when it cannot be called by the names that are offered, or sees nothing of them."""
    offered = set(GIVEN).union(*(task.facts for task in tasks))
    try:
        parameters = inspect.signature(reward.function).parameters
    except (TypeError, ValueError) as error:
        raise RecipeError("its signature cannot be read", reward.where, "wrap it in a Python function") from error
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RecipeError(f"'{name}' is positional-only, but arguments are given by name", reward.where,
                              "take the / out of its signature")  # fmt: skip
        if name not in offered and parameter.default is parameter.empty:
            columns = ", ".join(sorted(offered - set(GIVEN))) or "there are none"
            raise RecipeError(f"it asks for '{name}', which is neither {', '.join(GIVEN)} nor a column of the data "
                              f"({columns})", reward.where)  # fmt: skip
    if not any(name in offered or p.kind is p.VAR_KEYWORD for name, p in parameters.items()):
        raise RecipeError("its signature asks for nothing that a score could depend on", reward.where,
                          "let it take completions, prompts or a column")  # fmt: skip


def arguments_of(rollout: Rollout) -> dict[str, Any]:
    """All that a function may ask for, as copies."""
    columns: dict[str, list[Any]] = {}
    for key in sorted(set().union(*(task.facts for task in rollout.tasks))):
        columns[key] = [copy.deepcopy(task.facts.get(key)) for task in rollout.tasks]
    ids = [sample.completions[0].ids.tolist() for sample in rollout.samples]
    prompts = [plain_prompt(task) for task in rollout.tasks]
    given = (prompts, list(rollout.completions), ids)
    return columns | dict(zip(GIVEN, given, strict=True))


def plain_prompt(task: Task) -> Any:
    """A prompt as functions get it: text, or a list of {role, content}."""
    if isinstance(task.prompt, str):
        return task.prompt
    return [{"role": m.role, "content": m.content} for m in task.prompt]
