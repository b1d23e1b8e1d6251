"""What an evaluation found, for people: lines for the terminal, and report.html with pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.report.parts import shown, table, write_page
from rlhf_cli.report.plots import HUES, INK, drawn
from rlhf_cli.report.referee import warnings
from rlhf_cli.runs.metrics import number

FIGURES = "eval.json"
"""All figures of an evaluation, in its run directory."""
KINDS = ("pairs", "rankings", "scored", "steps")
HEADLINE = {
    "pairs": ("accuracy", "low", "high"), "rankings": ("accuracy", "low", "high"),
    "scored": ("correlation", "low", "high"), "steps": ("balanced_accuracy", "balanced_low", "balanced_high"),
}  # fmt: skip

Table = tuple[str, list[str], list[list[str]]]
"""Title, names of the columns, rows."""


def lines_of(found: dict[str, Any]) -> list[str]:
    """The figures as aligned lines."""
    out = []
    for title, names, rows in tables(found):
        cells = [[title, *names[1:]], *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        for row in cells:
            first, *others = zip(row, widths, strict=True)
            padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            out.append("  ".join(padded).rstrip())
    return out


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """The figures as tables."""
    for kind in KINDS:
        if kind in found:
            yield from _judged(kind, found[kind])
    if "models" in found:
        names = list(found["models"])
        rows = [[label, *(say(found["models"][name]) for name in names)] for label, say in _model_rows(found)]
        yield "models", ["", *names], rows
    for one in found.get("against", []):
        yield f"{one['model']} against {one['against']}, by {one['by']}", ["", ""], list(_duel_rows(one))
    if found.get("ratings"):
        rows = [[e["model"], f"{e['rating']:.0f}", _interval(e, "low", "high", "{:.0f}"), str(e["games"])]
                for e in found["ratings"]]  # fmt: skip
        yield "ratings", ["", "rating", "95 %", "games"], rows


def _judged(kind: str, found: dict[str, Any]) -> Iterator[Table]:
    """A kind of judged data: what there is to say of it, and the headline of each source."""
    main, low, high = HEADLINE[kind]
    rows = [["verdict", found["verdict"]], [main.replace("_", " "), _estimate(found, main, low, high)]]
    for key, value in found.items():
        if key in (main, low, high, "verdict", "low", "high", "count", "margins", "by_source"):
            continue
        if key == "calibration":
            rows.append(["expected calibration error", shown(value["ece"])])
        elif isinstance(value, dict):
            amount = "accuracy" if "accuracy" in value else "mean"
            count = f" ({value['count']})" if "count" in value else ""
            rows.append([key.replace("_", " "), _estimate(value, amount, "low", "high") + count])
        else:
            rows.append([key.replace("_", " "), shown(number(value))])
    yield kind, ["", ""], rows
    if len(found["by_source"]) > 1:
        by = [[source, _estimate(one, main, low, high), one["verdict"]] for source, one in found["by_source"].items()]
        yield f"{kind} by source", ["", main.replace("_", " "), "verdict"], by


def _model_rows(found: dict[str, Any]) -> Iterator[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Label and text of each figure of a language model; only those that were measured."""
    first = next(iter(found["models"].values()))
    if "perplexity" in first:
        yield "perplexity", lambda m: _estimate(m["perplexity"], "perplexity", "low", "high")
        for source in first["perplexity"]["by_source"] if len(first["perplexity"]["by_source"]) > 1 else ():
            yield (
                f"perplexity, {source}",
                lambda m, s=source: _estimate(  # type: ignore[misc]
                    m["perplexity"]["by_source"][s], "perplexity", "low", "high"
                ),
            )
    for name in first.get("scores", {}):
        what = "accuracy" if all(m["scores"][name]["accuracy"] for m in found["models"].values()) else "score"
        yield f"{what}, {name}", lambda m, n=name: _estimate(m["scores"][n], "mean", "low", "high")  # type: ignore[misc]
    if len(first.get("scores", {})) > 1:
        yield "score, weighted sum", lambda m: _estimate(m["score"], "mean", "low", "high")
    if "kl" in first:
        yield "KL to the reference, nats", lambda m: _estimate(m["kl"], "mean", "low", "high")
        yield "the same by k3", lambda m: shown(m["kl"]["k3"])
    if "completions" in first:
        yield "tokens a completion", lambda m: shown(m["mean_length"])
        yield "ended by themselves", lambda m: f"{100 * m['eos_rate']:.1f} %"
        yield "completions", lambda m: shown(m["completions"])


