"""Pictures of several runs over each other. Every run has a colour and a stroke of its own in all of them, and a class
by which a page can hide it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

from rlhf_cli.report.axes import Axis, mark, on
from rlhf_cli.report.evaluation import FIGURES, brief
from rlhf_cli.report.parts import shown
from rlhf_cli.report.plots import HUES, Curve, drawn, notes, thinned
from rlhf_cli.report.story import SUMMARY, Story, sound

STROKES: tuple[tuple[int, ...], ...] = ((), (5, 2), (2, 2), (7, 2, 2, 2))
"""On and off lengths of the strokes; the first is a whole line."""
MOST = len(HUES) * len(STROKES)
"""How many runs can be told apart."""
_SMOOTHED = 40
"""From so many points on, a curve is smoothed, with its raw values behind it."""
_FEW = 12
"""Up to so many points are marked."""

Member = tuple[int, Curve]
"""A curve and the number of its run."""


class Trace(NamedTuple):
    """Points that a run went through, or those of the models it compared."""

    across: Sequence[float]
    up: Sequence[float]
    models: Sequence[str] = ()
    """Their names, where each point is a model."""


def hue(run: int) -> str:
    """The colour of a run, as a page knows it."""
    return f"var(--hue{run % len(HUES)})"


def key(run: int) -> str:
    """A piece of the line of a run."""
    dashes = " ".join(map(str, _stroke(run)))
    return (
        f'<svg class="key" viewBox="0 0 30 8" aria-hidden="true"><line x1="1" y1="4" x2="29" y2="4" '
        f'stroke="{hue(run)}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )


def panel(title: str, members: Sequence[Member], called: Sequence[str], where: Sequence[Axis]) -> str:
    """A metric of all runs that have it; where: by run."""
    placed = [(run, on(curve, where[run])) for run, curve in members]
    picture = drawn(title, lambda axes: _draw(axes, placed, where[members[0][0]]))
    wild = [f"{called[run]}: not finite at step {', '.join(map(str, curve.wild[:5]))}" for run, curve in members
            if curve.wild]  # fmt: skip
    return _cell(title, picture, wild, notes(curve for _, curve in members))


def travelled(found: Sequence[Mapping[str, Curve]]) -> list[str]:
    """Panels of score against KL, for the runs that know both: while training and on held-out prompts."""
    return _trades((
        ("Score against KL, while training", [_met(one, "objective/kl", "objective/scores") for one in found]),
        ("Score against KL, on held-out prompts",
         [_met(one, "eval/objective/kl", "eval/objective/scores") for one in found]),
    ))  # fmt: skip


def reached(stories: Sequence[Story]) -> list[str]:
    """The same of the models of `rlhf eval`, and of the best of n, whose KL is at most log n - (n - 1) / n (Beirami et
    al. 2024, arXiv:2401.01879)."""
    return _trades((
        ("Score against KL, by rlhf eval", [sound(s.path / FIGURES, partial(_evaluated, s)) for s in stories]),
        ("Score against the most KL, best of n", [sound(s.path / SUMMARY, partial(_best_of, s)) for s in stories]),
    ))  # fmt: skip


def _trades(sources: Iterable[tuple[str, Sequence[Trace]]]) -> list[str]:
    cells = []
    for title, found in sources:
        traces = [(n, trace) for n, trace in enumerate(found) if trace.across]
        if traces:
            cells.append(_cell(title, drawn(title, lambda axes, t=traces: _draw_traces(axes, t)), ()))  # type: ignore[misc]
    return cells


def marked(text: str) -> str:
    """A picture whose groups of a run are known by class, so that they can be hidden together."""
    return re.sub(r'<g id="run(\d+)">', r'<g class="run\1">', text)


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over a twentieth of the values around each, fewer towards the ends, which stay as they are; NaN where a
    value is."""
    most, last = len(values) // 40, len(values) - 1
    out = []
    for i, value in enumerate(values):
        half = min(most, i, last - i)
        near = [v for v in values[i - half : i + half + 1] if math.isfinite(v)]
        out.append(math.fsum(near) / len(near) if math.isfinite(value) else math.nan)
    return out


# --- drawing ---------------------------------------------------------------------------------------------


def _cell(title: str, picture: str, wild: Sequence[str], said: str = "") -> str:
    said += "".join(f'<p class="wild">{escape(note)}</p>' for note in wild)
    return f'<div class="panel"><h3>{escape(title)}</h3>{marked(picture)}{said}</div>'


