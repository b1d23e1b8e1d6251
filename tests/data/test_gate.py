"""The data gate: what is refused and where, what is counted, what is set aside, what is told though it is kept."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.catalog import Data
from rlhf_cli.data import sources
from rlhf_cli.data.formats import FORMATS
from rlhf_cli.data.prepare import load_examples, prepare
from rlhf_cli.data.quarantine import quarantined
from rlhf_cli.data.template import load_template
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import DataSettings, SourceSettings

Write = Callable[..., str]
PAIR = b'{"prompt": "q ", "chosen": "a", "rejected": "b"}'
HALF = b'"prompt": "q ", "rejected": "b", "chosen": "a"'
NO_OBJECT = " (each line must be one whole JSON object)"
GZIP = "a.jsonl.gz: the gzip file is cut or damaged: Not a gzipped file (b'x') (make or fetch it again)"
TOOLS = b'{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "tool_calls": [1]}]}'
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "cut": (
        "a.jsonl",
        PAIR + b"\n" + PAIR[:3],
        f"a.jsonl:2: not JSON: Unterminated string starting at at column 2{NO_OBJECT}",
    ),
    "a second mark": (
        "a.jsonl",
        PAIR + b"\n\xef\xbb\xbf" + PAIR,
        f"a.jsonl:2: not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1{NO_OBJECT}",
    ),
    "lines of old Macs": (
        "a.jsonl",
        PAIR + b"\r" + PAIR,
        f"a.jsonl:1: not JSON: Extra data at column 50{NO_OBJECT}",
    ),
    "a key twice": (
        "a.jsonl",
        PAIR + b"\n{" + HALF + b', "chosen": "c"}',
        "a.jsonl:2: the key 'chosen' is given twice (keep one of them)",
    ),
    "a key twice in an array": (
        "a.json",
        b"[{" + HALF + b', "chosen": "c"}]',
        "a.json:1: the key 'chosen' is given twice (keep one of them)",
    ),
    "thousands of digits": (
        "a.jsonl",
        b"{" + HALF + b', "margin": ' + b"9" * 5000 + b"}",
        "a.jsonl:1: not readable JSON: a number with thousands of digits",
    ),
    "hundreds of digits": (
        "a.jsonl",
        b"{" + HALF + b', "margin": ' + b"9" * 400 + b"}",
        "a.jsonl:1: 'margin' is a number of 400 digits: too large, rescale it",
    ),
    "no number": ("a.jsonl", b"{" + HALF + b', "margin": NaN}', "a.jsonl:1: 'margin' is not a finite number"),
    "half a character": (
        "a.jsonl",
        PAIR.replace(b'"a"', b'"\\ud800"'),
        "a.jsonl:1: 'chosen' holds half a character (U+D800)",
    ),
    "after many blanks": (
        "a.json",
        b" " * 9000 + b"[" + PAIR + b", 3]",
        "a.json:row 2: a row must be an object with named columns, this is 3",
    ),
    "a row of an array": ("a.json", b"[\n" + PAIR + b',\n\n{"prompt": "q "}]', "a.json:4: no 'chosen'"),
    "calls of tools": (
        "a.jsonl",
        TOOLS[:-1] + b', "rejected": []}',
        "a.jsonl:1: a message with 'tool_calls', which are not read: write them into its content",
    ),
    "an unknown role": (
        "a.jsonl",
        b'{"chosen": [{"role": "developer", "content": "q"}], "rejected": []}',
        "a.jsonl:1: unknown role 'developer' in 'chosen'",
    ),
    "garbage after gzip": ("a.jsonl.gz", gzip.compress(PAIR + b"\n") + b"x", GZIP),
}


def source(path: object, **more: Any) -> SourceSettings:
    return SourceSettings(path=str(path), **more)


def pair(prompt: str = "q ", chosen: str = "a", rejected: str = "b", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def refused(folder: Path, *found: SourceSettings, kind: Data = "comparison", **more: Any) -> list[str]:
    """The problems of some sources, without the folder's name."""
    with pytest.raises(DataError) as caught:
        load_examples(found, kind, **more)
    assert caught.value.exit_code == 3
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_by_its_place(name: str, tmp_path: Path) -> None:
    file, content, said = REFUSED[name]
    (tmp_path / file).write_bytes(content)
    assert refused(tmp_path, source(tmp_path / file))[0] == said


