"""What a recipe takes over from the LoRA run it goes on from. No torch."""

from __future__ import annotations

from typing import Any

from rlhf_cli.errors import Problem, RecipeError
from rlhf_cli.recipe.model_path import read_json, resolve_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.settings.model import LoraSettings
from rlhf_cli.recipe.work import Work


def inherit_adapter(recipe: Work) -> Any:
    """The recipe with the shape of the adapter it goes on training; another recipe is given back as it is.

    Keys of `lora` that are left out are taken from the adapter, so that the resolved recipe says what is used; only the
    dropout may differ. Raises RecipeError for keys that contradict the adapter, or when `lora` is null; ModelError when
    the model cannot be found.
    """
    if not isinstance(recipe, Recipe):
        return recipe
    path = resolve_model(recipe.model.name_or_path, weights=False)  # those are looked for when they are read
    if path.kind != "adapter" or path.weights is None:
        return recipe
    if recipe.lora is None:
        raise RecipeError(
            f"{path.name} is a LoRA adapter, and lora is null", "lora", "add `lora: {}` to go on training it"
        )
    have, before = _shape(read_json(path.weights / "adapter_config.json")), _asked(path.run)
    said = {key: getattr(recipe.lora, key) for key in recipe.lora.model_fields_set}
    problems = [
        Problem(f"{wanted} is asked, but the adapter in {path.name} has {have[key]}", f"lora.{key}",
                f"write {have[key]}, or leave the key out")
        for key, wanted in sorted(said.items())
        if key != "dropout" and _plain(wanted) != _plain(have[key]) and wanted != before.get(key)
    ]  # fmt: skip
    if problems:
        raise RecipeError(problems)
    return recipe.model_copy(
        update={"lora": LoraSettings(**(have | {k: v for k, v in said.items() if k == "dropout"}))}
    )


def _shape(stored: dict[str, Any]) -> dict[str, Any]:
    """Our keys for peft's."""
    modules = stored.get("target_modules")
    return {
        "r": stored.get("r"),
        "alpha": float(stored.get("lora_alpha", 0)),
        "dropout": float(stored.get("lora_dropout", 0)),
        "target_modules": sorted(modules) if isinstance(modules, list) else modules,
        "use_dora": bool(stored.get("use_dora", False)),
        "use_rslora": bool(stored.get("use_rslora", False)),
    }


def _asked(run: dict[str, Any] | None) -> dict[str, Any]:
    """The `lora` block of the run that made the adapter: `all-linear` there became a list of names."""
    return ((run or {}).get("recipe") or {}).get("lora") or {}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
