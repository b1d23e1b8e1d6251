"""Examples that are put away come back as they were, and the data gate says the same of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data import heap
from rlhf_cli.data.examples import Comparison, Demonstration, Example, Message, Ranking, Rated, Steps, Task, Verdict
from rlhf_cli.data.heap import Heap, joined, read, written
from rlhf_cli.data.prepare import prepare
from rlhf_cli.data.template import load_template
from rlhf_cli.recipe.settings.data import DataSettings
from tests.stages import world as w

ASKED = (Message("system", "é\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")), Message("user", "q\n"))
EVERY: list[Example] = [
    Demonstration("p", "c", "f:1"),
    Demonstration(ASKED, None, "f:2"),
    Comparison(ASKED, "a", "b", "f:3", 0.1, (1 / 3, -2.0), 0.75, (True, False)),
    Comparison("p", "a", "b", "f:4"),
    Verdict("p", "c", True, "f:5"),
    Ranking(ASKED, ("a", "b", "c"), (1.0, 2.5, 2.5), "f:6", graded=False),
    Rated("p", "c", 1e-17, "f:7"),
    Steps("p", ("a", "b"), (1, None), "f:8"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly everything is put away."""
    monkeypatch.setattr(heap, "HELD", 8)


@pytest.mark.parametrize("item", EVERY, ids=lambda item: f"{type(item).__name__} {item.where}")
def test_an_example_comes_back_as_it_was(item: Example) -> None:
    assert read(written(item)) == item


@pytest.mark.usefixtures("small")
def test_a_heap_is_a_sequence_wherever_it_lies() -> None:
    found = Heap()
    for item in EVERY:
        found.extend((item,))
    assert found._file is not None
    assert list(found) == list(found) == EVERY
    assert [found[i] for i in (0, -1, 3)] == [EVERY[0], EVERY[-1], EVERY[3]]
    assert found[2:4] == EVERY[2:4]
    with pytest.raises(IndexError):
        found[len(EVERY)]
    assert list(joined([found, Heap(EVERY[:2])])) == EVERY + EVERY[:2]
    assert list(found.taken()) == EVERY
    assert (len(found), list(found)) == (0, [])


@pytest.mark.usefixtures("small")
def test_tasks_and_a_full_disk_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task("a long prompt", f"f:{n}", {"number": {1, 2}}) for n in range(3)]
    assert list(Heap(tasks)) == tasks

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "no space")

    monkeypatch.setattr(heap.tempfile, "TemporaryFile", full)
    assert list(Heap(EVERY * 3)) == EVERY * 3


@pytest.mark.parametrize("kind", ["chat", "pairs", "verdicts", "rankings", "scored", "steps", "prompts"])
def test_the_gate_says_the_same(kind: str, tmp_path: Path, qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"chat": "demonstration", "pairs": "comparison", "verdicts": "verdict", "rankings": "ranking",
             "scored": "rated", "steps": "steps", "prompts": "task"}  # fmt: skip
    rows = w.rows(kind, 40, 1)
    path = w.write_rows(tmp_path / "rows.jsonl", [*rows, rows[3]])
    data = DataSettings(train=[{"path": str(path)}, {"path": str(path), "limit": 5}], max_length=64)
    template = load_template(qwen, None, [])
    before = prepare(data, kinds[kind], template)
    monkeypatch.setattr(heap, "HELD", 100)
    after = prepare(data, kinds[kind], template)
    assert json.dumps(after.report.to_json()) == json.dumps(before.report.to_json())
    assert len(after.train) == len(before.train) > 20
    for one, other in zip(after.train, before.train, strict=True):
        assert np.array_equal(one.prompt, other.prompt)
        assert (one.where, one.numbers) == (other.where, other.numbers)
        assert [c.ids.tolist() for c in one.completions] == [c.ids.tolist() for c in other.completions]
