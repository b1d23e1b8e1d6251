"""Rewards: what a user's function may do, what it may not, and how scores are put together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.examples import Message, Task
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DivergedError, RecipeError
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import scalar_head
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.schema import ModelSettings, RewardSettings
from rlhf_cli.rollouts.rewards import (
    STATISTICS,
    FunctionReward,
    ModelReward,
    Rollout,
    load_function,
    model_reward,
    retokenise,
    total,
)
from tests.models.worlds import kinds, make_base, refused, write_model

TASKS = [
    Task("one?", "tasks.jsonl:1", {"answer": 1, "tags": ["a"]}),
    Task((Message("user", "two?"),), "tasks.jsonl:2", {"answer": 2, "tags": ["b"]}),
    Task("three?", "tasks.jsonl:3", {"answer": 3, "tags": ["c"]}),
]
ROLLOUT = Rollout(TASKS, ["1", "two", "3 3"], [])
Write = Callable[..., FunctionReward]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a function's file and gives its name in a recipe."""

    def make(code: str) -> str:
        (tmp_path / "score.py").write_text(code)
        return f"{tmp_path}/score.py:score"

    return make


@pytest.fixture
def made(write: Callable[[str], str]) -> Write:
    """A loaded function reward. The first call, on made-up completions, must pass: `quiet` lets only it pass."""

    def make(
        body: str, *, signature: str = "prompts, completions", quiet: bool = True, **settings: Any
    ) -> FunctionReward:
        guard = "    if completions[0] == 'A short answer.': return [0.0] * len(completions)\n" if quiet else ""
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        name = write(f"def score({signature}):\n{guard}{lines}")
        return load_function(RewardSettings(function=name, **settings), TASKS)

    return make


# --- functions that do right -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    ["[1, 2.5, True]", "(1, 2.5, 1)", "numpy.array([1, 2.5, 1])",
     "[numpy.float32(1), numpy.float64(2.5), numpy.int64(1)]", "torch.tensor([1, 2.5, 1])",
     "[torch.tensor(1.0), torch.tensor(2.5), 1]", "(x for x in (1, 2.5, 1))",
     "[numpy.array(1), 2.5, 1]"],
)  # fmt: skip
def test_kinds_of_numbers(made: Write, result: str) -> None:
    reward = made(f"import numpy, torch\nreturn {result}")
    scores = reward(ROLLOUT)
    assert scores.dtype == np.float64
    assert scores.tolist() == [1.0, 2.5, 1.0]


def test_what_a_function_gets(made: Write) -> None:
    reward = made(
        "assert prompts == ['one?', [{'role': 'user', 'content': 'two?'}], 'three?']\n"
        "assert completions == ['1', 'two', '3 3']\n"
        "assert tags == [['a'], ['b'], ['c']]\n"
        "return [float(str(a) in c) for a, c in zip(answer, completions)]",
        signature="completions, prompts, answer, tags",
    )
    assert reward(ROLLOUT).tolist() == [1.0, 0.0, 1.0]
    assert reward.name == "score"


@pytest.mark.parametrize(
    ("signature", "keys"),
    [("completions", "completions"), ("completions, **kw", "answer prompts tags"),
     ("completions, *, answer=None", "answer"), ("completions, extra=7", "extra"), ("answer, completions", "answer")],
)  # fmt: skip
def test_signatures(made: Write, signature: str, keys: str) -> None:
    have = "kw" if "**" in signature else "have"
    reward = made(
        f"have = list(locals())\nassert set({keys.split()}) <= set({have})\nreturn [0] * 3", signature=signature
    )
    assert reward(ROLLOUT).tolist() == [0.0] * 3


def test_a_missing_fact_is_none(made: Write) -> None:
    tasks = [Task("a", "t:1", {"x": 1}), Task("b", "t:2")]
    reward = made("return [0.0 if v is None else v for v in answer]", signature="completions, answer")
    rollout = Rollout([*TASKS[:1], *tasks[1:]], ["1", "2"], [])
    assert reward(rollout).tolist() == [1.0, 0.0]


