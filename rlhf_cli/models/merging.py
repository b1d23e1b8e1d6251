"""An adapter worked into its base: a full model that needs no peft, and how far its answers moved.

Two kinds of weights can take the adapter: the base's original ones, and (where it was quantised in training) those that
the adapter was trained on, dequantised. The first are what most people serve; the second answer as the training saw it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models import adapters
from rlhf_cli.models.base import Text, load_base
from rlhf_cli.models.build import check_base, frozen_role, quantization_of
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import Dtype, ModelSettings

Weights = Literal["original", "trained"]
PROBES, PROBE_LENGTH = 4, 64
"""Made-up sequences that the answers are compared on, and their tokens at most."""


@dataclass(frozen=True)
class Merged:
    """The full model, and its distance from the adapter on the weights that it was trained on."""

    role: Role
    words: str
    """Into which weights."""
    largest: float
    """Largest difference of a logit, or of a score."""
    divergence: float | None
    """Mean KL of the merged from the adapter's next-token distribution, in nats; None for scores."""


def merge(text: Text, weights: Weights, dtype: Dtype) -> Merged:
    """The adapter of `text` worked into its base; dtype `auto`: that of the base's files.

    Raises ModelError: no adapter, a process model, no memory.
    """
    if text.path.kind != "adapter":
        raise ModelError(
            "is no adapter: its weights are whole already",
            text.path.name,
            f"use {text.path.weights or text.path.name} as it is",
        )
    if text.path.role == "process":
        raise ModelError("is a process model, which is not merged here", text.path.name, "load it with peft")
    stored = str(getattr(text.config.get_text_config(), "dtype", None)).removeprefix("torch.")
    if dtype == "auto" and stored in ("float32", "bfloat16", "float16"):
        dtype = cast("Dtype", stored)
    quantization = quantization_of(text)
    name = "policy" if text.path.role == "policy" else "reward"
    settings = ModelSettings(
        name_or_path=text.path.name, dtype=dtype, quantization=quantization, kernels="reference",
        attn_implementation="sdpa",
    )  # fmt: skip
    trained = frozen_role(name, settings, text, None)
    before = answers(trained, text)
    if quantization == "none":
        return _compared(_worked_in(trained), "the base's own weights", before, text)
    if weights == "trained":
        base = replace(trained.base, model=_dequantized(trained, text), peft=None, active=None)
        words = f"the {quantization} weights it was trained on, dequantised"
    else:
        plain = settings.model_copy(update={"quantization": "none"})
        base = load_base(text.source, plain, trained=False, revision=text.revision)
        words = f"the base's original weights (it was trained on {quantization})"
    check_base(text, base)
    config, tensors = adapters.read_adapter(str(text.path.weights))
    adapters.add_adapter(base, name, config, tensors)
    return _compared(_worked_in(Role(name, base, name, trained.head)), words, before, text)


def _dequantized(role: Role, text: Text) -> Any:
    """The base's model with plain weights; the role is of no use afterwards."""
    base = role.base
    assert base.peft is not None
    model = base.peft.unload()  # type: ignore[operator]
    try:
        model = model.dequantize(dtype=base.dtype)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(
            f"its base cannot be dequantised: {error}", text.path.name, "use --weights original"
        ) from error
    model.config.__dict__.pop("quantization_config", None)
    return model


def _worked_in(role: Role) -> Role:
    """The same role as one full model."""
    with role.active():
        assert role.base.peft is not None
        model = role.base.peft.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Role(role.name, replace(role.base, model=model.eval(), peft=None, active=None), None, role.head)


def _compared(role: Role, words: str, before: Tensor, text: Text) -> Merged:
    after = answers(role, text)
    divergence = None
    if role.head is None:
        p, q = after.log_softmax(-1), before.log_softmax(-1)
        divergence = max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)  # rounding
    return Merged(role, words, float((after - before).abs().max()), divergence)


@torch.no_grad()
def answers(role: Role, text: Text) -> Tensor:
    """What a role says of made-up sequences: logits (N, V) of a language model, scores (N, 1) of a reward model."""
    batch = _probes(text).to(role.base.device)
    with role.active():
        if role.head is not None:
            return role.score(batch)[:, None].float().cpu()
        return role.base.logits(role.hidden(batch)[batch.targets]).float().cpu()


def _probes(text: Text) -> Batch:
    """Sequences of random tokens, always the same."""
    context = getattr(text.config.get_text_config(), "max_position_embeddings", None) or PROBE_LENGTH
    length = max(2, min(PROBE_LENGTH, context // 2))
    ids = (
        torch.randint(0, len(text.tokenizer), (PROBES, length), generator=torch.Generator().manual_seed(0))
        .int()
        .numpy()
    )
    every = torch.ones(length - 1, dtype=torch.bool).numpy()
    return collate([Sample(row[:1], (Completion(row[1:], every),), {}, "probe") for row in ids], packed=False)
