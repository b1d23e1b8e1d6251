"""From a recipe to roles: which weights, which adapter, which reference."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models import adapters, checkpointing, sharding
from rlhf_cli.models.base import Base, Text, load_base
from rlhf_cli.models.checks import allows_packing, check_logits
from rlhf_cli.models.gate import check_vocabulary
from rlhf_cli.models.quantised import numbers
from rlhf_cli.models.roles import Role, disable_dropout
from rlhf_cli.recipe.model_path import Kept
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.settings.model import ModelSettings, Quantization
from rlhf_cli.runs.display import Display

PLAIN_OPTIMIZERS = ("adamw", "adafactor", "sgd")
"""Those that do not come from bitsandbytes."""


def load_policy(recipe: Recipe, text: Text, display: Display, *, dropout: bool = False) -> Role:
    """The role that is trained: the whole base, a fresh adapter, or a copy of the adapter the recipe starts from.

    `dropout` False switches all dropout off. Raises RecipeError and ModelError.
    """
    settings, lora = recipe.model, recipe.lora
    starts_from_adapter = text.path.kind == "adapter"
    if starts_from_adapter and lora is None:
        raise RecipeError(
            f"{settings.name_or_path} is a LoRA adapter, and lora is null",
            "lora",
            "add `lora: {}` to go on training it",
        )
    if recipe.stage != "train-rm" and (text.path.run or {}).get("stage") == "train-rm":
        display.warn(
            f"model.name_or_path: {settings.name_or_path} was trained to judge (rlhf train-rm), not to write: "
            f"a policy usually starts from an sft run"
        )
    base = load_base(text.source, settings, trained=lora is None, revision=text.revision)
    check_vocabulary(base, text)
    check_logits(base)
    base.packed = recipe.training.layout != "padded" and allows_packing(base)
    if recipe.training.layout == "packed" and not base.packed:
        raise RecipeError("this architecture or attn_implementation cannot take packed rows", "training.layout",
                          "use auto")  # fmt: skip
    if not base.packed and recipe.training.layout == "auto":
        display.note("attention by segments does not fit this model: sequences are padded instead of packed")
    if base.compiled or base.flex:
        display.note("kernels are compiled when they are first needed: the first steps may take a minute longer")
    torch.manual_seed(recipe.seed)
    if recipe.training.optimizer not in PLAIN_OPTIMIZERS:
        import bitsandbytes  # noqa: F401  (before peft imports it without the compiler)
    if lora is None:
        role = Role("policy", base, trained=True)
    elif starts_from_adapter:
        check_base(text, base)
        config, tensors = adapters.read_adapter(str(text.path.weights))
        config.lora_dropout = lora.dropout
        adapters.add_adapter(base, "policy", config, tensors)
        role = Role("policy", base, "policy", trained=True)
    else:
        adapters.add_adapter(base, "policy", adapters.lora_config(lora))
        role = Role("policy", base, "policy", trained=True)
    checkpointing.enable(base.model, settings.gradient_checkpointing)
    if not dropout:
        disable_dropout(base)
    trained = sum(p.numel() for _, p in role.parameters)
    total = sum(numbers(p) for p in base.model.parameters())
    display.note(
        f"policy: {text.source} {settings.quantization if settings.quantization != 'none' else str(base.dtype)[6:]}, "
        f"{'all' if lora is None else lora.kind}: {trained:,} of {total:,} parameters trained, on {base.device}"
    )
    return role


def check_base(text: Text, base: Base) -> None:
    """ModelError when an adapter's run remembers other base weights than those that were loaded."""
    known = _trained_on(text)
    if known and known != base.fingerprint:
        raise ModelError(
            f"its adapter was trained on other base weights than {base.source} holds now", text.path.name,
            "restore the base, or train the adapter again",
        )  # fmt: skip


def _trained_on(text: Text) -> str | None:
    """Fingerprint of the base weights that an adapter was trained on, from its run or from its own file."""
    lineage = (text.path.run or {}).get("lineage", {}).get("base") or {}
    return lineage.get("fingerprint") or (adapters.trained_on(text.path.weights) if text.path.weights else None)


