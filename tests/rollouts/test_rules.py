"""The built-in rules: values by hand, numbers read exactly, settings refused, patterns that never end."""

from __future__ import annotations

import inspect
import json
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_cli.catalog import REWARDS
from rlhf_cli.catalog.explain import docstring, parse, settings_of
from rlhf_cli.data.examples import Task
from rlhf_cli.data.right_numbers import answer, numbers
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.rollouts.rewards import Rollout, total
from rlhf_cli.rollouts.rules import RuleReward, load_rule
from tests.models.worlds import refused

every_rule = pytest.mark.parametrize("name", REWARDS)
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


def rollout(*texts: str, facts: Any = None, lengths: list[int] | None = None, finished: Any = None) -> Rollout:
    """Completions with the columns of their rows, the numbers of their tokens, and whether they ended."""
    facts = [{}] * len(texts) if facts is None else facts
    tasks = [Task("?", f"t.jsonl:{n + 1}", f) for n, f in enumerate(facts)]
    samples = [
        Sample(np.zeros(1, np.int32), (Completion(np.zeros(n, np.int32), np.ones(n, bool)),), {}, "t")
        for n in lengths or [1] * len(texts)
    ]
    return Rollout(tasks, texts, samples, finished or [True] * len(texts))


def rule(name: str, tasks: Any = (), timeout: float = 5.0, **settings: Any) -> RuleReward:
    """A rule as a recipe would have it."""
    return load_rule(RewardSettings(rule={"name": name, **settings}, timeout=timeout), tasks, "rewards.2")


def scores(found: Rollout, name: str, **settings: Any) -> list[float]:
    """What a rule says."""
    out = rule(name, found.tasks, **settings)(found)
    assert out.valid.all()
    assert out.tokens is None
    return out.sequence.tolist()


# --- every rule ---------------------------------------------------------------------------------------------


@every_rule
def test_the_docstring_has_its_parts(name: str) -> None:
    entry = REWARDS[name]
    parse(docstring(entry), entry.path)
    assert entry.help
    assert not entry.help.endswith(".")
    for setting in settings_of(entry.settings):
        assert setting.help, setting.name


@every_rule
def test_settings_are_the_parameters(name: str) -> None:
    entry = REWARDS[name]
    parameters = list(inspect.signature(entry.load()).parameters.values())[1:]
    assert [p.name for p in parameters] == list(entry.settings.model_fields)
    assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    values = entry.settings().model_dump()
    assert entry.settings.model_validate(values).model_dump() == values