def test_changing_the_input_changes_nothing(made: Write) -> None:
    reward = made(
        "for t in tags: t.append('changed')\nprompts.clear()\nanswer[0] = 99\n"
        "out = [float(len(c)) for c in completions]\ncompletions.clear()\nreturn out",
        signature="prompts, completions, answer, tags",
    )
    for _ in range(2):
        assert reward(ROLLOUT).tolist() == [1.0, 3.0, 3.0]
    assert [t.facts["tags"] for t in TASKS] == [["a"], ["b"], ["c"]]
    assert ROLLOUT.completions == ["1", "two", "3 3"]


def test_printing_goes_to_stderr(made: Write, capsys: pytest.CaptureFixture[str]) -> None:
    reward = made("import sys\nprint('so be it')\nsys.stdout.write('and this')\nreturn [0.0] * 3")
    reward(ROLLOUT)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "so be it" in seen.err
    assert "and this" in seen.err


def test_printing_on_import_goes_to_stderr(write: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    name = write("print('loading')\ndef score(completions): return [0.0] * len(completions)\n")
    load_function(RewardSettings(function=name), TASKS)
    seen = capsys.readouterr()
    assert (seen.out, "loading" in seen.err) == ("", True)


def test_printing_before_raising_is_not_lost(made: Write, capsys: pytest.CaptureFixture[str]) -> None:
    reward = made("print('last words')\nraise ValueError('no')")
    refused(lambda: reward(ROLLOUT), "ValueError")
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "last words" in seen.err


# --- functions that do wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ValueError('bad luck')", ["raised ValueError: bad luck", "score.py:3"]),
        ("return {}['x']", ["raised KeyError"]),
        ("import sys\nsys.exit(0)", ["raised SystemExit"]),
        ("raise SystemExit", ["raised SystemExit"]),
        ("return [1.0]", ["returned 1 scores for 3 completions"]),
        ("return [1.0] * 4", ["returned 4 scores for 3 completions"]),
        ("return []", ["returned 0 scores for 3"]),
        ("return None", ["NoneType", "a list of numbers is wanted"]),
        ("return 1.0", ["float", "a list of numbers is wanted"]),
        ("return ['a', 'b', 'c']", ["a list of numbers is wanted"]),
        ("return [1.0, None, 2.0]", ["a list of numbers is wanted"]),
        ("return 'abc'", ["a list of numbers is wanted"]),
        ("return {'a': 1, 'b': 2, 'c': 3}", ["a list of numbers is wanted"]),
        ("return [[1.0], [2.0], [3.0]]", ["a list of numbers is wanted"]),
        ("return [1.0, float('nan'), 2.0]", ["returned nan", "tasks.jsonl:2"]),
        ("return [1.0, 2.0, float('inf')]", ["returned inf", "tasks.jsonl:3"]),
        ("return [1.0, 2.0, -float('inf')]", ["returned -inf", "tasks.jsonl:3"]),
        ("import numpy\nreturn numpy.ones((3, 2))", ["a list of numbers is wanted"]),
        ("import torch\nreturn torch.ones(3, 2)", ["a list of numbers is wanted"]),
        ("return (1 / 0 for _ in completions)", ["ZeroDivisionError"]),
        ("return '123'", ["a list of numbers is wanted"]),
        ("return ['1', '2', '3']", ["a list of numbers is wanted"]),
        ("return {1: 'a', 2: 'b', 3: 'c'}", ["dict", "a list of numbers is wanted"]),
        ("return {1.0, 2.0, 3.0}", ["set", "a list of numbers is wanted"]),
        ("async def later(): return [0.0] * 3\nmade = later()\nmade.close()\nreturn made", ["coroutine"]),
    ],
)
def test_faults(made: Write, body: str, words: list[str]) -> None:
    reward = made(body)
    refused(lambda: reward(ROLLOUT), "score.py:score", *words)


def test_a_score_too_large_for_a_float(made: Write) -> None:
    refused(lambda: made("return [10 ** 400, 0, 0]")(ROLLOUT), "score.py:score")


def test_clipping_does_not_hide_infinity(made: Write) -> None:
    refused(lambda: made("return [float('inf'), 0, 0]", clip=1.0)(ROLLOUT), "inf", "tasks.jsonl:1")


