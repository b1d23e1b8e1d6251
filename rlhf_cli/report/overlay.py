"""Pictures of several runs over each other. Every run has a colour and a stroke of its own in all of them, and a class
by which a page can hide it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rlhf_cli.report.evaluation import FIGURES
from rlhf_cli.report.parts import shown
from rlhf_cli.report.plots import HUES, Curve, drawn, moving
from rlhf_cli.report.story import SUMMARY, Story, sound

STROKES: tuple[tuple[int, ...], ...] = ((), (5, 2), (2, 2), (7, 2, 2, 2))
"""On and off lengths of the strokes; the first is a whole line."""
MOST = len(HUES) * len(STROKES)
"""How many runs can be told apart."""
_POINTS = 400
"""A longer curve is drawn as means of as many stretches, with a band from their lowest to their highest value."""
_SMOOTHED = 40
"""From so many points on, a curve is smoothed, with its raw values behind it."""
_FEW = 12
"""Up to so many points are marked."""

Member = tuple[int, Curve]
"""A curve and the number of its run."""


@dataclass(frozen=True)
class Trace:
    """Points that a run went through, and what the page says of them."""

    run: int
    across: tuple[float, ...]
    up: tuple[float, ...]


def hue(run: int) -> str:
    """The colour of a run, as a page knows it."""
    return f"var(--hue{run % len(HUES)})"


def key(run: int) -> str:
    """A piece of the line of a run."""
    dashes = " ".join(map(str, _stroke(run)))
    return (
        f'<svg class="key" viewBox="0 0 30 8" aria-hidden="true"><line x1="1" y1="4" x2="29" y2="4" stroke="{hue(run)}" '
        f'stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )


def panel(title: str, members: Sequence[Member], called: Sequence[str]) -> str:
    """A metric of all runs that have it."""
    picture = drawn(title, lambda axes: _draw(axes, members))
    notes = [f"{called[run]}: not finite at step {', '.join(map(str, curve.wild[:5]))}" for run, curve in members
             if curve.wild]  # fmt: skip
    return _cell(title, picture, notes)


def frontier(stories: Sequence[Story]) -> list[str]:
    """Panels of score against KL, for the runs that know both: while training, on held-out prompts, by rlhf eval, and
    of the best of n (KL at most log n - (n - 1) / n, arXiv:2401.01879)."""
    sources = (
        ("Score against KL, while training", [_met(s, "objective/kl", "objective/scores") for s in stories]),
        ("Score against KL, on held-out prompts",
         [_met(s, "eval/objective/kl", "eval/objective/scores") for s in stories]),
        ("Score against KL, by rlhf eval", [sound(s.path / FIGURES, lambda s=s: _evaluated(s)) for s in stories]),
        ("Score against the most KL, best of n", [sound(s.path / SUMMARY, lambda s=s: _best_of(s)) for s in stories]),
    )  # fmt: skip
    cells = []
    for title, found in sources:
        traces = [Trace(n, *points) for n, points in enumerate(found) if points[0]]
        if traces:
            cells.append(_cell(title, drawn(title, lambda axes, t=traces: _draw_traces(axes, t)), ()))  # type: ignore[misc]
    return cells


def marked(text: str) -> str:
    """A picture whose groups of a run are known by class, so that they can be hidden together."""
    return re.sub(r'<g id="run(\d+)">', r'<g class="run\1">', text)


def thinned(curve: Curve, most: int = _POINTS) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, means, lowest and highest values of at most `most` stretches of a curve; NaN where none is finite."""
    width = math.ceil(len(curve.steps) / most)
    steps, means, low, high = [], list[float](), list[float](), list[float]()
    for start in range(0, len(curve.steps), width):
        finite = [v for v in curve.values[start : start + width] if math.isfinite(v)] or [math.nan]
        steps.append(curve.steps[min(start + width, len(curve.steps)) - 1])
        means.append(math.fsum(finite) / len(finite))
        low.append(min(finite))
        high.append(max(finite))
    return steps, means, low, high


# --- drawing ---------------------------------------------------------------------------------------------


def _cell(title: str, picture: str, notes: Sequence[str]) -> str:
    said = "".join(f'<p class="wild">{escape(note)}</p>' for note in notes)
    return f'<div class="panel"><h3>{escape(title)}</h3>{marked(picture)}{said}</div>'


