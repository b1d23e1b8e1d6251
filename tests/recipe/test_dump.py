"""A recipe written out with every default reads as the same recipe."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.catalog.entries import LARGEST
from rlhf_cli.recipe.reader import dump_recipe, quote, read_recipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.tree import parse, plain, read_scalar

EXTRA = {
    "dpo": "objective: {name: dpo}\n",
    "ppo": "rewards: [{run: runs/rm}]\n",
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
NAME = TEXT.filter(str.strip)
LAYERS = TEXT.filter(bool).map(re.escape)
POSITIVE = st.floats(min_value=1e-300, max_value=LARGEST)
VARIATIONS: dict[str, st.SearchStrategy[Any]] = {
    "model.name_or_path": NAME,
    "model.chat_template": TEXT,
    "model.gradient_checkpointing": st.booleans(),
    "lora.target_modules": LAYERS | st.lists(TEXT.filter(bool), min_size=1, max_size=3),
    "lora.alpha": POSITIVE,
    "data.train": st.lists(NAME, min_size=1, max_size=3, unique=True).map(
        lambda texts: [{"path": text, "columns": {text: text}} for text in texts]
    ),
    "data.eval": st.none() | st.lists(NAME, min_size=1, max_size=2),
    "training.learning_rate": POSITIVE,
    "training.micro_batch_tokens": st.just("auto") | st.integers(8, 2**40),
    "training.warmup_steps": st.none() | st.integers(0, 100),
    "training.max_grad_norm": st.none() | POSITIVE,
    "logging.report_to": st.lists(st.sampled_from(["wandb", "trackio"]), max_size=2, unique=True),
    "seed": st.integers(0, 2**63 - 1),
    "output_dir": NAME,
}
OWN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "sft": {"data.train_on_prompt": st.booleans(), "objective.label_smoothing": st.floats(0, 0.99)},
    "train-rm": {"objective.centring": st.floats(0, 1e9)},
    "ppo": {"ppo.kl": st.just({"name": "doubling", "coef": 0.5}),
            "rollout.stop": st.lists(TEXT.filter(bool), max_size=2),
            "rewards": st.lists(NAME, min_size=1, max_size=2).map(
                lambda texts: [{"function": t, "weight": -1.5, "name": f"r{i}"} for i, t in enumerate(texts)])},
    "dpo": {"objective": st.sampled_from(["ipo", "kto", "odpo"]).map(lambda name: {"name": name, "beta": 0.3}),
            "reference": st.none() | NAME},
    "orpo": {"objective.beta": POSITIVE},
    "simpo": {"objective.gamma_beta_ratio": st.none() | st.floats(-1e9, 1e9)},
}  # fmt: skip


def as_flow(value: Any) -> str:
    """The value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quote(key)}: {as_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_flow, value)) + "]"
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def recipe_of(stage: str, overrides: list[str]) -> tuple[Recipe, Recipe]:
    """A recipe with overrides, and the same after a round trip."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.yaml"
        head = f"stage: {stage}\nmodel: m\ndata: {{train: t}}\ntraining: {{learning_rate: 1}}\noutput_dir: o\n"
        file.write_text(head + EXTRA.get(stage, ""))
        first = read_recipe(file, overrides, stage)
        file.write_text(dump_recipe(first), encoding="utf-8", newline="")
        return first, read_recipe(file, [], stage)


@pytest.mark.parametrize("stage", OWN)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_round_trip(stage: str, data: st.DataObject) -> None:
    choices = VARIATIONS | OWN[stage]
    keys = data.draw(st.lists(st.sampled_from(sorted(choices)), unique=True, max_size=6))
    overrides = [f"{key}={as_flow(data.draw(choices[key]))}" for key in keys]
    first, second = recipe_of(stage, overrides)
    assert first == second
    assert dump_recipe(first) == dump_recipe(second)


OTHERS = {
    "sample": "model: m\ndata: {prompts: p}\n",
    "score": "model: m\ndata: {completions: c}\nrewards: [{run: r}]\n",
    "select": "data: {completions: c}\nselection: {name: best}\n",
}


@pytest.mark.parametrize("stage", OTHERS)
def test_round_trip_of_stages_that_train_nothing(stage: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"stage: {stage}\n{OTHERS[stage]}output_dir: o\n")
    first = read_recipe(file, [], stage)
    file.write_text(dump_recipe(first))
    assert read_recipe(file, [], stage) == first


@given(TEXT)
@settings(deadline=None)
def test_quoted_text_reads_as_itself(text: str) -> None:
    node, found = parse(f"key: {quote(text)}\n", "f")
    assert not found
    assert plain(node) == {"key": text}


def test_every_default_is_written_and_the_order_is_readable() -> None:
    first, _ = recipe_of("ppo", ["lora.r=8"])
    lines = dump_recipe(first).splitlines()
    tops = [line.split(":")[0] for line in lines if line[0] not in " -"]
    assert tops == ["stage", "model", "lora", "data", "rewards", "rollout", "ppo", "critic", "doctor", "training",
                    "logging", "checkpoint", "evaluation", "license", "distributed", "seed", "output_dir"]  # fmt: skip
    assert "  adam_epsilon: 1.0e-08" in lines
    assert lines[lines.index("  kl:") + 1] == "    name: fixed"
    assert "  chat_template: null" in lines


def test_other_readers_agree_on_the_numbers() -> None:
    first, _ = recipe_of("dpo", ["training.learning_rate=5e-6", "output_dir='1e5'"])
    loaded = yaml.safe_load(dump_recipe(first))
    assert loaded == first.model_dump()
    assert loaded["output_dir"] == "1e5"


@pytest.mark.parametrize(
    "text", ["", "~", "null", "true", "1e5", ".5", "1_0", "a: b", "a #b", "- a", "-", "x ", ".inf"]
)
def test_text_that_looks_like_something_else(text: str) -> None:
    written = quote(text)
    assert written.startswith('"') or read_scalar(written) == text
    node, _ = parse(f"key: {written}", "f")
    assert plain(node) == {"key": text}
