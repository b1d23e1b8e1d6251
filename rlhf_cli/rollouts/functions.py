"""Rewards by Python functions of the user: imported, checked, called with a time limit, their answers taken apart."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import inspect
import io
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np

from rlhf_cli.data.examples import Task
from rlhf_cli.data.template import Template
from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.rollouts.limits import OutOfTime, time_limit
from rlhf_cli.rollouts.normalise import Running, Scaling, scaling_of
from rlhf_cli.rollouts.places import retokenise, spread
from rlhf_cli.rollouts.rewards import Infer, Rollout, Scores, at_the_end

GIVEN = ("prompts", "completions", "completion_ids")
"""What a function may ask for besides the columns of the data."""
WANTED = "a list of numbers is wanted"
Pairs = list[tuple[int, float]]
"""(count of characters, score) of each reward inside a completion."""


class Answer(NamedTuple):
    """What a function said."""

    numbers: np.ndarray  # (N,) NaN where it could not score; 0 where it gave pairs
    pairs: list[Pairs] | None
    parts: dict[str, np.ndarray]  # (N,) each
    """The named parts of the score, when it gave such."""


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
        """The function's answer, in order and in bounds. Raises ModelError as a call does."""
        columns: dict[str, list[Any]] = {}
        for key in sorted(set().union(*(task.facts for task in rollout.tasks))):
            columns[key] = [copy.deepcopy(task.facts.get(key)) for task in rollout.tasks]
        ids = [sample.completions[0].ids.tolist() for sample in rollout.samples]
        prompts = [plain_prompt(task) for task in rollout.tasks]
        given = (prompts, list(rollout.completions), ids)
        result = self._call(columns | dict(zip(GIVEN, given, strict=True)))
        try:
            answer = _taken_apart(result)
        except (TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"returned {type(result).__name__} {str(result)[:60]}; {WANTED}", self.where) from error
        for part, values in answer.parts.items() or (("", answer.numbers),):
            if len(values) != len(rollout.tasks):
                words = f" in part '{part}'" if part else ""
                raise ModelError(f"returned {len(values)} scores{words} for {len(rollout.tasks)} completions",
                                 self.where)  # fmt: skip
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

    def _call(self, arguments: dict[str, Any]) -> Any:
        parameters = inspect.signature(self.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {k: v for k, v in arguments.items() if k in parameters}
        spoken = io.StringIO()
        try:
            with time_limit(self.timeout), contextlib.redirect_stdout(spoken), patch("os._exit", _leave):
                result = self.function(**arguments)
                if inspect.iscoroutine(result):
                    result = asyncio.run(result)
                if isinstance(result, Iterator):
                    result = list(result)
        except OutOfTime as error:
            raise ModelError(f"took longer than {self.timeout:g} s", self.where, "raise rewards.timeout") from error
        except (Exception, SystemExit) as error:
            line = _line_of(error, self.where.rpartition(":")[0])
            raise ModelError(f"raised {type(error).__name__}: {error}{line}", self.where) from error
        finally:
            sys.stderr.write(spoken.getvalue())
        return result


# --- what a function returned ------------------------------------------------------------------------------------


def _taken_apart(result: Any) -> Answer:
    """Numbers, pairs for each completion, or a mapping of names to numbers. TypeError or ValueError for the rest."""
    if isinstance(result, Mapping):
        if not result or not all(isinstance(name, str) for name in result):
            raise TypeError
        parts = {name: _numbers(values) for name, values in result.items()}
        if len({len(values) for values in parts.values()}) == 1:
            return Answer(np.sum(list(parts.values()), axis=0), None, parts)
        return Answer(np.zeros(0), None, parts)
    if isinstance(result, list | tuple) and any(isinstance(row, list | tuple) for row in result):
        rows = [None if row is None else _pairs(row) for row in result]
        lost = [row is None or any(math.isnan(score) for _, score in row) for row in rows]
        kept: list[Pairs] = [[] if gone or row is None else row for row, gone in zip(rows, lost, strict=True)]
        return Answer(np.where(lost, np.nan, 0.0), kept, {})
    return Answer(_numbers(result), None, {})


def _numbers(result: Any) -> np.ndarray:
    """A sequence of numbers and None as floats. TypeError for text, mappings and sets, which only look like one."""
    if isinstance(result, str | bytes | Mapping | Set):
        raise TypeError
    return np.array([_number(value) for value in result], dtype=np.float64)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError
    return math.nan if value is None else float(value)


def _pairs(row: Any) -> Pairs:
    """(count of characters, score) pairs. TypeError for anything else."""
    if not isinstance(row, list | tuple):
        raise TypeError
    found = []
    for pair in row:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or isinstance(pair[0], bool):
            raise TypeError
        found.append((operator.index(pair[0]), _number(pair[1])))
    return found


# --- before any model is loaded ----------------------------------------------------------------------------------


def load_function(settings: RewardSettings, tasks: Sequence[Task], template: Template) -> FunctionReward:
    """Import the file, check the signature, and call it once on made-up completions: before any model is loaded.

    Raises RecipeError: no such file or function, wrong signature; ModelError as calling it does.
    """
    assert settings.function is not None
    file, _, attribute = settings.function.rpartition(":")
    function = getattr(_imported(settings.function), attribute, None)
    if not callable(function):
        raise RecipeError(f"{file} has no function {attribute}", f"rewards.function {settings.function}")
    reward = FunctionReward(settings.title(), settings.weight, settings.role, scaling_of(settings), function,
                            settings.function, settings.timeout, template)  # fmt: skip
    _check_signature(reward, tasks)
    few, text = list(tasks[:2]), "A short answer."
    samples = [retokenise(template, task, text, finished=True) for task in few]
    reward.ask(Rollout(few, [text for _ in few], samples, [True for _ in few]))
    return reward


def _imported(name: str) -> Any:
    """The module of `file.py:function`. Raises RecipeError."""
    file = name.rpartition(":")[0]
    path = Path(file)
    if not path.is_file():
        raise RecipeError("no such file", f"rewards.function {name}", "write it as file.py:function")
    spec = importlib.util.spec_from_file_location(f"rlhf_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError("this is not a Python file", f"rewards.function {name}")
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"importing it raised {type(error).__name__}: {error}{_line_of(error, file)}",
                          name) from error  # fmt: skip
    return module


def _check_signature(reward: FunctionReward, tasks: Sequence[Task]) -> None:
    offered = set(GIVEN).union(*(task.facts for task in tasks))
    for name, parameter in inspect.signature(reward.function).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY or (
            name not in offered and parameter.default is parameter.empty
        ):
            raise RecipeError(f"it asks for '{name}', which is neither {', '.join(GIVEN)} nor a column of the data "
                              f"({', '.join(sorted(offered))})", reward.where)  # fmt: skip


def plain_prompt(task: Task) -> Any:
    """A prompt as functions get it: text, or a list of {role, content}."""
    if isinstance(task.prompt, str):
        return task.prompt
    return [{"role": m.role, "content": m.content} for m in task.prompt]


def _line_of(error: BaseException, file: str) -> str:
    """` (file:line)` of the innermost frame within the user's file."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(Path(file).name):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" ({file}:{line})" if line else ""


def _leave(code: int) -> None:
    raise SystemExit(code)
