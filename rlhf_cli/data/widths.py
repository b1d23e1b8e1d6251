"""How much text a token can stand for at most, so that text which cannot fit is known without tokenising it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

COMPOSED = 4
"""Characters that NFC makes one of, at most (Unicode Standard Annex 15: U+1F82 and its like)."""
KEEPING = frozenset({"Prepend", "Lowercase", "NFC", "ByteLevel", "Metaspace", "Digits"})
"""Steps that take no character away."""

NEVER = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
"""As byte-level tokenizers write them: the bytes that no UTF-8 text holds."""


def widest(state: dict[str, Any]) -> int | None:
    """Characters that one token of a tokenizer (its tokenizer.json) can stand for; None where there is no such number,
    or it is not known: some step takes characters away, or one token stands for all that is unknown."""
    steps = [*_steps(state.get("normalizer")), *_steps(state.get("pre_tokenizer"))]
    added, kinds = state["added_tokens"], {step["type"] for step in steps}
    if not all(_keeps(step) for step in steps) or any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    vocabulary = _vocabulary(state["model"])
    if not _covers(state["model"], vocabulary, "ByteLevel" in kinds):
        return None
    longest = max(len(text) for text in (*vocabulary, *(token["content"] for token in added)))
    return longest * (COMPOSED if "NFC" in kinds else 1)


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, step by step."""
    if part is not None and part["type"] == "Sequence":
        for one in part.get("normalizers") or part.get("pretokenizers") or []:
            yield from _steps(one)
    elif part is not None:
        yield part


def _keeps(step: dict[str, Any]) -> bool:
    """Whether at least as many characters come out as went in."""
    if step["type"] == "Replace":
        return len(step["content"]) >= len(step["pattern"].get("String", step["content"] + "x"))
    return step["type"] in KEEPING or (step["type"] == "Split" and step["behavior"] != "Removed")


def _vocabulary(model: dict[str, Any]) -> set[str]:
    found = model.get("vocab") or {}
    return set(found) if isinstance(found, dict) else {text for text, _ in found}


def _covers(model: dict[str, Any], vocabulary: set[str], bytewise: bool) -> bool:
    """Whether whatever the vocabulary does not know becomes at least a token a character."""
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if model["type"] != "BPE":
        return False
    if bytewise:
        from tokenizers.pre_tokenizers import ByteLevel

        return vocabulary.issuperset(set(ByteLevel.alphabet()) - NEVER)
    return model.get("unk_token") in vocabulary and not model.get("fuse_unk")
