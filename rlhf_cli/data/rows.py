"""Reading the parts of a raw row: text, numbers, labels, messages, prompts and completions.

Whatever is wrong with a row raises `BadRow` with a short reason, which is what the data report counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from rlhf_cli.catalog.entries import LARGEST
from rlhf_cli.data.examples import Message, Prompt

Row: TypeAlias = Mapping[str, Any]

TEXTS = ("text", "completion", "response", "solution", "content", "answer")
"""Where an object may carry the text of a completion."""
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


HALF = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """A row that cannot be used; its text is the reason, in a few words."""


def kind_of(value: Any) -> str:
    """The JSON word for a value's type."""
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def text(row: Row, column: str) -> str:
    """The text in a column, as it stands."""
    if row.get(column) is None:
        raise BadRow(f"no '{column}'")
    if not isinstance(row[column], str):
        raise BadRow(f"'{column}' is {kind_of(row[column])}, not text")
    return sound(row[column], f"'{column}'")


def sound(value: str, what: str) -> str:
    """The text itself, refused when it holds half of a surrogate pair, which no tokenizer takes."""
    if not value.isascii() and (half := HALF.search(value)) is not None:
        raise BadRow(f"{what} holds half a character (U+{ord(half[0]):04X})")
    return value


def optional_text(row: Row, column: str) -> str:
    """The text in a column, or an empty string where there is none."""
    return "" if row.get(column) is None else text(row, column)


def number(row: Row, *columns: str) -> float | None:
    """The finite number in the first of these columns that is there; None when there is none."""
    for column in columns:
        value = row.get(column)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRow(f"'{column}' is {kind_of(value)}, not a number")
        return finite(value, f"'{column}'")
    return None


def finite(value: float, what: str) -> float:
    """The number as a float. Raises BadRow when it is not finite, or too large to compute with."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{what} is not a finite number")
    if abs(value) > LARGEST:
        written = f"{value:g}" if isinstance(value, float) else f"a number of {len(str(abs(int(value))))} digits"
        raise BadRow(f"{what} is {written}: too large, rescale it")
    return float(value)


def truth(row: Row, column: str) -> bool:
    """The verdict in a column: true or false, or 0 or 1."""
    value = row.get(column)
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise BadRow(f"no '{column}'" if value is None else f"'{column}' is neither true nor false")


def both(row: Row, first: str, second: str) -> tuple[bool, bool] | None:
    """The verdicts in two columns, None unless both are there."""
    if row.get(first) is None or row.get(second) is None:
        return None
    return truth(row, first), truth(row, second)


def items(row: Row, column: str) -> list[Any]:
    """The list in a column."""
    if row.get(column) is None:
        raise BadRow(f"no '{column}'")
    if not isinstance(row[column], list):
        raise BadRow(f"'{column}' is {kind_of(row[column])}, not a list")
    return row[column]


def filled(value: str, what: str) -> str:
    """The text itself, refused when it is blank."""
    if not value.strip():
        raise BadRow(f"empty {what}")
    return value


def messages(value: Any, column: str) -> tuple[Message, ...]:
    """A list of {role, content} objects as messages."""
    return tuple(_message(m, column, "role", "content", {r: r for r in ROLES}) for m in _listed(value, column))


def turns(row: Row, column: str = "conversations") -> tuple[Message, ...]:
    """A ShareGPT list of {from, value} objects as messages. The columns `system` and `tools` become a system message in
    front, tools as the JSON they are."""
    found = tuple(sharegpt_message(m, column) for m in _listed(row.get(column), column))
    parts = [optional_text(row, "system"), _tools(row.get("tools"))]
    extra = "\n\n".join(p for p in parts if p)
    if not extra:
        return found
    if found and found[0].role == "system":
        return Message("system", f"{found[0].content}\n\n{extra}"), *found[1:]
    return Message("system", extra), *found


def sharegpt_message(value: Any, column: str) -> Message:
    """One {from, value} object."""
    return _message(value, column, "from", "value", SHAREGPT_ROLES)


def _tools(value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow("'tools' is not valid JSON") from None
    if not value:
        return ""
    return "You can call these tools:\n" + json.dumps(value, ensure_ascii=False)


def _listed(value: Any, column: str) -> list[Any]:
    if value is None:
        raise BadRow(f"no '{column}'")
    if not isinstance(value, list):
        raise BadRow(f"'{column}' is {kind_of(value)}, not a list of messages")
    return value


def _message(value: Any, column: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(value, dict):
        raise BadRow(f"a message in '{column}' is {kind_of(value)}, not an object")
    role, content = value.get(role_key), value.get(content_key)
    if not isinstance(role, str) or role not in roles:
        raise BadRow(f"unknown role {role!r} in '{column}'" if role is not None else f"a message without '{role_key}'")
    if not isinstance(content, str):
        raise BadRow(f"a message whose '{content_key}' is {kind_of(content)}, not text")
    if value.get("tool_calls"):
        raise BadRow("a message with 'tool_calls', which are not read: write them into its content")
    sound(content, f"'{content_key}' of a message")
    return Message(roles[role], content)


def conversation(turns_: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of a demonstration: they end with the assistant, and no assistant turn is empty."""
    if not turns_ or turns_[-1].role != "assistant":
        raise BadRow("the last turn is not the assistant's")
    for turn in turns_:
        if turn.role == "assistant":
            filled(turn.content, "completion")
    chat_prompt(turns_[:-1])
    return turns_


