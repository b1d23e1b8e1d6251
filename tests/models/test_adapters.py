"""Adapters on disk: round trips, plain peft and transformers, and every kind of wrong folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_cli.data.batch import collate
from rlhf_cli.errors import RecipeError
from rlhf_cli.models import adapters
from rlhf_cli.models.base import Base, load_base
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings
from tests.models.worlds import kinds, lora_role, make_base, refused, tokens, write_model

SHAPES: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"r": 1, "alpha": 3.0, "target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.layers\.1\.mlp\..*_proj"},
]


def settings_for(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(name_or_path=str(folder), **changes)


@pytest.fixture
def base(model_folder: Path) -> Base:
    """A base read from the folder."""
    return load_base(str(model_folder), settings_for(model_folder), trained=False)


def logits(role: Role) -> torch.Tensor:
    batch = collate(kinds(1)["demonstrations"], packed=False)
    with role.active():
        return role.base.logits(role.hidden(batch))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(base: Base, model_folder: Path, tmp_path: Path, shape: dict[str, Any]) -> None:
    """Written, read onto a fresh base, and opened by plain transformers and peft: equal logits."""
    role = lora_role(base, "policy", **shape)
    adapters.write_adapter(base, "policy", tmp_path / "a")
    other = load_base(str(model_folder), settings_for(model_folder), trained=False)
    config, tensors = adapters.read_adapter(tmp_path / "a")
    adapters.add_adapter(other, "again", config, tensors)
    again = Role("again", other, "again", trained=True)
    assert torch.equal(logits(role), logits(again))
    assert len(again.parameters) == len(role.parameters) > 0
    assert not torch.allclose(logits(role), logits(Role("off", base)), atol=1e-3)

    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    opened = PeftModel.from_pretrained(plain, str(tmp_path / "a")).eval()
    ids = torch.from_numpy(tokens(np.random.default_rng(0), 17).astype(np.int64))[None]
    with torch.no_grad(), role.active():
        torch.testing.assert_close(base.model(input_ids=ids).logits, opened(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_the_folder_is_a_standard_one(base: Base, model_folder: Path, tmp_path: Path) -> None:
    lora_role(base, "policy")
    adapters.write_adapter(base, "policy", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    tensors = load_file(tmp_path / "a" / adapters.WEIGHTS)
    assert all(k.startswith("base_model.model.model.layers.") and ".lora_" in k for k in tensors)
    assert not any("policy" in k for k in tensors), "the name of the role is not part of the file"
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_several_adapters_do_not_mix(base: Base, tmp_path: Path) -> None:
    """Written beside others, each file holds its own tensors."""
    roles = [lora_role(base, name, seed=i) for i, name in enumerate(("policy", "policy2", "reward"))]
    for role in roles:
        adapters.write_adapter(base, role.name, tmp_path / role.name)
    for i, role in enumerate(roles):
        _, tensors = adapters.read_adapter(tmp_path / role.name)
        alone = make_base("llama")
        lora_role(alone, "x", seed=i)
        assert all(torch.equal(v, tensors[k]) for k, v in adapters.adapter_tensors(alone, "x").items())
        own = {n for n, _ in adapters.adapter_parameters(base, role.name)}
        assert len(own) == len(tensors)
        assert all(f".{role.name}." in n for n in own)


def test_a_fresh_adapter_is_switched_off_and_frozen(base: Base) -> None:
    before = logits(Role("off", base))
    adapters.add_adapter(base, "policy", adapters.lora_config(LoraSettings(r=4)))
    assert torch.equal(logits(Role("off", base)), before)
    assert torch.equal(logits(Role("policy", base, "policy")), before), "a fresh adapter is the base"


def test_a_reward_adapter_holds_its_head(base: Base, tmp_path: Path) -> None:
    lora_role(base, "reward")
    head = torch.nn.Linear(32, 1, bias=False)
    adapters.write_adapter(base, "reward", tmp_path / "a", head)
    config, tensors = adapters.read_adapter(tmp_path / "a")
    assert torch.equal(tensors[adapters.SCORE], head.weight)
    assert config.task_type == "SEQ_CLS"
    other = make_base("llama")
    adapters.add_adapter(other, "reward", config, tensors)
    assert config.modules_to_save is None


# --- wrong folders -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(base: Base, tmp_path: Path) -> Path:
    """A good adapter, to be spoilt."""
    lora_role(base, "policy")
    adapters.write_adapter(base, "policy", tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, spoil: Any) -> None:
    tensors = load_file(folder / adapters.WEIGHTS)
    save_file(spoil(tensors), folder / adapters.WEIGHTS)


def fresh(model_folder: Path) -> Base:
    return load_base(str(model_folder), settings_for(model_folder), trained=False)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(folder: Path, value: float) -> None:
    change(folder, lambda t: t | {FIRST: t[FIRST].index_fill(0, torch.tensor([1]), value)})
    refused(lambda: adapters.read_adapter(folder), FIRST, "NaN or infinite", str(folder))


def test_half_an_adapter(folder: Path, model_folder: Path) -> None:
    change(folder, lambda t: {k: v for i, (k, v) in enumerate(sorted(t.items())) if i % 2})
    config, tensors = adapters.read_adapter(folder)
    refused(lambda: adapters.add_adapter(fresh(model_folder), "p", config, tensors), "does not fit", FIRST)


def test_an_extra_tensor(folder: Path, model_folder: Path) -> None:
    change(folder, lambda t: t | {"base_model.model.model.layers.9.mlp.down_proj.lora_A.weight": torch.ones(4, 4)})
    config, tensors = adapters.read_adapter(folder)
    refused(lambda: adapters.add_adapter(fresh(model_folder), "p", config, tensors), "does not fit", "layers.9")


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"intermediate_size": 64}], ids=str)
def test_another_base(folder: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    other = write_model(tmp_path / "other", **changes)
    config, tensors = adapters.read_adapter(folder)
    refused(lambda: adapters.add_adapter(fresh(other), "p", config, tensors), "does not fit", "lora_")


def test_another_architecture(folder: Path) -> None:
    config, tensors = adapters.read_adapter(folder)
    refused(lambda: adapters.add_adapter(make_base("gpt2"), "p", config, tensors), "does not fit the base gpt2")


def test_no_file(folder: Path) -> None:
    (folder / adapters.WEIGHTS).unlink()
    refused(lambda: adapters.read_adapter(folder), adapters.WEIGHTS, str(folder))


def test_pickled(folder: Path) -> None:
    (folder / adapters.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")
    refused(lambda: adapters.read_adapter(folder), "pickled adapters are refused")


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_cut(folder: Path, keep: int) -> None:
    data = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(data[:keep])
    refused(lambda: adapters.read_adapter(folder), adapters.WEIGHTS, "damaged")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": "four"}', "{}"])
def test_a_wrong_configuration(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)

    def use() -> None:
        config, tensors = adapters.read_adapter(folder)
        adapters.add_adapter(make_base("llama"), "p", config, tensors)

    refused(use)


def test_no_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    refused(lambda: adapters.read_adapter(folder), "adapter_config.json")


@pytest.mark.parametrize("targets", [["nope"], "no.such", ["act_fn"], ["embed_tokens", "input_layernorm"]], ids=str)
def test_targets_that_are_not_there(targets: Any) -> None:
    with pytest.raises(RecipeError, match=r"^lora\.target_modules: ") as caught:
        adapters.add_adapter(make_base("llama"), "p", adapters.lora_config(LoraSettings(target_modules=targets)))
    assert "\n" not in str(caught.value)


def test_one_wrong_name_among_right_ones() -> None:
    """peft trains the others and says nothing."""
    with pytest.raises(RecipeError, match="has no layer 'v_porj'") as caught:
        adapters.add_adapter(
            make_base("llama"), "p", adapters.lora_config(LoraSettings(target_modules=["q_proj", "v_porj"]))
        )
    assert "did you mean 'v_proj'?" in str(caught.value)
    adapters.add_adapter(
        make_base("llama"), "p", adapters.lora_config(LoraSettings(target_modules=["q_proj", "v_proj"]))
    )
    adapters.add_adapter(make_base("llama"), "p", adapters.lora_config(LoraSettings(target_modules=["mlp.up_proj"])))
