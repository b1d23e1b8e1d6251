"""What a data path in a recipe stands for when it is a run: the rows that the run made. No torch."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.errors import DataError
from rlhf_cli.recipe.model_path import read_json

PRODUCT = "data.jsonl"
"""The rows that a run of `rlhf sample`, `score` or `select` makes, in its directory."""


def product_of(path: Path) -> Path | None:
    """The rows of a run directory; None for any other path. Raises DataError when the run is not finished, or makes a
    model."""
    if not path.is_dir() or not (path / "run.json").is_file():
        return None
    stage = read_json(path / "run.json").get("stage", "STAGE")
    if not (path / "DONE").is_file():
        raise DataError("this run has no DONE", str(path), f"finish it first: rlhf {stage} {path}/recipe.yaml")
    if not (path / PRODUCT).is_file():
        raise DataError(f"is a run of `rlhf {stage}` and holds no rows ({PRODUCT})", str(path),
                        "name a run of sample, score or select, or a data file")  # fmt: skip
    return path / PRODUCT
