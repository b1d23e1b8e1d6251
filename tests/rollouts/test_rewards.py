"""Rewards: what a user's function may do, what it may not, and how scores are put together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.examples import Message, Task
from rlhf_cli.data.template import Template, load_template
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import DivergedError, RecipeError
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import scalar_head
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.rollouts.functions import FunctionReward, load_function
from rlhf_cli.rollouts.loading import Judge, check_run, opened
from rlhf_cli.rollouts.normalise import Scaling
from rlhf_cli.rollouts.places import places, retokenise
from rlhf_cli.rollouts.rewards import STATISTICS, Rollout, Scores, total
from rlhf_cli.rollouts.scorers import ModelReward
from tests.models.worlds import kinds, make_base, refused, write_model, write_tokenizer

TASKS = [
    Task("one?", "tasks.jsonl:1", {"answer": 1, "tags": ["a"]}),
    Task((Message("user", "two?"),), "tasks.jsonl:2", {"answer": 2, "tags": ["b"]}),
    Task("three?", "tasks.jsonl:3", {"answer": 3, "tags": ["c"]}),
]
ROLLOUT = Rollout(TASKS, ["1", "two", "3 3"], [])
Write = Callable[..., FunctionReward]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """Of a byte-level tokenizer."""
    return load_template(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a function's file and gives its name in a recipe."""

    def make(code: str) -> str:
        (tmp_path / "score.py").write_text(code)
        return f"{tmp_path}/score.py:score"

    return make


@pytest.fixture
def made(write: Callable[[str], str], template: Template) -> Write:
    """A loaded function reward. The first call, on made-up completions, must pass: `quiet` lets only it pass."""

    def make(
        body: str, *, signature: str = "prompts, completions", quiet: bool = True, **settings: Any
    ) -> FunctionReward:
        guard = "    if completions[0] == 'A short answer.': return [0.0] * len(completions)\n" if quiet else ""
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        name = write(f"def score({signature}):\n{guard}{lines}")
        return load_function(RewardSettings(function=name, **settings), TASKS, template)

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
    assert scores.sequence.dtype == np.float64
    assert scores.sequence.tolist() == [1.0, 2.5, 1.0]
    assert scores.valid.all()
    assert scores.tokens is None


def test_what_a_function_gets(made: Write) -> None:
    reward = made(
        "assert prompts == ['one?', [{'role': 'user', 'content': 'two?'}], 'three?']\n"
        "assert completions == ['1', 'two', '3 3']\n"
        "assert tags == [['a'], ['b'], ['c']]\n"
        "return [float(str(a) in c) for a, c in zip(answer, completions)]",
        signature="completions, prompts, answer, tags",
    )
    assert reward(ROLLOUT).sequence.tolist() == [1.0, 0.0, 1.0]
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
    assert reward(ROLLOUT).sequence.tolist() == [0.0] * 3


def test_a_missing_fact_is_none(made: Write) -> None:
    tasks = [Task("a", "t:1", {"x": 1}), Task("b", "t:2")]
    reward = made("return [0.0 if v is None else v for v in answer]", signature="completions, answer")
    rollout = Rollout([*TASKS[:1], *tasks[1:]], ["1", "2"], [])
    assert reward(rollout).sequence.tolist() == [1.0, 0.0]


def test_changing_the_input_changes_nothing(made: Write) -> None:
    reward = made(
        "for t in tags: t.append('changed')\nprompts.clear()\nanswer[0] = 99\n"
        "out = [float(len(c)) for c in completions]\ncompletions.clear()\nreturn out",
        signature="prompts, completions, answer, tags",
    )
    for _ in range(2):
        assert reward(ROLLOUT).sequence.tolist() == [1.0, 3.0, 3.0]
    assert [t.facts["tags"] for t in TASKS] == [["a"], ["b"], ["c"]]
    assert ROLLOUT.completions == ["1", "two", "3 3"]


def test_printing_goes_to_stderr(made: Write, capsys: pytest.CaptureFixture[str]) -> None:
    reward = made("import sys\nprint('so be it')\nsys.stdout.write('and this')\nreturn [0.0] * 3")
    reward(ROLLOUT)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "so be it" in seen.err
    assert "and this" in seen.err


