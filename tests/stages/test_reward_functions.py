"""Reward functions that do wrong: named with function and line, before any model is loaded where that can be seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]
FUNCTIONS = """
import sys, time

CALLS = []


def raises(completions):
    raise ValueError("no such thing")


def nan(completions):
    return [float("nan")] * len(completions)


def short(completions):
    return [0.0] * (len(completions) - 1)


def text(completions):
    return ["good"] * len(completions)


def nothing(completions):
    return None


def hangs(completions):
    time.sleep(60)


def leaves(completions):
    sys.exit(0)


def wants(completions, colour):
    return [0.0] * len(completions)


def later(prompts, completions):
    CALLS.append(1)
    if len(CALLS) > 2:
        return [0.0] * (len(completions) - 1) + [float("inf")]
    return [0.0] * len(completions)


def greedy(prompts, completions, number):
    print("a word on stdout")
    scores = [float(n) for n in number]
    number.clear()
    completions.clear()
    prompts.clear()
    return scores
"""


@pytest.fixture
def ppo(toy: Toy, tmp_path: Path) -> Toy:
    """`ppo(function, **more)`: a recipe with that function of a file full of bad ones."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)

    def make(function: str, **more: Any) -> dict[str, Any]:
        reward = {"function": f"{tmp_path / 'rewards.py'}:{function}", "timeout": 1.0}
        settings = {"rollout": {"max_new_tokens": 6}, "rewards": [reward], "ppo": {"mini_batches": 1, "epochs": 1},
                    "training": {"max_steps": 3}}  # fmt: skip
        return toy("ppo", "prompts", "run", **w.merged(settings, more))

    return make


@pytest.mark.parametrize(
    ("function", "code", "said"),
    [
        ("absent", 2, ("has no function absent",)),
        ("wants", 2, ("'colour'", "number")),
        ("raises", 4, ("ValueError: no such thing", "rewards.py:8")),
        ("nan", 4, ("nan", "prompts.jsonl:1")),
        ("short", 4, ("1 scores for 2 completions",)),
        ("text", 4, ("list of numbers",)),
        ("nothing", 4, ("NoneType",)),
        ("hangs", 4, ("longer than 1 s",)),
        ("leaves", 4, ("SystemExit",)),
    ],
)
def test_a_fault_at_the_first_call(ppo: Toy, function: str, code: int, said: tuple[str, ...]) -> None:
    content, begun = ppo(function), time.monotonic()
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (code, 1), outcome.err
    assert [text for text in (*said, f"rewards.py:{function}") if text not in outcome.errors[0]] == []
    assert "policy:" not in outcome.err  # no model was loaded
    assert not Path(content["output_dir"]).exists()
    assert time.monotonic() - begun < 30


def test_a_missing_file(ppo: Toy) -> None:
    content = ppo("x", rewards=[{"function": "nowhere.py:f"}])
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "nowhere.py" in outcome.errors[0]
    assert not Path(content["output_dir"]).exists()


def test_a_file_that_cannot_be_imported(ppo: Toy, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import json\n\nimport nosuchmodule\n")
    content = ppo("x", rewards=[{"function": f"{tmp_path / 'broken.py'}:f"}])
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "nosuchmodule" in outcome.errors[0]
    assert "broken.py:3" in outcome.errors[0]


def test_a_fault_in_the_middle_names_the_row(ppo: Toy) -> None:
    content = ppo("later", data={"eval": None})
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (4, 1), outcome.err
    assert "rewards.py:later" in outcome.errors[0]
    assert "inf" in outcome.errors[0]
    assert "prompts.jsonl:" in outcome.errors[0]
    assert not (Path(content["output_dir"]) / "DONE").exists()


def test_a_function_may_print_and_spoil_its_arguments(ppo: Toy, world: Path) -> None:
    """stdout stays empty; two runs, one of a function that leaves its arguments alone, are equal."""
    content = ppo("greedy", training={"max_steps": 2}, data={"eval": None})
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, outcome.out) == (0, ""), outcome.err
    assert "a word on stdout" in outcome.err
    honest = Path(content["output_dir"]).with_name("honest.py")
    honest.write_text("def greedy(number, **columns):\n    return [float(n) for n in number]\n")
    other = ppo("x", training={"max_steps": 2}, data={"eval": None}, rewards=[{"function": f"{honest}:greedy"}],
                output_dir=str(honest.with_name("other")))  # fmt: skip
    assert w.metrics(train(other)) == w.metrics(Path(content["output_dir"]))