@pytest.mark.parametrize(
    "body", ["import time\ntime.sleep(30)", "while True: pass", "import threading\nthreading.Event().wait()",
             "import time\nwhile True:\n    try:\n        time.sleep(1)\n    except Exception:\n        pass"],
)  # fmt: skip
def test_hanging(made: Write, body: str) -> None:
    reward = made(body, timeout=0.3)
    begin = time.monotonic()
    refused(lambda: reward(ROLLOUT), "took longer than 0.3 s", "rewards.timeout")
    assert time.monotonic() - begin < 5


def test_a_timeout_of_the_function_itself_is_named_as_such(made: Write) -> None:
    """A network call that timed out is not our limit."""
    refused(lambda: made("raise TimeoutError('the judge did not answer')")(ROLLOUT), "TimeoutError", "the judge")


def test_the_clock_is_stopped_afterwards(made: Write) -> None:
    made("return [0.0] * 3", timeout=0.2)(ROLLOUT)
    time.sleep(0.3)


# --- before any model is loaded ----------------------------------------------------------------------------


def test_an_unknown_column(made: Write) -> None:
    refused(lambda: made("return [0.0]", signature="completions, anwser"), "anwser", "answer", kind=RecipeError)


def test_a_function_that_fails_at_once_is_seen_at_load(made: Write) -> None:
    refused(lambda: made("return None", quiet=False), "a list of numbers is wanted")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def other(completions): return []\n", ["has no function score"]),
        ("score = 3\n", ["has no function score"]),
        ("import no_such_module\n", ["importing it raised ModuleNotFoundError", "score.py:1"]),
        ("def score(:\n", ["importing it raised SyntaxError"]),
        ("import sys\nsys.exit(3)\n", ["importing it raised SystemExit"]),
        ("def score(completions, /): return []\n", ["completions"]),
    ],
)
def test_files_that_cannot_be_used(write: Callable[[str], str], code: str, words: list[str]) -> None:
    refused(lambda: load_function(RewardSettings(function=write(code)), TASKS), "score.py", *words, kind=RecipeError)


@pytest.mark.parametrize("name", ["nowhere.py:score", "score", "folder:score", ":score", "nowhere.py:"])
def test_no_such_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    refused(lambda: load_function(RewardSettings(function=name), TASKS), "no such file", kind=RecipeError)


def test_a_file_that_is_not_python(tmp_path: Path) -> None:
    (tmp_path / "score.txt").write_text("hello")
    refused(lambda: load_function(RewardSettings(function=f"{tmp_path}/score.txt:score"), TASKS), "not a Python file",
            kind=RecipeError)  # fmt: skip


# --- sums, clips and models --------------------------------------------------------------------------------


def constant(name: str, values: list[float], weight: float = 1.0, clip: float | None = None) -> FunctionReward:
    return FunctionReward(name, weight, lambda: values, f"{name}.py:{name}", clip, 5.0)


def test_total() -> None:
    rewards = [constant("a", [1.0, 2.0, 9.0], 2.0), constant("b", [4.0, -8.0, 0.0], -0.5, clip=5.0)]
    scores, metrics = total(rewards, ROLLOUT, None)  # type: ignore[arg-type]
    assert scores.tolist() == [2.0 - 2.0, 4.0 + 2.5, 18.0]
    parts = [r(ROLLOUT) for r in rewards]
    np.testing.assert_allclose(scores, 2.0 * parts[0] - 0.5 * parts[1])
    assert metrics["rewards/a/mean"] == 4.0
    assert metrics["rewards/b/mean"] == pytest.approx((4 - 5 + 0) / 3)
    assert metrics["rewards/a/std"] == pytest.approx(float(np.std([1, 2, 9])))


def scored_by(role: Role, samples: list[Sample]) -> Callable[..., list[torch.Tensor]]:
    """`Engine.infer` in its simplest form, which remembers what it was asked."""

    def infer(asked: Role, given: Any, function: Any, unit: str) -> list[torch.Tensor]:
        from rlhf_cli.data.batch import collate

        assert (asked, unit) == (role, "sequence")
        samples[:] = given
        with role.active():
            scores = function(collate(given, packed=False))
        return [scores[i : i + 1] for i in range(len(given))]

    return infer