def test_printing_on_import_goes_to_stderr(
    write: Callable[[str], str], template: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write("print('loading')\ndef score(completions): return [0.0] * len(completions)\n")
    load_function(RewardSettings(function=name), TASKS, template)
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
        ("raise KeyboardInterrupt", ["raised KeyboardInterrupt (", "score.py:3)"]),
        ("raise GeneratorExit('so')", ["raised GeneratorExit: so"]),
        ("import os\nos._exit(0)", ["raised SystemExit"]),
        ("raise ValueError('x' * 5000)", ["ValueError: " + "x" * 300 + "... ("]),
        ("raise ValueError('a\\x1b[31m\\x00b\\nc \\ud800')", [r"ValueError: a\x1b[31m\x00b c \ud800 ("]),
        ("class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd", ["raised Odd: <Odd>"]),
        ("return [1.0]", ["returned 1 scores for 3 completions, of tasks.jsonl:1, tasks.jsonl:2, tasks.jsonl:3"]),
        ("return [1.0, 'high', 3.0]", ["returned str high for tasks.jsonl:2; a list of numbers is wanted"]),
        ("return [1.0, 2.0, 10 ** 400]", ["returned a number for tasks.jsonl:3 that is too large: 1000", "..."]),
        ("return [1.0, 2.0, 10 ** 5000]", ["too large: <int>"]),
        ("return {'a': [1, 2, 3], 'b': [1, [2], 3]}", ["returned list [2] for tasks.jsonl:2"]),
        ("return [[(1, 0.5)], [(1, 0.5), 7], []]", ["returned int 7 in the list for tasks.jsonl:2"]),
        ("return [[(1, 0.5)], [(1, {})], []]", ["returned tuple (1, {}) for tasks.jsonl:2"]),
        ("return [1.0] * 4", ["returned 4 scores for 3 completions"]),
        ("return []", ["returned 0 scores for 3"]),
        ("return None", ["NoneType", "a list of numbers is wanted"]),
        ("return 1.0", ["float", "a list of numbers is wanted"]),
        ("return ['a', 'b', 'c']", ["a list of numbers is wanted"]),
        ("return 'abc'", ["a list of numbers is wanted"]),
        ("return {'a': 1, 'b': 2, 'c': 3}", ["a list of numbers is wanted"]),
        ("return [[1.0], [2.0], [3.0]]", ["a list of numbers is wanted"]),
        ("return [1.0, 2.0, float('inf')]", ["returned inf", "tasks.jsonl:3"]),
        ("return [1.0, 2.0, -float('inf')]", ["returned -inf", "tasks.jsonl:3"]),
        ("import numpy\nreturn numpy.ones((3, 2))", ["a list of numbers is wanted"]),
        ("import torch\nreturn torch.ones(3, 2)", ["a list of numbers is wanted"]),
        ("return (1 / 0 for _ in completions)", ["ZeroDivisionError"]),
        ("return '123'", ["a list of numbers is wanted"]),
        ("return ['1', '2', '3']", ["a list of numbers is wanted"]),
        ("return {1: 'a', 2: 'b', 3: 'c'}", ["dict", "a list of numbers is wanted"]),
        ("return {1.0, 2.0, 3.0}", ["set", "a list of numbers is wanted"]),
        ("return {}", ["dict", "a list of numbers is wanted"]),
        ("return {'a': [1, 2, 3], 'b': [1, 2]}", ["returned 2 scores in part 'b' for 3 completions"]),
        ("return {'a': [1, 2, float('inf')]}", ["returned inf", "tasks.jsonl:3"]),
        ("return [[(1, 0.5)], [(4, 1.0)], []]", ["after character 4 of a completion of 3", "tasks.jsonl:2"]),
        ("return [[(-1, 0.5)], [], []]", ["after character -1", "tasks.jsonl:1"]),
        ("return [[(1, float('inf'))], [], []]", ["returned inf", "tasks.jsonl:1"]),
        ("return [[(1, 0.5)], []]", ["returned 2 scores for 3 completions"]),
        ("return [[(1, 0.5)], 2.0, []]", ["a list of numbers is wanted"]),
        ("return [[(1.5, 0.5)], [], []]", ["a list of numbers is wanted"]),
        ("return [[(True, 0.5)], [], []]", ["a list of numbers is wanted"]),
        ("return [[(1, 0.5, 2)], [], []]", ["a list of numbers is wanted"]),
        ("return [[(1, 'x')], [], []]", ["a list of numbers is wanted"]),
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


@pytest.mark.parametrize(
    "body",
    ["while True:\n    try:\n        time.sleep(0.3)\n    except BaseException:\n        tries.append(1)\n"
     "        if len(tries) > 2: raise",
     "try:\n    time.sleep(9)\nexcept BaseException:\n    pass\ntime.sleep(9)"],
)  # fmt: skip
def test_a_function_that_swallows_the_alarm_gets_another(made: Write, body: str) -> None:
    reward, before = made(f"import time\ntries = []\n{body}", timeout=0.2), signal.getsignal(signal.SIGALRM)
    begin = time.monotonic()
    refused(lambda: reward(ROLLOUT), "took longer than 0.2 s", "rewards.timeout")
    assert time.monotonic() - begin < 4
    assert (signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)) == ((0.0, 0.0), before)


