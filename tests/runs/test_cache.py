"""The cache that runs share: whole or absent, proven when read, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_cli.runs import cache

ARRAYS = {"logp": np.arange(6, dtype=np.float32).reshape(3, 2), "known": np.array([1, 0, 1], dtype=np.uint8)}
LAYOUT = {"logp": ("F32", (3, 2)), "known": ("U8", (None,))}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> cache.Store:
    return cache.Store(tmp_path / "deep" / "cache", said.append)


def test_what_was_written_is_read(store: cache.Store, said: list[str]) -> None:
    assert store.read("reference", "ab", LAYOUT) is None
    store.write("reference", "ab", ARRAYS, {"run": "runs/one"})
    entry = store.read("reference", "ab", LAYOUT)
    assert entry is not None
    assert entry.notes == {"run": "runs/one"}
    for name, array in ARRAYS.items():
        assert entry.arrays[name].dtype == array.dtype
        assert np.array_equal(entry.arrays[name], array)
    standard = load_file(store.path("reference", "ab"))
    assert {n: a.tolist() for n, a in standard.items()} == {n: a.tolist() for n, a in ARRAYS.items()}
    assert [p.name for p in store.path("reference", "ab").parent.iterdir()] == ["ab.safetensors"]
    assert said == []


def test_arrays_are_mapped_and_cannot_be_written(store: cache.Store) -> None:
    store.write("tokens", "ab", {"ids": np.arange(10, dtype=np.int32), "ends": np.zeros(0, dtype=np.int64)}, {})
    entry = store.read("tokens", "ab", {"ids": ("I32", (None,)), "ends": ("I64", (None,))})
    assert entry is not None
    assert isinstance(entry.arrays["ids"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        entry.arrays["ids"][0] = 1


def test_every_damage_is_noticed(store: cache.Store, said: list[str]) -> None:
    """Each byte that is changed, and each length at which a file may be cut."""
    store.write("reference", "ab", ARRAYS, {"run": "one"})
    path = store.path("reference", "ab")
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 7)] + [whole + b"\0" * 8]
    damaged += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole)) if whole[n] != 0x20]
    for content in damaged:
        path.write_bytes(content)
        assert store.read("reference", "ab", LAYOUT) is None, content
    assert len(said) == len(damaged)
    assert all(line.startswith(f"{path}: damaged cache file (") for line in said)
    assert all(line.endswith("ignored, and made anew") for line in said)
    store.write("reference", "ab", ARRAYS, {"run": "one"})
    assert store.read("reference", "ab", LAYOUT) is not None


@pytest.mark.parametrize(
    "layout",
    [{"logp": ("F32", (3, 2))}, LAYOUT | {"logp": ("F32", (2, 3))}, LAYOUT | {"logp": ("F64", (3, 2))},
     LAYOUT | {"logp": ("F32", (6,))}, LAYOUT | {"more": ("U8", (1,))}],
)  # fmt: skip
def test_other_shapes_are_not_taken(store: cache.Store, said: list[str], layout: cache.Layout) -> None:
    store.write("reference", "ab", ARRAYS, {})
    assert store.read("reference", "ab", layout) is None
    assert "another shape or dtype" in said[0]


def test_numbers_that_are_not_finite_and_files_under_another_name(store: cache.Store, said: list[str]) -> None:
    store.write("reference", "ab", ARRAYS | {"logp": np.full((3, 2), np.nan, dtype=np.float32)}, {})
    assert store.read("reference", "ab", LAYOUT) is None
    assert "logp holds numbers that are not finite" in said[0]
    store.write("reference", "ab", ARRAYS, {})
    os.rename(store.path("reference", "ab"), store.path("reference", "cd"))
    assert store.read("reference", "cd", LAYOUT) is None
    assert "its content is not what was written" in said[1]


def test_a_disk_that_refuses_is_a_warning(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("")
    store = cache.Store(tmp_path / "file" / "cache", said.append)
    store.write("reference", "ab", ARRAYS, {})
    assert store.read("reference", "ab", LAYOUT) is None
    assert len(said) == 2
    assert all("the run goes on without it" in line for line in said)


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    for own, shared in (("/a", "/b"), (None, "/b"), (None, None), ("", "/b")):
        for name, value in (("RLHF_CACHE", own), ("XDG_CACHE_HOME", shared)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        found = cache.open_store(print)
        places.append(found and found.folder)
    assert places == [Path("/a"), Path("/b/rlhf"), Path.home() / ".cache/rlhf", None]


def test_a_key_belongs_to_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache.key_of(a=1, b=["x"])
    assert key == cache.key_of(b=["x"], a=1)
    assert len({key, cache.key_of(a=2, b=["x"]), cache.key_of(a=1, b=["y"]), cache.key_of(a=1)}) == 4
    assert cache.key_of("data", a=1, b=["x"]) != key
    monkeypatch.setattr(cache, "code_digest", lambda packages: "other code")
    assert cache.key_of(a=1, b=["x"]) != key


def test_what_nobody_reads_goes(store: cache.Store) -> None:
    for key in ("old", "new"):
        store.write("reference", key, ARRAYS, {})
    folder = store.path("reference", "old").parent
    (folder / ".left.safetensors.0123").write_text("half")
    (folder / ".under-way.safetensors.0123").write_text("half")
    past = time.time() - cache.FORGOTTEN - 60
    for name in ("old.safetensors", "new.safetensors", ".left.safetensors.0123"):
        os.utime(folder / name, (past, past))
    assert store.read("reference", "new", LAYOUT) is not None
    store.write("reference", "third", ARRAYS, {})
    assert sorted(p.name for p in folder.iterdir()) == [
        ".under-way.safetensors.0123", "new.safetensors", "third.safetensors"
    ]  # fmt: skip


WRITER = """
import sys
import numpy as np
from pathlib import Path
from rlhf_cli.runs.cache import Store
store = Store(Path(sys.argv[1]), lambda text: sys.exit(text))
layout = {"numbers": ("F64", (20000,))}
for _ in range(60):
    store.write("reference", "ab", {"numbers": np.full(20000, float(sys.argv[2]))}, {})
    entry = store.read("reference", "ab", layout)
    assert entry is not None and len(set(entry.arrays["numbers"].tolist())) == 1
"""


def test_two_writers_at_once(store: cache.Store, said: list[str]) -> None:
    """Each always reads a whole entry, its own or the other's."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(store.folder), str(n)], stderr=subprocess.PIPE)
        for n in range(2)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors.decode()
    assert [p.name for p in store.path("reference", "ab").parent.iterdir()] == ["ab.safetensors"]
    assert said == []
