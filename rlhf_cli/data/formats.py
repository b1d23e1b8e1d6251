"""The public data formats: one small function each, from a row to canonical examples.

`FORMATS` says which columns a format needs and which kinds of example it gives; `detect` picks one by the columns. A
reader takes a row and its `file:line` and returns examples (mostly one), or raises `BadRow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rlhf_cli.catalog import OBJECTIVES, Data
from rlhf_cli.data import formats_ranked, formats_steps, rows
from rlhf_cli.data.examples import Comparison, Demonstration, Message, Prompt, Rated, Verdict
from rlhf_cli.data.grouping import one_task_a_prompt, pair_by_score, rank_by_score
from rlhf_cli.data.reading import Finished, Format, Reader, as_task, columns
from rlhf_cli.data.rows import BadRow, Row
from rlhf_cli.errors import DataError, did_you_mean

# --- one function a format -------------------------------------------------------------------------------


def plain_text(row: Row, where: str) -> list[Any]:
    return [Demonstration("", rows.filled(rows.text(row, "text"), "text"), where)]


def prompt_completion(row: Row, where: str) -> list[Any]:
    if row.get("prompt") == "":
        return [Demonstration("", rows.filled(rows.text(row, "completion"), "completion"), where)]
    asked, (completion,) = rows.answers(row, "completion")
    return [Demonstration(asked, completion, where)]


def alpaca(row: Row, where: str) -> list[Any]:
    answer = Message("assistant", rows.filled(rows.text(row, "output"), "completion"))
    return [Demonstration((*rows.alpaca_messages(row), answer), None, where)]


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
    return Comparison(
        asked, chosen, rejected, where,
        margin=_margin(row),
        scores=(high, low) if high is not None and low is not None else None,
        target=_target(row),
        safety=rows.both(row, "chosen_safe", "rejected_safe"),
    )  # fmt: skip


def _margin(row: Row) -> float:
    margin = rows.number(row, "margin") or 0.0
    if margin < 0:
        raise BadRow(f"'margin' is {margin:g}, below 0: chosen would be the worse")
    return margin


def _target(row: Row) -> float:
    target = rows.number(row, "target")
    if target is None:
        return 1.0
    if not 0 <= target <= 1:
        raise BadRow("'target' is not between 0 and 1")
    if target < 0.5:
        raise BadRow("'target' is below 0.5: chosen would be the worse one")
    return target


def verdict(row: Row, where: str) -> list[Any]:
    wanted = rows.truth(row, "label")
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
    return [Rated(asked, completion, score, where)]


# --- from one kind to another ----------------------------------------------------------------------------


def _as_verdicts(read: Reader) -> Reader:
    def reader(row: Row, where: str) -> list[Any]:
        (pair,) = read(row, where)
        if pair.target == 0.5:
            raise BadRow("'target' is 0.5: neither completion is the better one")
        return [Verdict(pair.prompt, pair.chosen, True, where), Verdict(pair.prompt, pair.rejected, False, where)]

    return reader


def _prompt_part(turns: tuple[Message, ...]) -> Prompt:
    return rows.chat_prompt(turns[:-1] if turns and turns[-1].role == "assistant" else turns)


def _conversation(read: Callable[[Row], tuple[Message, ...]], *used: str) -> dict[Data, Reader]:
    return {
        "demonstration": lambda row, where: [Demonstration(rows.conversation(read(row)), None, where)],
        "task": as_task(lambda row: _prompt_part(read(row)), *used),
    }


def _pairs(read: Reader, task: Reader) -> dict[Data, Reader]:
    return {"comparison": read, "verdict": _as_verdicts(read), "task": task}


def _messages(row: Row) -> tuple[Message, ...]:
    return rows.messages(row.get("messages"), "messages")


def _either(row: Row) -> Prompt:
    return _prompt_part(_messages(row)) if "messages" in row and "prompt" not in row else rows.prompt(row)


_PROMPT = as_task(rows.prompt, "prompt")
_EITHER = as_task(_either, "prompt", "messages")
_IMPLICIT = as_task(lambda row: implicit_prompt(row, "")[0].prompt, "chosen", "rejected")

_ALPACA = as_task(rows.alpaca_messages, "instruction", "input", "system", "history")
(_EXTRA,) = columns("margin chosen_score score_chosen rejected_score score_rejected target chosen_safe rejected_safe")
_TOOLS = frozenset({"system", "tools"})
_TURNS = as_task(lambda row: rows.chat_prompt(rows.turns(row)), "conversations", "system", "tools")

FORMATS = {
    f.name: f
    for f in (
        Format("text", columns("text"), {"demonstration": plain_text}, "plain text, all of it trained"),
        Format("prompt_completion", columns("prompt completion"), {"demonstration": prompt_completion, "task": _PROMPT},
               "a prompt and its completion: text, or messages"),
        Format("messages", columns("messages"), _conversation(_messages, "messages"),
               "a list of {role, content}; every assistant turn is trained"),
        Format("sharegpt", columns("conversations"), _conversation(rows.turns, "conversations", "system", "tools"),
               "a list of {from, value}, with optional system and tools", optional=_TOOLS),
        Format("alpaca", columns("instruction output"), {"demonstration": alpaca, "task": _ALPACA},
               "instruction, input, output, system, history", optional=frozenset({"input", "system", "history"})),
        Format("preference", columns("prompt chosen rejected"), _pairs(preference, _PROMPT),
               "a prompt with a chosen and a rejected completion", optional=_EXTRA),
        Format("sharegpt_preference", columns("conversations chosen rejected"), _pairs(sharegpt_preference, _TURNS),
               "conversations with a chosen and a rejected {from, value}", optional=_EXTRA | _TOOLS),
        Format("implicit_prompt", columns("chosen rejected"), _pairs(implicit_prompt, _IMPLICIT),
               "two whole conversations that differ in the last answer", optional=_EXTRA),
        Format("verdict", columns("prompt completion label", "messages label"), {"verdict": verdict, "task": _EITHER},
               "one completion with a true/false label"),
        Format("scored", columns("prompt completion score"),
               {"comparison": scored, "ranking": scored, "rated": scored, "task": _PROMPT},
               "completions with scores; rows of one prompt make a ranking, or pairs of best with worst",
               {"comparison": lambda found, _: Finished(*pair_by_score(found)),
                "ranking": lambda found, _: Finished(*rank_by_score(found)),
                "task": lambda found, _: Finished(*one_task_a_prompt(found))}),
        *formats_ranked.FORMATS,
        *formats_steps.FORMATS,
        Format("prompt", columns("prompt"), {"task": _EITHER}, "only a prompt; other columns go to the rewards"),
    )
}  # fmt: skip


def detect(names: Iterable[str], kind: Data, where: str) -> Format:
    """The one format that gives this kind of example and has all its columns here; the one that uses more columns when
    one needs a part of what the other needs.

    Raises DataError, with the columns found, when none or several fit.
    """
    found = set(names)
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
                    elsewhere(found) or f"map them with `columns: {{ours: yours}}` to one of: {wanted}")  # fmt: skip


def elsewhere(found: set[str]) -> str:
    """Which objectives read rows with these columns as they are, in words; empty when none does."""
    fitting = [f for f in FORMATS.values() if f.match(found) is not None]
    readers = [o for o in OBJECTIVES.values() if any(o.data in f.gives for f in fitting)]
    if not readers:
        return ""
    named = ", ".join(o.name for o in readers[:4]) + (" and others" if len(readers) > 4 else "")
    stages = " or ".join(dict.fromkeys(f"rlhf {o.stage}" for o in readers))
    names = ", ".join(f.name for f in fitting)
    return f"they are those of format {names}, for {stages} with objective {named}; or map them with `columns:`"


def as_pairs(names: Iterable[str], chosen: Format, kind: Data) -> str:
    """What to do with rows that were read in a format of completions and hold pairs; empty for other rows."""
    found = set(names)
    used = chosen.match(found) or frozenset()
    pairs = [f for f in FORMATS.values() if "comparison" in f.gives and kind not in f.gives]
    wider = [f for f in pairs if (m := f.match(found)) is not None and used < m]
    if not wider:
        return ""
    return (
        f"their columns are those of pairs, format {wider[0].name}: give them to rlhf dpo or rlhf train-rm, or map "
        "other columns with `columns:`"
    )


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
