"""The schema of recipes as JSON Schema, for editors. No torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rlhf_cli.recipe.schema import RECIPES

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(stage: str | None = None) -> dict[str, Any]:
    """The schema of one command's recipes; with None one schema for all, which `stage:` tells apart."""
    models: list[type[BaseModel]] = [RECIPES[stage]] if stage else list(RECIPES.values())
    _, shared = models_json_schema([(model, "validation") for model in models])
    definitions = {name: _tidy(body) for name, body in shared["$defs"].items()}
    head: dict[str, Any] = {"$schema": DIALECT, "title": f"rlhf {stage} recipe" if stage else "rlhf recipe"}
    if stage:
        return head | definitions.pop(RECIPES[stage].__name__) | {"title": head["title"], "$defs": definitions}
    return head | {
        "type": "object",
        "required": ["stage"],
        "properties": {"stage": {"enum": list(RECIPES), "description": "The command this recipe is for."}},
        "allOf": [_branch(name, model) for name, model in RECIPES.items()],
        "$defs": definitions,
    }


def _branch(stage: str, model: type[BaseModel]) -> dict[str, Any]:
    condition = {"properties": {"stage": {"const": stage}}, "required": ["stage"]}
    return {"if": condition, "then": {"$ref": f"#/$defs/{model.__name__}"}}


def _tidy(part: Any, names: bool = False) -> Any:
    """Without generated titles, and with descriptions on one line. `names`: the keys are names of the recipe's keys."""
    if isinstance(part, list):
        return [_tidy(item) for item in part]
    if not isinstance(part, dict):
        return part
    tidy = {key: _tidy(value, key == "properties") for key, value in part.items() if names or key != "title"}
    if not names and isinstance(tidy.get("description"), str):
        tidy["description"] = " ".join(tidy["description"].split())
    return tidy
