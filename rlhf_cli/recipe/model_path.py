"""What a model name in a recipe stands for: a run directory, a folder of weights or a hub id. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rlhf_cli.errors import ModelError, did_you_mean
from rlhf_cli.recipe.glance import run_of

WHOLE = 8 * 2**20
"""Weight files below this size are hashed whole, in bytes."""
BLOCKS = 64
BLOCK = 64 * 2**10
"""Larger ones by this many evenly spaced blocks of this many bytes."""

Kept = Literal["policy", "reward", "cost", "process"]
"""What a folder holds: a language model, a model of one score (the higher the better, or a cost), a classifier of
steps."""


@dataclass(frozen=True)
class ModelPath:
    """Where a model lies, before anything of it is loaded."""

    name: str
    """As the recipe says it."""
    source: Literal["run", "folder", "hub"]
    weights: Path | None
    """Folder with the weights (`final/` of a run); None for a hub id."""
    kind: Literal["full", "adapter"]
    """What the weights are. A hub id counts as full."""
    role: Kept
    base: str | None
    """Model an adapter belongs to, or a run started from; None when not known."""
    done: bool
    """False only for a run without DONE."""
    run: dict[str, Any] | None = None
    """run.json of a run."""


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no blanks, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def fingerprint(folder: Path) -> str:
    """`sha256:...` of a folder of model weights: names, sizes and headers of the safetensors files, blocks of their
    content, and the configuration. Raises ModelError when a file cannot be read."""
    total = hashlib.sha256()
    try:
        for name in ("config.json", "adapter_config.json"):
            if (folder / name).is_file():
                total.update(canonical([name, sha256(folder / name)]))
        for path in sorted(folder.glob("*.safetensors")):
            total.update(canonical([path.name, path.stat().st_size]))
            for block in _sampled(path):
                total.update(block)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(error.filename or folder)) from error
    return f"sha256:{total.hexdigest()}"


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_model(name_or_path: str, *, weights: bool = True) -> ModelPath:
    """Tell a run directory, a model folder and a hub id apart. Raises ModelError when the path is missing, the run is
    not finished, or the folder holds no model that may be loaded. weights: whether they must be there."""
    path = _local(name_or_path)
    if path is None:
        return ModelPath(name_or_path, "hub", None, "full", "policy", None, True)
    if not path.is_dir():
        raise ModelError("is a file; a model is a folder, a run directory or a hub id", where=name_or_path,
                         hint=_beside(path))  # fmt: skip
    if not (path / "run.json").is_file():
        return _folder(name_or_path, path, "folder", None, weights)
    run = read_json(path / "run.json")
    stage = run.get("stage", "STAGE")
    if not (path / "DONE").is_file():
        raise ModelError(
            "this run has no DONE", where=name_or_path, hint=f"finish it first: rlhf {stage} {path}/recipe.yaml"
        )
    if not (path / "final").is_dir():
        if run.get("role") == "data":
            raise ModelError(f"is a run of `rlhf {stage}`: it holds rows, no model", where=name_or_path,
                             hint="name the run of a model")  # fmt: skip
        raise ModelError("this run has no final/", where=name_or_path, hint="it was removed; train the run again")
    return _folder(name_or_path, path / "final", "run", run)


def _beside(path: Path) -> str:
    """The run that a recipe makes, or that a file lies in."""
    if (run := run_of(path)) is not None:
        return f"the run of this recipe: {run}"
    above = next((str(p) for p in path.parents if (p / "run.json").is_file()), "")
    return f"name the run: {above}" if above else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours. Raises ModelError when it is missing, cut or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError("is not valid JSON", where=str(path), hint="the file is damaged; restore it") from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path), hint="the file is damaged; restore it")
    return value


def _sampled(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, then the blocks that stand for its content."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < WHOLE:
            yield file.read()
            return
        length = int.from_bytes(file.read(8), "little")
        yield file.read(min(length, size))
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            yield file.read(BLOCK)


def _folder(
    name: str, path: Path, source: Literal["run", "folder"], run: dict[str, Any] | None, weights: bool = True
) -> ModelPath:
    adapter = path / "adapter_config.json"
    if not adapter.is_file() and not (path / "config.json").is_file():
        raise ModelError(
            "holds no config.json and no adapter_config.json", where=str(path), hint="give a model or a run directory"
        )
    if weights or adapter.is_file():
        _refuse_pickle(path)
    base: str | None
    if adapter.is_file():
        settings = read_json(adapter)
        base = _base_of(settings, path)
        role = {"SEQ_CLS": "reward", "TOKEN_CLS": "process"}.get(str(settings.get("task_type")), "policy")
    else:
        names = read_json(path / "config.json").get("architectures") or []
        base = None if run is None else _started_from(run)
        heads = {"ForSequenceClassification": "reward", "ForTokenClassification": "process"}
        role = next((r for head, r in heads.items() if any(head in str(n) for n in names)), "policy")
    if run is not None:
        role = run.get("role", role)
    return ModelPath(
        name, source, path, "adapter" if adapter.is_file() else "full",
        cast("Kept", role if role in get_args(Kept) else "policy"), base, True, run,
    )  # fmt: skip


def _started_from(run: dict[str, Any]) -> str | None:
    """Base model that a run's lineage names."""
    base = run.get("lineage", {}).get("base")
    return base.get("name") if isinstance(base, dict) else base


def _base_of(settings: dict[str, Any], path: Path) -> str:
    """The base an adapter names. Raises ModelError when it names none, or a folder that is not there."""
    base = settings.get("base_model_name_or_path")
    where = f"{path}/adapter_config.json base_model_name_or_path"
    if not isinstance(base, str) or not base:
        raise ModelError("names no base model", where=where, hint="add the model the adapter was trained on")
    try:
        _local(base)
    except ModelError as error:
        raise ModelError(
            f"'{base}' does not exist in the working directory {Path.cwd()}", where=where,
            hint="run from the folder the adapter was trained in, or put the right path there",
        ) from error  # fmt: skip
    return base


def _refuse_pickle(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise ModelError(
            f"has weights only as pickle ({pickled[0]}), which can run any code when opened", where=str(path),
            hint="convert them to safetensors",
        )  # fmt: skip
    raise ModelError("holds no *.safetensors weights", where=str(path), hint="the folder is not complete")


def _local(name: str) -> Path | None:
    """The existing path, or None for a hub id. Raises ModelError for a path that is not there."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    hub = re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", name) is not None
    if hub and not (len(path.parts) == 2 and (path.parent.is_dir() or path.parts[0] == "runs")):
        return None
    raise ModelError("no such folder", where=name, hint=similar(path) or "give a folder, a run directory or a hub id")


def similar(path: Path) -> str:
    """Did-you-mean over the names beside a missing path."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    return did_you_mean(str(path), (str(path.parent / p.name) for p in path.parent.iterdir()))
