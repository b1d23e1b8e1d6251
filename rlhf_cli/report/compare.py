"""`rlhf report`: the page of a run anew, or several runs on one page. One file, nothing loaded, no script: runs are hidden
by boxes that the page's style obeys."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from rlhf_cli.errors import ModelError, RecipeError, RlhfError
from rlhf_cli.report.evaluation import FIGURES, write_evaluation
from rlhf_cli.report.overlay import MOST, Member, frontier, key, panel, phases
from rlhf_cli.report.page import write_report
from rlhf_cli.report.parts import write_page
from rlhf_cli.report.plots import Curve, grouped
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
from rlhf_cli.runs.files import writable

_CSS = """<style>
.legend { position: sticky; top: 0; z-index: 1; background: var(--back); padding: .5rem 0; margin: 1rem 0 0;
  max-height: 30vh; overflow-y: auto; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  border-bottom: 1px solid var(--line); }
.legend label { display: inline-flex; align-items: center; gap: .35rem; overflow-wrap: anywhere; }
.legend input { display: none; margin: 0; } @supports selector(:has(*)) { .legend input { display: inline; } }
svg.key { width: 1.9rem; height: .5rem; display: inline-block; flex: none; vertical-align: middle; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); }
.cards > div { background: var(--mark); border-radius: 6px; padding: .5rem .7rem; min-width: 0; }
.cards h3 { overflow-wrap: anywhere; } .cards > div > div { margin-top: .5rem; }
summary { cursor: pointer; margin: 1rem 0 .6rem; } details h2:empty { display: none; }
.phases span { margin-right: 1rem; } .phases i { display: inline-block; width: .8rem; height: .8rem;
  margin-right: .35rem; border-radius: 2px; } .fact > div + div { margin-top: .6rem; } .fact > div > b { display: inline; }
.bar { display: flex; height: .8rem; margin-top: .2rem; border-radius: 3px; overflow: hidden; } .bar i { height: 100%; }
"""


def write(given: Sequence[str], out: str | None) -> Path:
    """Write the page of one run into its directory, or of several as report.html of the working directory; `out` names
    another file.

    Returns:
        Its path. Raises RecipeError or ModelError with everything that is wrong; nothing is written then.
    """
    stories = read_all(given)
    alone = stories[0] if len(stories) == 1 else None
    target = Path(out).expanduser() if out is not None else alone.path / REPORT if alone else Path(REPORT)
    _check(target, out, alone)
    if alone is None:
        return write_comparison(stories, target)
    maker = write_evaluation if alone.figures else write_report
    return sound(alone.path, lambda: maker(alone.path, target=target))


def write_comparison(stories: Sequence[Story], target: Path) -> Path:
    """Write the page of several runs; the same files give the same page. Raises ModelError when the disk refuses."""
    names = [story.name for story in stories]
    title = f"{len(stories)} runs"
    parts = [
        f"{_CSS}{_hiding(len(stories))}</style>",
        f"<h1>{title} <small>{escape(', '.join(dict.fromkeys(s.stage for s in stories)))}</small></h1>",
        overview(stories),
        _legend(stories),
        held_out(stories),
        _panels("Reward against KL", frontier(stories),
                "Open circle: first, full circle: last. Scores compare where rewards and prompts are the same."),
        *_curves([s.curves for s in stories], names),
        phases(stories),
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
    where, hint = f"-o {out}" if out is not None else str(target), "name another file with -o"
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
        writable(target)
    except RlhfError as error:
        raise ModelError(error.problems[0].message, where, hint) from error


# --- curves ----------------------------------------------------------------------------------------------


def _curves(found: Sequence[dict[str, Curve]], called: Sequence[str]) -> Iterator[str]:
    """Panels by metric: on held-out data, while training, and those that one run alone has."""
    drawn = [n for n, one in enumerate(found) if one]
    if len(drawn) > MOST:
        raise RecipeError(f"{len(drawn)} of the runs have curves, and a page can tell {MOST} apart", "rlhf report",
                          "name fewer")  # fmt: skip
    members: dict[str, list[Member]] = {}
    for n in drawn:
        for name, curve in found[n].items():
            members.setdefault(name, []).append((n, curve))
    shared = {name: m for name, m in members.items() if len(m) > 1 or len(drawn) == 1}
    yield _by_subject("Curves on held-out data", shared, True, called)
    yield _by_subject("Curves", shared, False, called)
    for n in drawn:
        lone = {name: m for name, m in members.items() if name not in shared and m[0][0] == n}
        cells = [_cell(curve.name, lone, called) for _, group in _grouped(lone) for curve in group]
        yield folded(f"What {called[n]} alone has logged: {len(lone)} metrics",
                     f'<div class="panels run{n}">{"".join(cells)}</div>' if cells else "")  # fmt: skip


def _by_subject(title: str, members: dict[str, list[Member]], held: bool, called: Sequence[str]) -> str:
    wanted = {name: m for name, m in members.items() if m[0][1].held_out == held}
    parts = [
        f'<h3 class="subject">{escape(subject)}</h3><div class="panels">'
        + "".join(_cell(curve.name, wanted, called) for curve in group)
        + "</div>"
        for subject, group in _grouped(wanted)
    ]
    return f"<h2>{title}</h2>{''.join(parts)}" if parts else ""


def _grouped(members: dict[str, list[Member]]) -> list[tuple[str, list[Curve]]]:
    return grouped([m[0][1] for m in members.values()], most=max(1, len(members)))


def _cell(name: str, members: dict[str, list[Member]], called: Sequence[str]) -> str:
    return panel(name, members[name], called)


def _panels(title: str, cells: Sequence[str], note: str) -> str:
    return f'<h2>{title}</h2><p>{note}</p><div class="panels">{"".join(cells)}</div>' if cells else ""


# --- the legend ------------------------------------------------------------------------------------------


def _legend(stories: Sequence[Story]) -> str:
    """A box for each run that has curves; without its tick the run is hidden."""
    boxes = [
        f'<label><input type="checkbox" id="show{n}" checked>{key(n)}<span>{escape(story.name)}</span></label>'
        for n, story in enumerate(stories)
        if story.curves or story.summary.get("best_of_n") or story.figures
    ]
    return f'<div class="legend">{"".join(boxes)}</div>' if boxes else ""


def _hiding(count: int) -> str:
    return "".join(f"body:has(#show{n}:not(:checked)) .run{n} {{ display: none; }}\n" for n in range(count))
