"""What a chat template writes for some messages, as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from rlhf_cli.data.examples import Message
from rlhf_cli.errors import DataError

FIXED_DATE = datetime(2024, 7, 26)
"""What a template that asks for today's date is told, so that the same recipe gives the same tokens on every day."""
MARK = "\U000ffffd"


def answers(messages: Sequence[Message]) -> list[int]:
    """Where the assistant speaks."""
    return [i for i, m in enumerate(messages) if m.role == "assistant"]


def spellings(content: str) -> list[str]:
    """How a template may write a content: as it is, or stripped."""
    return [c for c in (content, content.rstrip(), content.lstrip(), content.strip()) if c]


def continuation(whole: str, start: str, where: str) -> str:
    """What a rendered conversation holds after its beginning `start`."""
    if not whole.startswith(start):
        raise DataError(
            "the chat template renders the messages before an answer differently once the answer is there, "
            "so training would not see what generation sees", where, "give another model.chat_template"
        )  # fmt: skip
    return whole[len(start) :]


def render(tokenizer: Any, chat: str, messages: Sequence[Message], ask: bool) -> str:
    """The text of a conversation; `ask`: with the header of the assistant's next turn."""
    return tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        chat_template=_dated(chat),
        add_generation_prompt=ask,
        tokenize=False,
    )


@lru_cache
def _dated(chat: str) -> str:
    """The template with calls for today's date answered by FIXED_DATE."""
    call = r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)"""
    return re.sub(call, lambda found: repr(FIXED_DATE.strftime(found[2])), chat)


def ending(tokenizer: Any, chat: str) -> str:
    """The first added token that the template writes after an assistant's content; empty when there is none, or when
    it refuses a plain dialogue."""
    for start in ([], [Message("system", "s")]):
        messages = [*start, Message("user", "q"), Message("assistant", MARK)]
        try:
            tail = render(tokenizer, chat, messages, False).rpartition(MARK)[2]
        except TemplateSyntaxError:
            raise
        except TemplateError:
            continue
        tokens = [t.content for t in tokenizer.added_tokens_decoder.values()]
        found = [(at, -len(t), t) for t in tokens if t and (at := tail.find(t)) >= 0]
        return min(found)[2] if found else ""
    return ""
