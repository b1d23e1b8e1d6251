"""The public data formats: one small function each, from a row to canonical examples.

`FORMATS` says which columns a format needs and which kinds of example it gives; `detect` picks one by the columns. A
reader takes a row and its `file:line` and returns examples (mostly one), or raises `BadRow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rlhf_cli.catalog import Data
from rlhf_cli.data import rows
from rlhf_cli.data.examples import Comparison, Demonstration, Message, Prompt, Task, Verdict
from rlhf_cli.data.grouping import Dropped, Scored, one_task_a_prompt, pair_by_score
from rlhf_cli.data.rows import BadRow, Row
from rlhf_cli.errors import DataError, did_you_mean

Reader: TypeAlias = Callable[[Row, str], list[Any]]


Finish: TypeAlias = Callable[[list[Any]], tuple[list[Any], list[Dropped]]]


@dataclass(frozen=True)
class Format:
    """A way to read rows."""

    name: str
    needs: tuple[frozenset[str], ...]
    """Sets of columns; the format fits rows that have all of one set."""
    gives: Mapping[Data, Reader]
    """The kinds of example, each with its reader."""
    help: str
    finish: Mapping[Data, Finish] = field(default_factory=dict)
    """What is done with all that the reader gave, when rows belong together."""
    optional: frozenset[str] = frozenset()
    """Further columns that it reads where they are there."""

    @property
    def reads(self) -> frozenset[str]:
        """All columns that it reads."""
        return self.optional.union(*self.needs)

    def match(self, columns: set[str]) -> frozenset[str] | None:
        """The largest of its column sets that is there, None when none is."""
        return max((n for n in self.needs if n <= columns), key=len, default=None)


# --- one function a format -------------------------------------------------------------------------------


def plain_text(row: Row, where: str) -> list[Any]:
    return [Demonstration("", rows.filled(rows.text(row, "text"), "text"), where)]


def prompt_completion(row: Row, where: str) -> list[Any]:
    if row.get("prompt") == "":
        return [Demonstration("", rows.filled(rows.text(row, "completion"), "completion"), where)]
    asked, (completion,) = rows.answers(row, "completion")
    return [Demonstration(asked, completion, where)]


def alpaca_messages(row: Row) -> tuple[Message, ...]:
    """System, earlier turns (`history`, pairs of user and assistant) and the instruction with its input below it."""
    system, extra = rows.optional_text(row, "system"), rows.optional_text(row, "input")
    found = [Message("system", system)] if system else []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise BadRow("'history' is not a list of [user, assistant] pairs")
        found += [Message("user", pair[0]), Message("assistant", pair[1])]
    ask = rows.filled(rows.text(row, "instruction"), "prompt")
    return *found, Message("user", f"{ask}\n{extra}" if extra else ask)


def alpaca(row: Row, where: str) -> list[Any]:
    answer = Message("assistant", rows.filled(rows.text(row, "output"), "completion"))
    return [Demonstration((*alpaca_messages(row), answer), None, where)]


def preference(row: Row, where: str) -> list[Any]:
    asked, (chosen, rejected) = rows.answers(row, "chosen", "rejected")
    return [_comparison(row, where, asked, chosen, rejected)]


def sharegpt_preference(row: Row, where: str) -> list[Any]:
    asked = rows.chat_prompt(rows.turns(row))
    pair = [rows.only_answer((rows.sharegpt_message(row.get(c), c),), c) for c in ("chosen", "rejected")]
    chosen, rejected = (rows.filled(p, "completion") for p in pair)
    return [_comparison(row, where, asked, chosen, rejected)]


def implicit_prompt(row: Row, where: str) -> list[Any]:
    if isinstance(row.get("chosen"), str):
        return [_comparison(row, where, *_split_dialogues(rows.text(row, "chosen"), rows.text(row, "rejected")))]
    chosen, rejected = (rows.messages(row.get(c), c) for c in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if len(chosen) != shared + 1 or len(rejected) != shared + 1:
        raise BadRow("chosen and rejected differ before their last turn")
    asked = rows.chat_prompt(chosen[:shared])
    pair = [
        rows.filled(rows.only_answer(m[shared:], c), "completion")
        for m, c in ((chosen, "chosen"), (rejected, "rejected"))
    ]
    return [_comparison(row, where, asked, *pair)]


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two texts of `\\n\\nHuman: ...\\n\\nAssistant: ...` turns as the prompt they share, and their last answers."""
    mark = "\n\nAssistant:"
    cut = chosen.rfind(mark) + len(mark)
    if cut < len(mark) or rejected.rfind(mark) < 0:
        raise BadRow("no '\\n\\nAssistant:' turn in chosen or rejected")
    if rejected.rfind(mark) + len(mark) != cut or chosen[:cut] != rejected[:cut]:
        raise BadRow("chosen and rejected differ before their last turn")
    rows.filled(chosen[: cut - len(mark)], "prompt")
    return chosen[:cut], rows.filled(chosen[cut:], "completion"), rows.filled(rejected[cut:], "completion")


