"""Recipes of which some go on from runs that others make. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.errors import Problem, RecipeError
from rlhf_cli.recipe.glance import run_of

if TYPE_CHECKING:
    from rlhf_cli.recipe.work import Work


def runs_named(recipe: Work) -> list[str]:
    """What a recipe reads that may be a run."""
    named = [source.path for source in recipe.data_read()] + [name for name, _ in recipe.models_read()]
    return named + [reward.run for reward in recipe.rewards_read() if reward.run is not None]


def makers_of(recipes: Mapping[str, Work]) -> dict[str, str]:
    """Each run with the recipe that makes it."""
    return {os.path.normpath(recipe.output_dir): path for path, recipe in recipes.items()}


def still_to_be_made(recipe: Work, path: str, makers: Mapping[str, str]) -> dict[str, str]:
    """The runs that a recipe names and that are not finished, each with the other recipe that makes it."""
    named = [name for name in runs_named(recipe) if not (Path(name) / "DONE").is_file()]
    found = {name: makers.get(os.path.normpath(name), path) for name in named}
    return {name: maker for name, maker in found.items() if maker != path}


def refused(recipes: Mapping[str, Work]) -> tuple[list[RecipeError], set[str]]:
    """What is wrong with recipes as a chain, and which they are: two that make one run, or a circle."""
    errors: list[RecipeError] = []
    wrong: set[str] = set()
    first: dict[str, str] = {}
    for path, recipe in recipes.items():
        other = first.setdefault(os.path.normpath(recipe.output_dir), path)
        if other != path and not os.path.samefile(other, path):
            errors.append(RecipeError(f"{other} makes it too: output_dir {recipe.output_dir}", path,
                                      "give each an output_dir of its own"))  # fmt: skip
            wrong |= {other, path}
    makers = makers_of(recipes)
    needs = {
        path: sorted({makers.get(os.path.normpath(name), path) for name in runs_named(recipe)} - {path})
        for path, recipe in recipes.items()
    }
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        errors.append(RecipeError(f"{', which reads the run of '.join(circle)}", "a circle of recipes",
                                  "let one of them start from something else"))  # fmt: skip
        wrong |= set(circle)
    return errors, wrong


def with_maker(problem: Problem, recipe: Work, path: str) -> Problem:
    """The same; where it is about a run that is not there, with the recipe beside this one that makes it."""
    name = problem.where
    if name not in runs_named(recipe) or os.path.lexists(name):
        return problem
    beside = sorted(p for ending in ("*.yaml", "*.yml") for p in Path(path).parent.glob(ending))
    for other in beside:
        run = run_of(other)
        if run is not None and os.path.normpath(run) == os.path.normpath(name) and other != Path(path):
            return replace(problem, hint=f"made by {other}: run that first, or check both together")
    return problem