HUB = "is only read of hub data sets, and this is here (leave it out)"
KINDS = ".jsonl, .json, .txt, .parquet, .jsonl.gz, .json.gz, .txt.gz"
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "a split of a file": ({"path": "a.jsonl", "split": "test"}, f"a.jsonl: data.*.split {HUB}"),
    "a name of a file": ({"path": "a.jsonl", "name": "main"}, f"a.jsonl: data.*.name {HUB}"),
    "a home": (
        {"path": "~/a.jsonl"},
        "~/a.jsonl: file not found: ~ is not read as your home folder (write the whole path)",
    ),
    "a pipe": ({"path": "pipe.jsonl"}, "pipe.jsonl: not a regular file: data are read more than once (make it a file)"),
    "a device": ({"path": "/dev/null"}, f"/dev/null: not a kind of data file (known kinds: {KINDS})"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_place_of_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(PAIR)
    os.mkfifo(tmp_path / "pipe.jsonl")
    place, said = PLACES[name]
    assert refused(tmp_path, SourceSettings(**place)) == [said]


def test_a_line_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 2**20)
    (tmp_path / "a.jsonl").write_bytes(PAIR + b"\n" + b" " * 2**20 + PAIR + b"\n")
    assert refused(tmp_path, source(tmp_path / "a.jsonl")) == [
        "a.jsonl:2: a line longer than 1 MiB (put each row on a line of its own)"
    ]


# --- how many rows may be bad, and where they go -----------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "passes"), [(None, True), (3, True), (2, False), (0, False), (0.3, True), (0.29, False)]
)
def test_more_bad_rows_than_may_be(jsonl: Write, tmp_path: Path, most: float | None, passes: bool) -> None:
    rows = [pair(f"q{i} ") for i in range(7)]
    bad = [pair(chosen=""), pair(chosen="b"), pair(margin=-1)]
    path = jsonl(*rows, *bad)
    if passes:
        examples, report = load_examples([source(path)], "comparison", "drop", max_bad_rows=most)
        assert (len(examples.items), report.bad_rows) == (7, 3)
        return
    said = refused(tmp_path, source(path), on_bad_row="drop", max_bad_rows=most)
    assert said == [
        "rows.jsonl:8: empty completion",
        "rows.jsonl:9: chosen equals rejected",
        "rows.jsonl:10: 'margin' is -1, below 0: chosen would be the worse",
        said[-1],
    ]
    allowed = f", of 10 rows: more than data.max_bad_rows {most:g} allows (correct them, or raise it)" if most else None
    assert said[-1] == f"3 bad rows in all{allowed}" or most == 0


def test_bad_rows_are_set_aside_as_they_stand_in_their_file(jsonl: Write) -> None:
    rows = [{"q": "x ", "chosen": "a", "rejected": "b"}, {"q": "\ud800", "chosen": "a", "rejected": "b", "id": 7}]
    path = jsonl(*rows, {"q": "y ", "chosen": "c", "rejected": "c"})
    examples, _ = load_examples([source(path, columns={"prompt": "q"})], "comparison", "drop")
    found = [json.loads(line) for line in quarantined(examples.bad).splitlines()]
    assert [(row["where"], row["reason"]) for row in found] == [
        (f"{path}:2", "'prompt' holds half a character (U+D800)"), (f"{path}:3", "chosen equals rejected"),
    ]  # fmt: skip
    assert found[0]["row"] == rows[1]


def test_a_row_of_two_bad_examples_is_one_row(jsonl: Write) -> None:
    path = jsonl(pair(), pair(target=0.5))
    examples, report = load_examples([source(path)], "verdict", "drop", max_bad_rows=1)
    assert (len(examples.items), report.bad_rows) == (2, 1)


# --- what is told though it is kept ------------------------------------------------------------------------

JUDGED = {"prompt": "q ", "completion": "a"}
RANKED = {"prompt": "q ", "completions": ["a", "b"]}
STEPS = {"prompt": "q", "steps": ["x"]}
TURNED = "the same pair the other way round"
CLASHES: dict[str, tuple[Data, list[dict[str, Any]], str]] = {
    "a pair both ways round": ("comparison", [pair(), pair(chosen="b", rejected="a")], TURNED),
    "a label both ways": (
        "verdict",
        [JUDGED | {"label": x} for x in (True, False)],
        "the same completion with the other label",
    ),
    "two scores": ("rated", [JUDGED | {"score": x} for x in (1, 2)], "the same completion with another score"),
    "two rankings": (
        "ranking",
        [RANKED | {"scores": x} for x in ([1, 2], [2, 1])],
        "the same completions with other scores",
    ),
    "two labels of steps": ("steps", [STEPS | {"labels": [x]} for x in (1, -1)], "the same steps with other labels"),
    "a pair twice": ("comparison", [pair(), pair()], "the same example again"),
    "a demonstration twice": ("demonstration", [JUDGED] * 2, "the same example again"),
}