def _comparison(row: Row, where: str, asked: Prompt, chosen: str, rejected: str) -> Comparison:
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    high = rows.number(row, "chosen_score", "score_chosen")
    low = rows.number(row, "rejected_score", "score_rejected")
    scores = (high, low) if high is not None and low is not None else None
    return Comparison(asked, chosen, rejected, where, rows.number(row, "margin") or 0.0, scores)


def verdict(row: Row, where: str) -> list[Any]:
    wanted = rows.label(row)
    if "messages" in row and "prompt" not in row:
        said = rows.conversation(rows.messages(row["messages"], "messages"))
        return [Verdict(said[:-1], said[-1].content, wanted, where)]
    asked, (completion,) = rows.answers(row, "completion")
    return [Verdict(asked, completion, wanted, where)]


def scored(row: Row, where: str) -> list[Any]:
    asked, (completion,) = rows.answers(row, "completion")
    score = rows.number(row, "score")
    if score is None:
        raise BadRow("no 'score'")
    return [Scored(asked, completion, score, where)]


# --- from one kind to another ----------------------------------------------------------------------------


def _as_verdicts(read: Reader) -> Reader:
    def reader(row: Row, where: str) -> list[Any]:
        return [
            Verdict(c.prompt, completion, wanted, where)
            for c in read(row, where)
            for completion, wanted in ((c.chosen, True), (c.rejected, False))
        ]

    return reader


def _as_task(read: Callable[[Row], Prompt], *used: str) -> Reader:
    """Only the prompt; all columns but `used` become facts."""

    def reader(row: Row, where: str) -> list[Any]:
        return [Task(read(row), where, {k: v for k, v in row.items() if k not in used})]

    return reader


def _prompt_part(turns: tuple[Message, ...]) -> Prompt:
    return rows.chat_prompt(turns[:-1] if turns and turns[-1].role == "assistant" else turns)


def _conversation(read: Callable[[Row], tuple[Message, ...]], *used: str) -> dict[Data, Reader]:
    return {
        "demonstration": lambda row, where: [Demonstration(rows.conversation(read(row)), None, where)],
        "task": _as_task(lambda row: _prompt_part(read(row)), *used),
    }


def _pairs(read: Reader, task: Reader) -> dict[Data, Reader]:
    return {"comparison": read, "verdict": _as_verdicts(read), "task": task}


def _messages(row: Row) -> tuple[Message, ...]:
    return rows.messages(row.get("messages"), "messages")


def _either(row: Row) -> Prompt:
    return _prompt_part(_messages(row)) if "messages" in row and "prompt" not in row else rows.prompt(row)


def _needs(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(s.split()) for s in sets)


_PROMPT = _as_task(rows.prompt, "prompt")
_EITHER = _as_task(_either, "prompt", "messages")
_IMPLICIT = _as_task(lambda row: implicit_prompt(row, "")[0].prompt, "chosen", "rejected")

