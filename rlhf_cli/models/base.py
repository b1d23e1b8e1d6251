"""Tokenizer and base weights: loaded from a hub id, a folder or a run directory, quantised, checked before use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rlhf_cli.data.template import Template, load_template
from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models import memory, mesh, share_out
from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.device import compute_dtype, pick_device
from rlhf_cli.models.gate import check_files, check_same_template, check_template, check_tensors, end_ids
from rlhf_cli.models.levers import Levers, check_dropout, levers
from rlhf_cli.models.lighten import lighten
from rlhf_cli.models.quantised import keep_4bit_layout, quantization_config
from rlhf_cli.objectives.head import Head
from rlhf_cli.recipe.hub import unreachable
from rlhf_cli.recipe.model_path import Kept, ModelPath, fingerprint, read_json, resolve_model
from rlhf_cli.recipe.settings.model import ModelSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_cli.models.roles import Role


@dataclass(frozen=True)
class Text:
    """What is known of a model before its weights are read."""

    path: ModelPath
    """Of the model named in the recipe."""
    source: str
    """Folder or hub id of the base weights."""
    tokenizer: PreTrainedTokenizerBase
    template: Template
    config: PreTrainedConfig
    generation: GenerationConfig | None
    revision: str | None = None
    """Branch, tag or commit of a hub base."""


@dataclass
class Base:
    """One set of base weights in memory, with the adapters on it. Roles are views of it (models/roles.py)."""

    model: PreTrainedModel
    source: str
    """Folder or hub id the weights came from."""
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    """Of the computation."""
    packed: bool = False
    """Whether attention by segments gives this architecture's own numbers."""
    peft: PeftModel | None = None
    """The wrapper that owns the adapters; its layers are injected into `model`."""
    active: str | None = None
    """Adapter that is switched on."""
    open_graph: Role | None = field(default=None, repr=False)
    """Role whose backward pass is still to come."""
    revision: str | None = None
    """Branch, tag or commit of a hub base."""
    light: bool = False
    """Whether layers that keep less are in place of the architecture's own (models/lighten.py)."""
    flex: bool = False
    """Whether attention by segments is one kernel (models/flex.py)."""
    compiled: bool = False
    """Whether chains of element-wise operations are compiled (objectives/fused.py)."""
    shards: bool = False
    """Whether its layers are held in parts, by several processes or in main memory (models/sharding.py)."""
    again: Callable[[bool], Base] | None = field(default=None, repr=False)
    """Reads the same weights once more, to be trained or not: parts cannot be copied."""
    collected: dict[str, Tensor] | None = field(default=None, repr=False)
    """All tensors whole, while they are written."""

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[index]

    def autocast(self) -> AbstractContextManager[Any]:
        """Computation in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (C, H) -> logits (C, V) with the architecture's scale and soft-capping."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        scale, cap = self._bends()
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _bends(self) -> tuple[float, float | None]:
        """What the architecture does to its logits: the factor, and the soft cap after it."""
        config = self.model.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return scale, getattr(config, "final_logit_softcapping", None) or None

    def head(self) -> Head | Callable[[Tensor], Tensor]:
        """The output layer for the kernel where it is a plain linear layer, else (adapted, quantised, hooked) `logits`
        as a function."""
        layer = self.model.get_output_embeddings()
        if type(layer) is not torch.nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            return self.logits
        return Head(layer.weight, layer.bias, *self._bends(), self.dtype, self.compiled)


def quiet() -> None:
    """transformers speaks through our own messages."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # a step without an update is no mistake


def _attempt(what: str, where: str, function: Callable[[], Any]) -> Any:
    """function(), its failure as a ModelError that names `where`."""
    try:
        return function()
    except Exception as error:  # whatever a library says of a file
        if memory.ran_out(error):
            raise
        lines = str(error).strip().split("\n")
        first = lines[0] if not lines[0].endswith(":") else " ".join(line.strip() for line in lines[:2])
        raise ModelError(f"{what}: {first[:300] or type(error).__name__}", where) from error


MODELS = {
    "policy": "a language model", "reward": "a reward model", "cost": "a cost model, whose scores are high for harm",
    "process": "a process reward model",
}  # fmt: skip


