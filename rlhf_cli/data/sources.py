"""Raw rows from files, folders and hub data sets, streamed, each with the place it came from."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from rlhf_cli.data.arrays import TwiceError, once, placed, short, unreadable
from rlhf_cli.errors import DataError, did_you_mean
from rlhf_cli.recipe.data_path import product_of
from rlhf_cli.recipe.hub import unreachable
from rlhf_cli.recipe.settings.data import SourceSettings

Located: TypeAlias = tuple[str, dict[str, Any]]
"""`file:line` and the row; `file:row N`, counted from 1, where there are no lines or several rows in one."""

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LONGEST_LINE = 2**26
"""Bytes of a line. Longer ones are no rows, and would be read into memory whole."""
BOM = b"\xef\xbb\xbf"


def read(source: SourceSettings) -> Iterator[Located]:
    """The rows of a source, its columns renamed, at most `limit` of them.

    Raises DataError for a missing file, broken JSON, a row that is not an object, a cut gzip file or text that is not
    UTF-8; it names the file and the line.
    """
    rows = itertools.islice(_open(source), source.limit)
    return _rename(rows, source) if source.columns else rows


def _open(source: SourceSettings) -> Iterator[Located]:
    path = Path(source.path)
    if path.exists() and (source.name is not None or source.split != "train"):
        key = "name" if source.name is not None else "split"
        raise DataError(f"data.*.{key} is only read of hub data sets, and this is here", source.path, "leave it out")
    if (rows := product_of(path)) is not None:
        return _file(rows)
    if path.is_dir():
        files = sorted(
            f for f in path.iterdir() if f.is_file() and not f.name.startswith(".") and suffix(f) is not None
        )
        if not files:
            raise DataError("the folder has no data file", source.path, f"known kinds: {', '.join(SUFFIXES)}")
        return itertools.chain.from_iterable(_file(f) for f in files)
    if path.exists():
        return _file(path)
    if path.parts[:1] == ("~",):
        raise DataError("file not found: ~ is not read as your home folder", source.path, "write the whole path")
    if looks_like_hub_id(source.path):
        return _hub(source)
    raise DataError("file not found", source.path, _sibling(path))


def looks_like_hub_id(path: str) -> bool:
    """`org/name`, not spelled like a data file, and no local folder is called `org`."""
    return HUB_ID.fullmatch(path) is not None and suffix(Path(path)) is None and not Path(path).parent.is_dir()


def suffix(path: Path) -> str | None:
    """The known ending of a file name, the longest first; None for other files."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), None)


def _sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return did_you_mean(path.name, sorted(p.name for p in path.parent.iterdir()))


def _rename(rows: Iterable[Located], source: SourceSettings) -> Iterator[Located]:
    for where, row in rows:
        used: set[str] = set()
        given: dict[str, Any] = {}
        for ours, theirs in source.columns.items():
            names = [theirs] if isinstance(theirs, str) else theirs
            values = [_value(row, name) for name in names]
            if ABSENT not in values:
                used.update(names)
                given[ours] = values[0] if isinstance(theirs, str) else values
        yield where, {k: v for k, v in row.items() if k not in used and k not in source.columns} | given


ROLE_KEYS = frozenset({"role", "from"})
MESSAGE_KEYS = ROLE_KEYS | {"content", "value", "tool_calls"}
ABSENT = object()


def _value(row: dict[str, Any], name: str) -> Any:
    """What is in a column, or at the end of a path `column.key.key` into its objects; ABSENT when there is none."""
    if name in row or "." not in name:
        return row.get(name, ABSENT)
    found: Any = row
    for key in name.split("."):
        found = found.get(key, ABSENT) if isinstance(found, dict) else ABSENT
    return found


def check_columns(source: SourceSettings, columns: list[str], head: Sequence[Mapping[str, Any]]) -> None:
    """Whether the columns that were asked for are there. `columns` and `head` have them renamed already."""
    known = {ours: [theirs] if isinstance(theirs, str) else theirs for ours, theirs in source.columns.items()}
    there = [theirs for c in columns for theirs in known.get(c, [c])]
    for ours, theirs in known.items():
        if ours in columns:
            continue
        missing = next((name for name in theirs if name not in there), theirs[0])
        found = f"found: {', '.join(sorted(there)) or 'none'}"
        root = missing.partition(".")[0]
        keys = dict.fromkeys(key for row in head if isinstance(row.get(root), dict) for key in row[root])
        if root != missing and root in there:
            found += f"; '{root}' holds {', '.join(sorted(keys)) or 'no objects'}"
        raise DataError(
            f"no column '{missing}' (wanted as {ours}); {found}", source.path,
            did_you_mean(missing, [*there, *(f"{root}.{key}" for key in keys)]) or "correct data.*.columns",
        )  # fmt: skip