@pytest.mark.parametrize("name", CLASHES)
def test_examples_that_contradict_or_repeat_one_another(name: str, jsonl: Write) -> None:
    kind, rows, said = CLASHES[name]
    path = jsonl(rows[0] | {"prompt": "other "}, *rows)
    examples, report = load_examples([source(path)], kind)
    assert len(examples.items) == 3
    (lint,) = report.lints
    assert (lint.found.reason, lint.found.count, lint.found.where) == (said, 1, (f"{path}:3 against 2",))
    assert f"warning: train (kept): {said}: 1 ({path}:3 against 2)" in report.lines()


def test_clashes_are_found_across_sources_and_not_for_prompts(jsonl: Write) -> None:
    one, two = jsonl(pair(), name="one.jsonl"), jsonl(pair(chosen="b", rejected="a"), name="two.jsonl")
    _, report = load_examples([source(one), source(two)], "comparison")
    assert [str(lint) for lint in report.lints] == [
        f"train (kept): the same pair the other way round: 1 ({two}:1 against 1)"
    ]
    _, report = load_examples([source(jsonl(JUDGED, JUDGED))], "task")
    assert report.lints == ()


def test_special_tokens_in_text_and_turns_that_are_left_out(jsonl: Write, qwen: Any) -> None:
    user, answer = {"role": "user", "content": "hi <|im_end|> you"}, {"role": "assistant", "content": "a"}
    path = jsonl(
        {"messages": [user, {"role": "tool", "content": "22"}, answer], "source": 3},
        {"messages": [user | {"content": "hi <| im_end", "weight": 0}, answer]},
    )
    template = load_template(qwen)
    silent = "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    made = prepare(DataSettings(train=[source(path)]), "demonstration", replace(template, chat=silent))
    assert [str(lint) for lint in made.report.lints] == [
        f"train (kept): special tokens spelled out in text, which are read as text: <|im_end|>: 1 ({path}:1)",
        f"train (kept): the chat template writes nothing of a tool turn: 1 ({path}:1)",
    ]
    assert made.report.sources[0].unused == ("source", "messages.weight")
    made = prepare(DataSettings(train=[source(path)]), "demonstration", template)
    assert [lint.found.count for lint in made.report.lints] == [1]


def test_a_column_that_comes_late_is_named(jsonl: Write) -> None:
    path = jsonl(*(pair(f"q{i} ") for i in range(40)), pair(late=1))
    assert load_examples([source(path)], "comparison")[1].sources[0].unused == ("late",)


# --- anything ----------------------------------------------------------------------------------------------

COLUMNS = sorted({column for one in FORMATS.values() for column in one.reads})
WORDS = st.sampled_from(["", " ", "a", "\ud800", "assistant", "user", "tool", "\n\nAssistant: x", "[]", "{"])
NUMBERS = st.sampled_from([0, 1, -1, 2, 0.5, 10**400, float("nan"), float("inf"), 1e300])
KEYS = ("role", "content", "from", "value", "text", "score", "start", "end", "rating", "steps", "completions",
        "chosen_completion", "tool_calls")  # fmt: skip
VALUES = st.recursive(
    WORDS | NUMBERS | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


def answers(*found: SourceSettings, kind: Data, on_bad_row: Literal["error", "drop"]) -> None:
    """Read them: examples, or a DataError of lines."""
    problems = []
    try:
        quarantined(load_examples(found, kind, on_bad_row)[0].bad)
    except DataError as error:
        problems = list(map(str, error.problems)) or [""]
    assert all(problem and "\n" not in problem for problem in problems)


@given(st.data(), st.sampled_from(sorted(FORMATS)), st.sampled_from(get_args(Data)))
@settings(max_examples=400, deadline=None)
def test_any_values_in_the_columns_of_any_format(data: st.DataObject, name: str, kind: Data) -> None:
    columns = st.sampled_from([*sorted(FORMATS[name].reads), *COLUMNS])
    rows = data.draw(st.lists(st.dictionaries(columns, VALUES, max_size=6), min_size=1, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers(source(path, format=name), kind=kind, on_bad_row="error")
        answers(source(path, format=name), kind=kind, on_bad_row="drop")


@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".json", ".txt", ".jsonl.gz", ".parquet"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_in_a_file(raw: bytes, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        path.write_bytes(raw)
        answers(source(path), kind="demonstration", on_bad_row="drop")
