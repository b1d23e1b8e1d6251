"""Which keys the schema knows, and where: the ground of the hints. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from rlhf_cli.recipe.schema import RECIPES
from rlhf_cli.recipe.tree import Node, Path, entries
from rlhf_cli.recipe.work import Work


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation may hold, through lists, unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from models_in(part)


def model_at(recipe: type[Work], root: Node, path: Path) -> type[BaseModel] | None:
    """The model that describes the mapping at that path; None where the schema has none."""
    models: list[type[BaseModel]] = [recipe]
    node = root
    for step in path:
        if isinstance(step, int):
            node = node.value[step] if isinstance(node.value, list) else node
            continue
        model = _chosen(models, node)
        field = model.model_fields.get(step) if model else None
        models = list(models_in(field.annotation)) if field else []
        node = entries(node)[step]
    return _chosen(models, node)


def _chosen(models: list[type[BaseModel]], node: Node) -> type[BaseModel] | None:
    written = entries(node)
    name = written.get("name")
    for model in models:
        known = model.model_fields.get("name")
        if len(models) == 1 or (known is None and "terms" in written):
            return model
        if known is not None and (name.value in get_args(known.annotation) if name else not known.is_required()):
            return model
    return None


def known_at(recipe: type[Work], root: Node, path: Path) -> list[str]:
    """The keys that the mapping at that path may have."""
    model = model_at(recipe, root, path)
    return list(model.model_fields) if model else []


@cache
def blocks_of(stage: str) -> dict[str, tuple[str, ...]]:
    """Every key of a stage's recipe -> the blocks it may stand in ('' is the top), each once, in schema order."""
    blocks: dict[str, list[str]] = {}
    _collect(RECIPES[stage], "", blocks)
    return {key: tuple(dict.fromkeys(where)) for key, where in blocks.items()}


def _collect(model: type[BaseModel], block: str, blocks: dict[str, list[str]]) -> None:
    for key, field in model.model_fields.items():
        blocks.setdefault(key, []).append(block)
        for inner in models_in(field.annotation):
            _collect(inner, f"{block}.{key}".lstrip("."), blocks)


def stages_with(key: str, block: str | None = None) -> list[str]:
    """The commands whose recipes know the key (in that block)."""
    return [stage for stage in RECIPES if key in blocks_of(stage) and (block is None or block in blocks_of(stage)[key])]
