"""Where a run comes from, for run.json: the runs before it, and what its base and its data declare. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.model_path import read_json, resolve_model
from rlhf_cli.recipe.settings.data import SourceSettings
from rlhf_cli.runs.licence import Declared, is_hub_id, of

_FURTHEST = 100
"""Runs that a chain may have."""


def about(model: str, revision: str | None, license_: str | None, sources: list[SourceSettings]) -> dict[str, Any]:
    """What run.json says of licences, languages and earlier runs.

    Args:
        model: as the recipe names it: a run, a folder or a hub id.
        revision: of a hub id.
        license_: of the result, where the recipe gives one.
        sources: of the data.
    """
    found = resolve_model(model)
    base = _inherited(found.run) if found.run is not None else _declared(found.base or model, revision, found.weights)
    paths = dict.fromkeys(source.path for source in sources)
    return {
        "license": license_,
        "base_license": base.license,
        "base_language": list(base.language),
        "data_licenses": {path: of(path, "dataset").license for path in paths},
        "hub_data": [path for path in paths if is_hub_id(path)],
        "ancestry": [] if found.run is None else [*_before(found.run), _entry(model, found.run)],
    }


def _declared(name: str, revision: str | None, weights: Path | None) -> Declared:
    """Of a model that is no run; of an adapter by what is declared beside it, else by its base."""
    own = Declared() if weights is None else of(str(weights), "model")
    return own if own.license is not None else of(name, "model", revision)


def _inherited(run: dict[str, Any]) -> Declared:
    """What a run's result is under: its own licence, else that of its base."""
    if "base_license" in run:
        language = run.get("base_language") or []
        return Declared(run.get("license") or run["base_license"], tuple(map(str, language)))
    base = (run.get("lineage") or {}).get("base") or {}
    return of(str(base.get("name", "")), "model")


def _before(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs before a run, the first one first; those that are gone from the disk are left out."""
    if "ancestry" in run:
        return list(run["ancestry"])
    found: list[dict[str, Any]] = []
    while len(found) < _FURTHEST:
        parents = (run.get("lineage") or {}).get("parents") or []
        if not parents:
            break
        name = str(parents[0].get("name"))
        try:
            run = read_json(Path(name).expanduser() / "run.json")
        except ModelError:
            found.insert(0, {"name": name, "stage": None, "objective": None, "base": None, "digest": None})
            break
        found.insert(0, _entry(name, run))
    return found


def _entry(name: str, run: dict[str, Any]) -> dict[str, Any]:
    recipe = run.get("recipe") or {}
    objective = recipe.get("objective") or {}
    terms = objective.get("terms") or [objective]
    return {
        "name": name,
        "stage": run.get("stage"),
        "objective": " + ".join(str(term["name"]) for term in terms if term.get("name")) or None,
        "base": ((run.get("lineage") or {}).get("base") or {}).get("name"),
        "digest": run.get("digest"),
    }
