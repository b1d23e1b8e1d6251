"""Tokenising many examples at once, and finding them again, is tokenising one after the other."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data import column, tokenizing
from rlhf_cli.data.encoder import Asking, Encoder, Request
from rlhf_cli.data.examples import (
    Comparison,
    Demonstration,
    Example,
    Message,
    Ranking,
    Rated,
    Steps,
    Task,
    Verdict,
    digest,
)
from rlhf_cli.data.prepare import Prepared, prepare
from rlhf_cli.data.quarantine import quarantined
from rlhf_cli.data.samples import Places
from rlhf_cli.data.shelf import LAYOUT
from rlhf_cli.data.template import Template, load_template
from rlhf_cli.data.tokenizing import tokenize
from rlhf_cli.data.tokens import Truncation, Unfit, ask_sample, check_different, cut, length, score_all
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import SFTDataSettings
from rlhf_cli.runs.cache import Store, key_of
from tests.data.conftest import CHATML, plain

USER = (Message("user", "Hello there, how are you?"),)
TALK = (*USER, Message("assistant", "I am fine."), Message("user", "Two plus <|im_end|> two </s>?"))
EVERY: list[Example] = [
    *(Demonstration((*p, Message("assistant", "four")), None, "f:1") for p in (USER, TALK)),
    Demonstration("", "Once upon a time there was <|im_end|> Lily.", "f:2"),
    Demonstration("Once upon ", "a time </s> there", "f:3"),
    *(Comparison(p, " two ", "four, thank you", f"f:{i}", 1.5) for i, p in enumerate((USER, TALK, "a ", USER))),
    Comparison(USER, "two", "two", "f:5 with 7", scores=(2.0, 1.0), safety=(True, False)),
    Verdict(TALK, "fine </s>", True, "f:6"),
    Verdict("Hello ", "<|im_start|>", False, "f:07"),
    Ranking(USER, ("two", "four", "two plus two"), (1.0, 0.5, -2.0), "g:1"),
    Rated("What is ", "two", 0.25, "g"),
    Steps(TALK, (" two is two.\n", "So ", "four."), (1.0, None, -1.0), "f:8"),
    Steps("What ", ("is ", "two"), (0.5, 0.0), "f:9"),
    Task(TALK, "f:10", {"answer": 4}),
    Task("Hello ", "f:11"),
]
"""Each kind, as chat and as text, special tokens spelled out in it."""


def one_by_one(examples: list[Example], template: Template, limit: int, how: Truncation, whole: bool) -> Any:
    """What `tokenize` is, each text given to the tokenizer when it is asked for."""
    samples, dropped = [], []
    for index, example in enumerate(examples):
        try:
            made = sample = asked_alone(template.encoder, ask_sample(example, template))
            if length(made) > limit:
                sample = cut(made, example, template, limit, how)
            check_different(sample, length(made) <= limit)
        except Unfit as reason:
            dropped.append((index, str(reason)))
            continue
        samples.append(plain(score_all(sample) if whole else sample))
    return samples, dropped


def asked_alone(encoder: Encoder, asking: Asking[Any]) -> Any:
    answer: Any = None
    try:
        while True:
            request = asking.send(answer)
            backend = encoder.rest if request.rest else encoder.whole
            backend.encode_special_tokens = request.literal
            answer = backend.encode(request.text, add_special_tokens=False).ids
    except StopIteration as done:
        return done.value


@pytest.mark.parametrize("tokenizer", ["qwen", "llama3", "llama2"])
@pytest.mark.parametrize("how", ["drop", "left", "right"])
def test_many_at_once_are_the_same_as_one_by_one(
    tokenizer: str, how: Truncation, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "TOGETHER", 4)
    template = load_template(request.getfixturevalue(tokenizer))
    for kind in dict.fromkeys(type(item) for item in EVERY):
        some = [item for item in EVERY if type(item) is kind]
        many = [replace(item, where=f"{item.where}{i}") for i in range(3) for item in some]
        for limit, whole in ((24, False), (40, False), (1000, kind is Demonstration)):
            made = tokenize(many, template, limit, how, whole)
            samples, dropped = one_by_one(many, template, limit, how, whole)
            assert [plain(s) for s in made.samples] == samples
            assert made.dropped == dropped
            assert made.kept.tolist() == sorted(set(range(len(many))) - {i for i, _ in dropped})
            assert [plain(s) for s in made.samples[-3:]] == samples[-3:]


def test_the_first_row_that_is_refused_is_named(llama2: Any) -> None:
    """Though a later one is refused at an earlier question."""
    bad = Verdict((Message("system", "x"), *USER), "y", True, "f:9")
    template = load_template(llama2)
    with pytest.raises(DataError, match=r"^f:3: the chat template"):
        tokenize([*EVERY[9:11], replace(bad, where="f:3"), bad], template, 1000)


def test_no_text_is_given_to_the_tokenizer_twice(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template, seen = load_template(qwen), []
    run = Encoder._run

    def watched(self: Encoder, requests: Sequence[Request], most: int | None) -> list[list[int]]:
        seen.append(requests)
        return run(self, requests, most)

    monkeypatch.setattr(Encoder, "_run", watched)
    tokenize([Ranking(USER, (str(i), "two"), (0.0, 1.0), "f") for i in range(9)], template, 1000)
    texts = [request for requests in seen for request in requests]
    assert len(texts) == len(set(texts)) == 1 + 9 + 1


def test_places() -> None:
    found = ["a/b.jsonl:1", "a/b.jsonl:12", "x:0", "x:007", "x:3 with 4, 5", "x", "", "9", "y:" + "8" * 40, "x:1\n"]
    assert list(Places(found)) == found
    assert Places(found)[1:3] == found[1:3]


def test_the_digest_is_that_of_the_representation() -> None:
    """Data reports of earlier versions hold it."""
    import hashlib

    total = hashlib.sha256()
    for item in (*EVERY, Task("\ud800 \\ud800", "w", {"a": [1.5, None]}), Demonstration((), None, "w")):
        total.update(repr(replace(item, where="")).encode("utf-8", "backslashreplace"))
    assert digest([*EVERY, Task("\ud800 \\ud800", "v", {"a": [1.5, None]}), Demonstration((), None, "")]) == (
        total.hexdigest()
    )


class Kept:
    """A shelf in a folder, as the stages have it."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.store, self.hits = Store(folder, self.said.append), 0

    def path(self, about: Mapping[str, Any]) -> str:
        return key_of("data", about=about)

    def find(self, about: Mapping[str, Any]) -> Any:
        entry = self.store.read("samples", self.path(about), LAYOUT, quietly=True)
        self.hits += entry is not None
        return entry and (entry.arrays, entry.notes)

    def keep(self, about: Mapping[str, Any], arrays: Any, notes: Any) -> None:
        self.store.write("samples", self.path(about), arrays, notes)

    def used(self, about: Mapping[str, Any]) -> None:
        self.store.touch("samples", self.path(about))


