"""Saved models open in plain transformers and peft and give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rlhf_cli.data.batch import collate
from rlhf_cli.models.base import Base, Text, load_base, load_text
from rlhf_cli.models.build import frozen_role, scalar_head
from rlhf_cli.models.roles import Role
from rlhf_cli.models.save import open_reward, pad_id, save_policy, save_reward
from rlhf_cli.recipe.settings.model import ModelSettings
from tests.models.worlds import full_role, kinds, lora_role, write_model

ARCHITECTURES = ["llama", "llama-tied", "gpt2", "qwen2", "mixtral"]


def opened(folder: Path, **settings: Any) -> tuple[Base, Text]:
    """Base and text of a folder."""
    made = ModelSettings(name_or_path=str(folder), **settings)
    text = load_text(made)
    return load_base(text.source, made, trained=False), text


def reward_role(base: Base, lora: bool) -> Role:
    """A reward model whose head has no bias, as a classifier's."""
    role = lora_role(base, "reward") if lora else full_role(base, "reward")
    weight = torch.randn(1, base.model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    return Role("reward", base, role.adapter, scalar_head(base, weight), trained=True)


def rows(seed: int = 1) -> list[np.ndarray]:
    """Prompt and completion of each sequence, of different lengths."""
    return [np.concatenate([s.prompt, c.ids]) for s in kinds(seed)["pairs"] for c in s.completions]


def scores(role: Role) -> torch.Tensor:
    with role.active():
        return role.score(collate(kinds(1)["pairs"], packed=False))


def nudge(base: Base) -> None:
    """As after some training: weights that are not the folder's any more."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


@pytest.fixture(params=ARCHITECTURES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model folder of an architecture."""
    return write_model(tmp_path / request.param, request.param)


def test_a_full_policy(world: Path, tmp_path: Path) -> None:
    base, text = opened(world)
    nudge(base)
    role = full_role(base)
    save_policy(role, text, tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    ids = torch.from_numpy(rows()[2].astype(np.int64))[None]
    with torch.no_grad(), role.active():
        ours = base.model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)
    again, _ = opened(tmp_path / "final")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), base.model.parameters(), strict=True))
    assert "rlhf" not in (tmp_path / "final" / "config.json").read_text()


