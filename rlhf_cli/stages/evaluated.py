"""What the evaluations share: how their data are read, and how they end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rlhf_cli.catalog import Need
from rlhf_cli.data.prepare import EVALUATED, Prepared, prepare
from rlhf_cli.data.quarantine import BadRows
from rlhf_cli.data.report import DataReport
from rlhf_cli.errors import DivergedError
from rlhf_cli.models import processes
from rlhf_cli.models.base import Text
from rlhf_cli.recipe.data_path import PRODUCT
from rlhf_cli.recipe.evaluation import EvalRecipe
from rlhf_cli.recipe.settings.data import RewardDataSettings
from rlhf_cli.report.evaluation import FIGURES, lines_of, write_evaluation
from rlhf_cli.report.referee import warnings
from rlhf_cli.runs.decide import PIECES
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.files import remove_quietly
from rlhf_cli.stages import product

AT_ONCE = 256
"""Examples or completions of a piece, about: what a kill can cost."""


def read(
    recipe: EvalRecipe, key: str, text: Text, *, needs: tuple[Need, ...] = (), room: int | None = None,
    **cut: Any,
) -> Prepared:  # fmt: skip
    """The examples of a key of `data`, in the tokens of a model. room: tokens of the longest prompt; cut: further
    settings of reward data. Raises DataError."""
    data = recipe.data
    settings = RewardDataSettings.model_construct(
        train=getattr(data, key), eval=None, max_length=data.max_length, truncation=data.truncation,
        on_bad_row=data.on_bad_row, max_bad_rows=data.max_bad_rows, cache="off", **cut,
    )  # fmt: skip
    found = prepare(settings, EVALUATED[key], text.template, needs=needs, max_length=room)
    report = replace(
        found.report,
        sources=tuple(replace(one, split=key) for one in found.report.sources),
        tokens=tuple(replace(one, split=key) for one in found.report.tokens),
        lints=tuple(replace(one, split=key) for one in found.report.lints),
        warnings=tuple(re.sub(r"^train\b", key, words) for words in found.report.warnings),
    )
    return replace(found, report=report)


def together(read: Sequence[Prepared]) -> tuple[DataReport, tuple[BadRows, ...]]:
    """One report of several readings."""
    reports = [one.report for one in read]
    return DataReport(
        sources=tuple(s for r in reports for s in r.sources),
        tokens=tuple(t for r in reports for t in r.tokens),
        warnings=tuple(w for r in reports for w in r.warnings),
        lints=tuple(lint for r in reports for lint in r.lints),
        bad_rows=sum(r.bad_rows for r in reports),
    ), tuple(bad for one in read for bad in one.bad)


def finite(value: float, where: str, what: str) -> float:
    """The same number. Raises DivergedError when it is none."""
    if not math.isfinite(value):
        raise DivergedError(f"{what} is {value}", where, "look at the model and at that row")
    return value


def finish(run: Run, display: Display, figures: Callable[[], dict[str, Any]]) -> None:
    """The rows, the figures in every form, then DONE."""

    def first() -> None:
        found = figures()
        product.write_rows(run.path / PRODUCT, product.made_rows(run))
        run.put(FIGURES, found)
        write_evaluation(run.path)
        for line in lines_of(found):
            display.note(line)
        for line in warnings(found):
            display.warn(line)
        run.finish({"step": 0})
        remove_quietly(run.path / PIECES)

    processes.first(first, "writing the figures")
    display.note(f"done: {run.path / FIGURES}")
