"""Prompts, completions and conversations to token ids: one rendering for every stage and for generation.

A prompt is tokenised by itself and its completion by itself, as the text that goes on after it. So what generation is
given is, token for token, what training saw. Of a conversation the text of every assistant turn and its end token are
scored; headers, other turns and what a template writes after the end token are not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from rlhf_cli.data.encoder import Asking, Encoder, load_encoder
from rlhf_cli.data.examples import Message, Prompt
from rlhf_cli.data.rendering import answers, continuation, ending, given, own, protect, render, spellings, steady
from rlhf_cli.errors import DataError, ModelError, RecipeError

Ids: TypeAlias = Sequence[int] | np.ndarray
Scored: TypeAlias = tuple[list[int], list[bool]]
"""Ids, and which of them are scored."""

REMEMBERED = 1024
"""Rendered conversations that are remembered."""
LONG = 2**16
"""Characters of a conversation that is not."""
NO_TEMPLATE = "the tokenizer has no chat template, and the data are chat messages"
NO_TEMPLATE_HINT = (
    "give model.chat_template, or use prompt/completion text; `rlhf init` writes a template to copy, recipes/chat.jinja"
    ", which docs/data.md shows too"
)
CHANGED = "the chat template changes the text of an assistant turn"
CHANGED_HINT = "it must write the content as it is, or stripped"


@dataclass(frozen=True)
class Template:
    """A tokenizer with its chat template."""

    tokenizer: Any
    encoder: Encoder
    chat: str | None
    """The Jinja text."""
    end_text: str
    """The token that ends an assistant turn, as text; empty when the template writes none."""
    eos_id: int
    stop_ids: tuple[int, ...]
    """Where generation stops: the end tokens of tokenizer and generation config, and of the template."""
    digest: str
    """SHA-256 of template and tokenizer."""

    @cached_property
    def end_id(self) -> int | None:
        """Id of `end_text`."""
        return self.encoder.whole.token_to_id(self.end_text) if self.end_text else None

    @property
    def steady(self) -> bool:
        """Whether the same conversation is rendered alike on every day."""
        return self.chat is None or steady(self.chat)

    def prompt_ids(self, prompt: Prompt, where: str = "") -> list[int]:
        """What comes before a completion: BOS if the tokenizer adds one, then the text or the rendered messages with
        the assistant's header."""
        return self.encoder.now(self.ask_prompt(prompt, where))

    def completion_ids(self, prompt: Prompt, completion: str, where: str = "") -> Scored:
        """A completion after its prompt, end token included; all of it scored."""
        return self.encoder.now(self.ask_completion(prompt, completion, where))

    def pieces_ids(self, prompt: Prompt, pieces: Sequence[str], where: str = "") -> tuple[list[int], list[int]]:
        """A completion that comes in pieces, each tokenised by itself as the text that goes on after those before it,
        and its end token; and the number of tokens up to the end of each piece. A template that strips completions
        strips the first and the last piece."""
        return self.encoder.now(self.ask_pieces(prompt, pieces, where))

    def conversation(self, messages: Sequence[Message], where: str = "") -> Scored:
        """A whole conversation, every assistant turn and its end token scored."""
        return self.encoder.now(self.ask_conversation(messages, where))

    def ask_prompt(self, prompt: Prompt, where: str = "") -> Asking[list[int]]:
        """As `prompt_ids`, and so are the others of their namesakes: to be answered together with many."""
        if isinstance(prompt, str):
            first = self.encoder.first
            return [*first, *((yield from self.encoder.ask_literal(prompt, first)) if prompt else [])]
        protected, hidden = protect(self.encoder.pattern, prompt)
        text = self._render(protected, True, where)
        starts = {i: self._render(protected[:i], True, where) for i in answers(prompt)}
        cuts = {i: len(s) for i, s in starts.items() if text.startswith(s)}
        return (yield from self._joined(text, cuts, protected, hidden, where))[0]

    def ask_completion(self, prompt: Prompt, completion: str, where: str = "") -> Asking[Scored]:
        if isinstance(prompt, str):
            before = yield from self._before(prompt)
            ids = [*(yield from self.encoder.ask_literal(completion, before)), self.eos_id]
            return ids, [True] * len(ids)
        protected, hidden = protect(self.encoder.pattern, (*prompt, Message("assistant", completion)))
        start, whole = (self._render(protected[:-1], True, where), self._render(protected, False, where))
        turn = continuation(whole, start, where)
        before = yield from self._before(prompt, where)
        ids, scored = yield from self._turn(turn, protected[-1].content, True, hidden, before, where)
        length = sum(scored)
        return ids[:length], scored[:length]

    def ask_pieces(self, prompt: Prompt, pieces: Sequence[str], where: str = "") -> Asking[tuple[list[int], list[int]]]:
        if isinstance(prompt, str):
            ids, ends = yield from self._one_by_one(pieces, None, (yield from self._before(prompt)))
            return [*ids, self.eos_id], ends
        protected, hidden = protect(self.encoder.pattern, (*prompt, *(Message("assistant", piece) for piece in pieces)))
        asked, parts = protected[: len(prompt)], [m.content for m in protected[len(prompt) :]]
        content = "".join(parts)
        start = self._render(asked, True, where)
        text = continuation(self._render([*asked, Message("assistant", content)], False, where), start, where)
        written = next((c for c in spellings(content) if c in text), None)
        if written is None:
            raise DataError(CHANGED, where, CHANGED_HINT)
        first, stripped = text.rfind(written), content.find(written)
        cuts = [0]
        for total in accumulate(len(part) for part in parts):
            cuts.append(first + min(max(total - stripped, 0), len(written)))
        before = yield from self._before(prompt, where)
        ids, ends = yield from self._one_by_one([text[a:b] for a, b in pairwise(cuts)], hidden, before)
        tail = re.match(r"\s*" + re.escape(self.end_text), text[cuts[-1] :]) if self.end_text else None
        return [*ids, *((yield from self._encode(tail[0], hidden, ids)) if tail else [self.eos_id])], ends

    def ask_conversation(self, messages: Sequence[Message], where: str = "") -> Asking[Scored]:
        protected, hidden = protect(self.encoder.pattern, messages)
        whole = self._render(protected, False, where)
        starts = {i: self._render(protected[:i], True, where) for i in answers(messages)}
        cuts = {i: len(whole) - len(continuation(whole, start, where)) for i, start in starts.items()}
        return (yield from self._joined(whole, cuts, protected, hidden, where))

    def header_length(self, prompt: Prompt, where: str = "") -> int:
        """How many tokens at the end of `prompt_ids(prompt)` follow the content of the last message: what the template
        writes before a completion."""
        return self.encoder.now(self.ask_header(prompt, where))

    def ask_header(self, prompt: Prompt, where: str = "") -> Asking[int]:
        if isinstance(prompt, str):
            return 0
        protected, hidden = protect(self.encoder.pattern, prompt)
        text = self._render(protected, True, where)
        found = [(at, c) for c in spellings(protected[-1].content) if (at := text.rfind(c)) >= 0]
        if not found:
            return len((yield from self.ask_prompt(prompt, where)))
        at, content = found[0]
        before = yield from self._encode(text[: at + len(content)], hidden, ())
        return len((yield from self._encode(text[at + len(content) :], hidden, before)))

    def first_length(self, ids: Ids) -> int:
        """How many of a prompt's first tokens are BOS."""
        first = len(self.encoder.first)
        return first or int(len(ids) > 0 and int(ids[0]) == self.tokenizer.bos_token_id)

    def decode(self, ids: Ids, skip_special: bool = True, after: Ids = ()) -> str:
        """Ids as text. `after` are the ids before them: some tokenizers drop the first space of a text, which matters
        when the ids are a completion."""
        head = self._text(after, skip_special)
        text = self._text([*after, *ids], skip_special)
        return text.removeprefix(head) if text.startswith(head) else self._text(ids, skip_special)

    def _text(self, ids: Ids, skip_special: bool) -> str:
        numbers = [int(i) for i in ids]
        return self.tokenizer.decode(numbers, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def _render(self, messages: Sequence[Message], ask: bool, where: str) -> str:
        if self.chat is None:
            raise DataError(NO_TEMPLATE, where, NO_TEMPLATE_HINT)
        try:
            if sum(len(message.content) for message in messages) > LONG:
                return render(self.tokenizer, self.chat, messages, ask)
            return self._rendered(tuple(messages), ask)
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}", where) from None

    @cached_property
    def _rendered(self) -> Callable[[tuple[Message, ...], bool], str]:
        """`render` with a memory: the completions of a prompt ask for it again."""
        return lru_cache(maxsize=REMEMBERED)(partial(render, self.tokenizer, self.chat or ""))

    def _before(self, prompt: Prompt, where: str = "") -> Asking[list[int]]:
        """The prompt's ids where they decide how a completion begins; most tokenizers do not look at them."""
        return [] if self.encoder.rest is self.encoder.whole else (yield from self.ask_prompt(prompt, where))

    def _joined(
        self, text: str, cuts: dict[int, int], messages: Sequence[Message], hidden: dict[str, str], where: str
    ) -> Asking[Scored]:
        """A rendered conversation, cut where answers begin (`cuts`: message -> offset), with what is scored."""
        ends = [*cuts.values(), len(text)]
        ids = self._with_first((yield from self._encode(text[: ends[0]], hidden, ())))
        scored = [False] * len(ids)
        for (i, start), end in zip(cuts.items(), ends[1:], strict=True):
            last = i == len(messages) - 1
            more, mask = yield from self._turn(text[start:end], messages[i].content, last, hidden, ids, where)
            ids, scored = ids + more, scored + mask
        return ids, scored

    def _with_first(self, ids: list[int]) -> list[int]:
        first = list(self.encoder.first)
        return ids if ids[: len(first)] == first else first + ids

    def _encode(self, text: str, hidden: dict[str, str], before: Sequence[int]) -> Asking[list[int]]:
        if not hidden:
            return (yield from self.encoder.ask(text, before))
        out = list(before)
        for piece in re.split(f"([{''.join(hidden)}])", text):
            if piece in hidden:
                out += yield from self.encoder.ask_literal(hidden[piece], out)
            elif piece:
                out += yield from self.encoder.ask(piece, out)
        return out[len(before) :]

    def _one_by_one(
        self, pieces: Sequence[str], hidden: dict[str, str] | None, before: Sequence[int]
    ) -> Asking[tuple[list[int], list[int]]]:
        """The ids of consecutive pieces of text, and the number of them up to the end of each; plain text without a
        table of hidden tokens."""
        out, ends = list(before), []
        for piece in pieces:
            asking = self.encoder.ask_literal(piece, out) if hidden is None else self._encode(piece, hidden, out)
            out += yield from asking
            ends.append(len(out) - len(before))
        return out[len(before) :], ends

    def _turn(
        self, text: str, content: str, last: bool, hidden: dict[str, str], before: Sequence[int], where: str
    ) -> Asking[Scored]:
        """From the first character of an assistant turn on: scored up to its end token. A last turn without an end
        token gets EOS."""
        ids = yield from self._encode(text, hidden, before)
        written = [c for c in spellings(content) if c in text]
        if self.end_id in ids and (not written or any(self._ends(text, c) for c in written)):
            length = ids.index(self.end_id) + 1
            return ids, [i < length for i in range(len(ids))]
        if not written:
            raise DataError(CHANGED, where, CHANGED_HINT)
        stop = (text.rfind(written[0]) if last else text.find(written[0])) + len(written[0])
        ids = yield from self._encode(text[:stop], hidden, before)
        if last:
            return [*ids, self.eos_id], [True] * (len(ids) + 1)
        more = yield from self._encode(text[stop:], hidden, [*before, *ids])
        return ids + more, [True] * len(ids) + [False] * len(more)

    def _ends(self, text: str, content: str) -> bool:
        """Whether the end token follows the content. A template may write one for other turns only."""
        at = text.find(content)
        while at >= 0:
            if self._tail.match(text, at + len(content)):
                return True
            at = text.find(content, at + 1)
        return False

    @cached_property
    def _tail(self) -> re.Pattern[str]:
        """Blanks and the end token."""
        return re.compile(r"\s*" + re.escape(self.end_text))