def test_a_lora_policy_with_its_text(model_folder: Path, tmp_path: Path) -> None:
    base, text = opened(model_folder)
    role = lora_role(base, "policy")
    save_policy(role, text, tmp_path / "final")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    plain = PeftModel.from_pretrained(model, str(tmp_path / "final")).eval()
    ids = torch.from_numpy(rows()[2].astype(np.int64))[None]
    with torch.no_grad(), role.active():
        torch.testing.assert_close(plain(input_ids=ids).logits, base.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text.tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert (tmp_path / "final" / "config.json").exists() is False, "an adapter folder holds no base"


def test_generation_stops_where_training_ended(tmp_path: Path) -> None:
    """The saved generation settings stop at every end token, the template's included."""
    folder = write_model(tmp_path / "model")
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    base, text = opened(folder)
    end = text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(text.template.stop_ids) == {2, end}
    save_policy(full_role(base), text, tmp_path / "final")
    saved = GenerationConfig.from_pretrained(tmp_path / "final")
    assert set(saved.eos_token_id) == {2, end}
    assert saved.pad_token_id == 0


def test_a_policy_in_half_precision(model_folder: Path, tmp_path: Path) -> None:
    """Trained in float32, saved in the compute dtype, which the configuration names."""
    made = ModelSettings(name_or_path=str(model_folder), dtype="bfloat16")
    text, base = load_text(made), load_base(str(model_folder), made, trained=True)
    save_policy(full_role(base), text, tmp_path / "final")
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    save_reward(reward_role(base, lora=False), text, tmp_path / "reward")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert {p.dtype for p in classifier.parameters()} == {torch.bfloat16}


# --- reward models -----------------------------------------------------------------------------------------


def check_scores(classifier: torch.nn.Module, role: Role, text: Text) -> None:
    """Each row alone, and all of them in one batch with right padding."""
    wanted = scores(role)
    with torch.no_grad():
        alone = [classifier(input_ids=torch.from_numpy(r.astype(np.int64))[None]).logits[0, 0] for r in rows()]
        torch.testing.assert_close(torch.stack(alone), wanted, rtol=1e-4, atol=1e-4)
        pad = pad_id(text)
        assert pad is not None
        width = max(len(r) for r in rows())
        ids = torch.full((len(rows()), width), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows()):
            ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask[i, : len(row)] = 1
        together = classifier(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-4)
    assert float(wanted.std()) > 0.1


def test_a_full_reward_model(world: Path, tmp_path: Path) -> None:
    base, text = opened(world)
    nudge(base)
    role = reward_role(base, lora=False)
    save_reward(role, text, tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    assert plain.config.num_labels == 1
    check_scores(plain, role, text)
    check_scores(open_reward(tmp_path / "final", text, role), role, text)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_lora_reward_model(name: str, lora: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path / name, name)
    base, text = opened(folder)
    adapter = lora_role(base, "reward", **lora)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    role = Role("reward", base, adapter.adapter, scalar_head(base, weight), trained=True)
    save_reward(role, text, tmp_path / "final")
    plain = open_reward(tmp_path / "final", text, role)
    plain.base_model.model.config.pad_token_id = pad_id(text)  # GPT-2's own configuration has none
    check_scores(plain, role, text)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "final"), num_labels=1).eval()
    plain.base_model.model.config.pad_token_id = pad_id(text)
    check_scores(plain, role, text)


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_reward_model_as_a_frozen_role(model_folder: Path, tmp_path: Path, lora: bool) -> None:
    """What ppo does with it: on the policy's base when it is an adapter of that, else on one of its own."""
    base, text = opened(model_folder)
    if not lora:
        nudge(base)
    role = reward_role(base, lora)
    save_reward(role, text, tmp_path / "final")
    settings = ModelSettings(name_or_path=str(tmp_path / "final"))
    policy_base, _ = opened(model_folder)
    policy = lora_role(policy_base, "policy")
    again = frozen_role("reward-0", settings, load_text(settings, role="reward"), policy_base)
    assert (again.base is policy_base) == lora
    torch.testing.assert_close(scores(again), scores(role), rtol=1e-5, atol=1e-5)
    assert again.parameters == []
    assert len(policy.parameters) == 28


@pytest.mark.parametrize(
    ("names", "wanted"),
    [({}, 0), ({"pad_token": "</s>"}, None), ({"pad_token": None}, None),
     ({"pad_token": "</s>", "unk_token": "<s>"}, 1), ({"pad_token": "<|im_end|>"}, None)],
    ids=str,
)  # fmt: skip
def test_which_token_pads(names: dict[str, str | None], wanted: int | None, model_folder: Path) -> None:
    """Never one that may end a text: transformers reads the score before the trailing pads."""
    _, text = opened(model_folder)
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | names
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.tokenizer.backend_tokenizer, **{k: v for k, v in specials.items() if v is not None}
    )
    changed = Text(text.path, text.source, tokenizer, text.template, text.config, text.generation)
    assert pad_id(changed) == wanted


def test_an_answer_that_ends_in_the_end_token_is_scored_there(model_folder: Path, tmp_path: Path) -> None:
    """The end token is part of the row, also where a tokenizer pads with it."""
    base, text = opened(model_folder)
    role = reward_role(base, lora=False)
    save_reward(role, text, tmp_path / "final")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    ids = torch.tensor([[5, 9, 11, 2]])
    with torch.no_grad(), role.active():
        assert role.head is not None
        wanted = role.head(base.model.base_model(ids).last_hidden_state[0, -1])
        torch.testing.assert_close(plain(input_ids=ids).logits[0], wanted, rtol=1e-4, atol=1e-4)