ALONE = """
import sys, time, hashlib
from rlhf_cli.rollouts import limits
from rlhf_cli.rollouts.foreign import called
limits.GRACE = 0.6

def swallows():
    sys.stdout.write("half a line")
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass

def native():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def alone():
    sum(range(10**13))

called(globals()[sys.argv[1]], "bad.py:" + sys.argv[1], 0.2)
"""


@pytest.mark.parametrize(("function", "said"), [("swallows", "half a line\n"), ("native", "")])
def test_the_process_ends_when_nothing_else_helps(function: str, said: str) -> None:
    """One line and the exit code of a ModelError."""
    end = subprocess.run([sys.executable, "-c", ALONE, function], capture_output=True, text=True, timeout=30)
    line = f"error: bad.py:{function}: took longer than 0.2 s (raise rewards.timeout)\n"
    assert (end.returncode, end.stdout, end.stderr) == (4, "", said + line)


def test_code_that_lets_no_thread_run_ends_with_its_traceback() -> None:
    end = subprocess.run([sys.executable, "-c", ALONE, "alone"], capture_output=True, text=True, timeout=30)
    assert (end.returncode, end.stdout) == (1, "")
    assert "in alone" in end.stderr


def test_a_real_interrupt_stays_one(made: Write) -> None:
    """Of a handler that raises, and of one that leaves at once."""
    reward = made("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    left: list[int] = []
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(ROLLOUT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with patch("os._exit", left.append):
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
            refused(lambda: made("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ValueError")(ROLLOUT),
                    "raised ValueError")  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert left == [130]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def score(completions):\n    os.kill(os.getpid(), 9)\n", ["died with SIGKILL when it was called"]),
        (
            "def score(completions):\n    ctypes.string_at(0)\n",
            ["died with SIGSEGV when it was called (", "score.py:4)"],
        ),
        ("os.kill(os.getpid(), 15)\n", ["died with SIGTERM when it was imported"]),
    ],
)
def test_a_death_is_named(write: Callable[[str], str], template: Template, code: str, words: list[str]) -> None:
    settings = RewardSettings(function=write(f"import os\nimport ctypes\n{code}"))
    refused(lambda: load_function(settings, TASKS, template, "rewards.0.function"), "rewards.0.function", *words)


