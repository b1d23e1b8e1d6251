"""What curves are drawn over: steps, tokens or time of training. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlhf_cli.runs.metrics import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rlhf_cli.report.plots import Curve

X = Literal["step", "tokens", "time"]
_UNITS = (("h", 7200.0, 3600.0), ("min", 120.0, 60.0), ("s", 0.0, 1.0))
"""Units of time, from which span on each is used, and its seconds."""


class Axis(NamedTuple):
    """Where each step lies."""

    label: str
    places: Mapping[int, float] | None = None
    """None: at its own number."""


STEPS = Axis("step")


def axis(name: X, rows: Iterable[Mapping[str, object]]) -> Axis:
    """The places of the steps of one run. Time is that of its steps in seconds, without evaluation, by the tokens and
    the rate of each, so that it goes on where a resumed run does."""
    if name == "step":
        return STEPS
    places: dict[int, float] = {}
    tokens = seconds = 0.0
    for row in rows:
        step, total, rate = (number(row.get(key)) for key in ("step", "num_tokens", "tokens_per_second"))
        if step is None:
            continue
        if total is not None:
            seconds += max(0.0, total - tokens) / rate if rate else 0.0
            tokens = total
        places[int(step)] = tokens if name == "tokens" else seconds
    return Axis("tokens" if name == "tokens" else "time of training", places)


def on(curve: Curve, where: Axis) -> Curve:
    """The curve at its places."""
    if where.places is None:
        return curve
    known = [(where.places[int(s)], v) for s, v in zip(curve.steps, curve.values, strict=True) if s in where.places]
    return replace(curve, steps=tuple(x for x, _ in known), values=tuple(v for _, v in known))


def mark(axes: Axes, where: Axis) -> None:
    """Name the axis, and give steps whole numbers."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes.set_xlabel(where.label)
    whole = where.places is None
    axes.xaxis.set_major_locator(MaxNLocator(integer=whole, min_n_ticks=1, nbins=7))
    if where.label == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    elif not whole:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: _clock(at, axes.get_xlim()[1])))


def _clock(seconds: float, most: float) -> str:
    """In the unit that suits the longest time."""
    unit, size = next((unit, size) for unit, least, size in _UNITS if most >= least or unit == "s")
    return f"{seconds / size:g} {unit}"
