"""The names of other tools lead to keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_cli.recipe.hints import INSTEAD, KEYS, VALUES, foreign_key, foreign_value
from rlhf_cli.recipe.keys import blocks_of, stages_with
from rlhf_cli.recipe.schema import RECIPES
from tests.conftest import run_cli

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


def test_what_has_no_like_here_says_what_to_do() -> None:
    assert not INSTEAD.keys() & (KEYS.keys() | {path.rpartition(".")[2] for path in OURS})
    assert foreign_key("ddp-find-unused-parameters") == "nothing here needs it: leave it out"
    assert "rlhf serve-rollouts RECIPE --gpu-memory-utilization" in foreign_key("vllm_gpu_memory_utilization")
    assert "torchrun --nproc-per-node N" in foreign_key("num_processes")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("rollout.use_vllm=true", "it is called rollout.engine: vllm, with rollout.server here"),
        ("vllm_server_port=8000", "it is called rollout.server, a whole address: http://HOST:PORT here"),
        ("vllm_gpu_memory_utilization=0.5", "`rlhf serve-rollouts RECIPE --gpu-memory-utilization SHARE` takes it"),
        ("fsdp=full_shard", "it is called distributed.shard: full here"),
        ("deepspeed=z3.json", "it is called distributed.shard: full, which is what ZeRO's stage 3 does here"),
        ("ddp_find_unused_parameters=false", "nothing here needs it: leave it out"),
    ],
)
def test_names_of_others_are_answered(key: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text("stage: ppo\nmodel: m\ndata: {train: x.jsonl}\nrewards: [{rule: {name: length}}]\n"
                    "training: {learning_rate: 1.0e-5}\nlora: {}\noutput_dir: o\n")  # fmt: skip
    outcome = run_cli("ppo", path, key)
    assert outcome.code == 2
    (line,) = (text for text in outcome.errors if key.partition("=")[0] in text)
    assert words in line


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