def everything(made: Prepared) -> Any:
    return (
        [plain(s) for s in made.train], [plain(s) for s in made.eval or []], made.source.tolist(), made.weights,
        made.tasks_train, json.dumps(made.report.to_json()), made.report.lines(),
    )  # fmt: skip


KINDS: list[tuple[Any, dict[str, Any]]] = [
    ("demonstration", {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "%s"}]}),
    ("comparison", {"prompt": "Hello ", "chosen": "%s", "rejected": "two"}),
    ("verdict", {"prompt": "Hello ", "completion": "%s", "label": True}),
    ("ranking", {"prompt": "Hello ", "completions": ["%s", "two", "a"], "scores": [1, 2.5, -3]}),
    ("rated", {"prompt": "Hello ", "completion": "%s", "score": 0.5}),
    ("steps", {"prompt": "Hello ", "steps": ["%s", "two"], "labels": [1, -1]}),
    ("task", {"prompt": "Hello %s", "answer": 4}),
]


def rows_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(row).replace("%s", f"four {i} {'you ' * 30 * (i % 4 == 3)}")) for i in range(12)]


@pytest.mark.parametrize(("kind", "row"), KINDS)
def test_what_is_found_is_what_is_made(
    kind: Any, row: dict[str, Any], jsonl: Callable[..., str], tmp_path: Path, qwen: Any
) -> None:
    rows = rows_of(row)
    for number, one in enumerate(rows if kind == "comparison" else []):
        one |= {"margin": number} | ({"chosen_score": 2, "rejected_score": 1} if number % 2 else {})
    train, held_out = jsonl(*rows), jsonl(*rows[:2], name="eval.jsonl")
    data = SFTDataSettings.model_validate(
        {"train": {"path": train, "weight": 2.0}, "eval": held_out, "max_length": 24, "truncation": "drop"}
    )
    template, shelf = load_template(qwen), Kept(tmp_path / "cache")
    bare = everything(prepare(data, kind, template))
    first = prepare(data, kind, template, shelf=shelf)
    assert everything(first) == bare
    assert not (tmp_path / "cache").exists(), "nothing is written before the run is accepted"
    for keep in first.shelved:
        keep()
    assert shelf.hits == 0
    again = prepare(data, kind, template, shelf=shelf)
    assert everything(again) == bare
    assert shelf.hits == 2
    assert "dropped, longer than max_length" in again.report.lines()[0]
    moved = jsonl(*rows, name="moved.jsonl")
    elsewhere = prepare(data.model_copy(update={"train": [data.train[0].model_copy(update={"path": moved})]}),
                        kind, template, shelf=shelf)  # fmt: skip
    assert shelf.hits == 4
    assert elsewhere.train[3].where.startswith(moved)
    assert shelf.said == []


