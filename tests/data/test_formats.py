from __future__ import annotations

from typing import Any

import pytest

from rlhf_cli.data.examples import Comparison, Demonstration, Message, Rated, Task, Verdict
from rlhf_cli.data.formats import FORMATS, detect, named
from rlhf_cli.data.grouping import one_task_a_prompt, pair_by_score
from rlhf_cli.data.rows import BadRow
from rlhf_cli.errors import DataError
from tests.data import test_formats_ranked, test_formats_steps

W = "f:1"
U, A, S, T = (lambda t, r=r: Message(r, t) for r in ("user", "assistant", "system", "tool"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(name: str, kind: Any, row: dict[str, Any]) -> list[Any]:
    return FORMATS[name].gives[kind](row, W)


CASES: list[tuple[str, str, dict[str, Any], list[Any]]] = [
    ("text", "demonstration", {"text": "a b"}, [Demonstration("", "a b", W)]),
    ("prompt_completion", "demonstration", {"prompt": "q", "completion": " a"}, [Demonstration("q", " a", W)]),
    ("prompt_completion", "demonstration", {"prompt": "", "completion": "a"}, [Demonstration("", "a", W)]),
    (
        "prompt_completion",
        "demonstration",
        {"prompt": [user("q")], "completion": [assistant("a")]},
        [Demonstration((U("q"),), "a", W)],
    ),
    (
        "messages",
        "demonstration",
        {"messages": [user("q"), assistant("a")]},
        [Demonstration((U("q"), A("a")), None, W)],
    ),
    ("messages", "task", {"messages": [user("q"), assistant("a")], "n": 1}, [Task((U("q"),), W, {"n": 1})]),
    ("messages", "task", {"messages": [user("q")]}, [Task((U("q"),), W, {})]),
    (
        "sharegpt",
        "demonstration",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "s",
            "tools": '[{"name": "é"}]',
        },
        [
            Demonstration(
                (S('s\n\nYou can call these tools:\n[{"name": "é"}]'), U("q"), A("{}"), T("1"), A("a")), None, W
            )
        ],
    ),
    (
        "sharegpt",
        "demonstration",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
        [Demonstration((U("q"), A("a")), None, W)],
    ),
    (
        "alpaca",
        "demonstration",
        {"instruction": "do", "input": "it", "output": "ok", "system": "s", "history": [["h", "i"]]},
        [Demonstration((S("s"), U("h"), A("i"), U("do\nit"), A("ok")), None, W)],
    ),
    (
        "alpaca",
        "demonstration",
        {"instruction": "do", "input": "", "output": "ok"},
        [Demonstration((U("do"), A("ok")), None, W)],
    ),
    ("alpaca", "task", {"instruction": "do", "output": "ok"}, [Task((U("do"),), W, {"output": "ok"})]),
    (
        "preference",
        "comparison",
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "score_chosen": 3, "rejected_score": 1.5},
        [Comparison("q", "a", "b", W, 2.0, (3.0, 1.5))],
    ),
    (
        "preference",
        "comparison",
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": assistant("b"), "chosen_score": 1},
        [Comparison((U("q"),), "a", "b", W)],
    ),
    (
        "preference",
        "verdict",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        [Verdict("q", "a", True, W), Verdict("q", "b", False, W)],
    ),
    (
        "preference",
        "task",
        {"prompt": "q", "chosen": "a", "rejected": ""},
        [Task("q", W, {"chosen": "a", "rejected": ""})],
    ),
    (
        "sharegpt_preference",
        "comparison",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [Comparison((U("q"),), "a", "b", W)],
    ),
    (
        "implicit_prompt",
        "comparison",
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        [Comparison((U("q"),), "a", "b", W)],
    ),
    (
        "implicit_prompt",
        "comparison",
        {
            "chosen": "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant: a",
            "rejected": "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant: b",
        },
        [Comparison("\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant:", " a", " b", W)],
    ),
    (
        "implicit_prompt",
        "task",
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b", "n": 1},
        [Task("\n\nHuman: x\n\nAssistant:", W, {"n": 1})],
    ),
    ("verdict", "verdict", {"prompt": "q", "completion": "a", "label": 0}, [Verdict("q", "a", False, W)]),
    (
        "verdict",
        "verdict",
        {"messages": [user("q"), assistant("a")], "label": True},
        [Verdict((U("q"),), "a", True, W)],
    ),
    ("scored", "comparison", {"prompt": "q", "completion": "a", "score": 1}, [Rated("q", "a", 1.0, W)]),
    ("prompt", "task", {"prompt": "q", "answer": 4}, [Task("q", W, {"answer": 4})]),
    ("prompt", "task", {"messages": [user("q")], "answer": 4}, [Task((U("q"),), W, {"answer": 4})]),
]


