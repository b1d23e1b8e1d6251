"""What a run depends on: the meaning of its recipe and the content of everything it reads. No torch.

`digest` is equal for two recipes exactly when they ask for the same result from the same inputs. Inputs are named by
their path as the recipe writes it, taken relative to the working directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DataError, ModelError, RecipeError
from rlhf_cli.recipe.data_path import product_of
from rlhf_cli.recipe.function_path import function_file
from rlhf_cli.recipe.model_path import canonical, fingerprint, resolve_model, sha256, similar
from rlhf_cli.recipe.settings.data import SourceSettings
from rlhf_cli.recipe.work import Work

_FREE = (
    "output_dir",
    "logging",
    "checkpoint",
    "evaluation",
    "training.max_steps",
    "training.micro_batch_tokens",
    "training.layout",
    "training.max_loss_spike",
    "training.max_grad_spike",
    "training.spike_window",
    "model.gradient_checkpointing",
    "rollout.max_batch",
    "rollout.server",
    "rollout.server_timeout",
    "rollout.api_key_env",
    "rollout.adapter_folder",
    "rollout.sleep",
    "judge.server",
    "judge.server_timeout",
    "judge.api_key_env",
    "judge.max_batch",
    "reference_cache",
    "data.cache",
    "data.max_bad_rows",
    "doctor",
    "license",
    "distributed",
)
"""Keys that cannot change what a step computes. `doctor` and the spikes decide when to stop and what to undo, and may
change when a stopped run goes on."""

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def semantic(recipe: Work) -> dict[str, Any]:
    """The resolved recipe without the keys that cannot change the result (where to write, how often to log, save and
    evaluate, how much to hold in memory, when to stop)."""
    plain = recipe.model_dump(mode="json")
    for dotted in _FREE:
        *parents, last = dotted.split(".")
        holder = plain
        for key in parents:
            holder = holder.get(key) or {}
        holder.pop(last, None)
    for reward in plain.get("rewards", []):
        reward.pop("timeout", None)
    return plain


def digest(recipe: Work) -> str:
    """SHA-256 over the meaning of the recipe and the fingerprints of its inputs. Raises as `inputs` does."""
    return digest_of(semantic(recipe), inputs(recipe))


def digest_of(meaning: dict[str, Any], sources: dict[str, str]) -> str:
    """The digest from `semantic` and `inputs` that are already known."""
    return hashlib.sha256(canonical({"recipe": meaning, "inputs": sources})).hexdigest()


def inputs(recipe: Work, made: Container[str] = ()) -> dict[str, str]:
    """Every input by name, with a fingerprint of its content; hub names stand for themselves with their revision. made:
    names that are left out, since they are still to be made.

    Raises DataError, RecipeError or ModelError when one of them is missing, unreadable or an unfinished run.
    """
    found: dict[str, str] = {}
    for source in recipe.data_read():
        if source.path not in made:
            found[source.path] = _data(source)
    for name, revision in recipe.models_read():
        if name not in made:
            found.update(_model(name, revision))
    for text in recipe.texts_read():
        if is_file(text):
            found[text] = _file(Path(text))
    for i, reward in enumerate(recipe.rewards_read()):
        if reward.run is not None and reward.run not in made:
            found.update(_model(reward.run, None))
        if reward.function is not None:
            path = function_file(reward.function, f"rewards.{i}.function")
            found[reward.function.rpartition(":")[0]] = _file(path)
    return found


def is_file(text: str) -> bool:
    """Whether a setting that is a file name or the text itself names an existing file."""
    try:
        return "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):
        return False


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per dotted key whose value differs, `key: old -> new`, in the order of the keys."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in keys
        if _shown(before, key) != _shown(after, key)
    ]


def _model(name: str, revision: str | None, above: tuple[str, ...] = ()) -> dict[str, str]:
    """Fingerprints of a model, its tokenizer and, for an adapter, its base."""
    if name in above:
        raise ModelError("is an adapter whose base is itself", where=name, hint="name the full model as its base")
    found = resolve_model(name)
    if found.weights is None:
        return {name: f"hub:{name}@{revision or 'main'}"}
    if revision is not None:
        raise RecipeError(
            "is only read of hub models, and this is a folder", f"model.revision of {name}", "leave it out"
        )
    weights = fingerprint(found.weights)
    result = {name: weights if found.run is None else f"run:{found.run.get('digest')} {weights}"}
    tokenizer = [[n, sha256(found.weights / n)] for n in _TOKENIZER if (found.weights / n).is_file()]
    if tokenizer:
        result[f"{name} tokenizer"] = f"sha256:{hashlib.sha256(canonical(tokenizer)).hexdigest()}"
    if found.kind == "adapter" and found.base is not None:
        result.update(_model(found.base, None, (*above, name)))
    return result


def _data(source: SourceSettings) -> str:
    """Fingerprint of a data source: a file, a folder of files, or the name of a hub data set."""
    path = Path(source.path).expanduser()
    path = product_of(path) or path
    if path.is_file():
        return _file(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        content = [[p.relative_to(path).as_posix(), _file(p)] for p in files]
        return f"sha256:{hashlib.sha256(canonical(content)).hexdigest()}"
    hub = re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", source.path)
    file_like = re.search(r"\.(jsonl|json|parquet|txt|csv|gz)$", source.path)
    if hub is None or file_like or (len(path.parts) == 2 and path.parent.is_dir()):
        raise DataError("no such file or folder", where=source.path, hint=similar(path))
    return f"hub:{source.path}/{source.name or 'default'}/{source.split}"


def _file(path: Path) -> str:
    try:
        return f"sha256:{sha256(path)}"
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists with their dotted keys."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list) or not value:
        yield prefix, value
    for key, inner in entries:
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "(absent)"