def test_whatever_decides_the_tokens_is_in_the_name(
    jsonl: Callable[..., str], tmp_path: Path, qwen: Any, llama3: Any
) -> None:
    rows = rows_of({"prompt": "Hello ", "completion": "%s"})

    def reading(path: str) -> SFTDataSettings:
        return SFTDataSettings.model_validate({"train": path, "max_length": 24})

    data = reading(jsonl(*rows))
    shelf, template = Kept(tmp_path / "cache"), load_template(qwen)
    for keep in prepare(data, "demonstration", template, shelf=shelf).shelved:
        keep()
    changes: list[Any] = [
        (data, load_template(llama3), None),
        (data, load_template(qwen, CHATML.replace("assistant", "a")), None),
        (data, template, 23),
        (data.model_copy(update={"truncation": "right"}), template, None),
        (data.model_copy(update={"train_on_prompt": True}), template, None),
        (reading(jsonl(*rows[:-1], name="b.jsonl")), template, None),
        (reading(jsonl(*reversed(rows), name="c.jsonl")), template, None),
    ]  # fmt: skip
    for settings, other, limit in changes:
        found = prepare(settings, "demonstration", other, max_length=limit, shelf=shelf)
        assert everything(found) == everything(prepare(settings, "demonstration", other, max_length=limit))
    assert shelf.hits == 0
    dated = load_template(qwen, "{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML)
    for _ in range(2):
        assert prepare(data, "demonstration", dated, shelf=shelf).shelved == (), "tomorrow it may render otherwise"
    asks = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}"
    assert load_template(qwen, asks + CHATML).steady


def test_a_damaged_file_is_named_and_made_anew(jsonl: Callable[..., str], tmp_path: Path, qwen: Any) -> None:
    data = SFTDataSettings.model_validate({"train": jsonl(*rows_of({"prompt": "Hello ", "completion": "%s"}))})
    template, shelf = load_template(qwen), Kept(tmp_path / "cache")
    bare = everything(prepare(data, "demonstration", template))
    for damage in (None, lambda b: b[:-3], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]):
        (path,) = (tmp_path / "cache").rglob("*.safetensors") if damage else (None,)
        if path is not None:
            path.write_bytes(damage(path.read_bytes()))  # type: ignore[misc]
        shelf.said.clear()
        made = prepare(data, "demonstration", template, shelf=shelf)
        assert everything(made) == bare
        assert len(shelf.said) == (path is not None)
        assert all(f"{path}: damaged cache file" in line for line in shelf.said)
        for keep in made.shelved:
            keep()
    shelf.said.clear()
    hits = shelf.hits
    assert everything(prepare(data, "demonstration", template, shelf=shelf)) == bare
    assert (shelf.hits, shelf.said) == (hits + 1, [])


def test_bad_rows_do_not_hide_behind_what_was_kept(jsonl: Callable[..., str], tmp_path: Path, qwen: Any) -> None:
    rows = rows_of({"prompt": "Hello ", "completion": "%s"})
    data = SFTDataSettings.model_validate({"train": jsonl(*rows)})
    shelf, template = Kept(tmp_path / "cache"), load_template(qwen)
    for keep in prepare(data, "demonstration", template, shelf=shelf).shelved:
        keep()
    jsonl(*rows, {"prompt": "Hello ", "completion": " "})
    with pytest.raises(DataError, match=r":13: empty completion"):
        prepare(data, "demonstration", template, shelf=shelf)
    dropping = data.model_copy(update={"on_bad_row": "drop"})
    assert "dropped, empty completion: 1" in prepare(dropping, "demonstration", template, shelf=shelf).report.lines()[0]