@every_rule
def test_one_reward_among_others(name: str) -> None:
    found = rollout("so 4", "great 5", facts=[{"answer": 4}, {"answer": 4}])
    reward = load_rule(RewardSettings(rule={"name": name}, weight=2.0, normalize="running"), found.tasks, "rewards.0")
    assert (reward.name, reward.weight, reward.role) == (name, 2.0, "reward")
    assert reward.state is not None
    totals = total([reward], found, None, learn=True)  # type: ignore[arg-type]
    assert reward.state.count == 2
    assert np.isfinite(totals.reward.sequence).all()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"name": "length", "limit": 0}, "limit"),
        ({"name": "length", "margin": 0}, "margin"),
        ({"name": "length", "limit": 8, "margin": 9}, "larger than limit"),
        ({"name": "length", "unit": "words"}, "unit"),
        ({"name": "stop", "stopped": math.nan}, "stopped"),
        ({"name": "regex", "pattern": "(a"}, "not a regular expression"),
        ({"name": "regex", "pattern": "*"}, "not a regular expression"),
        ({"name": "regex", "pattern": "(?P<a>x)(?P<a>y)"}, "not a regular expression"),
        ({"name": "regex", "pattern": "(" * 5000 + ")" * 5000}, "not a regular expression"),
        ({"name": "regex", "match": "start"}, "match"),
        ({"name": "numeric_answer", "column": 1}, "column"),
        ({"name": "numeric_answer", "right": math.inf}, "right"),
        ({"name": "words", "plus": ["two words"]}, "not one word"),
        ({"name": "words", "plus": [""]}, "not one word"),
        ({"name": "words", "plus": ["Good"], "minus": ["good"]}, "'good' stands in plus and in minus"),
        ({"name": "words", "plus": [], "minus": []}, "both empty"),
        ({"name": "length", "target": 3}, "target"),
        ({"name": "lenght"}, "lenght"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RewardSettings(rule=settings)
    assert word in str(caught.value)


# --- values by hand -----------------------------------------------------------------------------------------


def test_length() -> None:
    found = rollout("a", "bb", "ccc", "dddd", "e" * 9, lengths=[1, 60, 70, 80, 200])
    assert scores(found, "length", limit=80, margin=20) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert scores(found, "length", aim="near", limit=70, margin=20) == [-1.0, -0.5, 0.0, -0.5, -1.0]
    assert scores(found, "length", unit="character", limit=4, margin=2) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_stop() -> None:
    found = rollout("a", "b", finished=[True, False])
    assert scores(found, "stop") == [1.0, 0.0]
    assert scores(found, "stop", stopped=0.0, cut=-3.0) == [0.0, -3.0]


def test_regex() -> None:
    found = rollout("<answer>4</answer>", "so: <answer>\n4\n</answer> ok", "4", "<answer></answer>")
    assert scores(found, "regex") == [1.0, 1.0, 0.0, 0.0]
    assert scores(found, "regex", match="full") == [1.0, 0.0, 0.0, 0.0]
    assert scores(found, "regex", pattern="(?i)SO", matched=-1.0, missed=0.5) == [0.5, -1.0, 0.5, 0.5]


def test_a_pattern_that_never_ends_is_stopped() -> None:
    """Backtracking without end obeys the limit too."""
    reward = rule("regex", pattern="(a+)+b", timeout=0.3)
    begin = time.monotonic()
    refused(lambda: reward(rollout("a" * 60)), "longer than 0.3 s", "reward regex", "pattern", kind=ModelError)
    assert time.monotonic() - begin < 5


def test_words() -> None:
    found = rollout("Good, GOOD bad!", "badge goodness", "", "I don't; don’t", "naïve good_one")
    settings = {"plus": ["good", "don't", "naïve"], "minus": ["BAD"]}
    assert scores(found, "words", **settings) == [1.0, 0.0, 0.0, 1.0, 2.0]
    assert scores(found, "words", per="word", **settings) == [1 / 3, 0.0, 0.0, 1 / 3, 2 / 3]
    assert scores(rollout("a sad, sad day; I love it"), "words") == [-1.0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1,000", ["1000"]), ("1000", ["1000"]), ("1000.0", ["1000"]), ("$1,000.50!", ["2001/2"]), ("50%", ["50"]),
        ("1/2", ["1/2"]), ("3 / 4 cup", ["3/4"]), ("5/0", ["5", "0"]), ("0.1", ["1/10"]), (".5", ["1/2"]),
        ("-5", ["-5"]), ("−7", ["-7"]), ("-$5", ["-5"]), ("$-5", ["-5"]), ("x = -3", ["-3"]), ("(-2)", ["-2"]),
        ("10-5", ["10", "5"]), ("10 - 5 = 5", ["10", "5", "5"]), ("- 5 apples", ["5"]), ("f(x)-1", ["1"]),
        ("1e3", ["1000"]), ("2.5e-2", ["1/40"]), ("1e999", ["1"]), ("3.", ["3"]), ("42km", ["42"]), ("x2", []),
        ("1,2,3", ["1", "2", "3"]), ("12,34", ["12", "34"]), ("1,000,000", ["1000000"]), ("", []), ("none", []),
        ("9" * 5000, []), ("0" * 150 + "7", ["7"]), ("48/2=<<48/2=24>>24", ["24"] * 4),
        ("€ 12 or £3", ["12", "3"]), ("1/3/2", ["1/3", "2"]), ("٣", []),
    ],
)  # fmt: skip
def test_the_numbers_of_a_text(text: str, wanted: list[str]) -> None:
    assert list(map(str, numbers(text))) == wanted


