"""The names of other tools lead to keys that exist."""

from __future__ import annotations

import re

import pytest

from rlhf_cli.recipe.hints import KEYS, VALUES, foreign_key, foreign_value
from rlhf_cli.recipe.keys import blocks_of, stages_with
from rlhf_cli.recipe.schema import RECIPES

OURS = {
    f"{block}.{key}".lstrip(".") for stage in RECIPES for key, blocks in blocks_of(stage).items() for block in blocks
}


@pytest.mark.parametrize("name", KEYS)
def test_foreign_names_lead_to_our_keys(name: str) -> None:
    target = KEYS[name]
    words = re.findall(r"[a-z_]+(?:\.[a-z_]+)*", target)
    assert any(word in OURS for word in words) or target.startswith("the option"), target
    dotted = re.match(r"([a-z_]+(?:\.[a-z_]+)+)", target)
    assert dotted is None or dotted[1] in OURS, target


def test_no_foreign_name_hides_a_key_of_ours_that_means_the_same() -> None:
    assert not {name for name, target in KEYS.items() if name in RECIPES["dpo"].model_fields or name == target}


def test_spelling_does_not_matter() -> None:
    assert foreign_key("per-device-train-batch-size") == "it is called training.batch_size here"
    assert foreign_key("LoRA_rank") == "it is called lora.r here"
    assert foreign_key("zzz") == ""


def test_foreign_values_lead_to_values_of_ours() -> None:
    assert foreign_value("dtype", "BF16") == "here it is bfloat16"
    assert foreign_value("stage", "rm") == "here it is train-rm"
    assert foreign_value("stage", "zzz") == ""
    assert {value.split(",")[0] for value in VALUES["stage"].values()} <= set(RECIPES)


def test_keys_know_their_blocks() -> None:
    assert blocks_of("dpo")["learning_rate"] == ("training",)
    assert set(blocks_of("ppo")["learning_rate"]) == {"training", "critic", "ppo.lagrange"}
    assert blocks_of("dpo")["output_dir"] == ("",)
    assert stages_with("critic") == ["ppo"]
    assert stages_with("train_on_prompt", "data") == ["sft"]
