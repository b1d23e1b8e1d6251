"""LoRA adapters by name on a shared base: made, copied, read and written. models/roles.py decides which one is on.

peft is imported when the first adapter is wanted: runs without LoRA have no use for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_cli.errors import ModelError, RecipeError, did_you_mean
from rlhf_cli.models import sharding
from rlhf_cli.models.base import Base
from rlhf_cli.models.lighten import lighten_adapters
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.recipe.settings.model import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
SCORE_LAYER = "base_model.model.score"
SCORE = f"{SCORE_LAYER}.weight"
"""Where peft keeps the scalar head of a sequence classifier."""
BASE = "trained_on.json"
"""Beside an adapter: the fingerprint of the base weights it was trained on."""
COMPILER_OFF = "TORCHDYNAMO_DISABLE"
"""The variable that makes torch.compile give functions back as they are."""


def load_peft() -> ModuleType:
    """peft. It imports bitsandbytes, which wraps functions by torch.compile as it is imported and so brings the
    compiler: more than a second for nothing, since who computes with bitsandbytes has imported it before."""
    if "peft" in sys.modules or "bitsandbytes" in sys.modules:
        import peft

        return peft
    before = os.environ.get(COMPILER_OFF)
    os.environ[COMPILER_OFF] = "1"
    try:
        import peft
    finally:
        if before is None:
            del os.environ[COMPILER_OFF]
        else:
            os.environ[COMPILER_OFF] = before
    return peft


def lora_config(settings: LoraSettings) -> LoraConfig:
    """peft's configuration of a fresh adapter."""
    config: LoraConfig = load_peft().LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
    )
    return config


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and tensors of an adapter folder. ModelError: no file, pickled, cut, not LoRA, not finite."""
    folder = Path(folder)
    if not (folder / WEIGHTS).exists():
        hint = "pickled adapters are refused" if (folder / "adapter_model.bin").exists() else ""
        raise ModelError(f"no {WEIGHTS}", str(folder), hint)
    raw = read_json(folder / "adapter_config.json")
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"an adapter of type {raw.get('peft_type')}; only LoRA is known here", str(folder))
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise ModelError(f"{WEIGHTS} cannot be read: {error}", str(folder), "the file is damaged") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tensor {name} holds NaN or infinite numbers", str(folder / WEIGHTS))
    try:
        return load_peft().LoraConfig.from_pretrained(str(folder)), tensors
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"no usable adapter_config.json: {_first_line(error)}", str(folder)) from error


def trained_on(folder: Path) -> str | None:
    """Fingerprint of the base that an adapter's own folder names; None for one that was not written here."""
    path = folder / BASE
    return read_json(path).get("fingerprint") if path.is_file() else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def add_adapter(base: Base, name: str, config: LoraConfig, tensors: dict[str, Tensor] | None = None) -> None:
    """A new adapter called `name`: fresh (policy = base), or with the given tensors. Left switched off and frozen.

    Raises ModelError when the tensors do not belong to this base, RecipeError when a fresh adapter has nowhere to go.
    """
    config.inference_mode = False
    config.modules_to_save = None
    config.task_type = None
    try:
        with sharding.as_plain(base):
            if base.peft is None:
                base.peft = load_peft().get_peft_model(base.model, config, adapter_name=name)
            else:
                base.peft.add_adapter(name, config)
    except (ValueError, TypeError, KeyError, RuntimeError, re.error) as error:
        if tensors is not None:
            message = f"the adapter does not fit the base {base.source}: {_first_line(error)}"
            raise ModelError(message, f"adapter {name}") from error
        raise RecipeError(f"no adapter can be made for {base.source}: {_first_line(error)}", "lora.target_modules",
                          "use all-linear, or names of linear layers of this model") from error  # fmt: skip
    _place(base, name)
    if tensors is None:
        _check_targets(base, config)
    else:
        _fill(base, name, {k: v for k, v in tensors.items() if not k.startswith(f"{SCORE_LAYER}.")})
    if base.light:
        with sharding.gathered(base, layers=1):  # where a layer of each kind is tried
            lighten_adapters(base.model, name)
    base.active = None


def _place(base: Base, name: str) -> None:
    """Bring an adapter to the device that computes: peft puts it where the base lies, which may be main memory."""
    own = {id(p) for _, p in adapter_parameters(base, name)}
    for module in base.model.modules():
        for key, p in module._parameters.items():
            if p is not None and id(p) in own and p.device.type != base.device.type:
                module._parameters[key] = torch.nn.Parameter(p.detach().to(base.device), p.requires_grad)


def _check_targets(base: Base, config: LoraConfig) -> None:
    """RecipeError for a name in a list of target modules that is no layer of the model: peft skips it in silence."""
    assert base.peft is not None
    if not isinstance(config.target_modules, (list, set)):
        return
    found: list[str] = base.peft.base_model.targeted_module_names  # type: ignore[assignment]
    layers = {n.rpartition(".")[2] for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name in sorted(config.target_modules):
        if not any(f".{full}".endswith(f".{name}") for full in found):
            raise RecipeError(f"{base.source} has no layer '{name}'", "lora.target_modules", did_you_mean(name, layers))


def _fill(base: Base, name: str, tensors: dict[str, Tensor]) -> None:
    assert base.peft is not None
    wanted = adapter_tensors(base, name)
    if set(wanted) != set(tensors):
        odd = sorted(set(wanted) ^ set(tensors))
        raise ModelError(f"the adapter does not fit the base {base.source}: tensor {odd[0]} on one side only", odd[0])
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise ModelError(
                f"the adapter does not fit the base {base.source}: {key} is {tuple(tensor.shape)}, "
                f"not {tuple(wanted[key].shape)}", key,
            )  # fmt: skip
    load_peft().set_peft_model_state_dict(base.peft, tensors, adapter_name=name)


def adapter_tensors(base: Base, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter under peft's file names. Views, not copies."""
    assert base.peft is not None
    tensors: dict[str, Tensor] = load_peft().get_peft_model_state_dict(
        base.peft, adapter_name=name, save_embedding_layers=False
    )
    return tensors


def adapter_parameters(base: Base, name: str) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters of an adapter, by their names in the model."""
    return [(n, p) for n, p in base.model.named_parameters() if f".{name}." in f".{n}." and "lora_" in n]


def adapter_config(base: Base, name: str) -> LoraConfig:
    """peft's configuration of an adapter."""
    assert base.peft is not None
    config = base.peft.peft_config[name]
    assert isinstance(config, load_peft().LoraConfig)
    return config


def write_adapter(base: Base, name: str, folder: Path, head: torch.nn.Linear | None = None) -> None:
    """A standard peft folder; with a head, one of a sequence classifier (one output) or a token classifier."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_tensors(base, name).items()}
    config: dict[str, Any] = adapter_config(base, name).to_dict()
    config |= {"base_model_name_or_path": base.source, "revision": base.revision, "inference_mode": True}
    if head is not None:
        tensors |= {f"{SCORE_LAYER}.{k}": v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
        task = "SEQ_CLS" if head.out_features == 1 else "TOKEN_CLS"
        config |= {"task_type": task, "modules_to_save": ["score"]}
    else:
        config |= {"task_type": "CAUSAL_LM"}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / BASE).write_text(json.dumps({"fingerprint": base.fingerprint}) + "\n")
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
