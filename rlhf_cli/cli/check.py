"""`rlhf check`: recipes with their data and places, before any model is loaded. No torch.

Recipes that are given together may be a chain: a run that one of them makes need not be there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_cli.cli.chain import makers_of, refused, still_to_be_made, with_maker
from rlhf_cli.cli.tools import together
from rlhf_cli.errors import ModelError, RlhfError

if TYPE_CHECKING:
    from rlhf_cli.recipe.work import Work


def check_all(paths: Sequence[str], overrides: Sequence[str], command: str, say: Callable[[str], None]) -> None:
    """Say a line of each recipe that is fit, and one of each of its warnings; raises one RlhfError with what is wrong
    with the others."""
    from rlhf_cli.recipe.reader import read_recipe

    errors: list[RlhfError] = []
    recipes: dict[str, Work] = {}
    for path in paths:
        try:
            recipes[path] = read_recipe(path, overrides, None)
        except RlhfError as error:
            errors.append(error)
    wrong, unfit = refused(recipes)
    errors += wrong
    makers = makers_of(recipes)
    for path, recipe in recipes.items():
        try:
            lines = _check(recipe, path, makers, command)
            if path in unfit:
                continue
            warnings = [line for line in lines if line.startswith("warning: ")]
            say(f"{path}: fit for rlhf {recipe.stage}; {'; '.join(line for line in lines if line not in warnings)}")
            for line in warnings:
                say(f"{path}: {line}")
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
    found: list[RlhfError] = []
    if made.keys().isdisjoint(name for name, _ in recipe.models_read()):
        try:
            whole = inherit_adapter(recipe)
        except RlhfError as error:
            found.append(_named(error, recipe, path))
    for check in (_room, _hub, _principles, _data, _place):
        try:
            lines += check(whole, frozenset(made), command)
        except RlhfError as error:
            found.append(_named(error, recipe, path))
    if found:
        raise together(found)
    return lines


def _hub(recipe: Work, made: frozenset[str], command: str) -> list[str]:
    """The models that no folder here holds."""
    from rlhf_cli.recipe.model_path import resolve_model

    names = [name for name, _ in recipe.models_read()]
    names += [reward.run for reward in recipe.rewards_read() if reward.run is not None]
    found = []
    for name in dict.fromkeys(name for name in names if name not in made):
        with suppress(ModelError):  # said where the inputs are looked up
            if resolve_model(name, weights=False).source == "hub":
                found.append(f"{name}: taken as a hub id, not looked up")
    return found


def _principles(recipe: Work, made: frozenset[str], command: str) -> list[str]:
    """Nothing, when the principles that it names are there."""
    from rlhf_cli.recipe.principles import check_principles

    check_principles(recipe)
    return []


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
    """What running it would do with its run directory; for that, the keys of its servers must be in the environment."""
    from rlhf_cli.rollouts.server import check_keys
    from rlhf_cli.runs.decide import check_ahead, up_to_date
    from rlhf_cli.runs.directory import Run

    if made:
        check_ahead(recipe, made)
        check_keys(recipe)
        return ["to be run after that"]
    run = Run.open(recipe, command, "auto")
    run.close()
    if run.status == "done":
        return [up_to_date(run.path, recipe.max_steps)]
    check_keys(recipe)
    return ["new run" if run.status == "fresh" else "run to be resumed"]


def _named(error: RlhfError, recipe: Work, path: str) -> RlhfError:
    """The same error, its problems placed in the recipe that was checked."""
    problems = [with_maker(problem, recipe, path) for problem in error.problems]
    return type(error)([replace(p, where=f"{path}: {p.where}" if p.where else path) for p in problems])