def load_template(tokenizer: Any, chat_template: str | None = None, eos_ids: Sequence[int] = ()) -> Template:
    """The template of a tokenizer; `chat_template` (a file or the Jinja text) instead of the tokenizer's own; `eos_ids`
    are the end tokens of the generation config.

    Raises RecipeError for a missing file or broken Jinja in `chat_template`, ModelError for a tokenizer without an end
    token or with a broken template.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token (eos_token)", hint="set eos_token in tokenizer_config.json")
    chat = own(tokenizer) if chat_template is None else given(chat_template)
    end_text = ""
    if chat is not None:
        try:
            end_text = ending(tokenizer, chat)
        except TemplateSyntaxError as error:
            kind = ModelError if chat_template is None else RecipeError
            raise kind(f"the chat template is not valid Jinja: {error}", "model.chat_template") from None
    encoder, digest = load_encoder(tokenizer, [end_text] if end_text else [])
    ends = [tokenizer.eos_token_id, *eos_ids] + ([encoder.whole.token_to_id(end_text)] if end_text else [])
    return Template(
        tokenizer=tokenizer,
        encoder=encoder,
        chat=chat,
        end_text=end_text,
        eos_id=tokenizer.eos_token_id,
        stop_ids=tuple(dict.fromkeys(int(i) for i in ends)),
        digest=_digest(chat, digest),
    )


def _digest(chat: str | None, tokenizer: str) -> str:
    """Line ends do not count: Jinja reads all alike, and a saved template has LF only."""
    chat = None if chat is None else "\n".join(re.split("\r\n|\r|\n", chat))
    return hashlib.sha256(f"{tokenizer}\n{chat}".encode()).hexdigest()