def keys_of_messages(columns: Sequence[str], head: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of messages that nothing reads, as `column.key`."""
    found: dict[str, None] = {}
    for column in columns:
        for value in (row.get(column) for row in head):
            for message in value if isinstance(value, list) else [value]:
                if isinstance(message, dict) and not ROLE_KEYS.isdisjoint(message):
                    found |= dict.fromkeys(f"{column}.{key}" for key in message if key not in MESSAGE_KEYS)
    return list(found)


# --- files -----------------------------------------------------------------------------------------------


def _file(path: Path) -> Iterator[Located]:
    ending = suffix(path)
    if ending is None:
        raise DataError("not a kind of data file", str(path), f"known kinds: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError("not a regular file: data are read more than once", str(path), "make it a file")
    return READERS[ending.removesuffix(".gz")](path)


@contextmanager
def _bytes(path: Path) -> Iterator[BinaryIO]:
    """The file opened for reading, unpacked when it is gzip; what goes wrong while reading becomes a DataError."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"the gzip file is cut or damaged: {error}", str(path), "make or fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", str(path)) from None


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}", where, "save the file as UTF-8"
        ) from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, with `file:line`; lines end at LF only, a CR before it is dropped."""
    with _bytes(path) as stream:
        for count, line in enumerate(iter(partial(stream.readline, LONGEST_LINE + 1), b""), start=1):
            where = f"{path}:{count}"
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"a line longer than {LONGEST_LINE >> 20} MiB", where, "put each row on a line of its own"
                )
            content = _text(line.removeprefix(BOM) if count == 1 else line, where).rstrip("\r\n")
            if content.strip():
                yield where, content


def _txt(path: Path) -> Iterator[Located]:
    return ((where, {"text": line}) for where, line in _lines(path))


def _jsonl(path: Path) -> Iterator[Located]:
    for where, line in _lines(path):
        try:
            value = json.loads(line, object_pairs_hook=once)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error.msg} at column {error.colno}", where, _json_hint(path, line)) from None
        except (TwiceError, RecursionError, ValueError) as error:
            raise unreadable(error, where) from None
        yield where, _object(value, where)


def _json_hint(path: Path, line: str) -> str:
    if line.strip() == "{" and suffix(path) in (".json", ".json.gz"):
        return "a .json file is one array of rows, or one row a line"
    return "each line must be one whole JSON object"


def _json(path: Path) -> Iterator[Located]:
    """An array of objects; a file that does not begin with `[` is read as one object a line."""
    with _bytes(path) as stream:
        first = stream.read(4096).removeprefix(BOM).lstrip()[:1]
        while not first and (more := stream.read(4096)):
            first = more.lstrip()[:1]
        if first == b"[":
            stream.seek(0)
            data = stream.read().removeprefix(BOM)
    if first != b"[":
        yield from _jsonl(path)
        return
    for where, value in placed(_text(data, str(path)), str(path)):
        yield where, _object(value, where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"a row must be an object with named columns, this is {json.dumps(value)[:40]}", where)
    return value


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            for count, row in enumerate(itertools.chain.from_iterable(batches), start=1):
                yield f"{path}:row {count}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {short(error)}", str(path)) from None


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".txt": _txt,
    ".parquet": _parquet,
}


# --- the hub ---------------------------------------------------------------------------------------------


def _hub(source: SourceSettings) -> Iterator[Located]:
    """Rows of a hub data set through the `datasets` library, which caches it; needs the network the first time."""
    import datasets

    away = unreachable()
    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:
        raise DataError(
            f"neither a file here nor a hub data set that can be loaded: {short(error)}",
            source.path,
            f"the hub cannot be reached ({away})"
            if away
            else "check the name, data.*.name and data.*.split, and the network",
        ) from None
    return ((f"{source.path}:row {count}", dict(row)) for count, row in enumerate(table, start=1))