_ALPACA = _as_task(alpaca_messages, "instruction", "input", "system", "history")
_SCORES = frozenset({"margin", "chosen_score", "score_chosen", "rejected_score", "score_rejected"})
_TOOLS = frozenset({"system", "tools"})
_TURNS = _as_task(lambda row: rows.chat_prompt(rows.turns(row)), "conversations", "system", "tools")

FORMATS = {
    f.name: f
    for f in (
        Format("text", _needs("text"), {"demonstration": plain_text}, "plain text, all of it trained"),
        Format("prompt_completion", _needs("prompt completion"), {"demonstration": prompt_completion, "task": _PROMPT},
               "a prompt and its completion: text, or messages"),
        Format("messages", _needs("messages"), _conversation(_messages, "messages"),
               "a list of {role, content}; every assistant turn is trained"),
        Format("sharegpt", _needs("conversations"), _conversation(rows.turns, "conversations", "system", "tools"),
               "a list of {from, value}, with optional system and tools", optional=_TOOLS),
        Format("alpaca", _needs("instruction output"), {"demonstration": alpaca, "task": _ALPACA},
               "instruction, input, output, system, history", optional=frozenset({"input", "system", "history"})),
        Format("preference", _needs("prompt chosen rejected"), _pairs(preference, _PROMPT),
               "a prompt with a chosen and a rejected completion", optional=_SCORES),
        Format("sharegpt_preference", _needs("conversations chosen rejected"), _pairs(sharegpt_preference, _TURNS),
               "conversations with a chosen and a rejected {from, value}", optional=_SCORES | _TOOLS),
        Format("implicit_prompt", _needs("chosen rejected"), _pairs(implicit_prompt, _IMPLICIT),
               "two whole conversations that differ in the last answer", optional=_SCORES),
        Format("verdict", _needs("prompt completion label", "messages label"), {"verdict": verdict, "task": _EITHER},
               "one completion with a true/false label"),
        Format("scored", _needs("prompt completion score"), {"comparison": scored, "task": _PROMPT},
               "completions with scores; rows of one prompt are paired best with worst",
               {"comparison": pair_by_score, "task": one_task_a_prompt}),
        Format("prompt", _needs("prompt"), {"task": _EITHER}, "only a prompt; other columns go to the rewards"),
    )
}  # fmt: skip


def detect(columns: Iterable[str], kind: Data, where: str) -> Format:
    """The one format that gives this kind of example and has all its columns here; the one that uses more columns when
    one needs a part of what the other needs.

    Raises DataError, with the columns found, when none or several fit.
    """
    found = set(columns)
    fits = {f.name: m for f in FORMATS.values() if kind in f.gives and (m := f.match(found)) is not None}
    best = [name for name, used in fits.items() if not any(used < other for other in fits.values())]
    if len(best) == 1:
        return FORMATS[best[0]]
    listed = ", ".join(sorted(found)) or "none"
    if best:
        raise DataError(
            f"several formats fit the columns {listed}: {', '.join(best)}", where, "say which with `format:`"
        )
    wanted = "; ".join(f"{f.name} ({' or '.join(', '.join(sorted(n)) for n in f.needs)})" for f in able(kind))
    raise DataError(f"no format that gives a {kind} fits the columns found: {listed}", where,
                    f"map them with `columns: {{ours: yours}}` to one of: {wanted}")  # fmt: skip


def able(kind: Data) -> list[Format]:
    """The formats that give this kind of example."""
    return [f for f in FORMATS.values() if kind in f.gives]


def named(name: str, kind: Data, where: str) -> Format:
    """The format of that name. Raises DataError when there is none or it does not give this kind."""
    known = [f.name for f in able(kind)]
    if name in known:
        return FORMATS[name]
    if name in FORMATS:
        raise DataError(f"format {name} gives no {kind}", where, f"these do: {', '.join(known)}")
    raise DataError(f"no format is called '{name}'", where, did_you_mean(name, FORMATS) or f"known: {', '.join(known)}")
