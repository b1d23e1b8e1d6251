"""`rlhf data`: every token in its kind, what truncation takes, and nothing for recipes that train nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.recipe.reader import read_recipe
from rlhf_cli.stages.show import histogram, view
from tests.stages import world as w
from tests.stages.conftest import quick

Toy = Callable[..., dict[str, Any]]


def test_each_stretch_is_what_training_sees(toy: Toy, tmp_path: Path) -> None:
    path = w.save(toy("dpo", "pairs", objective={"name": "dpo"}), tmp_path / "r.yaml")
    found = view(read_recipe(path, [], None), 2)
    assert [one.split for one in found.examples] == ["train", "train", "eval", "eval"]
    row = w.rows("pairs", 1, 1)[0]
    first = found.examples[0]
    assert "".join(s.text for s in first.prompt) == f"<s><|user|>{row['prompt'][0]['content']}<|end|><|assistant|>"
    assert {s.kind for s in first.prompt} == {"prompt"}
    for (name, stretches), key in zip(first.completions, ("chosen", "rejected"), strict=True):
        assert name == key
        assert [(s.text, s.kind) for s in stretches] == [(row[key], "trained"), ("<|end|>", "end")]
    assert len(found.lengths["train"]) == 96


def test_what_is_cut_and_left_out_is_shown(toy: Toy, tmp_path: Path) -> None:
    content = toy("dpo", "pairs", objective={"name": "dpo"}, data={"max_length": 13})
    for truncation, fate in (("right", "cut to 13 (truncation: right)"), ("left", "cut to 13"), ("drop", "left out")):
        content["data"]["truncation"] = truncation
        found = view(read_recipe(w.save(content, tmp_path / "r.yaml"), [], None), 40)
        long = next(one for one in found.examples if fate in one.fate)
        parts = [long.prompt, *(stretches for _, stretches in long.completions)]
        assert "cut" in {s.kind for stretches in parts for s in stretches}
        assert ("cut" in {s.kind for s in long.prompt}) == (truncation != "right")


def test_an_example_that_is_kept_comes_first(toy: Toy, tmp_path: Path, world: Path) -> None:
    rows = w.rows("pairs", 4, 1)
    for row in rows[:3]:
        row["chosen"] = " ".join(["good"] * 40)
    data = {"train": str(w.write_rows(tmp_path / "p.jsonl", rows)), "eval": None, "max_length": 24}
    recipe = read_recipe(
        w.save(toy("dpo", "pairs", objective={"name": "dpo"}, data=data), tmp_path / "r.yaml"), [], None
    )
    for count, lines in ((1, ["4"]), (2, ["4", "1"]), (9, ["4", "1", "2", "3"]), (0, [])):
        found = view(recipe, count).examples
        assert [one.where.rpartition(":")[2] for one in found] == lines
        assert [one.kept for one in found] == [line == "4" for line in lines]


def test_prompts_verdicts_rankings_and_conversations(toy: Toy, tmp_path: Path) -> None:
    sampled = {"rewards": [{"rule": {"name": "stop"}}], "rollout": {"max_new_tokens": 8}}
    for stage, kind, more, names in (
        ("sft", "chat", {}, {"completion 1"}),
        ("dpo", "verdicts", {"objective": {"name": "kto"}}, {"wanted", "not wanted"}),
        ("dpo", "rankings", {"objective": {"name": "rrhf"}}, None),
        ("ppo", "prompts", sampled, set()),
    ):
        found = view(read_recipe(w.save(toy(stage, kind, **more), tmp_path / "r.yaml"), [], None), 3)
        called = {name for one in found.examples for name, _ in one.completions}
        assert called == names or (names is None and all(", score " in name for name in called))


def test_on_the_terminal_and_as_a_page(toy: Toy, tmp_path: Path) -> None:
    recipe = w.save(toy("sft", "chat"), tmp_path / "r.yaml")
    outcome = quick("data", recipe, "--rows", 1)
    assert outcome.code == 0, outcome.err
    assert "<|assistant|>" in outcome.out
    assert "tokens of train examples" in outcome.out
    assert "format messages (detected), 96 rows" in outcome.out
    outcome = quick("data", recipe, "--html", tmp_path / "d.html")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "d.html").read_text()
    assert '<span class="trained">' in page
    assert "&lt;|end|&gt;" in page
    assert "http" not in page
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_shown_is_named(toy: Toy, tmp_path: Path, world: Path) -> None:
    select = {"stage": "select", "data": {"completions": str(world / "scored.jsonl")}, "selection": {"name": "best"},
              "output_dir": "x"}  # fmt: skip
    outcome = quick("data", w.save(select, tmp_path / "s.yaml"))
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "rlhf select trains nothing" in outcome.err
    outcome = quick("data", w.save(toy("sft", "chat", data={"train": "none.jsonl"}), tmp_path / "r.yaml"))
    assert (outcome.code, len(outcome.errors)) == (3, 1)


def test_bars_count_every_example() -> None:
    lines = list(histogram(np.array([3, 3, 4, 9]), 48, bins=3, width=4))
    assert sum(int(line.split()[3]) for line in lines[:-1]) == 4
    assert lines[-1] == "max_length leaves 48 tokens; longest example 9"
    assert len(list(histogram(np.array([5, 5]), 48))) == 2
