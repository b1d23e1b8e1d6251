"""JSON lines that are appended as a run goes on and read back for reports. Numbers that are not finite stay visible."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.runs.files import FREE, disk_error, write_all

HINT = f"{FREE}, then run the same command again to resume"


def plain(value: Any) -> Any:
    """The value with NaN and infinities spelled as the strings "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def number(value: Any) -> float | None:
    """A metric read back as a number, None when it is none (NaN strings count as numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value)
    return float(value)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file of ours, without a last line that was cut. Raises ModelError for damage elsewhere."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else None
        except ValueError as error:
            if place == len(lines):
                break
            raise ModelError("is not valid JSON", where=f"{path}:{place}", hint="the file is damaged") from error
        if isinstance(row, dict):
            rows.append(row)
    return rows


class Lines:
    """A JSONL file that grows: each object reaches the system as one line before `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1

    def append(self, record: dict[str, Any]) -> None:
        """Add one object; floats keep every digit. Raises ModelError when the disk refuses."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            if self._handle < 0:
                self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            write_all(self._handle, line.encode("utf-8", errors="surrogatepass"))
        except OSError as error:
            raise disk_error(error, "cannot append", self.path, HINT) from error

    def size(self) -> int:
        """Bytes written, all of them on the disk. Raises ModelError."""
        try:
            if self._handle >= 0:
                os.fsync(self._handle)
            return self.path.stat().st_size if self.path.exists() else 0
        except OSError as error:
            raise disk_error(error, "cannot be brought to the disk", self.path, HINT) from error

    def cut(self, size: int) -> str:
        """Forget everything after `size` bytes. A file that is shorter keeps its whole lines; returns a sentence that
        says so, else an empty string. Raises ModelError."""
        self.close()
        if not self.path.exists():
            return f"{self.path} is gone: its first {size} bytes are lost" if size else ""
        try:
            present = self.path.stat().st_size
            if present >= size:
                os.truncate(self.path, size)
                return ""
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        except OSError as error:
            raise disk_error(error, "cannot be cut back", self.path, HINT) from error
        return f"{self.path} has {present} bytes where the checkpoint counted {size}: lines were lost"

    def close(self) -> None:
        """Let go of the file; `append` opens it again."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