@pytest.mark.parametrize(("name", "kind", "row", "expected"), CASES)
def test_each_format_reads_its_rows(name: str, kind: str, row: dict[str, Any], expected: list[Any]) -> None:
    assert read(name, kind, row) == expected


def test_every_format_has_a_case() -> None:
    assert {c[0] for c in (*CASES, *test_formats_ranked.CASES, *test_formats_steps.CASES)} == set(FORMATS)


BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("text", "demonstration", {"text": " \n"}, "empty text"),
    ("text", "demonstration", {"text": 3}, "'text' is a number, not text"),
    ("text", "demonstration", {}, "no 'text'"),
    ("prompt_completion", "demonstration", {"prompt": "q", "completion": " "}, "empty completion"),
    ("prompt_completion", "demonstration", {"prompt": " ", "completion": "a"}, "empty prompt"),
    ("prompt_completion", "demonstration", {"prompt": "q", "completion": None}, "no 'completion'"),
    ("prompt_completion", "demonstration", {"prompt": "q", "completion": [user("a")]}, "not one assistant message"),
    ("messages", "demonstration", {"messages": [user("q")]}, "the last turn is not the assistant's"),
    ("messages", "demonstration", {"messages": [user("q"), assistant(" ")]}, "empty completion"),
    ("messages", "demonstration", {"messages": [user(" "), assistant("a")]}, "empty prompt"),
    ("messages", "demonstration", {"messages": [assistant("a")]}, "empty prompt"),
    ("messages", "demonstration", {"messages": "hello"}, "'messages' is text, not a list of messages"),
    ("messages", "demonstration", {"messages": ["hello"]}, "a message in 'messages' is text, not an object"),
    ("messages", "demonstration", {"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
    ("messages", "demonstration", {"messages": [{"content": "x"}]}, "a message without 'role'"),
    ("messages", "demonstration", {"messages": [{"role": "user", "content": None}]}, "'content' is null, not text"),
    ("sharegpt", "demonstration", {"conversations": [{"from": "x", "value": "y"}]}, "unknown role 'x'"),
    ("alpaca", "demonstration", {"instruction": "", "output": "a"}, "empty prompt"),
    ("alpaca", "demonstration", {"instruction": "a", "output": "b", "history": [["x"]]}, "'history' is not"),
    ("preference", "comparison", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    ("preference", "comparison", {"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ("preference", "comparison", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "2"}, "not a number"),
    ("preference", "comparison", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "finite"),
    (
        "implicit_prompt",
        "comparison",
        {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        "differ before their last turn",
    ),
    (
        "implicit_prompt",
        "comparison",
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
        "differ before their last turn",
    ),
    ("implicit_prompt", "comparison", {"chosen": "a", "rejected": "b"}, "no '\\n\\nAssistant:' turn"),
    ("verdict", "verdict", {"prompt": "q", "completion": "a", "label": "yes"}, "neither true nor false"),
    ("verdict", "verdict", {"prompt": "q", "completion": "a", "label": 2}, "neither true nor false"),
    ("verdict", "verdict", {"prompt": "q", "completion": "a", "label": None}, "no 'label'"),
    ("scored", "comparison", {"prompt": "q", "completion": "a", "score": float("inf")}, "not a finite number"),
    ("scored", "comparison", {"prompt": "q", "completion": "a", "score": True}, "not a number"),
    ("scored", "comparison", {"prompt": "q", "completion": "a"}, "no 'score'"),
    ("prompt", "task", {"prompt": [assistant("a")]}, "empty prompt"),
    ("prompt", "task", {"prompt": [user("q"), assistant("a")]}, "ends with an assistant turn"),
]


@pytest.mark.parametrize(("name", "kind", "row", "reason"), BAD)
def test_bad_rows_are_named(name: str, kind: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(name, kind, row)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        ("text", "demonstration", "text"),
        ("prompt completion", "demonstration", "prompt_completion"),
        ("prompt completion label", "demonstration", "prompt_completion"),
        ("prompt completion label", "verdict", "verdict"),
        ("prompt chosen rejected", "comparison", "preference"),
        ("prompt chosen rejected messages", "demonstration", "messages"),
        ("chosen rejected", "comparison", "implicit_prompt"),
        ("chosen rejected", "verdict", "implicit_prompt"),
        ("conversations chosen rejected", "comparison", "sharegpt_preference"),
        ("conversations tools", "demonstration", "sharegpt"),
        ("messages label", "verdict", "verdict"),
        ("instruction input output", "demonstration", "alpaca"),
        ("prompt completion score extra", "comparison", "scored"),
        ("prompt answer", "task", "prompt"),
        ("prompt completion", "task", "prompt_completion"),
        ("messages", "task", "messages"),
    ],
)
def test_detection(columns: str, kind: Any, expected: str) -> None:
    assert detect(columns.split(), kind, "f").name == expected


def test_no_format_fits() -> None:
    with pytest.raises(
        DataError, match=r"f: no format that gives a comparison fits the columns found: a, b \(map them"
    ):
        detect(["b", "a"], "comparison", "f")
    with pytest.raises(DataError, match=r"those of format messages, verdict, for .* objective cross_entropy, .*kto"):
        detect(["messages", "label"], "comparison", "f")


def test_several_formats_fit() -> None:
    with pytest.raises(DataError, match=r"several formats fit .*: text, messages"):
        detect(["text", "messages"], "demonstration", "f")


def test_pairs_do_not_become_demonstrations_by_themselves() -> None:
    with pytest.raises(DataError, match="no format that gives a demonstration"):
        detect(["prompt", "chosen", "rejected"], "demonstration", "f")
    with pytest.raises(DataError, match="format preference gives no demonstration"):
        named("preference", "demonstration", "f")


def test_misspelt_format() -> None:
    with pytest.raises(DataError, match=r"no format is called 'sharegtp'.*did you mean 'sharegpt'"):
        named("sharegtp", "demonstration", "f")


def test_scored_rows_pair_best_with_worst() -> None:
    rows = [
        Rated("p", t, s, f"f:{i}")
        for i, (t, s) in enumerate([("a", 1.0), ("b", 5.0), ("c", 3.0), ("d", 2.0), ("e", 4.0)], 1)
    ]
    pairs, left = pair_by_score([*rows, Rated("q", "x", 1.0, "f:6"), Rated("q", "y", 1.0, "f:7")])
    assert [(c.chosen, c.rejected, c.scores, c.where) for c in pairs] == [
        ("b", "a", (5.0, 1.0), "f:2 with 1"),
        ("e", "d", (4.0, 2.0), "f:5 with 4"),
    ]
    assert [(d.reason, d.where) for d in left] == [
        ("no partner to pair with", "f:3"),
        ("no other score at the same prompt", "f:6"),
        ("no other score at the same prompt", "f:7"),
    ]


def test_equal_completions_are_not_paired() -> None:
    pairs, left = pair_by_score([Rated("p", "a", 1.0, "f:1"), Rated("p", "a", 2.0, "f:2")])
    assert pairs == []
    assert [d.reason for d in left] == ["same completion, other score"] * 2


def test_scored_rows_give_one_task_a_prompt() -> None:
    tasks, repeated = one_task_a_prompt([Task("p", "f:1"), Task("q", "f:2"), Task("p", "f:3")])
    assert [t.where for t in tasks] == ["f:1", "f:2"]
    assert [d.where for d in repeated] == ["f:3"]
