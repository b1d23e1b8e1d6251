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
import ctypes, os, signal, sys, time

CALLS = []


def length(completions):
    return [float(len(c)) for c in completions]


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


def segv(completions):
    ctypes.string_at(0)


def killed(completions):
    os.kill(os.getpid(), signal.SIGKILL)


def noargs():
    return [0.0, 0.0]


class Scorer:
    def __call__(self, completions):
        return [0.0] * len(completions)


def interrupts(completions):
    raise KeyboardInterrupt


def huge(completions):
    return [0.0] * (len(completions) - 1) + [10 ** 400]


def leaves(completions):
    sys.exit(0)


def wants(completions, colour):
    return [0.0] * len(completions)


def later(prompts, completions):
    CALLS.append(1)
    if len(CALLS) > 2:
        return [0.0] * (len(completions) - 1) + [float("inf")]
    return [0.0] * len(completions)


def some(completions, number):
    return [None if n % 2 else float(len(c)) for n, c in zip(number, completions)]


def parts(completions):
    return {"long": [float(len(c)) for c in completions], "one": [1.0] * len(completions)}


def inside(completions):
    return [[(end, 1.0) for end in range(1, len(c) + 1) if c[end - 1] == "o"] for c in completions]


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
        ("raises", 4, ("ValueError: no such thing", "rewards.py:12")),
        ("short", 4, ("1 scores for 2 completions", "prompts.jsonl:1, ")),
        ("segv", 4, ("rewards.0.function", "died with SIGSEGV when it was called", "rewards.py:36)")),
        ("killed", 4, ("rewards.0.function", "died with SIGKILL when it was called")),
        ("noargs", 2, ("signature",)),
        ("Scorer", 2, ("is a class",)),
        ("interrupts", 4, ("raised KeyboardInterrupt",)),
        ("huge", 4, ("too large", "prompts.jsonl:2")),
        ("text", 4, ("list of numbers", "str good for", "prompts.jsonl:1")),
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


@pytest.mark.parametrize(
    ("function", "said"), [("nowhere.py:f", "no such file"), ("rewards.py", "no function is named (write file.py:f")]
)
def test_a_missing_file(ppo: Toy, function: str, said: str) -> None:
    content = ppo("x", rewards=[{"function": function}])
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert f"rewards.0.function {function}: {said}" in outcome.errors[0]
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


def run(content: dict[str, Any]) -> Any:
    """The outcome of a PPO recipe."""
    return quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))


def test_a_function_that_scores_nothing(ppo: Toy) -> None:
    outcome = run(ppo("nan", data={"eval": None}))
    assert (outcome.code, len(outcome.errors)) == (4, 1), outcome.err
    assert "none of the" in outcome.errors[0]
    assert "reward nan" in outcome.errors[0]


def test_rows_without_a_score_are_left_out_and_counted(ppo: Toy) -> None:
    content = ppo("some", data={"eval": None})
    assert run(content).code == 0
    out = Path(content["output_dir"])
    invalid = w.column(out, "rewards/some/invalid")
    assert len(invalid) == 3
    assert any(0 < n < 16 for n in invalid)


def test_parts_and_rewards_inside_completions(ppo: Toy) -> None:
    content = ppo("parts", data={"eval": None})
    content["rewards"].append({**content["rewards"][0], "function": content["rewards"][0]["function"][:-5] + "inside",
                               "normalize": "running", "clip": 2.0})  # fmt: skip
    outcome = run(content)
    assert outcome.code == 0, outcome.err
    (row, *_) = [r for r in w.metrics(Path(content["output_dir"])) if "rewards/parts/one/mean" in r]
    assert row["rewards/parts/one/mean"] == 1.0
    assert row["rewards/parts/mean"] == pytest.approx(1.0 + row["rewards/parts/long/mean"])
    assert row["rewards/inside/raw_mean"] > 0
    assert row["rewards/inside/invalid"] == 0.0
    assert row["objective/scores"] == pytest.approx(row["rewards/parts/mean"] + row["rewards/inside/mean"], rel=1e-5)


def test_running_statistics_are_in_the_checkpoint(ppo: Toy) -> None:
    """Stopped after three of four rollouts and gone on: the same as without the stop."""
    reward = {"normalize": "running", "shift": True}
    whole = ppo("length", checkpoint={"every": 1}, training={"max_steps": 4}, data={"eval": None})
    whole["rewards"][0] |= reward
    assert run(whole).code == 0
    halves = w.merged(whole, {"training": {"max_steps": 2}, "output_dir": f"{whole['output_dir']}-halves"})
    assert run(halves).code == 0
    assert run(w.merged(halves, {"training": {"max_steps": 4}})).code == 0
    assert w.metrics(Path(halves["output_dir"])) == w.metrics(Path(whole["output_dir"]))
    assert len(set(w.column(Path(whole["output_dir"]), "rewards/length/raw_mean"))) > 1


