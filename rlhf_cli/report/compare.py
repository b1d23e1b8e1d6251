"""`rlhf report`: the page of a run anew, or several runs on one page. One file, nothing loaded, no script: the
boxes that hide a run are obeyed by the page's style."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.report.axes import Axis, X
from rlhf_cli.report.evaluation import write_evaluation
from rlhf_cli.report.overlay import MOST, Member, key, panel, phases, reached, travelled
from rlhf_cli.report.page import write_report
from rlhf_cli.report.parts import write_page
from rlhf_cli.report.plots import Curve, grouped, repeats
from rlhf_cli.report.sections import (
    data,
    evaluations,
    folded,
    health,
    held_out,
    overview,
    samples,
    settings,
    summaries,
)
from rlhf_cli.report.story import REPORT, Story, read_all, sound


def write(given: Sequence[str], out: str | None, x: X = "step") -> list[str]:
    """Write the page of one run into its directory, or of several as report.html of the working directory; `out` names
    another file, `x` what curves are drawn over.

    Returns:
        What there is to say: where the page is, and which runs are not finished. Raises RecipeError or ModelError with
        everything that is wrong; nothing is written then.
    """
    stories = read_all(given)
    alone = stories[0] if len(stories) == 1 else None
    target = Path(out).expanduser() if out is not None else alone.path / REPORT if alone else Path(REPORT)
    _check(target, out, alone)
    if alone is None:
        page = write_comparison(stories, target, x)
    elif alone.figures:
        page = sound(alone.path, lambda: write_evaluation(alone.path, target=target))
    else:
        page = sound(alone.path, lambda: write_report(alone.path, target=target, x=x))
    return [*(f"{s.path} is not finished: {s.pending}" for s in stories if s.pending), f"report: {page}"]


def write_comparison(stories: Sequence[Story], target: Path, x: X = "step") -> Path:
    """Write the page of several runs; the same files give the same page. Raises ModelError when the disk refuses."""
    names, found = [story.name for story in stories], [story.curves for story in stories]
    title = f"{len(stories)} runs"
    parts = [
        f"<style>{_hiding(len(stories))}</style>",
        f"<h1>{title} <small>{escape(', '.join(dict.fromkeys(s.stage for s in stories)))}</small></h1>",
        overview(stories),
        _legend(stories),
        held_out(stories),
        _panels("Reward against KL", [*travelled(found), *reached(stories)],
                "Open circle: first, full circle: last. Scores compare where rewards and prompts are the same."),
        *_curves(found, names, [story.axes[x] for story in stories]),
        phases(found, names),
        evaluations(stories),
        summaries(stories),
        samples(stories),
        health(stories),
        settings(stories),
        data(stories),
    ]  # fmt: skip
    return write_page(target, f"{title}: {', '.join(names)}", parts)


def _check(target: Path, out: str | None, alone: Story | None) -> None:
    """Raises RecipeError or ModelError when a page must not or cannot be written there."""
    where, hint = str(target) if out is None else f"-o {out or repr(out)}", "name another file with -o"
    if target.is_dir():
        raise RecipeError("is a folder", where, f"name a file: -o {target / REPORT}")
    if target.suffix.lower() not in (".html", ".htm"):
        raise RecipeError("does not end in .html", where, f"name a page: -o {target.with_suffix('.html')}")
    if not target.parent.is_dir():
        raise RecipeError(f"there is no folder {target.parent}", where, f"create it, or {hint}")
    own = alone is not None and target.name == REPORT and os.path.samefile(target.parent, alone.path)
    if (target.parent / "run.json").is_file() and not own:
        raise RecipeError("would lie in a run directory, which holds its run's own pages", where, hint)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ModelError(f"cannot be written: {error.strerror}", where, hint) from error


# --- curves ----------------------------------------------------------------------------------------------


def _curves(found: Sequence[dict[str, Curve]], called: Sequence[str], where: Sequence[Axis]) -> Iterator[str]:
    """Panels by metric: on held-out data, while training, and those that one run alone has."""
    drawn = [n for n, one in enumerate(found) if one]
    if len(drawn) > MOST:
        raise RecipeError(f"{len(drawn)} of the runs have curves, and a page can tell {MOST} apart", "rlhf report",
                          "name fewer")  # fmt: skip
    members: dict[str, list[Member]] = {}
    for n in drawn:
        for name, curve in found[n].items():
            members.setdefault(name, []).append((n, curve))
    if all(repeats(one) for one in found if "nll" in one):
        members.pop("nll", None)
    shared = {name: m for name, m in members.items() if len(m) > 1 or len(drawn) == 1}
    for title, held in (("Curves on held-out data", True), ("Curves", False)):
        yield _panels(title, _cells({n: m for n, m in shared.items() if m[0][1].held_out == held}, called, where))
    for n in drawn:
        lone = {name: m for name, m in members.items() if name not in shared and m[0][0] == n}
        panels = _panels("", _cells(lone, called, where))
        yield f'<div class="run{n}">{folded(f"Metrics of {called[n]} alone: {len(lone)}", panels)}</div>'


def _cells(members: dict[str, list[Member]], called: Sequence[str], where: Sequence[Axis]) -> list[str]:
    """The panels, in the order of subjects."""
    subjects = grouped([m[0][1] for m in members.values()], most=max(1, len(members)))
    return [panel(curve.name, members[curve.name], called, where) for _, group in subjects for curve in group]


def _panels(title: str, cells: Sequence[str], note: str = "") -> str:
    head = (f"<h2>{title}</h2>" if title else "") + (f"<p>{note}</p>" if note else "")
    return f'{head}<div class="panels">{"".join(cells)}</div>' if cells else ""


# --- the legend ------------------------------------------------------------------------------------------


def _legend(stories: Sequence[Story]) -> str:
    """A box for each run that has curves; without its tick the run is hidden."""
    boxes = [
        f'<label><input type="checkbox" id="show{n}" checked />{key(n)}<span>{escape(story.name)}</span></label>'
        for n, story in enumerate(stories)
        if story.curves or story.summary.get("best_of_n") or story.figures.get("models")
    ]
    return f'<div class="legend">{"".join(boxes)}</div>' if boxes else ""


def _hiding(count: int) -> str:
    return "".join(f"body:has(#show{n}:not(:checked)) .run{n} {{ display: none; }}\n" for n in range(count))