def _duel_rows(one: dict[str, Any]) -> Iterator[list[str]]:
    yield ["verdict", one["verdict"]]
    if not one["matches"]:
        return
    yield ["win rate", _estimate(one, "win_rate", "low", "high")]
    yield ["win rate at equal lengths",
           _estimate(one, "length_controlled", "length_controlled_low", "length_controlled_high")]  # fmt: skip
    yield ["wins, ties, losses", f"{one['wins']}, {one['ties']}, {one['losses']}"]
    yield ["prompts", shown(one["prompts"])]
    yield ["characters", " against ".join(shown(length) for length in one["mean_lengths"])]
    for key in ("label_probability", "position_bias"):
        if one.get(key) is not None:
            yield [key.replace("_", " "), shown(one[key])]
    if one.get("flips") is not None:
        yield ["winner changes with the order", f"{100 * one['flips']:.0f} % of the matches"]


def _estimate(found: dict[str, Any], main: str, low: str, high: str) -> str:
    value = number(found.get(main))
    return "none" if value is None else f"{shown(value)} {_interval(found, low, high)}".strip()


def _interval(found: dict[str, Any], low: str, high: str, form: str = "") -> str:
    ends = [number(found.get(key)) for key in (low, high)]
    if None in ends:
        return ""
    return f"({' to '.join(form.format(end) if form else shown(end) for end in ends)})"


# --- the page --------------------------------------------------------------------------------------------


def write_evaluation(run_path: Path, target: Path | None = None) -> Path:
    """Write report.html, or `target`, from eval.json and run.json; the same files give the same page. Raises
    ModelError."""
    found, run = read_json(run_path / FIGURES), read_json(run_path / "run.json")
    head = f"<h1>{escape(run_path.name)} <small>eval of {escape(str(found['model']))}</small></h1>"
    bad = "".join(f'<p class="wild">{escape(line)}</p>' for line in warnings(found))
    parts = [head, bad, *(table(title, names, rows) for title, names, rows in tables(found)), _pictures(found)]
    return write_page(target or run_path / "report.html", f"{run_path.name} - rlhf {run.get('stage', '')}", parts)


def _pictures(found: dict[str, Any]) -> str:
    cells = []
    if "pairs" in found:
        margins, reliability = found["pairs"]["margins"], found["pairs"]["calibration"]["table"]
        cells = [("Margins: score of chosen less rejected", lambda axes: _bars(axes, margins)),
                 ("Calibration: predicted and found share", lambda axes: _reliability(axes, reliability))]  # fmt: skip
    met = [one for one in found.get("against", []) if one["matches"]]
    if met:
        cells.append(("Win rates", lambda axes: _forest(axes, met)))
    panels = [f'<div class="panel"><h3>{escape(t)}</h3>{drawn(t, draw)}</div>' for t, draw in cells]
    return f'<h2>Pictures</h2><div class="panels">{"".join(panels)}</div>' if panels else ""


def brief(name: str, most: int = 24) -> str:
    """The end of a name that is too long for a picture, which tells most."""
    return name if len(name) <= most else f"\N{HORIZONTAL ELLIPSIS}{name[1 - most :]}"


def _bars(axes: Any, histogram: dict[str, Any]) -> None:
    edges = histogram["edges"]
    axes.bar(edges[:-1], histogram["counts"], [b - a for a, b in pairwise(edges)], align="edge",
             color=HUES[0])  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1, linestyle=":")
    axes.set_xlabel("margin")
    axes.set_ylabel("pairs")


def _reliability(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
    axes.plot([r["probability"] for r in rows], [r["outcome"] for r in rows], color=HUES[0], marker="o", markersize=4)
    axes.set_xlabel("sigmoid(margin)")
    axes.set_ylabel("chosen is better")


def _forest(axes: Any, met: Sequence[dict[str, Any]]) -> None:
    for key, low, high, hue, shift in (
        ("win_rate", "low", "high", HUES[0], 0.1),
        ("length_controlled", "length_controlled_low", "length_controlled_high", HUES[1], -0.1),
    ):
        for n, one in enumerate(met):
            ends = [one[low] if one[low] is not None else one[key], one[high] if one[high] is not None else one[key]]
            axes.plot(ends, [n + shift] * 2, color=hue, linewidth=1.5)
        places = [n + shift for n in range(len(met))]
        axes.plot([one[key] for one in met], places, "o", color=hue, markersize=4, label=key.replace("_", " "))
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(met)), [brief(one["against"]) for one in met])
    axes.set_ylim(-0.5, len(met) - 0.5)
    axes.set_xlim(0, 1)
    axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
