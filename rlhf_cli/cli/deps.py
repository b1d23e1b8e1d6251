"""`rlhf deps`: what each recipe reads and makes, as rules for make. No torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from rlhf_cli.data.sources import looks_like_hub_id
from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.lineage import is_file
from rlhf_cli.recipe.reader import read_recipe
from rlhf_cli.recipe.work import Work

HEADER = "RLHF ?= rlhf\n"


def rules(recipes: Sequence[str], overrides: Sequence[str]) -> str:
    """A rule for each recipe: its run's DONE is made of the recipe and of everything that it reads. Runs are named by
    their DONE, whether they are there yet or come from another rule. Raises RecipeError."""
    works = {path: read_recipe(path, overrides, None) for path in recipes}
    made = {_clean(work.output_dir) for work in works.values()}
    _refuse_twice(works)
    _refuse_cycle(works, made)
    return HEADER + "".join(_rule(path, work, made, overrides) for path, work in works.items())


def _refuse_twice(works: Mapping[str, Work]) -> None:
    """RecipeError when two recipes make the same run."""
    makers: dict[str, str] = {}
    for path, work in works.items():
        other = makers.setdefault(_clean(work.output_dir), path)
        if other != path:
            raise RecipeError(f"{other} and {path} both make it", f"output_dir {work.output_dir}", "give one another")


def _refuse_cycle(works: Mapping[str, Work], made: set[str]) -> None:
    """RecipeError when a run is made of itself, through others."""
    needs = {f"{_clean(work.output_dir)}/DONE": set(_inputs(work, made)) for work in works.values()}
    try:
        tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise RecipeError(f"each is made of the one before: {', '.join(error.args[1])}", "output_dir",
                          "break the circle") from None  # fmt: skip


def _rule(path: str, work: Work, made: set[str], overrides: Sequence[str]) -> str:
    needed = [path, *dict.fromkeys(_inputs(work, made))]
    command = shlex.join([work.stage, path, *overrides]).replace("$", "$$")
    target = f"{_escaped(_clean(work.output_dir))}/DONE"
    return f"\n{target}: {' '.join(map(_escaped, needed))}\n\t$(RLHF) {command}\n\t@touch $@\n"


def _inputs(work: Work, made: set[str]) -> Iterator[str]:
    """What the recipe reads, as file names; hub names are none."""
    for source in work.data_read():
        yield from _file(source.path, made)
    rewards = work.rewards_read()
    for name in [*(name for name, _ in work.models_read()), *(r.run for r in rewards if r.run is not None)]:
        yield from _file(name, made)
    for text in work.texts_read():
        if is_file(text):
            yield text
    for reward in rewards:
        if reward.function is not None:
            yield reward.function.rpartition(":")[0]


def _file(name: str, made: set[str]) -> Iterator[str]:
    path = Path(name)
    if _clean(name) in made or (path / "run.json").is_file() or "runs" in path.parts[:-1]:
        yield f"{_clean(name)}/DONE"
    elif path.exists() or not looks_like_hub_id(name):
        yield name


def _clean(name: str) -> str:
    return name.rstrip("/") or name


def _escaped(name: str) -> str:
    """A file name as make reads it back."""
    return re.sub(r"([ #:%])", r"\\\1", name).replace("$", "$$")
