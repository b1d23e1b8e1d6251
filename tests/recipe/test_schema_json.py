"""recipes/schema.json is what `rlhf schema` prints, and it says what the models say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.catalog import objectives_of
from rlhf_cli.cli.tools import schema_text
from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.jsonschema import json_schema
from rlhf_cli.recipe.schema import RECIPES

FILE = Path(__file__).parents[2] / "recipes" / "schema.json"


def test_the_file_is_fresh() -> None:
    assert FILE.read_text(encoding="utf-8") == schema_text(None) + "\n", "run: rlhf schema > recipes/schema.json"


def references(part: Any) -> set[str]:
    if isinstance(part, dict):
        own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return own.union(*map(references, part.values()))
    return set().union(*map(references, part)) if isinstance(part, list) else set()


@pytest.mark.parametrize("stage", [None, *RECIPES])
def test_every_reference_is_defined(stage: str | None) -> None:
    schema = json_schema(stage)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}
    assert "Recipe" not in schema["$defs"]


def test_one_branch_for_each_stage() -> None:
    schema = json_schema()
    assert schema["properties"]["stage"]["enum"] == list(RECIPES)
    branches = {branch["if"]["properties"]["stage"]["const"]: branch["then"]["$ref"] for branch in schema["allOf"]}
    assert branches == {stage: f"#/$defs/{model.__name__}" for stage, model in RECIPES.items()}


def test_docstrings_bounds_and_short_forms() -> None:
    schema = json_schema("dpo")
    training = schema["$defs"]["TrainingSettings"]
    assert training["properties"]["learning_rate"] == {
        "description": "Peak learning rate.", "exclusiveMinimum": 0, "maximum": 1e15, "type": "number"
    }  # fmt: skip
    assert training["additionalProperties"] is False
    assert training["required"] == ["learning_rate"]
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert {"type": "string"} in schema["$defs"]["DataSettings"]["properties"]["train"]["anyOf"]
    members = [member["$ref"] for member in schema["properties"]["objective"]["oneOf"]]
    assert members == [*(f"#/$defs/{entry.name}_block" for entry in objectives_of("dpo")), "#/$defs/dpo_mix"]
    assert "title" not in json.dumps(schema["$defs"])


def test_an_unknown_stage() -> None:
    with pytest.raises(RecipeError, match="no command is called 'dppo'"):
        schema_text("dppo")


@pytest.mark.parametrize("stage", RECIPES)
def test_every_number_has_a_largest(stage: str) -> None:
    """Beyond it what is computed with it would overflow."""

    def unbounded(node: Any, path: str) -> list[str]:
        if isinstance(node, list):
            return [found for part in node for found in unbounded(part, path)]
        if not isinstance(node, dict):
            return []
        own = node.get("type") == "number" and not {"maximum", "exclusiveMaximum"} & node.keys()
        return [path] * own + [found for key, part in node.items() for found in unbounded(part, f"{path}.{key}")]

    assert unbounded(RECIPES[stage].model_json_schema(), stage) == []
