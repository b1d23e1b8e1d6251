"""What a completion is worth: reward models and Python functions, weighted and summed."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
from torch import Tensor

from rlhf_cli.data.examples import Task
from rlhf_cli.data.template import Template
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import DivergedError, ModelError, RecipeError
from rlhf_cli.models.base import Text
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.recipe.schema import RewardSettings

STATISTICS = "reward.json"
"""In a reward model's folder: {"mean", "std"} of its scores on held-out completions."""


@dataclass(frozen=True)
class Rollout:
    """N sampled completions, as rewards see them."""

    tasks: Sequence[Task]  # N
    completions: Sequence[str]  # N texts without special tokens
    samples: Sequence[Sample]  # N, each one prompt with one completion, in the policy's tokens
    finished: Sequence[bool] = ()  # N, whether a stop token ended it


Infer = Callable[..., list[Tensor]]
"""`Engine.infer`: (role, samples, function of a batch, "token" | "sequence") -> a tensor for each sample."""


class Reward(Protocol):
    """A source of scores."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...

    def __call__(self, rollout: Rollout, infer: Infer) -> np.ndarray:
        """Scores (N,) float64, before the weight."""


@dataclass(frozen=True)
class FunctionReward:
    """`file.py:function`, called as function(prompts=..., completions=..., **columns) with the arguments it takes."""

    name: str
    weight: float
    function: Callable[..., Any]
    where: str
    clip: float | None
    timeout: float

    def __call__(self, rollout: Rollout, infer: Infer | None = None) -> np.ndarray:
        """Scores (N,). ModelError naming function and row: it raised, took too long, or returned no numbers."""
        prompts = [plain_prompt(task) for task in rollout.tasks]
        columns: dict[str, list[Any]] = {}
        for key in sorted(set().union(*(task.facts for task in rollout.tasks))):
            columns[key] = [copy.deepcopy(task.facts.get(key)) for task in rollout.tasks]
        arguments = {**columns, "prompts": prompts, "completions": list(rollout.completions)}
        result = self._call(arguments)
        try:
            scores = _numbers(result)
        except (TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"returned {type(result).__name__} {str(result)[:60]}; a list of numbers is wanted",
                             self.where) from error  # fmt: skip
        if len(scores) != len(rollout.tasks):
            raise ModelError(f"returned {len(scores)} scores for {len(rollout.tasks)} completions", self.where)
        for task, score in zip(rollout.tasks, scores, strict=True):
            if not math.isfinite(score):
                raise ModelError(f"returned {score} for {task.where}", self.where)
        return _clipped(np.array(scores), self.clip)

    def _call(self, arguments: dict[str, Any]) -> Any:
        parameters = inspect.signature(self.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments = {k: v for k, v in arguments.items() if k in parameters}
        spoken = io.StringIO()
        try:
            with time_limit(self.timeout), contextlib.redirect_stdout(spoken), patch("os._exit", _leave):
                result = self.function(**arguments)
                if isinstance(result, Iterator):
                    result = list(result)
        except _OutOfTime as error:
            raise ModelError(f"took longer than {self.timeout:g} s", self.where, "raise rewards.timeout") from error
        except (Exception, SystemExit) as error:
            line = _line_of(error, self.where.rpartition(":")[0])
            raise ModelError(f"raised {type(error).__name__}: {error}{line}", self.where) from error
        finally:
            sys.stderr.write(spoken.getvalue())
        return result


def _numbers(result: Any) -> list[float]:
    """A sequence of numbers as floats. Raises TypeError for text, mappings and sets, which only look like one."""
    if isinstance(result, str | bytes | Mapping | Set):
        raise TypeError
    values = list(result)
    if any(isinstance(value, str | bytes) for value in values):
        raise TypeError
    return [float(value) for value in values]


@dataclass(frozen=True)
class ModelReward:
    """A reward model as a frozen role."""

    name: str
    weight: float
    role: Role
    mean: float
    std: float
    clip: float | None
    template: Template | None
    """Of its own tokenizer when that differs from the policy's: then texts are tokenised anew."""

    def __call__(self, rollout: Rollout, infer: Infer) -> np.ndarray:
        """Scores at the last token, shifted and scaled by the stored statistics."""
        samples = rollout.samples
        if self.template is not None:
            samples = [
                retokenise(self.template, task, text, finished=done)
                for task, text, done in zip(rollout.tasks, rollout.completions, rollout.finished, strict=True)
            ]
        parts = infer(self.role, samples, self.role.score, "sequence")
        scores = np.array([float(p[0]) for p in parts], dtype=np.float64)
        return _clipped((scores - self.mean) / self.std, self.clip)