def chat_prompt(turns_: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of a prompt: something is said, and it is the assistant's turn."""
    if not any(t.content.strip() for t in turns_ if t.role != "assistant"):
        raise BadRow("empty prompt")
    if turns_[-1].role == "assistant":
        raise BadRow("the prompt ends with an assistant turn")
    return turns_


def prompt(row: Row, column: str = "prompt") -> Prompt:
    """The prompt in a column: text, a message or a list of messages."""
    value = row.get(column)
    if isinstance(value, (list, dict)):
        return chat_prompt(messages([value] if isinstance(value, dict) else value, column))
    return filled(text(row, column), "prompt")


def alpaca_messages(row: Row) -> tuple[Message, ...]:
    """System, earlier turns (`history`, pairs of user and assistant) and the instruction with its input below it."""
    system, extra = optional_text(row, "system"), optional_text(row, "input")
    found = [Message("system", system)] if system else []
    turns_ = row.get("history") or []
    for pair in turns_ if isinstance(turns_, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise BadRow("'history' is not a list of [user, assistant] pairs")
        sound("".join(pair), "'history'")
        found += [Message("user", pair[0]), Message("assistant", pair[1])]
    ask = filled(text(row, "instruction"), "prompt")
    return *found, Message("user", f"{ask}\n{extra}" if extra else ask)


def answers(row: Row, *columns: str) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt of a row and the completions in these columns. A completion is text, an assistant message, or a list
    of messages that is one assistant message, with or without the prompt's messages before it. Text becomes chat (the
    prompt a user message) when a completion is given as messages."""
    asked = prompt(row)
    values = [row.get(c) for c in columns]
    if isinstance(asked, str) and any(isinstance(v, (list, dict)) for v in values):
        asked = (Message("user", asked),)
    return asked, tuple(filled(_answer(row, c, asked), "completion") for c in columns)


def _answer(row: Row, column: str, asked: Prompt) -> str:
    value = row.get(column)
    if not isinstance(value, (list, dict)):
        return text(row, column)
    return _said(value, column, asked)


def _said(value: list[Any] | dict[str, Any], column: str, asked: Prompt) -> str:
    """The text of a completion given as messages, those of the prompt before it or not."""
    said = messages([value] if isinstance(value, dict) else value, column)
    if isinstance(asked, tuple) and said[: len(asked)] == asked:
        said = said[len(asked) :]
    return only_answer(said, column)


def several_answers(row: Row) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt of a row (`prompt`, or an alpaca `instruction`) and its `completions`: texts, messages, or objects
    that carry their text under one of TEXTS."""
    asked = prompt(row) if "prompt" in row else alpaca_messages(row)
    found = items(row, "completions")
    if isinstance(asked, str) and any(_is_message(v) for v in found):
        asked = (Message("user", asked),)
    return asked, tuple(filled(_one_of_several(v, asked), "completion") for v in found)


def _is_message(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and "role" in value)


def _one_of_several(value: Any, asked: Prompt) -> str:
    if _is_message(value):
        return _said(value, "completions", asked)
    if isinstance(value, dict):
        key = next((k for k in TEXTS if value.get(k) is not None), None)
        if key is None:
            raise BadRow(f"a completion without a text (one of {', '.join(TEXTS)})")
        return text(value, key)
    if not isinstance(value, str):
        raise BadRow(f"a completion is {kind_of(value)}, not text")
    return sound(value, "a completion")


def only_answer(said: tuple[Message, ...], column: str) -> str:
    """The text of the one assistant message that a completion consists of."""
    if len(said) != 1 or said[0].role != "assistant":
        raise BadRow(f"'{column}' is not one assistant message")
    return said[0].content
