"""The checks of a fresh base: they say yes where it is right, and see planted faults."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlhf_cli.data.batch import collate
from rlhf_cli.errors import ModelError
from rlhf_cli.models import attention, checks
from rlhf_cli.models.base import Base
from rlhf_cli.models.checks import allows_packing, check_logits
from rlhf_cli.models.roles import Role
from tests.models.worlds import ARCHITECTURES, PACKED, PADDED, make_base, make_sample


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes(name: str) -> None:
    base = make_base(name, packed=False)
    check_logits(base)
    assert allows_packing(base) == (name in PACKED)
    assert base.packed is False
    assert base.open_graph is None


def test_lists_are_whole() -> None:
    assert sorted(PACKED + PADDED) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("name", ["llama", "cohere", "gemma2"])
@pytest.mark.parametrize("fault", ["scale", "bias", "shift", "nan"])
def test_check_logits_sees_a_wrong_head(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(name)
    right = Base.logits

    def wrong(self: Base, hidden: torch.Tensor) -> torch.Tensor:
        logits = right(self, hidden)
        return {"scale": logits * 1.01, "bias": logits + 0.01, "shift": logits.roll(1, -1), "nan": logits * np.nan}[
            fault
        ]

    monkeypatch.setattr(Base, "logits", wrong)
    with pytest.raises(ModelError, match="does something to its logits"):
        check_logits(base)


@pytest.mark.parametrize(
    ("name", "key"),
    [("cohere", "logit_scale"), ("granite", "logits_scaling"), ("gemma2", "final_logit_softcapping")],
)
def test_check_logits_sees_what_the_head_forgets(name: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base whose scale, divisor or soft cap is not read from the configuration."""
    base = make_base(name)

    def forgetful(self: Base, hidden: torch.Tensor) -> Any:
        return self.model.get_output_embeddings()(hidden)

    check_logits(base)
    assert getattr(base.model.config, key)
    monkeypatch.setattr(Base, "logits", forgetful)
    with pytest.raises(ModelError, match="does something to its logits"):
        check_logits(base)


def test_an_architecture_without_a_backbone_is_refused() -> None:
    base = make_base("llama")
    base.model.base_model_prefix = "nothing"  # as architectures whose backbone transformers does not tell
    with pytest.raises(ModelError, match=r"this architecture \(LlamaForCausalLM\) cannot be run here"):
        check_logits(base)
    assert not allows_packing(base)


# --- planted faults of attention ---------------------------------------------------------------------------


def places(segments: Any) -> list[slice]:
    """Where each segment lies in the row."""
    ends = list(accumulate(segments.lengths))
    return [slice(end - length, end) for end, length in zip(ends, segments.lengths, strict=True)]


def everything_sees_everything(query: Any, key: Any, value: Any, segments: Any, scale: Any) -> Any:
    """Causal over the whole row: neighbours leak."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def own_segment_only(query: Any, key: Any, value: Any, segments: Any, scale: Any) -> Any:
    """The prompt is forgotten."""
    parts = [
        F.scaled_dot_product_attention(query[:, :, s], key[:, :, s], value[:, :, s], is_causal=True, scale=scale)
        for s in places(segments)
    ]
    return torch.cat(parts, dim=2)


def prompt_without_its_last_token(query: Any, key: Any, value: Any, segments: Any, scale: Any) -> Any:
    """One token too few of the prompt."""
    parts = []
    for own, parent in zip(places(segments), segments.parent, strict=True):
        whole = slice(0, 1) if parent is None else places(segments)[parent]
        above = slice(whole.start, whole.stop - 1)
        k, v = (torch.cat([x[:, :, above], x[:, :, own]], dim=2) for x in (key, value))
        length, seen = own.stop - own.start, above.stop - above.start
        mask = torch.ones(length, seen + length, dtype=torch.bool).tril(seen)
        parts.append(F.scaled_dot_product_attention(query[:, :, own], k, v, attn_mask=mask, scale=scale))
    return torch.cat(parts, dim=2)


def not_causal(query: Any, key: Any, value: Any, segments: Any, scale: Any) -> Any:
    """Completions see their own future."""
    parts = []
    for own, parent in zip(places(segments), segments.parent, strict=True):
        above = slice(0, 0) if parent is None else places(segments)[parent]
        k, v = (torch.cat([x[:, :, above], x[:, :, own]], dim=2) for x in (key, value))
        parts.append(F.scaled_dot_product_attention(query[:, :, own], k, v, scale=scale))
    return torch.cat(parts, dim=2)


FAULTS = [everything_sees_everything, own_segment_only, prompt_without_its_last_token, not_causal]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    right = attention.segment_attention

    def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float = 0.0,
              scaling: float | None = None, segments: Any = None, **rest: Any) -> Any:  # fmt: skip
        if segments is None:
            return right(module, query, key, value, mask, dropout, scaling, None, **rest)
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        return fault(query, key, value, segments, scaling).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, wrong)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_wrong_attention_is_seen(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(name)
    assert allows_packing(base)
    plant(monkeypatch, fault)
    assert not allows_packing(base)


def test_positions_that_do_not_restart_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base, right = make_base("gpt2"), checks.collate

    def wrong(samples: Any, *, packed: bool) -> Any:
        batch = right(samples, packed=packed)
        if packed:
            batch.position[:] = torch.arange(batch.ids.shape[1])
        return batch

    monkeypatch.setattr(checks, "collate", wrong)
    assert not allows_packing(base)


def test_attention_with_extras_is_not_packed() -> None:
    """Soft-capped scores, sinks and position biases are no part of attention by segments."""
    states = torch.zeros(1, 2, 3, 4)
    segments = attention.plan(collate([make_sample(np.random.default_rng(0), 1, 2)], packed=True))
    for extra in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=extra):
            attention.segment_attention(
                SimpleNamespace(), states, states, states, None, segments=segments, **{extra: torch.ones(1)}
            )


def test_a_leak_of_a_short_filter_is_seen() -> None:
    """A convolution over the row mixes in the two tokens before a segment: too little to show in the largest gap."""
    assert not allows_packing(make_base("lfm2"))


# --- sliding windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5, 16, 60])
def test_windows_are_exact_at_every_length(window: int) -> None:
    """The probe is shorter than a real window, so this must hold by construction: compare far beyond the probe."""
    base = make_base("mistral-window-8")
    for layer in base.model.model.layers:
        layer.self_attn.config.sliding_window = window
    random = np.random.default_rng(window)
    samples = [make_sample(random, p, a, b) for p, a, b in ((60, 30, 45), (3, 70, 1), (20, 2, 20))]
    role, states = Role("check", base), []
    with role.active():
        for packed in (True, False):
            states.append(role.logp(collate(samples, packed=packed)).logp)
        base.model.config.sliding_window = None
        whole = role.logp(collate(samples, packed=True)).logp
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states[0], whole, atol=1e-3), "the window does something"