def retokenise(template: Template, task: Task, completion: str, *, finished: bool) -> Sample:
    """A completion of the policy in another model's tokens, without the end token when it was cut."""
    ids, scored = template.completion_ids(task.prompt, completion, task.where)
    if not finished and len(ids) > 1:
        ids, scored = ids[:-1], scored[:-1]
    prompt = np.array(template.prompt_ids(task.prompt), dtype=np.int32)
    return Sample(prompt, (Completion(np.array(ids, np.int32), np.array(scored, bool)),), {}, task.where)


def total(rewards: Sequence[Reward], rollout: Rollout, infer: Infer) -> tuple[np.ndarray, dict[str, float]]:
    """Weighted sum of all rewards (N,), and the mean and standard deviation of each. Raises ModelError."""
    scores = np.zeros(len(rollout.tasks))
    metrics: dict[str, float] = {}
    for reward in rewards:
        part = reward(rollout, infer)
        if not np.isfinite(part).all():
            row = int(np.flatnonzero(~np.isfinite(part))[0])
            raise DivergedError(f"the score of {rollout.tasks[row].where} is {part[row]}", f"reward {reward.name}",
                                "nothing was learned from it; look at the reward model and that row")  # fmt: skip
        metrics[f"rewards/{reward.name}/mean"] = float(part.mean())
        metrics[f"rewards/{reward.name}/std"] = float(part.std())
        scores += reward.weight * part
    return scores, metrics


def load_function(settings: RewardSettings, tasks: Sequence[Task]) -> FunctionReward:
    """Import the file, check the signature, and call it once on made-up completions: before any model is loaded.

    Raises RecipeError: no such file or function, wrong signature; ModelError as calling it does.
    """
    assert settings.function is not None
    file, _, attribute = settings.function.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise RecipeError("no such file", f"rewards.function {settings.function}", "write it as file.py:function")
    spec = importlib.util.spec_from_file_location(f"rlhf_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError("this is not a Python file", f"rewards.function {settings.function}")
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"importing it raised {type(error).__name__}: {error}{_line_of(error, file)}",
                          settings.function) from error  # fmt: skip
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RecipeError(f"{file} has no function {attribute}", f"rewards.function {settings.function}")
    reward = FunctionReward(settings.title(), settings.weight, function, settings.function,
                            settings.clip, settings.timeout)  # fmt: skip
    _check_signature(reward, tasks)
    few = list(tasks[:2])
    reward(Rollout(few, ["A short answer." for _ in few], []))
    return reward


def _check_signature(reward: FunctionReward, tasks: Sequence[Task]) -> None:
    offered = {"prompts", "completions"}.union(*(task.facts for task in tasks))
    for name, parameter in inspect.signature(reward.function).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY or (
            name not in offered and parameter.default is parameter.empty
        ):
            raise RecipeError(f"it asks for '{name}', which is neither prompts, completions nor a column of the data "
                              f"({', '.join(sorted(offered))})", reward.where)  # fmt: skip


def statistics(settings: RewardSettings, text: Text) -> tuple[float, float]:
    """Mean and deviation to normalise a reward model by. RecipeError when they are wanted and absent."""
    if not settings.normalize:
        return 0.0, 1.0
    file = None if text.path.weights is None else text.path.weights / STATISTICS
    if file is None or not file.is_file():
        raise RecipeError(f"no {STATISTICS} beside the reward model", f"rewards.run {settings.run}",
                          "name a train-rm run, or set normalize: false")  # fmt: skip
    stored = read_json(file)
    return float(stored["mean"]), float(stored["std"])


def model_reward(settings: RewardSettings, text: Text, role: Role, policy: Text) -> ModelReward:
    """A loaded reward model with its stored statistics."""
    mean, std = statistics(settings, text)
    same = text.template.digest == policy.template.digest
    return ModelReward(
        settings.title(), settings.weight, role, mean, std, settings.clip, None if same else text.template
    )


def plain_prompt(task: Task) -> Any:
    """A prompt as functions get it: text, or a list of {role, content}."""
    if isinstance(task.prompt, str):
        return task.prompt
    return [{"role": m.role, "content": m.content} for m in task.prompt]


def _clipped(scores: np.ndarray, clip: float | None) -> np.ndarray:
    return scores if clip is None else np.clip(scores, -clip, clip)


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


class _OutOfTime(BaseException):
    """The time limit was reached. Not an Exception: a function that catches those is stopped all the same."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """_OutOfTime when the body takes longer. Works where signals do: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
