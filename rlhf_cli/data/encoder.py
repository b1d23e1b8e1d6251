"""Text to token ids, piece by piece, so that the pieces of a text join to what the whole text would give.

Some tokenizers put a space before every text they are given. That is right at the start of a text and wrong in its
middle, where a completion goes on after its prompt; `Encoder` keeps a second copy of the tokenizer without that space.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, TypeVar

from rlhf_cli.data.widths import widest
from rlhf_cli.errors import DataError, ModelError

T = TypeVar("T")
AT_ONCE = 2**20
"""Characters that the tokenizer is given in one call."""


class Request(NamedTuple):
    """A text whose ids are wanted."""

    text: str
    rest: bool
    """Whether it goes on after other text."""
    literal: bool
    """Whether special tokens spelled out in it are taken as text."""


Asking: TypeAlias = Generator[Request, list[int], T]
"""A computation that asks for ids as it goes, so that many of them can be answered together."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer's own copy, free of state that others may change."""

    whole: Any
    """`tokenizers.Tokenizer` for the start of a text."""
    rest: Any
    """The same without a space put in front."""
    each_section: bool
    """Whether the space also comes after every added token, not only at the start."""
    added: frozenset[int]
    """Ids of all added tokens."""
    control: dict[str, int]
    """Spelling and id of the tokens that text must never turn into: the special ones."""
    first: tuple[int, ...]
    """What the tokenizer puts before a text: mostly one BOS, or nothing."""
    widest: int | None = None
    """Characters that a token can stand for, at most; None: not known."""

    def inside(self, text: str) -> list[int]:
        """Ids of a piece of text that comes after other text. Spelled-out added tokens are recognised."""
        return self._run([Request(text, True, False)])[0]

    def literal(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """Ids of a piece of text that comes after the tokens `before`; special tokens spelled out in it are text."""
        return self.now(self.ask_literal(text, before))

    def now(self, asking: Asking[T]) -> T:
        """What comes out, each question answered when it is asked."""
        answer = None
        try:
            while True:
                (answer,) = self._run([asking.send(answer)])  # type: ignore[arg-type]
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    def together(self, askings: Sequence[Asking[T]], most: int | None = None) -> list[T | DataError]:
        """What comes out of each, or what it raises. Their questions are answered together, none of them twice. A text
        that must have more than `most` tokens may be answered with any ids, more than `most` too."""
        out: dict[int, T | DataError] = {}
        known: dict[Request, list[int]] = {}
        asked: dict[int, Request | None] = dict.fromkeys(range(len(askings)))
        while asked:
            for i in list(asked):
                try:
                    while (request := asked[i]) is None or request in known:
                        asked[i] = askings[i].send(known[request] if request else None)  # type: ignore[arg-type]
                except StopIteration as done:
                    out[i] = done.value
                except DataError as error:
                    out[i] = error
                if i in out:
                    asked.pop(i)
            new = list(dict.fromkeys(request for request in asked.values() if request is not None))
            known |= zip(new, self._run(new, most), strict=True)
        return [out[i] for i in range(len(askings))]

    def ask(self, text: str, before: Sequence[int], literal: bool = False) -> Asking[list[int]]:
        """Ids of a piece of text that comes after the tokens `before`; added tokens spelled out in it are recognised,
        special ones unless it is literal."""
        whole = yield Request(text, False, literal)
        if self.rest is self.whole or len(before) == 0 or tuple(before) == self.first:
            return whole
        rest = yield Request(text, True, literal)
        if before[-1] in self.added:
            return whole if self.each_section else rest
        return rest[: self._first_added(rest)] + whole[self._first_added(whole) :]

    def ask_literal(self, text: str, before: Sequence[int] = ()) -> Asking[list[int]]:
        """As `literal`."""
        ids = yield from self.ask(text, before, literal=True)
        if not self.forbidden(ids):
            return ids
        # The vocabulary holds the spelling as an ordinary word: break it after its first character.
        out: list[int] = []
        for piece in re.split(f"({self.pattern.pattern})", text):
            for part in (piece[:1], piece[1:]) if piece in self.control else (piece,):
                out += (yield from self.ask(part, [*before, *out], literal=True)) if part else []
        return out

    def forbidden(self, ids: Sequence[int]) -> bool:
        """Whether a control token is among the ids."""
        return not self._controls.isdisjoint(ids)

    @cached_property
    def _controls(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression for the spellings of the control tokens, longest first."""
        return re.compile("|".join(re.escape(s) for s in sorted(self.control, key=len, reverse=True)) or r"(?!)")

    def _first_added(self, ids: list[int]) -> int:
        return next((i for i, token in enumerate(ids) if token in self.added), len(ids))

    def _endless(self, request: Request, most: int | None) -> list[int] | None:
        """Stands for the ids of a text that must have more than `most`, which would take a hundred times its memory.
        Tokens that are looked for are among them."""
        if most is None or self.widest is None or len(request.text) <= most * self.widest:
            return None
        spelled = [] if request.literal else [token for word, token in self.control.items() if word in request.text]
        return [*self.whole.encode("a", add_special_tokens=False).ids[-1:] * (most + 1), *spelled]

    def _run(self, requests: Sequence[Request], most: int | None = None) -> list[list[int]]:
        """The answers, in the threads that the tokenizer may use."""
        out = {i: ids for i, r in enumerate(requests) if (ids := self._endless(r, most)) is not None}
        for rest, literal in dict.fromkeys((request.rest, request.literal) for request in requests):
            backend = self.rest if rest else self.whole
            backend.encode_special_tokens = literal
            alike = ((i, r) for i, r in enumerate(requests) if i not in out and (r.rest, r.literal) == (rest, literal))
            for piece in _pieces(alike):
                found = backend.encode_batch_fast([request.text for _, request in piece], add_special_tokens=False)
                out |= {number: encoding.ids for (number, _), encoding in zip(piece, found, strict=True)}
        return [out[i] for i in range(len(requests))]


def _pieces(requests: Iterable[tuple[int, Request]]) -> Iterator[list[tuple[int, Request]]]:
    """Numbered requests of one kind, at most AT_ONCE characters together unless one alone is longer."""
    piece: list[tuple[int, Request]] = []
    size = 0
    for number, request in requests:
        if piece and size + len(request.text) > AT_ONCE:
            yield piece
            piece, size = [], 0
        piece.append((number, request))
        size += len(request.text)
    if piece:
        yield piece


def load_encoder(tokenizer: Any, end_texts: Sequence[str] = ()) -> tuple[Encoder, str]:
    """The encoder of a Hugging Face tokenizer, and a digest of everything that decides its ids. Added tokens in
    `end_texts` count as special even where the tokenizer does not mark them so.

    Raises ModelError for a tokenizer that is not backed by the `tokenizers` library.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json (it is not a fast tokenizer)",
                         hint="convert it once with transformers and save it")  # fmt: skip
    state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    digest = hashlib.sha256(json.dumps([state, tokenizer.special_tokens_map], sort_keys=True, default=str).encode())
    named = {v for v in tokenizer.special_tokens_map.values() if isinstance(v, str)} | set(end_texts)
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in named
    whole = Tokenizer.from_str(json.dumps(state))
    schemes: set[str] = set()
    bare = state | {k: _without_prefix(state.get(k), schemes) for k in ("normalizer", "pre_tokenizer")}
    rest = Tokenizer.from_str(json.dumps(bare)) if schemes else whole
    control = {t["content"]: t["id"] for t in state["added_tokens"] if t["special"] and t["content"]}
    if tokenizer.unk_token not in (tokenizer.bos_token, tokenizer.eos_token):
        control.pop(tokenizer.unk_token, None)
    return Encoder(
        whole=whole,
        rest=rest,
        each_section=schemes != {"first"},
        added=frozenset(t["id"] for t in state["added_tokens"]),
        control=control,
        first=_put_first(whole),
        widest=widest(state),
    ), digest.hexdigest()


def _put_first(backend: Any) -> tuple[int, ...]:
    """The ids that come before a text when special tokens are asked for."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:at])


def _without_prefix(part: Any, schemes: set[str]) -> Any:
    """A normalizer or pre-tokenizer without the step that puts a space first; `schemes` learns which were found."""
    if part is None:
        return None
    part = dict(part)
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            part[key] = [p for p in (_without_prefix(q, schemes) for q in part[key]) if p is not None]
    if part["type"] == "Prepend":
        schemes.add("always")
        return None
    if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
        schemes.add(part.get("prepend_scheme", "always"))
        part |= {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        schemes.add("always")
        part |= {"add_prefix_space": False}
    return part