@pytest.mark.parametrize(
    ("rule", "code", "said"),
    [
        ({"name": "regex", "pattern": "(a"}, 2, ("rewards.0.rule.pattern", "not a regular expression")),
        ({"name": "words", "plus": ["a b"]}, 2, ("rewards.0.rule.plus", "not one word")),
        ({"name": "lenght"}, 2, ("rewards.0.rule", "length")),
        ({"name": "length", "limt": 3}, 2, ("limt", "limit")),
        ({"name": "numeric_answer"}, 3, ("no column 'answer'", "number", "prompts.jsonl:1")),
    ],
)
def test_a_rule_that_cannot_be_used(ppo: Toy, rule: dict[str, Any], code: int, said: tuple[str, ...]) -> None:
    """Known before any model is loaded."""
    content = ppo("x", rewards=[{"rule": rule}])
    outcome = run(content)
    assert (outcome.code, len(outcome.errors)) == (code, 1), outcome.err
    assert [text for text in said if text not in outcome.errors[0]] == []
    assert "policy:" not in outcome.err
    assert not Path(content["output_dir"]).exists()


def test_rules_in_a_run(ppo: Toy) -> None:
    names = ("length", "stop", "regex", "words", "numeric_answer")
    settings = {"length": {"limit": 6, "margin": 3}, "numeric_answer": {"column": "number"}}
    content = ppo("x", rewards=[{"rule": {"name": name, **settings.get(name, {})}} for name in names])
    outcome = run(content)
    assert outcome.code == 0, outcome.err
    row = w.metrics(Path(content["output_dir"]))[-1]
    assert all(f"rewards/{name}/mean" in row for name in names)
    assert row["objective/scores"] == pytest.approx(sum(row[f"rewards/{name}/mean"] for name in names), rel=1e-5)


@pytest.mark.parametrize("lora", [{"r": 4}, None])
@pytest.mark.parametrize("kind", ["steps", "spans", "two_token"])
def test_a_process_reward_model_in_a_run(toy: Toy, kind: str, lora: Any) -> None:
    """Trained on steps or marked errors, then asked at the steps of completions, and for the whole of them."""
    objective = {"name": "two_token" if kind == "two_token" else "step_labels"}
    data = {"step_separator": " "} if kind != "spans" else {"segments": {"by": "sub_sentence"}}
    rows = "steps" if kind == "two_token" else kind
    made = toy("train-rm", rows, "prm", objective=objective, data=data, training={"max_steps": 2}, lora=lora)
    prm = str(train(made))
    rewards = [{"run": prm, "place": "steps", "name": "dense"}, {"run": prm, "name": "end"},
               {"run": prm, "name": "signs", "place": "steps", "step_value": "sign", "weight": 0.3}]  # fmt: skip
    content = toy("ppo", "prompts", "run", rewards=rewards, rollout={"max_new_tokens": 6},
                  ppo={"mini_batches": 1, "epochs": 1}, training={"max_steps": 2})  # fmt: skip
    outcome = run(content)
    assert outcome.code == 0, outcome.err
    row = w.metrics(Path(content["output_dir"]))[-1]
    parts = row["rewards/dense/mean"] + row["rewards/end/mean"] + 0.3 * row["rewards/signs/mean"]
    assert row["objective/scores"] == pytest.approx(parts, rel=1e-4, abs=1e-6)
    assert row["rewards/dense/std"] > 0


def test_a_cost_model_is_no_reward_unless_it_counts_against(toy: Toy) -> None:
    made = toy("train-rm", "safety", "cost", objective={"name": "cost"}, training={"max_steps": 1})
    cost = str(train(made))
    short = {"rollout": {"max_new_tokens": 6}}
    wrong = run(toy("ppo", "prompts", "run", rewards=[{"run": cost}], **short))
    assert (wrong.code, len(wrong.errors)) == (4, 1), wrong.err
    assert "cost model" in wrong.errors[0]
    for rewards in ([{"run": cost, "weight": -1.0}], [{"rule": {"name": "stop"}}, {"run": cost, "role": "cost"}]):
        lag = {"lagrange": {}} if len(rewards) > 1 else {}
        content = toy("ppo", "prompts", "run", rewards=rewards, ppo=lag, **short)
        recipe = w.save(content, Path(content["output_dir"]).with_suffix(".yaml"))
        outcome = quick("ppo", recipe, "--dry-run")
        assert outcome.code == 0, outcome.err


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