def _stroke(run: int) -> tuple[int, ...]:
    return STROKES[run // len(HUES) % len(STROKES)]


def _style(run: int) -> dict[str, Any]:
    dashes = _stroke(run)
    return {"color": HUES[run % len(HUES)], "gid": f"run{run}", "linestyle": (0, dashes) if dashes else "-"}


def _draw(axes: Any, members: Sequence[Member], where: Axis) -> None:
    """The raw values or their band, the smoothed line, a dotted line where a value was not finite."""
    mark(axes, where)
    for run, curve in members:
        style = _style(run)
        faint = {"color": style["color"], "gid": style["gid"]}
        steps, line, low, high = thinned(curve)
        if len(steps) < len(curve.steps):
            axes.fill_between(steps, low, high, alpha=0.2, linewidth=0, **faint)
        noisy = len(line) >= _SMOOTHED and not curve.held_out and not curve.scheduled
        if noisy and len(steps) == len(curve.steps):
            axes.plot(steps, line, alpha=0.3, linewidth=0.7, **faint)
        if noisy:
            line = smoothed(line)
        points = {"marker": "o", "markersize": 3.5} if len(line) <= _FEW or curve.held_out else {}
        axes.plot(steps, line, linewidth=1.6, **style, **points)
        for step in curve.wild[:50]:
            axes.axvline(step, linewidth=1, linestyle=":", **faint)


def _draw_traces(axes: Any, traces: Sequence[tuple[int, Trace]]) -> None:
    """Each trace from an open circle to a full one; models as points with their names."""
    axes.set_xlabel("KL to the reference, nats")
    axes.set_ylabel("score")
    axes.margins(0.12)
    for run, trace in traces:
        style = _style(run)
        own = {"color": style["color"], "gid": style["gid"]}
        circle = {**own, "marker": "o", "markersize": 5.5, "linestyle": ""}
        if trace.models:
            axes.plot(trace.across, trace.up, **circle)
        else:
            axes.plot(trace.across, trace.up, linewidth=1.4, **style)
            axes.plot(trace.across[:1], trace.up[:1], **circle, markerfacecolor="none")
            axes.plot(trace.across[-1:], trace.up[-1:], **circle)
        middle = (max(trace.across) + min(trace.across)) / 2
        for x, y, name in zip(trace.across, trace.up, trace.models, strict=False):
            side = "left" if x <= middle else "right"  # towards the middle, where there is room
            axes.annotate(brief(name), (x, y), (0, 6), textcoords="offset points", ha=side, fontsize=8, **own)


# --- what is drawn ---------------------------------------------------------------------------------------


def _met(found: Mapping[str, Curve], across: str, up: str) -> Trace:
    """Two metrics at the steps that have both, smoothed where they are many."""
    if across not in found or up not in found:
        return Trace((), ())
    other = dict(zip(found[up].steps, found[up].values, strict=True))
    pairs = [(x, other[step]) for step, x in zip(found[across].steps, found[across].values, strict=True)
             if step in other and math.isfinite(x) and math.isfinite(other[step])]  # fmt: skip
    steps = tuple(range(len(pairs)))
    lines = [thinned(Curve("", steps, tuple(pair[i] for pair in pairs)))[1] for i in range(2)]
    return Trace(smoothed(lines[0]), smoothed(lines[1]))


def _evaluated(story: Story) -> Trace:
    """The models of an evaluation that was given a reference and rewards."""
    models = story.figures.get("models", {}).items()
    found = [
        (name, float(m["kl"]["mean"]), float(m["score"]["mean"])) for name, m in models if "kl" in m and "score" in m
    ]
    return Trace([x for _, x, _ in found], [y for _, _, y in found], [name for name, _, _ in found])


def _best_of(story: Story) -> Trace:
    rows = story.summary.get("best_of_n", [])
    return Trace([float(row["kl_bound"]) for row in rows], [float(row["score"]) for row in rows])


# --- time ------------------------------------------------------------------------------------------------


def phases(found: Sequence[Mapping[str, Curve]], called: Sequence[str]) -> str:
    """Seconds a step by phase, as bars of one scale; nothing where no run logged them. What is not done in every step,
    an evaluation say, is spread over them all."""
    spent = {n: _spent({name: curve for name, curve in one.items() if name.startswith("time/")})
             for n, one in enumerate(found)}  # fmt: skip
    spent = {n: one for n, one in spent.items() if one}
    longest = max((sum(one.values()) for one in spent.values()), default=0.0)
    if not longest > 0:
        return ""
    order = list(dict.fromkeys(name for one in spent.values() for name in one))
    legend = "".join(f'<span><i style="background:{hue(i)}"></i>{escape(name)}</span>' for i, name in enumerate(order))
    rows = []
    for n, one in spent.items():
        pieces = "".join(f'<i style="width:{100 * one[name] / longest:.2f}%;background:{hue(i)}"></i>'
                         for i, name in enumerate(order) if name in one)  # fmt: skip
        words = ", ".join(f"{name} {shown(one[name])} s" for name in order if name in one)
        rows.append(f'<div class="run{n}"><b>{escape(called[n])}</b> {escape(words)}<div class="bar">{pieces}'
                    "</div></div>")  # fmt: skip
    return f'<h2>Time of a step by phase</h2><p class="phases">{legend}</p><div class="fact">{"".join(rows)}</div>'


def _spent(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Seconds a step of each phase."""
    steps = max((len(curve.steps) for curve in curves.values()), default=0)
    return {name.removeprefix("time/").removesuffix("_s"): math.fsum(filter(math.isfinite, curve.values)) / steps
            for name, curve in curves.items()}  # fmt: skip
