"""Text that cannot fit is left out without being tokenised, and nothing else changes by that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data import widths
from rlhf_cli.data.encoder import Encoder, Request, load_encoder
from rlhf_cli.data.examples import Comparison, Demonstration, Example, Message, Steps
from rlhf_cli.data.template import load_template
from rlhf_cli.data.tokenizing import tokenize
from tests.conftest import make_tokenizer
from tests.data.conftest import plain

TOKENIZERS = ("qwen", "llama3", "llama2", "demo")
LIMIT = 16


@pytest.fixture(scope="module")
def encoders(qwen: Any, llama3: Any, llama2: Any) -> dict[str, Encoder]:
    with_bytes = json.loads(llama2.backend_tokenizer.to_str())
    return {
        name: load_encoder(tokenizer)[0]
        for name, tokenizer in zip(TOKENIZERS, (qwen, llama3, llama2, make_tokenizer()), strict=True)
    } | {"bytes": _encoder(with_bytes)}


def _encoder(state: dict[str, Any]) -> Encoder:
    """Of the tokenizer with tokens for bytes, as Llama's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    backend = Tokenizer.from_str(json.dumps(state))
    return load_encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))[0]


def test_what_is_known_of_each_tokenizer(encoders: dict[str, Encoder]) -> None:
    found = {name: encoder.widest for name, encoder in encoders.items()}
    longest = {name: max(map(len, encoder.whole.get_vocab())) for name, encoder in encoders.items()}
    assert found == longest
    assert longest["demo"] == len("<|assistant|>")


LETTERS = st.text(st.sampled_from("ab e\u0301\u1fbf \n\n\t<|ims_rtend>#\U0001f600\u4e00\ud7a3\u0345012"), max_size=200)


@given(LETTERS | st.text(max_size=60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_text_has_fewer_tokens_than_that(encoders: dict[str, Encoder], text: str, literal: bool) -> None:
    for encoder in encoders.values():
        (ids,) = encoder._run([Request(text, True, literal)])
        assert encoder.widest is not None
        assert len(text) <= encoder.widest * len(ids)


BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
BPE = {"type": "BPE", "vocab": {"abc": 0, "<u>": 1}, "unk_token": "<u>", "fuse_unk": False}
TOKEN = {"content": "<longest>", "lstrip": False, "rstrip": False}
STATES: dict[str, tuple[dict[str, Any], int | None]] = {
    "each unknown character its token": ({}, 3),
    "an added token": ({"added_tokens": [TOKEN]}, 9),
    "an added token that takes blanks": ({"added_tokens": [TOKEN | {"rstrip": True}]}, None),
    "unknown characters in one token": ({"model": BPE | {"fuse_unk": True}}, None),
    "no token for unknown characters": ({"model": BPE | {"unk_token": None}}, None),
    "all bytes": ({"model": BPE | {"fuse_unk": True, "byte_fallback": True, "vocab": BYTES}}, 6),
    "not all bytes": ({"model": BPE | {"byte_fallback": True}}, None),
    "bytes, not all written": ({"pre_tokenizer": {"type": "ByteLevel"}}, None),
    "words": ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}}, None),
    "pieces": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}}, None),
    "pieces and bytes": (
        {"model": {"type": "Unigram", "vocab": [[b, 0.0] for b in BYTES], "byte_fallback": True}}, 6,
    ),
    "characters composed": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, 12),
    "characters taken away": ({"normalizer": {"type": "StripAccents"}}, None),
    "two for one": ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "##"}}, 3),
    "one for two": ({"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": "#"}}, None),
    "one for some": ({"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "#"}}, None),
    "cut at blanks": ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated"}}, 3),
    "blanks taken away": ({"pre_tokenizer": {"type": "Split", "behavior": "Removed"}}, None),
    "something new": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "New"}]}}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_where_it_is_known(name: str) -> None:
    changes, expected = STATES[name]
    assert widths.widest({"added_tokens": [], "model": BPE, **changes}) == expected


HUGE = "once upon a time " * 300
USER = Message("user", "two")


def talk(*said: str) -> Demonstration:
    turns = (Message(("assistant", "user")[i % 2], text) for i, text in enumerate(said))
    return Demonstration((USER, *turns), None, "f:1")


EXAMPLES: dict[str, list[Example]] = {
    "texts": [Demonstration("a ", "b", "f:1"), Demonstration("a ", HUGE, "f:2"), Demonstration(HUGE, "b", "f:3")],
    "talks": [talk("four"), talk(HUGE), talk("four", HUGE, "a"), talk("a" + HUGE, f"{HUGE}<|im_end|>", "b")],
    "pairs": [Comparison((USER,), "a", "b", "f:1"), Comparison((USER,), f"a</s>{HUGE}", "b", "f:2")],
    "steps": [Steps((USER,), ("a", "b"), (1.0, None), "f:1"), Steps((USER,), ("a", HUGE), (1.0, -1.0), "f:2")],
    "refused": [talk("a"), Demonstration((Message("system", "x"), USER, Message("assistant", HUGE)), None, "f:2")],
}


@pytest.mark.parametrize("name", ["qwen", "llama3", "llama2"])
def test_the_result_is_that_of_tokenising(
    name: str, encoders: dict[str, Encoder], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, spared = load_template(request.getfixturevalue(name)), []
    endless: Callable[..., Any] = Encoder._endless

    def watched(encoder: Encoder, *asked: Any) -> Any:
        spared.append(endless(encoder, *asked) is not None)
        return endless(encoder, *asked)

    monkeypatch.setattr(Encoder, "_endless", watched)
    unaware = replace(template, encoder=replace(template.encoder, widest=None))
    for kind, examples in EXAMPLES.items():
        found = tokenize(examples, template, LIMIT, strict=False)
        assert any(spared) or (kind == "refused" and found.refused)
        spared.clear()
        known = tokenize(examples, unaware, LIMIT, strict=False)
        assert not any(spared)
        assert [plain(s) for s in found.samples] == [plain(s) for s in known.samples]
        assert (found.dropped, found.refused, found.kept.tolist()) == (
            known.dropped, known.refused, known.kept.tolist(),
        )  # fmt: skip
        for cut in ("left", "right"):
            spared.clear()
            tokenize(examples, template, LIMIT, cut, strict=False)
            assert not any(spared)
