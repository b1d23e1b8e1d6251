from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.arrays import placed
from rlhf_cli.data.sources import check_columns, looks_like_hub_id, read
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import SourceSettings


def rows(path: Path, **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    found = read(SourceSettings(path=str(path), **settings))
    return [(where.removeprefix(str(path)), row) for where, row in found]


def problem(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read(SourceSettings(path=str(path), **settings)))
    return str(caught.value).replace(str(path.parent) + "/", "")


def put(folder: Path, *lines: str) -> Path:
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_jsonl_with_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\r\n{"a": "x\xe2\x80\xa8y"}')
    assert rows(path) == [(":1", {"a": 1}), (":4", {"a": 2}), (":5", {"a": "x\u2028y"})]


def test_malformed_line_is_named_by_its_true_number(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"n": i}) for i in range(10_000)]
    lines[100] = ""
    lines[7776] = '{"n": 7776'
    path.write_text("\n".join(lines))
    assert problem(path).startswith("pairs.jsonl:7777: not JSON: ")


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n')
    assert [row for _, row in rows(path, limit=2)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(("line", "said"), [("[1]", "this is [1]"), ("3", "this is 3"), ('"x"', 'this is "x"')])
def test_row_that_is_not_an_object(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    assert problem(path) == f"a.jsonl:2: a row must be an object with named columns, {said}"


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 200_000)
    assert "a.jsonl:1: not readable JSON: nested too deeply" in problem(path)


def test_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf \n[{"a": 1},\r\n {"a": 2}]')
    assert rows(path) == [(":2", {"a": 1}), (":3", {"a": 2})]
    path.write_text('[{"a": 1},\n\n {"a": 2}, {"a":\n3},\n{"a": 4}\n]\n')
    assert rows(path) == [(":1", {"a": 1}), (":row 2", {"a": 2}), (":row 3", {"a": 3}), (":5", {"a": 4})]
    assert rows(path, limit=2) == rows(path)[:2]
    path.write_text('[{"a": 1}, 5]')
    assert problem(path).startswith("a.json:row 2: a row must be an object")
    path.write_text('[{"a": 1},\n {"a" 2}]')
    assert problem(path).startswith("a.json:2:7: not JSON")


BROKEN = [
    "[", "[]", "[ ] x", "[1", "[1,", "[1 2]", '[1, {"a"}]', "[{}]]", "[{}, ]", "[{} ,\n {}\n] ", "\v[{}]", '[{"a": "b]',
    '[{"a": 1e}]', "[nul]", "[\n\n{},,]", "[,]", "[[[]]]]", '[{"a": "\t"}]', "[{}\f]",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_an_array_is_refused_where_the_json_library_refuses_it(text: str) -> None:
    try:
        expected: Any = json.loads(text)
    except json.JSONDecodeError as error:
        expected = f"a.json:{error.lineno}:{error.colno}: not JSON: {error.msg}"
    try:
        found: Any = [value for _, value in placed(text, "a.json")]
    except DataError as error:
        found = str(error)
    assert found == expected


def test_json_with_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert rows(path) == [(":1", {"a": 1}), (":2", {"a": 2})]
    path.write_text('{\n "data": []\n}\n')
    assert "a .json file is one array of rows, or one row a line" in problem(path)


def test_txt_has_a_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\n two \n")
    assert rows(path) == [(":1", {"text": "one"}), (":3", {"text": " two "})]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
def test_gzip(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": 1}\n'))
    expected = '{"text": 1}' if "txt" in name else 1
    assert rows(path) == [(":1", {"text": expected})]


def test_cut_and_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(f'{{"a": {i * 7919}}}\n' for i in range(5000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    assert problem(path).startswith("a.jsonl.gz: the gzip file is cut or damaged")
    path.write_bytes(b'{"a": 1}\n')
    assert problem(path).startswith("a.jsonl.gz: the gzip file is cut or damaged")


@pytest.mark.parametrize(
    ("data", "where"), [('{"a": "é"}\n'.encode("latin-1"), "a.jsonl:1"), ('{"a": 1}\n'.encode("utf-16"), "a.jsonl:1")]
)
def test_wrong_encoding(tmp_path: Path, data: bytes, where: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert problem(path).startswith(f"{where}: not UTF-8 text: byte 0x")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "q"}]
    pq.write_table(pa.Table.from_pylist([{"a": 1, "messages": messages}, {"a": None, "messages": []}]), path)
    assert rows(path) == [(":row 1", {"a": 1, "messages": messages}), (":row 2", {"a": None, "messages": []})]
    path.write_bytes(path.read_bytes()[:100])
    assert problem(path).startswith("a.parquet: not a readable Parquet file")


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"a": 2}\n')
    (tmp_path / "a.json").write_text('[{"a": 1}]')
    (tmp_path / ".hidden.jsonl").write_text("broken")
    (tmp_path / "README.md").write_text("words")
    assert rows(tmp_path) == [("/a.json:1", {"a": 1}), ("/b.jsonl:1", {"a": 2})]


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("words")
    assert "the folder has no data file" in problem(tmp_path)


def test_missing_file_names_its_sibling(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    assert problem(tmp_path / "pair.jsonl") == "pair.jsonl: file not found (did you mean 'pairs.jsonl'?)"
    assert "there is no folder" in problem(tmp_path / "no" / "such" / "pairs.jsonl")


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    assert problem(tmp_path / "a.csv").startswith("a.csv: not a kind of data file (known kinds: .jsonl")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert looks_like_hub_id("org/some-name.v2")
    for path in ("data/pairs", "org/pairs.jsonl", "pairs", "./org/name", "/org/name", "a/b/c"):
        assert not looks_like_hub_id(path), path


def test_hub_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(path: str, name: str | None, split: str) -> Any:
        asked.append((path, name, split))
        return [{"a": 1}, {"a": 2}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(read(SourceSettings(path="org/name", name="main", split="test", limit=1)))
    assert found == [("org/name:row 1", {"a": 1})]
    assert asked == [("org/name", "main", "test")]

    def fail(path: str, name: str | None, split: str) -> Any:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"org/name: neither a file here nor a hub data set .*: no network"):
        list(read(SourceSettings(path="org/name")))


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": 1, "prompt": 2, "x": 3}\n')
    assert rows(path, columns={"prompt": "question"}) == [(":1", {"prompt": 1, "x": 3})]
    assert rows(path, columns={"prompt": "x", "x": "prompt"}) == [(":1", {"question": 1, "prompt": 3, "x": 2})]


def test_several_columns_become_a_list(tmp_path: Path) -> None:
    path = put(tmp_path, '{"one": 1, "two": 2, "x": 3}', '{"one": 1, "x": 3}')
    assert rows(path, columns={"both": ["two", "one"]}) == [
        (":1", {"x": 3, "both": [2, 1]}),
        (":2", {"one": 1, "x": 3}),
    ]


def test_paths_lead_into_objects(tmp_path: Path) -> None:
    path = put(tmp_path, '{"a": {"b": {"c": 1}}, "d.e": 2, "d": {"e": 3}}')
    whole = {"a": {"b": {"c": 1}}, "d": {"e": 3}}
    assert rows(path, columns={"x": "a.b.c"}) == [(":1", whole | {"d.e": 2, "x": 1})]
    assert rows(path, columns={"x": "d.e"}) == [(":1", whole | {"x": 2})]
    assert rows(path, columns={"x": ["a.b.c", "d.e"]}) == [(":1", whole | {"x": [1, 2]})]
    assert rows(path, columns={"x": "a.b.c.d"}) == [(":1", whole | {"d.e": 2})]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"p": "quest"}, "no column 'quest' (wanted as p); found: feedback, one, prompt (correct data.*.columns)"),
        ({"p": "promt"}, "no column 'promt' (wanted as p); found: feedback, one, prompt (did you mean 'prompt'?)"),
        ({"p": ["one", "two"]}, "no column 'two' (wanted as p); found: feedback, one, prompt (correct data.*.columns)"),
        (
            {"p": "feedback.error", "q": "one"},
            "no column 'feedback.error' (wanted as p); found: feedback, one, prompt; 'feedback' holds errors, notes "
            "(did you mean 'feedback.errors'?)",
        ),
        (
            {"p": "one.more"},
            "no column 'one.more' (wanted as p); found: feedback, one, prompt; 'one' holds no objects "
            "(correct data.*.columns)",
        ),
        ({"p": "a.b"}, "no column 'a.b' (wanted as p); found: feedback, one, prompt (correct data.*.columns)"),
    ],
)
def test_a_column_that_is_not_there(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    path = put(tmp_path, '{"prompt": "a", "one": 1, "feedback": {"errors": [], "notes": 2}}')
    settings = SourceSettings(path=str(path), columns=columns)
    found = list(read(settings))
    with pytest.raises(DataError) as caught:
        check_columns(settings, list(found[0][1]), [row for _, row in found])
    assert str(caught.value) == f"{path}: {said}"
