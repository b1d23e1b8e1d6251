"""Loading a model: what is wrong with it is said in one line, before anything is trained on it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rlhf_cli.errors import RecipeError
from rlhf_cli.models import base as module
from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.base import Base, Text, check_length, load_base, load_text
from rlhf_cli.models.device import compute_dtype, micro_batch_range, pick_device
from rlhf_cli.models.gate import check_vocabulary
from rlhf_cli.recipe.settings.model import ModelSettings
from tests.models.worlds import CPU, refused, write_model, write_tokenizer


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder to be spoilt."""
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


def settings_for(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(name_or_path=str(folder), **changes)


def load(folder: Path, **changes: Any) -> Base:
    return load_base(str(folder), settings_for(folder, **changes), trained=False)


def edit_tensors(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(spoil(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


KEY = "model.layers.1.mlp.up_proj.weight"


def test_a_good_folder(copy: Path) -> None:
    base = load(copy)
    assert base.model.config._attn_implementation == SEGMENTS
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert base.fingerprint.startswith("sha256:")
    assert base.vocabulary == base.model.config.vocab_size
    assert load(copy).fingerprint == base.fingerprint


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_another_attention(copy: Path, chosen: str) -> None:
    assert load(copy, attn_implementation=chosen).model.config._attn_implementation == chosen


@pytest.mark.parametrize(("name", "wanted"), [("gemma2", "eager"), ("gpt-oss", "eager"), ("falcon", "sdpa")])
def test_attention_that_segments_cannot_stand_for(tmp_path: Path, name: str, wanted: str) -> None:
    """Soft-capped scores, sinks, attention code of its own: what transformers itself would use."""
    assert load(write_model(tmp_path / name, name)).model.config._attn_implementation == wanted


def test_the_fingerprint_sees_a_changed_weight(copy: Path) -> None:
    before = load(copy).fingerprint
    edit_tensors(copy, lambda t: t | {KEY: t[KEY] + 1e-3})
    assert load(copy).fingerprint != before


def test_missing_tensors(copy: Path) -> None:
    edit_tensors(copy, lambda t: {k: v for k, v in t.items() if k != KEY})
    refused(lambda: load(copy), "missing", KEY, str(copy))


def test_many_missing_tensors(copy: Path) -> None:
    edit_tensors(copy, lambda t: {k: v for k, v in t.items() if "mlp" not in k})
    refused(lambda: load(copy), "missing", "and 3 more")


def test_extra_tensors(copy: Path) -> None:
    edit_tensors(copy, lambda t: t | {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)})
    refused(lambda: load(copy), "extra", "model.layers.7.mlp.up_proj.weight")


def test_tensors_of_the_wrong_shape(copy: Path) -> None:
    edit_tensors(copy, lambda t: t | {KEY: torch.ones(3, 3)})
    refused(lambda: load(copy), "of the wrong shape", KEY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [KEY, "lm_head.weight", "model.norm.weight"])
def test_tensors_that_are_not_finite(copy: Path, value: float, key: str) -> None:
    edit_tensors(copy, lambda t: t | {key: t[key].index_fill(0, torch.tensor([1]), value)})
    refused(lambda: load(copy), key, "NaN or infinite", str(copy))


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_a_cut_file(copy: Path, keep: int) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:keep])
    refused(lambda: load(copy), "cannot be loaded", str(copy))


def test_weights_only_as_pickle(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    refused(lambda: load_text(settings_for(copy)), "pickle", "pytorch_model.bin", "convert them to safetensors")
    refused(lambda: load(copy), str(copy))


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(lambda: load_text(settings_for(copy)), "safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_a_wrong_configuration(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    refused(lambda: load_text(settings_for(copy)), str(copy))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_wrong_tokenizer(copy: Path, text: str) -> None:
    (copy / "tokenizer.json").write_text(text)
    refused(lambda: load_text(settings_for(copy)))


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    refused(lambda: load_text(settings_for(copy)), str(copy))


def test_no_end_token(copy: Path) -> None:
    write_tokenizer(copy, eos_token=None)
    refused(lambda: load_text(settings_for(copy)), "no end token", "set eos_token")


def test_a_tokenizer_larger_than_the_embedding(copy: Path) -> None:
    tokenizer = load_text(settings_for(copy)).tokenizer
    tokenizer.add_tokens(["<more>", "<and-more>"])
    tokenizer.save_pretrained(copy)
    text = load_text(settings_for(copy))
    rows = load(copy).vocabulary
    words = f"the tokenizer has {rows + 2} tokens, the embedding {rows} rows"
    refused(lambda: check_vocabulary(load(copy), text), words)


def test_a_padded_embedding_is_fine(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "padded", vocab_size=512)
    check_vocabulary(load(folder), load_text(settings_for(folder)))


def test_remote_code_is_refused_without_a_question(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither run nor asked about: not with a terminal on standard input either."""
    marker = copy / "was-run"
    (copy / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    code = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_json(copy / "config.json", model_type="evil", architectures=["EvilForCausalLM"], auto_map=code)

    def ask(*_: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    refused(lambda: load_text(settings_for(copy)), str(copy))
    refused(lambda: load(copy), str(copy))
    assert not marker.exists()


def test_remote_code_of_a_known_architecture_is_not_run(copy: Path) -> None:
    """With a model type that transformers has, its own code is used and the file is left alone."""
    marker = copy / "was-run"
    (copy / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    code = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit_json(copy / "config.json", auto_map=code)
    load_text(settings_for(copy))
    assert type(load(copy).model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def write_classifier(folder: Path, labels: int = 1) -> Path:
    tokenizer = write_tokenizer(folder)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=labels, pad_token_id=0, eos_token_id=2)  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def test_a_reward_model_as_policy(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "rm")
    refused(lambda: load_text(settings_for(folder)), "this is a reward model", "LlamaForSequenceClassification",
            "a language model is wanted here", "name the language model it was trained from")  # fmt: skip
    assert load_text(settings_for(folder), role="reward").generation is None


def test_a_language_model_as_reward(copy: Path) -> None:
    refused(lambda: load_text(settings_for(copy), role="reward"), "this is a language model", "LlamaForCausalLM",
            "a reward model is wanted here", "rlhf train-rm")  # fmt: skip


def test_a_classifier_loads_as_one(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "rm")
    base = load_base(str(folder), settings_for(folder), trained=False, classifier=True)
    assert base.model.score.weight.shape == (1, 16)
    refused(lambda: load(folder), "missing", "lm_head.weight")


@pytest.mark.parametrize(("name", "word"), [("no/such/folder", "no such folder"), ("runs/absent", "no such folder")])
def test_no_such_model(name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_text(ModelSettings(name_or_path=name)), word, name)


def test_a_hub_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "someone/no-such-model-at-all"
    refused(lambda: load_text(ModelSettings(name_or_path=name)), name)


def test_a_context_that_is_too_short(copy: Path) -> None:
    text = load_text(settings_for(copy))
    check_length(text, 512, "data.max_length")
    refused(lambda: check_length(text, 513, "data.max_length"), "data.max_length", "513 tokens", "context of 512",
            kind=RecipeError)  # fmt: skip
    endless = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
    check_length(endless, 10**9, "data.max_length")


def test_end_tokens_of_the_generation_settings_stop(copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    text: Text = load_text(settings_for(copy))
    assert {2, 7} <= set(text.template.stop_ids)


def test_the_weights_do_not_fit(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", full)
    refused(lambda: load(copy), "do not fit the memory", "nf4")


def test_devices_and_dtypes() -> None:
    if not torch.cuda.is_available():
        assert pick_device() == CPU
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert micro_batch_range(CPU).usual == 1024


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert compute_dtype("auto", torch.device("cuda")) == torch.float32
    refused(lambda: compute_dtype("bfloat16", torch.device("cuda")), "bfloat16", "model.dtype")


@pytest.mark.parametrize(("dtype", "wanted"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_trained_weights_are_float32(copy: Path, dtype: str, wanted: torch.dtype) -> None:
    settings = settings_for(copy, dtype=dtype)
    trained, frozen = (load_base(str(copy), settings, trained=t) for t in (True, False))
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert {p.dtype for p in frozen.model.parameters()} == {wanted}
    assert trained.dtype == frozen.dtype == wanted
