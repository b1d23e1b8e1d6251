"""What the shell offers after a command: recipes of its stage, runs, names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_cli.recipe.glance import stage_of

_DEEPEST = 4
_MOST = 5000
"""Entries that are looked at."""


def recipes(ctx: Any, incomplete: str) -> list[str]:
    """YAML files below what was typed: of a stage's command those of its stage."""
    from rlhf_cli.catalog import STAGES

    wanted = ctx.info_name if ctx.info_name in STAGES else None
    return sorted(path for path in _below(incomplete, _is_yaml) if _fits(Path(path), wanted))


def runs(ctx: Any, incomplete: str) -> list[str]:
    """Run directories below what was typed."""
    return sorted(_below(incomplete, lambda path: (path / "run.json").is_file()))


def trained(ctx: Any, incomplete: str) -> list[str]:
    """Those that hold a model."""
    return [path for path in runs(ctx, incomplete) if (Path(path) / "final").is_dir()]


def names(ctx: Any, incomplete: str) -> list[tuple[str, str]]:
    """All that `rlhf explain` knows, with a line of each."""
    from rlhf_cli.catalog import CONTROLLERS, ESTIMATORS, OBJECTIVES, REWARDS, SELECTIONS, STAGES

    tables: tuple[Iterable[Any], ...] = tuple(
        t.values() for t in (OBJECTIVES, ESTIMATORS, CONTROLLERS, REWARDS, SELECTIONS, STAGES)
    )
    known = {entry.name: entry.help for table in reversed(tables) for entry in table}
    return [(name, words) for name, words in known.items() if name.startswith(incomplete)]


def stages(ctx: Any, incomplete: str) -> list[str]:
    """Commands that have recipes."""
    from rlhf_cli.catalog import STAGES

    return [name for name in STAGES if name.startswith(incomplete)]


def one(*words: str) -> Callable[[Any, str], list[str]]:
    """One of these."""

    def offer(ctx: Any, incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return offer


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") and path.is_file()


def _fits(path: Path, stage: str | None) -> bool:
    found = stage_of(path)
    return found == stage if stage is not None else found is not None


def _below(incomplete: str, wanted: Callable[[Path], bool]) -> Iterator[str]:
    """Paths that begin as typed, a few folders deep; what is found is not searched any further, hidden folders never.
    More than one way on keeps a shell from ending the word after a folder."""
    head, _, begun = incomplete.rpartition("/")
    start = head + "/" if head or incomplete.startswith("/") else ""
    folder = Path(start).expanduser() if start else Path()
    left = _MOST
    places: list[tuple[Path, str, int]] = [(folder, start, 0)]
    while places:
        place, typed, depth = places.pop(0)
        try:
            entries = sorted(os.listdir(place))
        except OSError:
            continue
        for name in entries[:left]:
            left -= 1
            if name.startswith(".") or (depth == 0 and not name.startswith(begun)):
                continue
            path = place / name
            if wanted(path):
                yield typed + name
            elif depth < _DEEPEST and path.is_dir() and not path.is_symlink():
                places.append((path, f"{typed}{name}/", depth + 1))