def _stroke(run: int) -> tuple[int, ...]:
    return STROKES[run // len(HUES) % len(STROKES)]


def _style(run: int) -> dict[str, Any]:
    dashes = _stroke(run)
    return {"color": HUES[run % len(HUES)], "gid": f"run{run}", "linestyle": (0, dashes) if dashes else "-"}


def _draw(axes: Any, members: Sequence[Member]) -> None:
    """The raw values or their band, the smoothed line, a dotted line where a value was not finite."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=7))
    for run, curve in members:
        style = _style(run)
        faint = {"color": style["color"], "gid": style["gid"]}
        steps, line, low, high = thinned(curve)
        if len(steps) < len(curve.steps):
            axes.fill_between(steps, low, high, alpha=0.2, linewidth=0, **faint)
        elif len(line) >= _SMOOTHED and not curve.held_out:
            axes.plot(steps, line, alpha=0.3, linewidth=0.7, **faint)
        if len(line) >= _SMOOTHED and not curve.held_out:
            line = moving(line, len(line) // 20)
        points = {"marker": "o", "markersize": 3.5} if len(line) <= _FEW or curve.held_out else {}
        axes.plot(steps, line, linewidth=1.6, **style, **points)
        for step in curve.wild[:50]:
            axes.axvline(step, linewidth=1, linestyle=":", **faint)


def _draw_traces(axes: Any, traces: Sequence[Trace]) -> None:
    """Each trace from an open circle to a full one."""
    axes.set_xlabel("KL to the reference, nats")
    axes.set_ylabel("score")
    for trace in traces:
        style = _style(trace.run)
        axes.plot(trace.across, trace.up, linewidth=1.4, **style)
        ends = {"color": style["color"], "gid": style["gid"], "marker": "o", "markersize": 5.5, "linestyle": ""}
        axes.plot(trace.across[:1], trace.up[:1], **ends, markerfacecolor="none")
        axes.plot(trace.across[-1:], trace.up[-1:], **ends)


# --- what is drawn ---------------------------------------------------------------------------------------

Points = tuple[tuple[float, ...], tuple[float, ...]]


def _met(story: Story, across: str, up: str) -> Points:
    """Two metrics at the steps that have both, smoothed where they are many."""
    if across not in story.curves or up not in story.curves:
        return (), ()
    other = dict(zip(story.curves[up].steps, story.curves[up].values, strict=True))
    pairs = [(x, other[step]) for step, x in zip(story.curves[across].steps, story.curves[across].values, strict=True)
             if step in other and math.isfinite(x) and math.isfinite(other[step])]  # fmt: skip
    found = tuple(
        thinned(Curve("", tuple(range(len(pairs))), tuple(pair[i] for pair in pairs)))[1] if pairs else []
        for i in range(2)
    )
    smooth = [moving(line, max(1, len(line) // 20)) for line in found]
    return tuple(smooth[0]), tuple(smooth[1])


def _evaluated(story: Story) -> Points:
    """The models of an evaluation that was given a reference and rewards, by growing KL."""
    models = story.figures.get("models", {}).values()
    found = sorted((float(m["kl"]["mean"]), float(m["score"]["mean"])) for m in models if "kl" in m and "score" in m)
    return tuple(x for x, _ in found), tuple(y for _, y in found)


def _best_of(story: Story) -> Points:
    rows = story.summary.get("best_of_n", [])
    return tuple(float(row["kl_bound"]) for row in rows), tuple(float(row["score"]) for row in rows)


# --- time ------------------------------------------------------------------------------------------------


def phases(stories: Sequence[Story]) -> str:
    """Seconds a step by phase, as bars of one scale; nothing where no run logged them."""
    spent = {n: {name[5:].removesuffix("_s"): _mean(curve) for name, curve in story.curves.items()
                 if name.startswith("time/")} for n, story in enumerate(stories)}  # fmt: skip
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
        rows.append(f'<div class="run{n}"><b>{escape(stories[n].name)}</b> {escape(words)}<div class="bar">{pieces}'
                    "</div></div>")  # fmt: skip
    return f'<h2>Time of a step by phase</h2><p class="phases">{legend}</p><div class="fact">{"".join(rows)}</div>'


def _mean(curve: Curve) -> float:
    finite = [v for v in curve.values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else 0.0