def test_a_rehearsal_leaves_no_trace(
    write: Callable[[str], str], template: Template, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What import and first call build is built here too; the rehearsal's words and programs are gone."""
    name = write(
        "import os, subprocess, sys\nprint('imported', file=sys.stderr)\nCALLS = []\n"
        "subprocess.Popen(['sleep', '60'], close_fds=False) if os.getpid() == os.getsid(0) else None\n"
        "def score(completions):\n    CALLS.append(1)\n    return [len(CALLS)] * len(completions)\n"
    )
    begin = time.monotonic()
    reward = load_function(RewardSettings(function=name), TASKS, template)
    assert reward(ROLLOUT).sequence.tolist() == [2.0] * 3, "called once before, in this process"
    assert capfd.readouterr().err.count("imported") == 1
    assert time.monotonic() - begin < 20


def test_a_rehearsal_that_takes_long_is_broken_off(
    write: Callable[[str], str], template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_cli.rollouts.foreign.REHEARSAL", 0.3)
    name = write("import os, time\nif os.getpid() == os.getsid(0): time.sleep(60)\n"
                 "def score(completions): return [1] * len(completions)\n")  # fmt: skip
    begin = time.monotonic()
    assert load_function(RewardSettings(function=name), TASKS, template)(ROLLOUT).sequence.tolist() == [1.0] * 3
    assert time.monotonic() - begin < 10


def test_a_file_that_hangs_on_import(write: Callable[[str], str], template: Template) -> None:
    settings = RewardSettings(function=write("import time\ntime.sleep(60)\n"), timeout=0.3)
    refused(lambda: load_function(settings, TASKS, template), "importing it took longer than 0.3 s", "rewards.timeout")


def test_no_way_leads_to_stdout(made: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever was printed ends in a line end."""
    reward = made(
        "import ctypes, os, sys\nprint('one')\nos.system('echo two')\nos.write(1, b'three ')\n"
        "ctypes.CDLL(None).printf(b'four ')\nsys.__stdout__.write('five')\nreturn [0.0] * 3"
    )
    reward(ROLLOUT)
    os.write(1, b"ours")
    seen = capfd.readouterr()
    assert seen.out == "ours"
    assert seen.err.startswith("one\ntwo\nthree ")
    assert seen.err.endswith("\n")
    assert set(seen.err.split()) >= {"four", "five"} or "fivefour" in seen.err


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
        ("def score(completions, /): return []\n", ["'completions' is positional-only", "take the /"]),
        ("def score(): return []\n", ["its signature asks for nothing"]),
        ("def score(*every, extra=1): return []\n", ["its signature asks for nothing"]),
        ("class score:\n    def __call__(self, completions): return []\n", ["score is a class", "score(...)"]),
        ("score = max\n", ["its signature cannot be read"]),
        ("def scores(completions): return []\n", ["has no function score", "did you mean 'scores'?"]),
        ("raise KeyboardInterrupt\n", ["importing it raised KeyboardInterrupt (", "score.py:1)"]),
    ],
)
def test_files_that_cannot_be_used(
    write: Callable[[str], str], template: Template, code: str, words: list[str]
) -> None:
    name = write(code)
    refused(lambda: load_function(RewardSettings(function=name), TASKS, template), "score.py", *words,
            kind=RecipeError)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:score", ["no such file", "write file.py:function"]),
        ("score.py", ["no function is named", "write file.py:function"]),
        ("score.py:", ["no function is named beside the colon"]),
        (":score", ["no file is named beside the colon"]),
        ("folder:score", ["this is a folder"]),
        ("score.txt:score", ["not a Python file"]),
        ("scores.py:score", ["no such file", "did you mean 'score.py'?"]),
        ("nowhere/score.py:score", ["no such file", "no folder nowhere"]),
    ],
)
def test_no_such_file(
    name: str, words: list[str], template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for other in ("score.py", "score.txt", "nowhere.yaml"):
        (tmp_path / other).write_text("hello")
    text = refused(lambda: load_function(RewardSettings(function=name), TASKS, template, "rewards.1.function"), *words,
                   f"rewards.1.function {name}", kind=RecipeError)  # fmt: skip
    assert "nowhere.yaml" not in text


# --- rows that cannot be scored, parts, rewards inside a completion ----------------------------------------


def test_none_and_nan_are_rows_without_a_score(made: Write) -> None:
    scores = made("import numpy\nreturn [None, 2.5, numpy.float32('nan')]")(ROLLOUT)
    assert scores.valid.tolist() == [False, True, False]
    assert scores.sequence.tolist() == [0.0, 2.5, 0.0]


def test_named_parts_are_summed_and_logged(made: Write) -> None:
    reward = made("return {'long': [1, 2, 3], 'kind': (0.5, None, -1)}")
    scores = reward(ROLLOUT)
    assert scores.sequence.tolist() == [1.5, 0.0, 2.0]
    assert scores.valid.tolist() == [True, False, True]
    totals = total([reward], ROLLOUT, None, learn=False)  # type: ignore[arg-type]
    assert totals.metrics == {
        "rewards/score/mean": 1.75, "rewards/score/std": 0.25, "rewards/score/invalid": 1.0,
        "rewards/score/long/mean": 2.0, "rewards/score/kind/mean": -0.25,
    }  # fmt: skip


def test_an_async_function(write: Callable[[str], str], template: Template) -> None:
    name = write("import asyncio\nasync def score(completions):\n    await asyncio.sleep(0)\n"
                 "    return [float(len(c)) for c in completions]\n")  # fmt: skip
    reward = load_function(RewardSettings(function=name), TASKS, template)
    assert reward(ROLLOUT).sequence.tolist() == [1.0, 3.0, 3.0]


def test_the_ids_of_the_completions(made: Write, template: Template) -> None:
    """As TRL gives them: lists of the policy's token ids, the end token included; at the first call too."""
    reward = made(
        "assert all(type(i) is int for row in completion_ids for i in row)\n"
        "return [float(len(row)) for row in completion_ids]",
        signature="completions, completion_ids", quiet=False,
    )  # fmt: skip
    rollout = in_tokens(template, "Hello there", "two plus two")
    assert reward(rollout).sequence.tolist() == [float(len(s.completions[0].ids)) for s in rollout.samples]


def in_tokens(template: Template, *texts: str) -> Rollout:
    """A rollout whose texts are the tokenizer's own tokens of them, and an end token."""
    samples = [retokenise(template, TASKS[0], text, finished=True) for text in texts]
    back = [template.decode(s.completions[0].ids, after=s.prompt) for s in samples]
    assert back == list(texts)
    return Rollout([TASKS[0]] * len(texts), back, samples, [True] * len(texts))


def by_prefixes(template: Template, rollout: Rollout, end: int) -> int:
    """Where character `end` of the first completion ends: the slow way, token by token."""
    ids, text = rollout.samples[0].completions[0].ids, rollout.completions[0]
    for count in range(1, len(ids) + 1):
        start = template.decode(ids[:count], after=rollout.samples[0].prompt)
        if text.startswith(start) and len(start) >= end:
            return count - 1
    raise AssertionError(end)


TEXTS = [
    "Hello there, how are you today?", "naïve café \U0001f600 done", "你好，世界。", "a  b\n\n c", "", " ", "\n",
    "one two  three", "ends in space ", "\U0001f600\U0001f600",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_every_character_has_its_token(template: Template, text: str) -> None:
    """Against the slow way; only white space inside the token of the next word goes to the token before."""
    rollout = in_tokens(template, text)
    ids = rollout.samples[0].completions[0].ids
    ends = list(range(len(text) + 1))
    found = places(template, rollout.samples[0], text, ends)
    assert found == sorted(found)
    assert found[0] == 0
    for end, place in list(zip(ends, found, strict=True))[1:]:
        plain = by_prefixes(template, rollout, end)
        after = template.decode(ids[: plain + 1], after=rollout.samples[0].prompt)
        if len(after) > end and text[:end] != text[:end].rstrip() and after.startswith(text[:end]):
            bare = len(text[:end].rstrip())
            assert place == max(plain - 1, by_prefixes(template, rollout, bare) if bare else 0)
        else:
            assert place == plain


@given(st.lists(st.sampled_from(["one", " two", "\U0001f600", "é", "。", "  ", "\n", ", "]), max_size=60), st.data())
def test_long_texts_are_read_block_by_block_as_from_the_start(
    template: Template, words: list[str], data: st.DataObject
) -> None:
    text = "".join(words)
    rollout = in_tokens(template, text)
    end = data.draw(st.integers(1, len(text) or 1))
    if text and not text[end - 1].isspace():
        assert places(template, rollout.samples[0], text, [end]) == [by_prefixes(template, rollout, end)]


@given(st.lists(st.integers(5, 260), min_size=1, max_size=60))
def test_any_tokens_a_policy_may_sample_have_places(template: Template, ids: list[int]) -> None:
    """Bytes that are no characters too: every place is a token, none comes before an earlier one."""
    prompt = retokenise(template, TASKS[0], "x", finished=True).prompt
    sample = Sample(prompt, (Completion(np.array(ids, np.int32), np.ones(len(ids), bool)),), {}, "t")
    text = template.decode(sample.completions[0].ids, after=prompt)
    found = places(template, sample, text, list(range(len(text) + 1)))
    assert found == sorted(found)
    assert set(found) <= set(range(len(ids)))


def test_a_character_of_several_tokens_ends_in_its_last(template: Template) -> None:
    rollout = in_tokens(template, "a\U0001f600b")
    ids = rollout.samples[0].completions[0].ids
    assert len(ids) == 7, "a, four bytes, b and the end token"
    assert places(template, rollout.samples[0], "a\U0001f600b", [1, 2, 3]) == [0, 4, 5]


def test_white_space_in_the_token_of_the_next_word(template: Template) -> None:
    """A segment that ends with a space: its reward does not stand on the word after it."""
    text = "Hello there, how"
    rollout = in_tokens(template, text)
    ids = rollout.samples[0].completions[0].ids
    pieces = [template.decode(ids[i : i + 1]) for i in range(len(ids))]
    comma = pieces.index(",")
    assert pieces[comma + 1] == " how"
    assert places(template, rollout.samples[0], text, [12, 13, 14]) == [comma, comma, comma + 1]


def test_rewards_inside_completions_keep_their_sum(made: Write, template: Template) -> None:
    reward = made("return [[(end, 0.25 + end) for end in range(len(c) + 1)] for c in completions]", quiet=False)
    texts = [*TEXTS, "the last"]
    rollout = in_tokens(template, *texts)
    scores = reward(rollout)
    assert scores.tokens is not None
    assert scores.sequence.tolist() == [0.0] * len(texts)
    for text, sample, row in zip(texts, rollout.samples, scores.tokens, strict=True):
        assert row.shape == sample.completions[0].ids.shape
        assert row.sum() == sum(0.25 + end for end in range(len(text) + 1))
    np.testing.assert_array_equal(scores.totals, [row.sum() for row in scores.tokens])


def test_rewards_inside_completions_and_rows_without_a_score(made: Write, template: Template) -> None:
    reward = made("return [[(1, 2.0), (1, 3.0)], None, [], [(2, None)]]")
    rollout = in_tokens(template, "ab", "cd", "ef", "gh")
    scores = reward(rollout)
    assert scores.valid.tolist() == [True, False, True, False]
    assert scores.tokens is not None
    assert [row.sum() for row in scores.tokens] == [5.0, 0.0, 0.0, 0.0]
    assert scores.tokens[0][0] == 5.0


# --- sums ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """A reward that always says the same."""

    name: str
    scores: Scores
    weight: float = 1.0
    role: Literal["reward", "cost"] = "reward"
    scaling: Scaling = field(default_factory=Scaling)
    state: None = None

    def __call__(self, rollout: Rollout, infer: Any) -> Scores:
        return self.scores


def fixed(name: str, values: list[float], weight: float = 1.0, clip: float | None = None, **more: Any) -> Fixed:
    """Scores at the end; NaN is not valid."""
    array = np.array(values)
    scores = Scores(np.nan_to_num(array), more.pop("tokens", None), ~np.isnan(array))
    return Fixed(name, scores, weight, scaling=Scaling(clip=clip), **more)


def summed(*rewards: Fixed) -> Any:
    """Their totals."""
    return total(rewards, ROLLOUT, None, learn=False)  # type: ignore[arg-type]


def test_total() -> None:
    rewards = [fixed("a", [1.0, 2.0, 9.0], 2.0), fixed("b", [4.0, -8.0, 0.0], -0.5, clip=5.0)]
    totals = summed(*rewards)
    assert totals.reward.sequence.tolist() == [2.0 - 2.0, 4.0 + 2.5, 18.0]
    assert totals.reward.tokens is None
    assert totals.cost is None
    assert totals.reward.valid.all()
    assert totals.metrics == {
        "rewards/a/mean": 4.0, "rewards/a/std": pytest.approx(float(np.std([1, 2, 9]))), "rewards/a/invalid": 0.0,
        "rewards/b/mean": pytest.approx((4 - 5 + 0) / 3), "rewards/b/std": pytest.approx(float(np.std([4, -5, 0]))),
        "rewards/b/invalid": 0.0, "rewards/b/clipped": 1.0,
    }  # fmt: skip


def test_costs_are_summed_by_themselves() -> None:
    totals = summed(
        fixed("a", [1.0, 2.0, 3.0]), fixed("harm", [0.5, -1.0, 4.0], 2.0, role="cost"),
        fixed("risk", [1.0, 1.0, 1.0], 0.5, role="cost"),
    )  # fmt: skip
    assert totals.reward.sequence.tolist() == [1.0, 2.0, 3.0]
    assert totals.cost.sequence.tolist() == [1.5, -1.5, 8.5]


def test_a_row_that_one_reward_cannot_score_is_not_valid_in_any_sum() -> None:
    nan = float("nan")
    rows = [np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0])]
    totals = summed(
        fixed("a", [1.0, 2.0, nan]), fixed("b", [5.0, 5.0, 5.0], tokens=rows), fixed("c", [nan, 7.0, 7.0], role="cost")
    )
    for scores in (totals.reward, totals.cost):
        assert scores.valid.tolist() == [False, True, False]
    assert totals.reward.sequence.tolist() == [0.0, 7.0, 0.0]
    assert [row.tolist() for row in totals.reward.tokens] == [[0.0, 0.0], [3.0], [0.0]]
    assert totals.reward.totals.tolist() == [0.0, 10.0, 0.0]
    assert totals.cost.sequence.tolist() == [0.0, 7.0, 0.0]
    assert totals.cost.tokens is None
    invalid = {k: v for k, v in totals.metrics.items() if k.endswith("invalid")}
    assert invalid == {"rewards/a/invalid": 1.0, "rewards/b/invalid": 0.0, "rewards/c/invalid": 1.0}
    assert totals.metrics["rewards/a/mean"] == 1.5, "over the rows that it could score"


def test_a_rollout_without_any_score() -> None:
    nan = float("nan")
    refused(lambda: summed(fixed("a", [nan] * 3), fixed("b", [1.0] * 3)), "none of the 3 completions", "reward a")
    refused(lambda: summed(fixed("a", [nan, nan, 1.0]), fixed("b", [1.0, 1.0, nan])), "reward a, b")


def test_token_rewards_are_weighted_and_added() -> None:
    one, two = [np.array([1.0, 0.0]), np.zeros(1), np.ones(1)], [np.array([0.0, 3.0]), np.ones(1), np.ones(1)]
    totals = summed(fixed("a", [0.0] * 3, 2.0, tokens=one), fixed("b", [1.0] * 3), fixed("c", [0.0] * 3, tokens=two))
    assert [row.tolist() for row in totals.reward.tokens] == [[2.0, 3.0], [1.0], [3.0]]
    assert totals.reward.sequence.tolist() == [1.0, 1.0, 1.0]
    assert one[0].tolist() == [1.0, 0.0], "what a reward gave is not changed"


# --- models -------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def rm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's folder that says it is a classifier; nobody reads its weights."""
    folder = write_model(tmp_path_factory.mktemp("rm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    return folder


def reward_role() -> Role:
    base = make_base("llama")
    return Role("reward", base, None, scalar_head(base, torch.randn(1, 32, generator=torch.Generator().manual_seed(1))))


@pytest.mark.parametrize("clip", [None, 0.7])
def test_a_model_reward_is_shifted_scaled_and_clipped(clip: float | None) -> None:
    role, seen = reward_role(), []
    samples = kinds(1)["demonstrations"][:3]
    rollout = Rollout(TASKS, ["a", "b", "c"], samples)
    infer = scored_by(role, seen)
    reward = ModelReward("rm", 1.0, "reward", Scaling(0.5, 2.0, clip=clip), role, None)
    raw = reward(rollout, infer)
    assert seen == samples, "the policy's own tokens"
    assert raw.valid.all()
    scores = total([reward], rollout, infer, learn=True).reward.sequence
    wanted = (raw.sequence - 0.5) / 2.0
    np.testing.assert_allclose(scores, wanted if clip is None else np.clip(wanted, -clip, clip), rtol=1e-12)
    assert len(set(raw.sequence.tolist())) == 3


def test_a_model_score_that_is_not_finite_is_named() -> None:
    role = reward_role()
    assert role.head is not None
    role.head.weight.data.fill_(float("nan"))
    rollout = Rollout(TASKS, ["a", "b", "c"], kinds(1)["demonstrations"][:3])
    reward = ModelReward("rm", 1.0, "reward", Scaling(clip=0.5), role, None)
    refused(lambda: total([reward], rollout, scored_by(role, []), learn=True), "tasks.jsonl:1", "nan", "reward rm",
            kind=DivergedError)  # fmt: skip


def test_statistics_of_the_reward_model(rm_folder: Path, tmp_path: Path) -> None:
    role = reward_role()
    made = ModelSettings(name_or_path=str(rm_folder))
    text = load_text(made, "reward")
    settings = RewardSettings(run=str(rm_folder), weight=0.5, clip=3.0)
    refused(lambda: check_run(settings, made, text, TASKS), STATISTICS, "normalize: false", kind=RecipeError)
    for plain in ({"normalize": False}, {"normalize": "running"}, {"role": "cost"}):
        judge = check_run(RewardSettings(run=str(rm_folder), weight=0.5, clip=3.0, **plain), made, text, TASKS)
        reward = opened(judge, role, text)
        scaling = reward.scaling
        assert (scaling.mean, scaling.std, scaling.clip, reward.weight) == (0.0, 1.0, 3.0, 0.5)
        assert (reward.state is not None) == (plain == {"normalize": "running"})
        assert reward.role == plain.get("role", "reward")
    folder = tmp_path / "rm"
    shutil.copytree(rm_folder, folder)
    (folder / STATISTICS).write_text(json.dumps({"mean": 1.5, "std": 0.25}))
    for settings in (RewardSettings(run=str(folder)), RewardSettings(run=str(folder), normalize=True)):
        reward = opened(check_run(settings, made, text, TASKS), role, text)
        assert isinstance(reward, ModelReward)
        assert (reward.scaling.mean, reward.scaling.std, reward.name) == (1.5, 0.25, "rm")
        assert reward.template is None, "the same tokenizer and template: no text is tokenised anew"


def test_a_model_of_whole_completions_has_no_steps(rm_folder: Path) -> None:
    made = ModelSettings(name_or_path=str(rm_folder))
    text = load_text(made, "reward")
    settings = RewardSettings(run=str(rm_folder), place="steps")
    refused(lambda: check_run(settings, made, text, TASKS), "rewards.place", "step_labels", kind=RecipeError)


def test_another_tokenizer_tokenises_anew(rm_folder: Path) -> None:
    """The reward model reads the texts in its own tokens: prompt, completion, end token."""
    text = load_text(ModelSettings(name_or_path=str(rm_folder)), "reward")
    other = load_text(ModelSettings(name_or_path=str(rm_folder), chat_template=(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )), "reward")  # fmt: skip
    settings = RewardSettings(run=str(rm_folder), normalize=False)
    role, seen = reward_role(), []
    reward = opened(Judge(settings, other, 0.0, 1.0, None, None), role, text)
    assert isinstance(reward, ModelReward)
    assert reward.template is other.template
    tasks = [Task((Message("user", "two?"),), "t:2")]

    def infer(asked: Role, given: Any, function: Any, unit: str) -> list[torch.Tensor]:
        seen[:] = given
        return [torch.ones(1)] * len(given)

    rollout = Rollout(tasks, ["good"], kinds()["demonstrations"][:1], [True])
    assert reward(rollout, infer).sequence.tolist() == [1.0]
    (sample,) = seen
    assert other.tokenizer.decode(sample.prompt) == "<user>two?<|im_end|><assistant>"
    assert other.tokenizer.decode(sample.completions[0].ids) == "good<|im_end|>"
    assert bool(sample.completions[0].scored.all())
    plain = retokenise(other.template, Task("Once", "t:3"), " upon", finished=True)
    assert other.tokenizer.decode(np.concatenate([plain.prompt, plain.completions[0].ids])) == "Once upon</s>"
    cut = retokenise(other.template, Task("Once", "t:3"), " upon", finished=False)
    assert other.tokenizer.decode(cut.completions[0].ids).strip() == "upon", "a cut completion has no end token"
