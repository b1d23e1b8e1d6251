"""Numbers that come piece by piece and lie one after the other in the end: in memory, or in a file when there are
many."""

from __future__ import annotations

import tempfile
from io import RawIOBase
from typing import Any, cast

import numpy as np

HELD = 2**27
"""Bytes beyond which a column goes to a file."""


class Column:
    """One array that grows."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._held = bytearray()
        self._file: RawIOBase | None = None
        self._written, self._most = 0, HELD

    def __len__(self) -> int:
        return (self._written + len(self._held)) // self._dtype.itemsize

    def extend(self, data: bytes) -> None:
        """More numbers, as the bytes of an array."""
        self._held += data
        if len(self._held) >= self._most:
            self._put_away()

    def array(self) -> np.ndarray:
        """All of them, not to be changed when they lie in a file: that is mapped, has no name and goes with them."""
        if self._file is not None:
            self._put_away()
        if self._file is not None:
            return np.asarray(np.memmap(self._file, self._dtype, "r"))  # type: ignore[call-overload]
        return np.frombuffer(self._held, self._dtype) if self._held else np.zeros(0, self._dtype)

    def _put_away(self) -> None:
        """What is held, into the file. Where there is no room for one, memory has to do."""
        rest = memoryview(self._held)
        try:
            self._file = self._file or cast("RawIOBase", tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._held, self._most = self._read_back() + self._held, 2**62
            self._file, self._written = None, 0
            return
        self._written += len(self._held)
        self._held = bytearray()

    def _read_back(self) -> bytearray:
        """What the file holds of what was written before."""
        found = bytearray(self._written)
        rest = memoryview(found)
        if self._file is not None:
            self._file.seek(0)
        while rest and self._file is not None:
            rest = rest[self._file.readinto(rest) or 0 :]
        return found