def load_reference(policy: Role, text: Text, *, moves: bool = False) -> tuple[Role, str]:
    """The frozen model the policy starts from, and in words which one that is.

    Under LoRA: the base with adapters off, or a frozen copy of the adapter the policy started from; always such a copy
    when the reference `moves`. Else a frozen copy of the whole model, in the compute dtype.
    """
    base = policy.base
    if policy.adapter is None:
        return Role("reference", _frozen_copy(base)), f"a frozen copy of {text.path.name}"
    if text.path.kind == "full" and not moves:
        return Role("reference", base), f"{text.source} with adapters off"
    config = copy.deepcopy(adapters.adapter_config(base, policy.adapter))
    tensors = {k: v.detach().clone() for k, v in adapters.adapter_tensors(base, policy.adapter).items()}
    adapters.add_adapter(base, "reference", config, tensors)
    words = "a copy of the policy's fresh adapter" if text.path.kind == "full" else "a frozen copy of the adapter"
    return Role("reference", base, "reference"), f"{words} in {text.path.name}"


def weights_of(role: Role) -> dict[str, torch.Tensor]:
    """The tensors that tell a role from others of its kind: of its adapter, or of the whole model. Views."""
    if role.adapter is not None:
        return adapters.adapter_tensors(role.base, role.adapter)
    return {name: parameter.detach() for name, parameter in role.base.model.named_parameters()}


def move(reference: Role, policy: Role, alpha: float) -> None:
    """reference <- (1 - alpha) reference + alpha policy, tensor by tensor."""
    new = weights_of(policy)
    with torch.no_grad():
        for name, tensor in weights_of(reference).items():
            own = sharding.held(tensor)
            own.copy_((1.0 - alpha) * own.float() + alpha * sharding.held(new[name]).float())


def _frozen_copy(base: Base) -> Base:
    if base.again is not None:
        return replace(base.again(False), packed=base.packed)
    model = copy.deepcopy(base.model)
    for parameter in model.parameters():  # and not the buffers: rotary frequencies stay in float32
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(base.dtype)
    return replace(base, model=model.eval(), open_graph=None)


