"""Finished models on disk: standard folders that plain transformers and peft open."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from rlhf_cli.errors import ModelError
from rlhf_cli.models import adapters, sharding
from rlhf_cli.models.base import Text
from rlhf_cli.models.quantised import keep_4bit_layout
from rlhf_cli.models.roles import Role


def save_policy(role: Role, text: Text, folder: Path) -> None:
    """A causal language model: peft adapter or full weights, tokenizer, chat template, generation settings."""
    if role.adapter is not None:
        adapters.write_adapter(role.base, role.adapter, folder)
    else:
        _write_full(role, folder)
    _write_text(text, folder)
    if text.generation is not None:
        generation = copy.deepcopy(text.generation)
        generation.eos_token_id = list(text.template.stop_ids)
        (folder / "generation_config.json").write_text(generation.to_json_string())


def _write_full(role: Role, folder: Path) -> None:
    """Full weights, in the compute dtype."""
    model, dtype = role.base.model, role.base.dtype
    state = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in sharding.state(role.base).items()}
    model.save_pretrained(folder, state_dict=state)
    with _config_dtype(model.config, dtype):  # save_pretrained names the dtype of the weights in memory
        model.config.save_pretrained(folder)


@contextmanager
def _config_dtype(config: Any, dtype: torch.dtype) -> Iterator[None]:
    """config.dtype is `dtype` inside."""
    before = getattr(config, "dtype", None)
    config.dtype = dtype
    try:
        yield
    finally:
        config.dtype = before


def _write_text(text: Text, folder: Path) -> None:
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.chat_template = text.template.chat
    tokenizer.save_pretrained(folder)


def save_reward(role: Role, text: Text, folder: Path, labels: Sequence[str] = ()) -> None:
    """A sequence classifier with one label, or with `labels` a token classifier; its head included."""
    assert role.head is not None
    if role.adapter is not None:
        adapters.write_adapter(role.base, role.adapter, folder, role.head)
        _write_text(text, folder)
        return
    config = classifier_config(role, text, labels)
    with torch.device("meta"):
        shell = _classifier(labels).from_config(config)
    prefix = shell.base_model_prefix
    dtype = role.base.dtype
    state: dict[str, Tensor] = {
        f"{prefix}.{k}": v.detach().to(dtype) if v.is_floating_point() else v for k, v in _body(role).items()
    }
    state |= {f"score.{k}": v.detach().to(dtype) for k, v in role.head.state_dict().items()}
    missing = sorted(set(shell.state_dict()) ^ set(state))
    if missing:
        raise ModelError(f"this architecture keeps its classifier elsewhere: {missing[0]}", str(folder))
    shell.save_pretrained(folder, state_dict=state)
    _write_text(text, folder)


def _body(role: Role) -> dict[str, Tensor]:
    """The tensors of a model without its heads."""
    model = role.base.model
    if role.base.collected is None:
        return dict(model.base_model.state_dict())
    prefix = f"{model.base_model_prefix}."
    return {k.removeprefix(prefix): v for k, v in role.base.collected.items() if k.startswith(prefix)}


def _classifier(labels: Sequence[str]) -> Any:
    return AutoModelForTokenClassification if labels else AutoModelForSequenceClassification


def check_classifier(text: Text, labels: Sequence[str] = ()) -> None:
    """ModelError when transformers has no classifier of this kind for the architecture, or keeps its head where peft
    would not find it: known before training, not after it."""
    config = copy.deepcopy(text.config)
    config.num_labels = len(labels) or 1
    kind = "token" if labels else "sequence"
    hint = "use objective two_token, which needs no classifier" if labels else "start from another architecture"
    try:
        with torch.device("meta"):
            shell = _classifier(labels).from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no {kind} classifier for {config.model_type}", text.path.name, hint
        ) from error
    if not isinstance(getattr(shell, "score", None), torch.nn.Linear):
        raise ModelError(f"the {kind} classifier of {config.model_type} has no `score` layer", text.path.name, hint)


def classifier_config(role: Role, text: Text, labels: Sequence[str] = ()) -> Any:
    """The configuration of the same architecture as a classifier with one label, or with these."""
    config = copy.deepcopy(role.base.model.config)
    config.num_labels = len(labels) or 1
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    config.pad_token_id = pad_id(text)
    config.dtype = role.base.dtype
    return config


def pad_id(text: Text) -> int | None:
    """A token that pads and never ends a text: transformers' classifiers read the score before the trailing pads."""
    tokenizer = text.tokenizer
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if candidate is not None and candidate not in text.template.stop_ids:
            return int(candidate)
    return None


def open_reward(
    folder: Path, text: Text, role: Role, device: torch.device | None = None, labels: Sequence[str] = ()
) -> torch.nn.Module:
    """The saved reward model, opened as any user of transformers and peft would, its base quantised as in training.

    An adapter's base brings its own padding token; where that ends texts, it has to be told another one.
    """
    dtype, device, kind = role.base.dtype, device or role.base.device, _classifier(labels)
    if role.adapter is None:
        model = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        return model.to(device).eval()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    more: dict[str, Any] = {"use_safetensors": True}
    if role.base.revision is not None:
        more["revision"] = role.base.revision
    quantized: dict[str, Any] = {}
    if (settings := getattr(role.base.model.config, "quantization_config", None)) is not None:
        settings = copy.deepcopy(settings)
        settings.llm_int8_skip_modules = ["score"]
        quantized = {"quantization_config": settings, "device_map": {"": device}}
    about = {"num_labels": len(labels) or 1, "pad_token_id": pad_id(text), "dtype": dtype}
    model = kind.from_pretrained(base, **about, **more, **quantized)
    keep_4bit_layout(model)
    opened: torch.nn.Module = adapters.load_peft().PeftModel.from_pretrained(model, str(folder)).eval()
    return opened if quantized else opened.to(device)