def reward_role() -> Role:
    base = make_base("llama")
    return Role("reward", base, None, scalar_head(base, torch.randn(1, 32, generator=torch.Generator().manual_seed(1))))


@pytest.mark.parametrize("clip", [None, 0.7])
def test_a_model_reward_is_shifted_scaled_and_clipped(clip: float | None) -> None:
    role, seen = reward_role(), []
    samples = kinds(1)["demonstrations"][:3]
    rollout = Rollout(TASKS, ["a", "b", "c"], samples)
    infer = scored_by(role, seen)
    raw = ModelReward("rm", 1.0, role, 0.0, 1.0, None, None)(rollout, infer)
    assert seen == samples, "the policy's own tokens"
    scores = ModelReward("rm", 1.0, role, 0.5, 2.0, clip, None)(rollout, infer)
    wanted = (raw - 0.5) / 2.0
    np.testing.assert_allclose(scores, wanted if clip is None else np.clip(wanted, -clip, clip), rtol=1e-6)
    assert len(set(raw.tolist())) == 3


def test_a_model_score_that_is_not_finite_is_named() -> None:
    role = reward_role()
    assert role.head is not None
    role.head.weight.data.fill_(float("nan"))
    rollout = Rollout(TASKS, ["a", "b", "c"], kinds(1)["demonstrations"][:3])
    reward = ModelReward("rm", 1.0, role, 0, 1, 0.5, None)
    refused(
        lambda: total([reward], rollout, scored_by(role, [])), "tasks.jsonl:1", "nan", "reward rm", kind=DivergedError
    )


def test_statistics_of_the_reward_model(model_folder: Path, tmp_path: Path) -> None:
    text, role = load_text(ModelSettings(name_or_path=str(model_folder))), reward_role()
    settings = RewardSettings(run=str(model_folder), weight=0.5, clip=3.0)
    refused(lambda: model_reward(settings, text, role, text), STATISTICS, "normalize: false", kind=RecipeError)
    plain = model_reward(settings.model_copy(update={"normalize": False}), text, role, text)
    assert (plain.mean, plain.std, plain.weight, plain.clip) == (0.0, 1.0, 0.5, 3.0)
    folder = write_model(tmp_path / "rm")
    (folder / STATISTICS).write_text(json.dumps({"mean": 1.5, "std": 0.25}))
    own = load_text(ModelSettings(name_or_path=str(folder)))
    reward = model_reward(RewardSettings(run=str(folder)), own, role, text)
    assert (reward.mean, reward.std, reward.name) == (1.5, 0.25, "rm")
    assert reward.template is None, "the same tokenizer and template: no text is tokenised anew"


def test_another_tokenizer_tokenises_anew(model_folder: Path, tmp_path: Path) -> None:
    """The reward model reads the texts in its own tokens: prompt, completion, end token."""
    text = load_text(ModelSettings(name_or_path=str(model_folder)))
    other = load_text(ModelSettings(name_or_path=str(model_folder), chat_template=(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )))  # fmt: skip
    settings = RewardSettings(run=str(model_folder), normalize=False)
    role, seen = reward_role(), []
    reward = model_reward(settings, other, role, text)
    assert reward.template is other.template
    tasks = [Task((Message("user", "two?"),), "t:2")]

    def infer(asked: Role, given: Any, function: Any, unit: str) -> list[torch.Tensor]:
        seen[:] = given
        return [torch.ones(1)] * len(given)

    rollout = Rollout(tasks, ["good"], kinds()["demonstrations"][:1], [True])
    assert reward(rollout, infer).tolist() == [1.0]
    (sample,) = seen
    assert other.tokenizer.decode(sample.prompt) == "<user>two?<|im_end|><assistant>"
    assert other.tokenizer.decode(sample.completions[0].ids) == "good<|im_end|>"
    assert bool(sample.completions[0].scored.all())
    plain = retokenise(other.template, Task("Once", "t:3"), " upon", finished=True)
    assert other.tokenizer.decode(np.concatenate([plain.prompt, plain.completions[0].ids])) == "Once upon</s>"
    cut = retokenise(other.template, Task("Once", "t:3"), " upon", finished=False)
    assert other.tokenizer.decode(cut.completions[0].ids).strip() == "upon", "a cut completion has no end token"
