"""What a chat template writes for some messages, as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateRuntimeError, TemplateSyntaxError

from rlhf_cli.data.examples import Message
from rlhf_cli.errors import DataError, RecipeError, did_you_mean

FIXED_DATE = datetime(2024, 7, 26)
"""What a template that asks for today's date is told, so that the same recipe gives the same tokens on every day."""
MARK = "\U000ffffd"
PRIVATE = range(0xF0000, 0xFFFFD)


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


def protect(special: re.Pattern[str], messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
    """Messages with each special token that is spelled out in a content replaced by a private character, and the table
    to undo it."""
    spelled = sorted({s for m in messages for s in special.findall(m.content)})
    if not spelled:
        return list(messages), {}
    used = {c for m in messages for c in m.content}
    free = (chr(c) for c in PRIVATE if chr(c) not in used)
    mark = dict(zip(spelled, free, strict=False))
    changed = [Message(m.role, special.sub(lambda found: mark[found[0]], m.content)) for m in messages]
    return changed, {v: k for k, v in mark.items()}


def render(tokenizer: Any, chat: str, messages: Sequence[Message], ask: bool) -> str:
    """The text of a conversation; `ask`: with the header of the assistant's next turn. Raises TemplateError, also for
    what a template computes wrongly."""
    try:
        return tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=_dated(chat),
            add_generation_prompt=ask,
            tokenize=False,
        )
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


@lru_cache
def _dated(chat: str) -> str:
    """The template with calls for today's date answered by FIXED_DATE."""
    call = r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)"""
    return re.sub(call, lambda found: repr(FIXED_DATE.strftime(found[2])), chat)


def left_out(tokenizer: Any, chat: str, roles: Sequence[str]) -> tuple[str, ...]:
    """The roles of turns of which the template writes nothing; none when it refuses such a conversation."""
    messages = [Message(role, f"turn-{i}-said") for i, role in enumerate(roles)]
    try:
        text = render(tokenizer, chat, messages, False)
    except TemplateError:
        return ()
    return tuple(dict.fromkeys(m.role for m in messages if m.content not in text))


def steady(chat: str) -> bool:
    """Whether the template never asks for today's date in a way that `render` cannot answer."""
    return "strftime_now" not in re.sub(r"strftime_now\s+is\s", "", _dated(chat))


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


def given(chat_template: str) -> str:
    """The text of a template that is named by its file, or given itself. Raises RecipeError."""
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = Path(chat_template)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    near = did_you_mean(path.name, sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
    raise RecipeError(f"no such file: {chat_template}", "model.chat_template", near or "give a file or Jinja text")


def own(tokenizer: Any) -> str | None:
    """The tokenizer's template; the one called default when it has several."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found