@given(st.fractions(max_denominator=10**6), st.sampled_from(["{}", "#### {}", "is ${}.", "so {} it is"]))
def test_fractions_come_back(value: Fraction, frame: str) -> None:
    assert answer(frame.format(value), "####", "last") == value


@given(st.integers(-(10**12), 10**12))
def test_grouped_thousands_come_back(value: int) -> None:
    assert answer(f"it is {value:,}.", "", "last") == value
    assert answer(f"it is {value:,}.0 in all", "", "last") == value


@given(st.text(max_size=60))
def test_any_text_is_read(text: str) -> None:
    assert all(isinstance(n, Fraction) for n in numbers(text))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("so 7 #### 42 and 43", 42), ("#### 1 #### 2", 2), ("7 ####", None), ("the last is 9.", 9), ("no", None)],
)
def test_which_number_is_the_answer(text: str, wanted: int | None) -> None:
    assert answer(text, "####", "last") == wanted


def test_a_completion_without_the_marker() -> None:
    found = rollout("it is 4", "#### 4", facts=[{"answer": "2+2 #### 4"}] * 2)
    assert scores(found, "numeric_answer") == [1.0, 1.0]
    assert scores(found, "numeric_answer", without_marker="wrong") == [0.0, 1.0]
    assert scores(found, "numeric_answer", marker="", right=2.0, wrong=-1.0) == [2.0, 2.0]


def test_numeric_answer() -> None:
    gold = [1000, "#### 1,000", 1000.0, "half of it #### $500", "1/2", 0.1]
    said = ["#### 1000.00", "so 1000", "#### $1,000", "#### 500 %", "0.5", "1/10"]
    facts = [{"answer": g} for g in gold]
    assert scores(rollout(*said, facts=facts), "numeric_answer") == [1.0] * 6
    assert scores(rollout(*["#### 999", "1,00", "nothing", "#### 5", "0.51", "0.1000001"], facts=facts),
                  "numeric_answer") == [0.0] * 6  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"solution": 4}, ["no column 'answer'", "solution", "t.jsonl:1", "rewards.2.rule.column"]),
        ({}, ["columns besides the prompt: none"]),
        ({"answer": "none"}, ["no number in column 'answer': none"]),
        ({"answer": True}, ["no number"]),
        ({"answer": [4]}, ["no number"]),
        ({"answer": math.nan}, ["no number"]),
        ({"answer": "#### "}, ["no number"]),
    ],
)
def test_rows_without_a_right_number(facts: dict[str, Any], words: list[str]) -> None:
    tasks = [Task("?", "t.jsonl:1", facts)]
    refused(lambda: rule("numeric_answer", tasks), *words, kind=DataError)


def test_the_rows_of_gsm8k() -> None:
    """Every row has a right number, and its own solution has it."""
    if not GSM8K.is_file():
        pytest.skip("the data are not here")
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    found = rollout(*[row["answer"] for row in rows], facts=rows)
    assert scores(found, "numeric_answer") == [1.0] * len(rows)
    wrong = rollout(*[f"{row['answer']}1" for row in rows], facts=rows)
    assert scores(wrong, "numeric_answer") == [0.0] * len(rows)


def test_one_row_that_lacks_the_column_is_named() -> None:
    tasks = [Task("?", f"t.jsonl:{i}", {"answer": 4, "other": 1} if i != 2 else {"other": 1}) for i in (1, 2, 3)]
    refused(lambda: rule("numeric_answer", tasks), "t.jsonl:2: this row has no 'answer'", "2 of 3 rows", kind=DataError)
