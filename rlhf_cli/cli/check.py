"""`rlhf check`: recipes with their data and places, before any model is loaded. No torch.

Recipes that are given together may be a chain: a run that one of them makes need not be there yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.cli.tools import together
from rlhf_cli.errors import RlhfError

if TYPE_CHECKING:
    from rlhf_cli.recipe.work import Work


def check_all(paths: Sequence[str], overrides: Sequence[str], command: str, say: Callable[[str], None]) -> None:
    """Say a line of each recipe that is fit; raises one RlhfError with what is wrong with the others."""
    from rlhf_cli.recipe.reader import read_recipe

    errors: list[RlhfError] = []
    recipes: dict[str, Work] = {}
    for path in paths:
        try:
            recipes[path] = read_recipe(path, overrides, None)
        except RlhfError as error:
            errors.append(error)
    makers = {os.path.normpath(recipe.output_dir): path for path, recipe in recipes.items()}
    for path, recipe in recipes.items():
        try:
            say(f"{path}: fit for rlhf {recipe.stage}; {'; '.join(_check(recipe, path, makers, command))}")
        except RlhfError as error:
            errors.append(error)
    if errors:
        raise together(errors)


def _check(recipe: Work, path: str, makers: Mapping[str, str], command: str) -> list[str]:
    """Lines about a recipe, its data and its run directory. Raises one error with all that is wrong."""
    from rlhf_cli.recipe.inherit import inherit_adapter

    made = still_to_be_made(recipe, path, makers)
    lines = [f"{name} is made by {maker}" for name, maker in made.items()]
    whole = recipe
    if made.keys().isdisjoint(name for name, _ in recipe.models_read()):
        whole = inherit_adapter(recipe)
    found: list[RlhfError] = []
    for check in (_room, _data, _place):
        try:
            lines += check(whole, frozenset(made), command)
        except RlhfError as error:
            found.append(_named(error, path))
    if found:
        raise together(found)
    return lines


def still_to_be_made(recipe: Work, path: str, makers: Mapping[str, str]) -> dict[str, str]:
    """The runs that a recipe names and that are not finished, each with the other recipe that makes it."""
    named = [source.path for source in recipe.data_read()] + [name for name, _ in recipe.models_read()]
    named += [reward.run for reward in recipe.rewards_read() if reward.run is not None]
    found = {name: makers.get(os.path.normpath(name), path) for name in named if not (Path(name) / "DONE").is_file()}
    return {name: maker for name, maker in found.items() if maker != path}


def _room(recipe: Work, made: frozenset[str], command: str) -> list[str]:
    """Nothing, when the model has room for the lengths that are asked for."""
    from rlhf_cli.recipe.local_model import check_room

    check_room(recipe, made)
    return []


def _data(recipe: Work, made: frozenset[str], command: str) -> list[str]:
    """What its rows are."""
    from rlhf_cli.data.prepare import check_data

    return check_data(recipe, made)


def _place(recipe: Work, made: frozenset[str], command: str) -> list[str]:
    """What running it would do with its run directory."""
    from rlhf_cli.runs.decide import check_ahead
    from rlhf_cli.runs.directory import Run

    if made:
        check_ahead(recipe, made)
        return ["to be run after that"]
    run = Run.open(recipe, command, "auto")
    run.close()
    return [{"fresh": "new run", "resume": "run to be resumed", "done": "up to date"}[run.status]]


def _named(error: RlhfError, path: str) -> RlhfError:
    """The same error, its problems placed in the recipe that was checked."""
    places = [f"{path}: {problem.where}" if problem.where else path for problem in error.problems]
    return type(error)([replace(problem, where=place) for problem, place in zip(error.problems, places, strict=True)])
