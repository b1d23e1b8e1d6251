"""What run.json says: from what a run was begun, by which command and versions, and each time that it went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.lineage import differences
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.runs import provenance
from rlhf_cli.runs.decide import Identity

SCHEMA = 1


def entry(command: str) -> dict[str, Any]:
    """Of a start, the first or a later one."""
    return {"command": command, "started": provenance.now(), "versions": provenance.versions()}


def started(
    stage: str, identity: Identity, lineage: dict[str, Any], about: dict[str, Any], first: dict[str, Any]
) -> dict[str, Any]:
    """Of a new run. about: what its stage says besides."""
    return {
        "schema": SCHEMA,
        "stage": stage,
        "role": lineage.get("role", "reward" if stage == "train-rm" else "policy"),
        "digest": identity.digest,
        "recipe": identity.meaning,
        "inputs": identity.sources,
        "lineage": lineage,
        **about,
        **first,
        "hardware": provenance.hardware(),
    }


def resumed(path: Path, lineage: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Of a run that goes on: it keeps its own and notes the resumption. Raises ModelError for other models."""
    own = read_json(path / "run.json")
    changed = differences(own.get("lineage", {}), lineage)
    if changed:
        raise ModelError(
            f"the models are not those the run started with: {'; '.join(changed)}", str(path),
            "restore them, or archive the run with --resume never",
        )  # fmt: skip
    return own | {"resumed": [*own.get("resumed", []), again]}
