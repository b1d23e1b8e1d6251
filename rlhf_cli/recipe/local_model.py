"""What a local model folder says of itself in plain files, before a library reads it. No torch."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.recipe.model_path import ModelPath, read_json, resolve_model
from rlhf_cli.recipe.work import Work

CONTEXT = ("max_position_embeddings", "n_positions")
"""Where a config.json may say how many tokens fit."""
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")
"""Where a template may lie beside the tokenizer; others stand in its tokenizer_config.json."""


@dataclass(frozen=True)
class Told:
    """What is known of a model; None: not told there, or only on the hub."""

    context: int | None = None
    """Tokens."""
    template: bool | None = None
    """Whether its tokenizer has a chat template."""


def look(name_or_path: str) -> Told:
    """What a folder or a run tells. Raises ModelError as `resolve_model` does."""
    path = resolve_model(name_or_path, weights=False)
    return Told(_context(path), _template(path))


def told_of(recipe: Work, made: Container[str] = ()) -> Told:
    """What the model of a recipe tells; nothing of one that is still to be made (`made`), or that is not there, which
    is said where the inputs of the recipe are looked up."""
    model = getattr(recipe, "model", None)
    if model is None or model.name_or_path in made:
        return Told()
    try:
        told = look(model.name_or_path)
    except ModelError:
        return Told()
    return told if model.chat_template is None else Told(told.context)


def check_room(recipe: Work, made: Container[str] = ()) -> None:
    """RecipeError when data.max_length is more than the model's folder says it has room for."""
    told, longest = told_of(recipe, made), getattr(getattr(recipe, "data", None), "max_length", None)
    if told.context is not None and longest is not None and longest > told.context:
        raise RecipeError(f"{longest} tokens are asked of a model with a context of {told.context}", "data.max_length",
                          f"lower it to {told.context} or less")  # fmt: skip


def _context(path: ModelPath) -> int | None:
    """By the configuration of the base, where the weights are an adapter."""
    if path.kind == "adapter" and path.base is not None and path.base != path.name:
        path = resolve_model(path.base, weights=False)
    if path.weights is None or not (path.weights / "config.json").is_file():
        return None
    config = read_json(path.weights / "config.json")
    inner: Any = config.get("text_config")
    found = [part.get(key) for part in (config, inner) if isinstance(part, dict) for key in CONTEXT]
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def _template(path: ModelPath) -> bool | None:
    settings = None if path.weights is None else path.weights / "tokenizer_config.json"
    if path.weights is None or settings is None or not settings.is_file():
        return None
    return any((path.weights / name).exists() for name in TEMPLATES) or bool(read_json(settings).get("chat_template"))