def scalar_head(base: Base, weight: torch.Tensor | None = None, bias: float | None = None) -> nn.Linear:
    """hidden -> one number, float32: zero, or with the given weight (1, H); with a bias when one is given."""
    size = base.model.config.get_text_config().hidden_size
    head = nn.Linear(size, 1, bias=bias is not None, device=base.device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.zero_() if weight is None else head.weight.copy_(weight)
        if bias is not None:
            head.bias.fill_(bias)
    return head


def with_values(policy: Role, outputs: int) -> Role:
    """The policy with a zero head for so many values on its own hidden states."""
    size = policy.base.model.config.get_text_config().hidden_size
    head = nn.Linear(size, outputs, device=policy.base.device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return Role(policy.name, policy.base, policy.adapter, trained=True, value_head=head)


def with_head(policy: Role, name: str, outputs: int = 1) -> Role:
    """The policy's weights under a zero head: a reward model before training. Several outputs are classes of tokens,
    and then the head has a bias, as token classifiers have."""
    if outputs == 1:
        return Role(name, policy.base, policy.adapter, scalar_head(policy.base), trained=True)
    size = policy.base.model.config.get_text_config().hidden_size
    head = nn.Linear(size, outputs, device=policy.base.device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return Role(name, policy.base, policy.adapter, head, trained=True)


def frozen_role(name: str, settings: ModelSettings, text: Text, shared: Base | None) -> Role:
    """A finished model as a frozen role: on `shared` when that holds its base weights, else on a base of its own.

    Reward models get their head of one output, process reward models theirs of several, with its bias.
    """
    kind = kind_of(text)
    if text.path.kind == "full":
        if shared is not None and kind == "policy" and shared.peft is not None and text.source == shared.source:
            return Role(name, shared)
        base = load_base(text.source, settings, trained=False, classifier=kind != "policy",
                         of_tokens=kind == "process", revision=text.revision)  # fmt: skip
        check_vocabulary(base, text)
        base.packed = allows_packing(base)
        disable_dropout(base)
        if kind == "policy":
            return Role(name, base)
        return Role(name, base, None, _head(base, text, *_score_layer(base, text, several=kind == "process")))
    config, tensors = adapters.read_adapter(str(text.path.weights))
    fits = shared is not None and _same_base(text, shared)
    base = (
        shared
        if shared is not None and fits
        else load_base(text.source, settings, trained=False, revision=text.revision)
    )
    if base is not shared:
        base.packed = allows_packing(base)
    check_base(text, base)
    check_vocabulary(base, text)
    adapters.add_adapter(base, name, config, tensors)
    disable_dropout(base)
    if kind == "policy":
        return Role(name, base, name)
    if adapters.SCORE not in tensors:
        raise ModelError(f"the reward adapter has no tensor {adapters.SCORE}", str(text.path.weights))
    bias = tensors.get(f"{adapters.SCORE_LAYER}.bias") if kind == "process" else None
    return Role(name, base, name, _head(base, text, tensors[adapters.SCORE], bias))


def load_frozen(settings: ModelSettings, text: Text) -> Role:
    """A language model that is not trained. Raises RecipeError and ModelError."""
    role = frozen_role("policy", settings, text, None)
    check_logits(role.base)
    return role


def quantization_of(text: Text) -> Quantization:
    """How the base was quantised when the adapter was trained, as its run says; none when nobody says."""
    recipe = (text.path.run or {}).get("recipe") or {}
    return cast("Quantization", (recipe.get("model") or {}).get("quantization", "none"))


def kind_of(text: Text) -> Kept:
    """policy, reward, cost or process: what a finished model is, by its architecture or its adapter."""
    architecture = (text.config.architectures or [""])[0]
    ends: dict[str, Kept] = {"ForSequenceClassification": "reward", "ForTokenClassification": "process"}
    return next((kind for end, kind in ends.items() if architecture.endswith(end)), text.path.role)


def _head(base: Base, text: Text, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A head of given weights (C, H) and, when there is one, bias (C,), float32. ModelError for other shapes."""
    several, width = kind_of(text) == "process", base.model.config.get_text_config().hidden_size
    rows = len(weight) if weight.ndim == 2 else 0
    whole = weight.shape == (rows, width) and (rows in (2, 3) if several else rows == 1)
    if not whole or (bias is not None and bias.shape != (rows,)):
        raise ModelError(
            f"its head {adapters.SCORE} is {tuple(weight.shape)}, not {('2 or 3' if several else 1, width)}",
            text.path.name, "train it again, or take another reward model",
        )  # fmt: skip
    head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device=base.device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return head


def _same_base(text: Text, shared: Base) -> bool:
    """Whether an adapter's base is the one in memory (a trained base is not: its weights move)."""
    if shared.peft is None:
        return False
    known = _trained_on(text)
    return known == shared.fingerprint if known else text.source == shared.source


def _score_layer(base: Base, text: Text, *, several: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a classifier's head; a reward model's has one output and its bias is not read."""
    score = getattr(base.model, "score", None)
    if not isinstance(score, nn.Linear) or (score.weight.shape[0] == 1) == several:
        wanted = "several outputs" if several else "one output"
        hint = "a process reward model has two or three labels" if several else "a reward model has num_labels 1"
        raise ModelError(f"no `score` layer with {wanted}", text.path.name, hint)
    return score.weight.detach().float(), score.bias.detach().float() if several and score.bias is not None else None


def lineage(policy: Role, text: Text, **more: Any) -> dict[str, Any]:
    """What run.json remembers of the model."""
    parent = text.path.run or {}
    return {
        "base": {"name": policy.base.source, "fingerprint": policy.base.fingerprint},
        "adapter": None if policy.adapter is None else adapters.adapter_config(policy.base, policy.adapter).r,
        "template": text.template.digest,
        "parents": [{"name": text.path.name, "digest": parent.get("digest")}] if parent else [],
        **more,
    }