def test_a_row_that_the_chat_template_refuses_is_a_bad_row(
    jsonl: Callable[..., str], tmp_path: Path, llama2: Any
) -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "two"}]
    odd = {"messages": [{"role": "system", "content": "x"}, *said]}
    path = jsonl(odd, {"messages": said}, {"messages": [*said, *said]}, odd, {"messages": said[:1]})
    template, shelf = load_template(llama2), Kept(tmp_path / "cache")

    def made(**changed: Any) -> Prepared:
        data = SFTDataSettings.model_validate({"train": path, "on_bad_row": "drop", "max_length": 40} | changed)
        return prepare(data, "demonstration", template, shelf=shelf)

    why, last = (
        "the chat template refuses these messages: only user and assistant",
        "the last turn is not the assistant's",
    )
    with pytest.raises(DataError, match=f"^{path}:5: {last}\n1 bad row in all"):
        made(on_bad_row="error")
    first = made(max_bad_rows=3)
    for keep in first.shelved:
        keep()
    for found in (first, made()):
        (source,) = found.report.sources
        assert (source.kept, found.report.bad_rows, [s.where for s in found.train]) == (
            2, 3, [f"{path}:2", f"{path}:3"],
        )  # fmt: skip
        assert [(d.reason, d.where) for d in source.dropped] == [
            (last, (f"{path}:5",)), (why, (f"{path}:1", f"{path}:4")),
        ]  # fmt: skip
        rows = [json.loads(line) for line in quarantined(found.bad).splitlines()]
        assert [(row["where"], row["reason"]) for row in rows] == [
            (f"{path}:1", why), (f"{path}:4", why), (f"{path}:5", last),
        ]  # fmt: skip
        assert rows[0]["row"] == odd
    assert shelf.hits == 1
    for limit in (40, 41):  # kept on the shelf, and not
        with pytest.raises(DataError) as caught:
            made(max_bad_rows=2, max_length=limit)
        assert [p.message for p in caught.value.problems] == [
            last, why, why, "3 bad rows in all, of 5 rows: more than data.max_bad_rows 2 allows",
        ]  # fmt: skip
    jsonl(odd, {"messages": said}, {"messages": [*said, *said]}, odd)
    with pytest.raises(DataError) as caught:
        made(on_bad_row="error")
    assert [(p.where, p.message) for p in caught.value.problems] == [
        (f"{path}:1", why), (f"{path}:4", why), ("", "2 bad rows in all"),
    ]  # fmt: skip
    jsonl(odd)
    with pytest.raises(DataError, match=f"^no train example is left: {why}: 1 \\({path}:1\\) \\(give another"):
        made()
    bare = replace(template, chat=None)
    with pytest.raises(DataError, match=f"^{path}:1: the tokenizer has no chat template"):
        prepare(SFTDataSettings.model_validate({"train": path, "on_bad_row": "drop"}), "demonstration", bare)


@pytest.mark.parametrize("room", [None, 0, 300])
def test_many_tokens_lie_in_a_file(
    room: int | None, qwen: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The samples are the same, also where there is no room for one, or not enough. room: bytes of it; None: any."""
    template = load_template(qwen)
    plainly = tokenize(EVERY[:4] * 20, template, 1000).samples

    class Small:
        def __init__(self, buffering: int) -> None:
            self.file, self.left = (tmp_path / f"{len(made)}").open("w+b", buffering), room
            made.append(self)

        def write(self, data: bytes) -> int:
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = self.file.write(data[: self.left])
            self.left = None if self.left is None else self.left - done
            return done

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    made: list[Small] = []
    monkeypatch.setattr(column, "HELD", 128)
    monkeypatch.setattr(column.tempfile, "TemporaryFile", Small)
    found = tokenize(EVERY[:4] * 20, template, 1000).samples
    assert [plain(s) for s in found] == [plain(s) for s in plainly]
    assert all(np.array_equal(found.arrays[name], plainly.arrays[name]) for name in LAYOUT if name in found.arrays)
    assert isinstance(found.arrays["ids"].base, np.memmap) == (room is None)
    sizes = {path.stat().st_size for path in tmp_path.iterdir()}
    assert len(made) == 2
    assert sizes == {None: {4 * len(found.arrays["ids"]), len(found.arrays["ids"])}, 0: {0}}.get(room, sizes)


def test_a_sample_is_a_copy(qwen: Any) -> None:
    """Whoever changes one does not change what is kept, and torch asks for arrays that can be written."""
    made = tokenize(EVERY[4:9], load_template(qwen), 1000).samples
    before = plain(made[1])
    made[1].prompt[:] = 0
    made[1].completions[0].scored[:] = False
    assert plain(made[1]) == before
    assert all(np.asarray(c.scored).flags.writeable for s in made for c in s.completions)
    with pytest.raises(IndexError):
        made[len(made)]
