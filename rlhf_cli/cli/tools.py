"""The commands that train nothing: schema, list, env, check. Torch only where `env` asks for the devices."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_cli.catalog import (
    CONTROLLERS,
    ESTIMATORS,
    OBJECTIVES,
    REWARDS,
    SELECTIONS,
    STAGES,
    Entry,
    Objective,
    Selection,
)
from rlhf_cli.catalog.explain import Named, settings_of
from rlhf_cli.cli.explain import name_lines, offers
from rlhf_cli.errors import DataError, ModelError, Problem, RecipeError, RlhfError

USUAL = ("demonstration", "comparison")
"""Kinds of data that `rlhf list` does not mention."""


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
        "objectives": [
            _plain(o) | {"stage": o.stage, "data": o.data, "needs": list(o.needs), "head": o.head}
            for o in OBJECTIVES.values()
        ],
        "estimators": [
            _plain(e) | {"critic": e.critic, "group": e.group, "greedy": e.greedy} for e in ESTIMATORS.values()
        ],
        "controllers": [_plain(c) for c in CONTROLLERS.values()],
        "rules": [_plain(r) | {"reads": r.reads} for r in REWARDS.values()],
        "selections": [_plain(s) | {"gives": s.gives, "scored": s.scored} for s in SELECTIONS.values()],
    }


def _plain(entry: Named | Selection) -> dict[str, Any]:
    settings = [asdict(setting) for setting in settings_of(entry.settings)]
    return {"name": entry.name, "help": entry.help, "settings": settings}


def catalogue_lines() -> list[str]:
    """The catalogue for people: a line for each name, below its command; folded only where a terminal shows it."""
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else 1000
    lines: list[str] = []
    for stage in STAGES.values():
        lines += [f"rlhf {stage.name}: {stage.help}"]
        for title, entries in offers(stage).items():
            lines += [f" {title}"] if title != "objectives" else []
            lines += name_lines({e.name: f"{e.help}{_unusual(e)}" for e in entries}, width)
        lines += [""]
    return [*lines, "`rlhf explain NAME` shows formula, settings, data and source."]


def _unusual(entry: Entry) -> str:
    """The data of an objective, where it is not what most of its command read."""
    return f" [{entry.data}]" if isinstance(entry, Objective) and entry.data not in USUAL else ""


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


# --- eval ------------------------------------------------------------------------------------------------


def figures(path: Path) -> str:
    """The figures of a finished evaluation, as they lie in its run directory. Raises ModelError."""
    from rlhf_cli.recipe.model_path import read_json
    from rlhf_cli.report.evaluation import FIGURES

    return json.dumps(read_json(path / FIGURES), indent=2, ensure_ascii=False)


# --- check -----------------------------------------------------------------------------------------------


def is_change(word: str) -> bool:
    """Whether a word among recipes is an override, KEY.PATH=VALUE, and no file."""
    return re.match(r"[\w.]+=", word) is not None and not Path(word).exists()


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


def watch_garbage() -> None:
    """The imports are done, if this process put garbage collection off for them: what they made stays for good, so no
    later collection needs to walk through it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
