"""A recipe that goes on from a LoRA run takes over the shape of its adapter, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.inherit import inherit_adapter
from rlhf_cli.recipe.reader import dump_recipe, read_recipe
from rlhf_cli.recipe.schema import DPORecipe, Recipe

STORED = {
    "peft_type": "LORA", "base_model_name_or_path": "BASE", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1,
    "use_dora": False, "use_rslora": False, "target_modules": ["v_proj", "q_proj"],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished LoRA run that was asked for all-linear."""
    base, final = tmp_path / "base", tmp_path / "sft" / "final"
    for folder in (base, final):
        folder.mkdir(parents=True)
        (folder / "x.safetensors").touch()
    (base / "config.json").write_text("{}")
    (final / "adapter_config.json").write_text(json.dumps(STORED | {"base_model_name_or_path": str(base)}))
    asked = {"lora": {"target_modules": "all-linear"}}
    (tmp_path / "sft" / "run.json").write_text(json.dumps({"stage": "sft", "role": "policy", "recipe": asked}))
    (tmp_path / "sft" / "DONE").write_text("{}")
    return tmp_path / "sft"


def recipe(model: Path, lora: Any) -> Recipe:
    content = {
        "stage": "dpo", "model": str(model), "lora": lora, "data": {"train": "x.jsonl"},
        "training": {"learning_rate": 1.0}, "objective": {"name": "dpo"}, "output_dir": "o",
    }  # fmt: skip
    return DPORecipe.model_validate(content)


def test_left_out_keys_are_the_adapters(run: Path) -> None:
    lora = inherit_adapter(recipe(run, {})).lora
    assert lora is not None
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (4, 8.0, 0.1, ["q_proj", "v_proj"])


def test_what_is_resolved_can_be_run_again(run: Path, tmp_path: Path) -> None:
    resolved = inherit_adapter(recipe(run, {"dropout": 0.0}))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(resolved))
    assert inherit_adapter(read_recipe(tmp_path / "recipe.yaml", [], "dpo")) == resolved
    assert resolved.lora is not None
    assert resolved.lora.dropout == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", 8), ("alpha", 16.0), ("use_dora", True), ("use_rslora", True), ("target_modules", ["q_proj"])],
)
def test_a_contradiction_is_refused_with_its_key(run: Path, key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"lora\.{key}: .*adapter in .*sft has"):
        inherit_adapter(recipe(run, {key: value}))


@pytest.mark.parametrize("value", ["all-linear", ["v_proj", "q_proj"]])
def test_the_same_layers_in_other_words_are_no_contradiction(run: Path, value: Any) -> None:
    lora = inherit_adapter(recipe(run, {"r": 4, "target_modules": value})).lora
    assert lora is not None
    assert lora.target_modules == ["q_proj", "v_proj"]


def test_an_adapter_needs_lora(run: Path) -> None:
    with pytest.raises(RecipeError, match="lora is null"):
        inherit_adapter(recipe(run, None))


def test_a_full_model_is_left_alone(run: Path) -> None:
    plain = recipe(run.parent / "base", {"r": 2})
    assert inherit_adapter(plain) is plain
