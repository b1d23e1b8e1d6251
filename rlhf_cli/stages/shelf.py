"""Tokenised samples shared between runs, by the content they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from rlhf_cli.data.shelf import LAYOUT
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.runs.cache import Store, key_of, open_store
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.provenance import versions

KIND = "samples"


@dataclass(frozen=True)
class Shelf:
    """Their place in the cache."""

    store: Store

    def find(self, about: Mapping[str, Any]) -> tuple[Mapping[str, np.ndarray], Mapping[str, str]] | None:
        """What was kept, mapped from its file. Nothing is written, not even that it was read."""
        entry = self.store.read(KIND, _key(about), LAYOUT, quietly=True)
        return None if entry is None else (entry.arrays, entry.notes)

    def keep(self, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
        """Keep these."""
        self.store.write(KIND, _key(about), arrays, notes)

    def used(self, about: Mapping[str, Any]) -> None:
        """Say that what was found is still wanted."""
        self.store.touch(KIND, _key(about))


def open_shelf(recipe: Recipe, display: Display) -> Shelf | None:
    """The samples in the cache, None when recipe or environment want none."""
    store = None if recipe.data.cache == "off" else open_store(display.warn)
    return None if store is None else Shelf(store)


def _key(about: Mapping[str, Any]) -> str:
    return key_of("data", about=about, versions=versions() | {"jinja2": version("jinja2")})
