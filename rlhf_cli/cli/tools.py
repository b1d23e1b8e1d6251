"""The commands that train nothing: schema, list, env, check. Torch only where `env` asks for the devices."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf_cli.catalog import CONTROLLERS, ESTIMATORS, OBJECTIVES, STAGES, Controller, Entry, Estimator, Objective
from rlhf_cli.errors import DataError, ModelError, Problem, RecipeError, RlhfError


def schema_text(stage: str | None) -> str:
    """JSON Schema of the recipes of a command, or of all. Raises RecipeError for an unknown command."""
    from rlhf_cli.catalog import look_up
    from rlhf_cli.recipe.jsonschema import json_schema

    if stage is not None:
        look_up("command", STAGES, stage)
    return json.dumps(json_schema(stage), indent=2, ensure_ascii=False)


# --- list ------------------------------------------------------------------------------------------------


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """The catalogue as plain data."""
    return {
        "stages": [{"name": s.name, "help": s.help} for s in STAGES.values()],
        "objectives": [_objective(o) for o in OBJECTIVES.values()],
        "estimators": [{"name": e.name, "help": e.help, "critic": e.critic, "settings": _settings(e)}
                       for e in ESTIMATORS.values()],
        "controllers": [{"name": c.name, "help": c.help, "settings": _settings(c)} for c in CONTROLLERS.values()],
    }  # fmt: skip


def _objective(entry: Objective) -> dict[str, Any]:
    head = {"name": entry.name, "help": entry.help, "stage": entry.stage, "data": entry.data}
    return head | {"needs": list(entry.needs), "settings": _settings(entry)}


def _settings(entry: Objective | Estimator | Controller) -> list[dict[str, Any]]:
    return [
        {"name": name, "default": field.default, "help": " ".join((field.description or "").split())}
        for name, field in entry.settings.model_fields.items()
    ]


def catalogue_lines() -> list[str]:
    """The catalogue for people."""
    lines: list[str] = []
    tables: dict[str, Sequence[Entry]] = {
        "commands": list(STAGES.values()),
        "objectives": list(OBJECTIVES.values()),
        "advantage estimators": list(ESTIMATORS.values()),
        "KL controllers": list(CONTROLLERS.values()),
    }
    for title, entries in tables.items():
        lines += ["", title] if lines else [title]
        for entry in entries:
            lines.append(f"  {entry.name:<14} {entry.help}{_belongs(entry)}")
            if isinstance(entry, Objective | Estimator | Controller):
                lines += [f"    {s['name']} = {json.dumps(s['default'])}: {s['help']}" for s in _settings(entry)]
    return lines


def _belongs(entry: Entry) -> str:
    if not isinstance(entry, Objective):
        return ""
    needs = f", needs {' and '.join(entry.needs)}" if entry.needs else ""
    return f" [rlhf {entry.stage}, {entry.data} data{needs}]"


# --- env -------------------------------------------------------------------------------------------------


def environment_lines() -> list[str]:
    """Versions, processors, memory and devices. Imports torch."""
    import torch

    from rlhf_cli.runs.provenance import hardware, versions

    machine = hardware()
    lines = [f"{name} {number}" for name, number in versions().items()]
    lines.append(f"{machine['system']} {machine['machine']}, {machine['cpus']} processors, {_gib(machine['memory'])}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        bfloat = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        lines.append(f"cuda:{index} {gpu.name}, {_gib(gpu.total_memory)}, capability {gpu.major}.{gpu.minor}, {bfloat}")
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU")
    if not torch.cuda.is_available():
        lines.append("no CUDA device: training runs on the processor")
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


# --- check -----------------------------------------------------------------------------------------------


def check_one(path: str, overrides: Sequence[str], command: str) -> str:
    """Check a recipe, its data and its run directory, loading no model. Returns a line; raises what is wrong."""
    from rlhf_cli.data.prepare import check_data
    from rlhf_cli.recipe.inherit import inherit_adapter
    from rlhf_cli.recipe.reader import read_recipe
    from rlhf_cli.runs.directory import Run

    recipe = inherit_adapter(read_recipe(path, overrides, None))
    found: list[RlhfError] = []
    lines: list[str] = []
    try:
        lines += check_data(recipe)
    except RlhfError as error:
        found.append(_named(error, path))
    try:
        run = Run.open(recipe, command, "auto")
        run.close()
        lines.append({"fresh": "new run", "resume": "run to be resumed", "done": "up to date"}[run.status])
    except RlhfError as error:
        found.append(_named(error, path))
    if found:
        raise together(found)
    return f"{path}: fit for rlhf {recipe.stage}; {'; '.join(lines)}"


def _named(error: RlhfError, path: str) -> RlhfError:
    """The same error, its problems placed in the recipe that was checked."""
    places = [f"{path}: {problem.where}" if problem.where else path for problem in error.problems]
    return type(error)([replace(problem, where=place) for problem, place in zip(error.problems, places, strict=True)])


def together(errors: Sequence[RlhfError]) -> RlhfError:
    """One error with all problems, one for each place, and the worst exit code."""
    problems: dict[str, Problem] = {}
    for problem in (problem for error in errors for problem in error.problems):
        problems.setdefault(problem.where or problem.message, problem)
    worst = max(errors, key=lambda error: error.exit_code)
    kinds = {kind.exit_code: kind for kind in (RecipeError, DataError, ModelError)}
    return kinds.get(worst.exit_code, RlhfError)(problems.values())


def silence_stdout() -> None:
    """Send what is still to be written to a reader who left to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