def load_text(settings: ModelSettings, role: Kept = "policy", *others: Kept, weights: bool = True) -> Text:
    """Tokenizer, template and configuration of the model a recipe names. weights: whether those must be there.

    Raises RecipeError or ModelError: not found, unfinished run, another role than `role` (or one of `others`), no
    end token, a run that was trained with another tokenizer or template, a DoRA adapter where layers are held in parts.
    """
    quiet()
    path = resolve_model(settings.name_or_path, weights=weights)
    source = path.base if path.kind == "adapter" and path.base else str(path.weights or path.name)
    adapter = path.weights if path.kind == "adapter" else None
    about = {} if adapter is None else read_json(adapter / "adapter_config.json")
    revision = about.get("revision") if settings.revision is None else settings.revision
    if about.get("use_dora") and mesh.wanted():
        raise RecipeError(f"layers in parts cannot go with {path.name}, a DoRA adapter, which reads whole weights",
                          "distributed.shard", f"set none, or merge it first: rlhf merge {path.name}")  # fmt: skip
    for folder in {Path(source), path.weights or Path(source)}:
        if folder.is_dir() and (weights or any(folder.glob("*.safetensors"))):
            check_files(folder)
    safe: dict[str, Any] = {"trust_remote_code": False}
    if revision:
        safe["revision"] = revision
    away = "" if Path(source).is_dir() else unreachable()
    trouble = f"not in the cache, and the hub cannot be reached ({away})" if away else "no usable config.json"
    config = _attempt(trouble, source, lambda: AutoConfig.from_pretrained(source, **safe))
    architecture = (config.architectures or ["a model without a named architecture"])[0]
    heads: dict[str, Kept] = {"ForSequenceClassification": "reward", "ForTokenClassification": "process"}
    found = path.role
    if path.kind == "full" and path.run is None:
        found = next((r for end, r in heads.items() if architecture.endswith(end)), path.role)
    if found not in (role, *others):
        hint = "name the language model it was trained from" if role == "policy" else "train one with `rlhf train-rm`"
        message = f"this is {MODELS[found]} ({architecture}); {MODELS[role]} is wanted here"
        raise ModelError(message, settings.name_or_path, hint)
    own = str(path.weights or path.name)
    tokenizer = _attempt("no usable tokenizer", own, lambda: AutoTokenizer.from_pretrained(own, **safe))
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token, so nothing would ever stop", own,
                         "set eos_token in tokenizer_config.json")  # fmt: skip
    generation = None if found != "policy" else _generation_config(source, safe)
    ends = [] if generation is None else end_ids(generation.to_dict(), source)
    template = load_template(tokenizer, settings.chat_template, ends)
    check_template(template, own)
    check_same_template(template, path, settings.chat_template is not None)
    return Text(path, source, tokenizer, template, config, generation, revision)


def _generation_config(source: str, safe: dict[str, Any]) -> GenerationConfig | None:
    there = (Path(source) / "generation_config.json").is_file()
    revision = {k: v for k, v in safe.items() if k == "revision"}
    try:
        return transformers.GenerationConfig.from_pretrained(source, **revision)
    except (OSError, ValueError, TypeError) as error:  # the file is optional
        if not there:
            return None
        raise ModelError("no usable generation_config.json", source, "correct the file, or remove it") from error


def check_length(text: Text, longest: int, key: str) -> None:
    """RecipeError when `longest` tokens do not fit the model's context."""
    context = getattr(text.config.get_text_config(), "max_position_embeddings", None)
    if context and longest > context:
        raise RecipeError(f"{longest} tokens are asked of a model with a context of {context}", key, "lower it")


def load_base(
    source: str,
    settings: ModelSettings,
    *,
    trained: bool,
    classifier: bool = False,
    of_tokens: bool = False,
    revision: str | None = None,
) -> Base:
    """The weights, on the device: in float32 when `trained` (full fine-tuning), else in the compute dtype.

    classifier: of sequences, or with `of_tokens` of tokens. Raises ModelError: missing, extra or non-finite tensors,
    pickled weights, remote code, no memory.
    """
    quiet()
    device = pick_device()
    dtype = compute_dtype(settings.dtype, device)
    quantization = quantization_config(settings.quantization, dtype)
    chosen = settings.attn_implementation
    kinds = AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
    auto = kinds[classifier * (1 + of_tokens)]
    arguments: dict[str, Any] = {
        "dtype": torch.float32 if trained else dtype,
        "attn_implementation": None if chosen in ("auto", "flex_attention") else chosen,
        "use_safetensors": True,
        "trust_remote_code": False,
        "ignore_mismatched_sizes": True,  # so that _check_tensors can name them
        "output_loading_info": True,
    }
    if revision:
        arguments["revision"] = revision
    asked, shards = levers(settings, device, source), mesh.wanted()
    if quantization is not None and not shards:
        arguments |= {"quantization_config": quantization, "device_map": {"": device}}

    def read() -> PreTrainedModel:
        return _read(auto, source, arguments, device, asked)

    model = share_out.in_parts(read, device, dtype, source, quantization) if shards else read()
    memory.give_back()  # what reading and quantising took in the loader's threads
    base = Base(model, source, _identity(source, model), device, dtype, revision=revision,
                shards=shards, **asked._asdict())  # fmt: skip
    if shards:
        base.again = lambda trained: load_base(source, settings, trained=trained, classifier=classifier,
                                               of_tokens=of_tokens, revision=revision)  # fmt: skip
    return base


def _read(auto: Any, source: str, arguments: dict[str, Any], device: torch.device, asked: Levers) -> PreTrainedModel:
    """The weights, checked and frozen; on the device unless they are to be shared out."""
    try:
        model, info = _attempt("cannot be loaded", source, lambda: auto.from_pretrained(source, **arguments))
        check_tensors(model, info, source)
        model = model if "quantization_config" in arguments or mesh.wanted() else model.to(device)
        keep_4bit_layout(model)
        if arguments["attn_implementation"] is None and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(SEGMENTS)  # no effect on architectures with attention code of their own
    except Exception as error:
        if not memory.ran_out(error):
            raise
        raise ModelError("the weights do not fit the memory", source,
                         "use quantization: nf4 or a smaller model") from error  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if asked.flex:
        check_dropout(model.config, source)
    if asked.light:
        lighten(model, compiled=asked.compiled)
    found: PreTrainedModel = model.eval()
    return found


def _identity(source: str, model: PreTrainedModel) -> str:
    folder = Path(source)
    if folder.is_dir():
        return fingerprint(folder)
    return f"hub:{source}@{getattr(model.config, '_commit_hash', None) or 'unknown'}"
