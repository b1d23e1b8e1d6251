"""Figures about a finished model.

1. Read which kind of model it is, and refuse what the recipe asks that does not fit it;
2. reward models: scores of completions that are judged already (stages/bench.py);
3. language models: perplexity, completions with their scores and the KL, matches against others (stages/language.py);
4. eval.json, the same as lines and as report.html.
"""

from __future__ import annotations

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models.base import MODELS, check_length, load_text
from rlhf_cli.models.build import kind_of
from rlhf_cli.models.levers import check_levers
from rlhf_cli.recipe.evaluation import JUDGED, SPOKEN, EvalRecipe
from rlhf_cli.recipe.model_path import Kept
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import bench, language

STEPPED = ("step_labels", "two_token")
"""Objectives of process reward models."""


def run(recipe: EvalRecipe, run: Run, display: Display, options: Options) -> None:
    """Evaluate a model. Raises RlhfError."""
    text = load_text(recipe.model, "policy", "reward", "cost", "process")
    trained = recipe.trained()
    objective = trained.get("objective", {})
    kind: Kept = "process" if objective.get("name") in STEPPED else kind_of(text)
    if kind == "process" and objective.get("name") not in STEPPED:
        raise ModelError(
            "is a classifier of tokens, and no run of `rlhf train-rm` with objective "
            f"{' or '.join(STEPPED)} says how its steps end and what its classes mean", recipe.model.name_or_path,
            "name such a run",
        )  # fmt: skip
    refuse(recipe, kind)
    check_length(text, recipe.data.max_length, "data.max_length")
    if recipe.rollout.engine != "vllm":
        check_levers(recipe.model, text.source)
    if kind == "policy":
        language.run(recipe, text, run, display, options)
    else:
        bench.run(recipe, text, kind, trained, run, display, options)


def refuse(recipe: EvalRecipe, kind: Kept) -> None:
    """RecipeError for keys that do not fit this kind of model."""
    name = recipe.model.name_or_path
    read = {"policy": SPOKEN, "process": ("steps",)}.get(kind, tuple(key for key in JUDGED if key != "steps"))
    wrong = [f"data.{key}" for key in recipe.data.given() if key not in read]
    if kind != "policy":
        wrong += list(recipe.changed("against", "judge", "reference", "rewards", "rollout"))
    hint = f"it is evaluated on {', '.join(f'data.{key}' for key in read)}"
    if wrong:
        raise RecipeError(f"not for {name}: this is {MODELS[kind]}", ", ".join(wrong), hint)
