"""Curves of a run as SVG that takes its colours from the page around it. matplotlib is imported on use."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rlhf_cli.report.axes import STEPS, Axis, mark, on
from rlhf_cli.runs.metrics import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
HUES = ("#0b0101", "#0b0102", "#0b0103", "#0b0104", "#0b0105", "#0b0106")
"""Stand-ins that become CSS variables, so that one picture serves the light and the dark page."""
_CROWDED = 200
"""From so many points on, a curve is shown thin with its moving average over it."""
STRETCHES = 400
"""As many parts of a curve are drawn, each as its mean and a band from its lowest to its highest value, where there
are more points than fit."""
_ENDLESS = 2000
"""From so many points on, that is done in the pages of single runs."""
_HELD_OUT = re.compile(r"eval[/_](.+)")
_SUBJECTS: tuple[tuple[str, str], ...] = (
    ("Loss", r"(cost/)?loss(/.*)?"),
    ("Rewards", r"rewards/(?!accurac|best$|sign_accuracy)(?!.*/(invalid|clipped)$).*"),
    ("Accuracy", r"rewards/(accurac.*|best|sign_accuracy)|accuracy|.*/accuracy"),
    ("Score", r"objective/(scores|rlhf_reward|non_score_reward|truncation_reward|lagrangian)|score.*"),
    ("Cost", r"cost/(mean|std|window_mean)"),
    ("KL", r"(.*/)?kl"),
    ("KL per token", r"(.*/)?kl_(?!coef).*|policy/approxkl"),
    ("Coefficients", r"kl_coef|lagrange/lambda|policy/penalty_coef"),
    ("Entropy", r"(.*/)?entropy"),
    ("Log-probabilities", r"logps/.*"),
    ("Sampled against recomputed, nats a token", r"rollout/logprob_gap.*"),
    ("Clipped shares", r"(policy|(cost/)?val)/clipfrac.*"),
    ("Ratio of new to old probability", r"policy/ratio.*|val/ratio"),
    ("Advantages", r"advantages/.*"),
    ("Critic", r"(cost/)?val/(mean|returns_mean)"),
    ("Explained variance", r"(cost/)?val/explained_variance"),
    ("Tokens of a completion", r"completions/.*length.*"),
    (
        "Shares of completions",
        r"completions/.*|rollout/(unique_share|repetition|unscorable|useful_share)|greedy/eos_rate|frac_reward_zero_std"
        r"|cost/above_threshold",
    ),
    ("Correlation of score and length", r"rollout/reward_length_correlation"),
    ("Counts", r"rewards/.*/(invalid|clipped)|rollout/halvings|policy/updates|greedy/completions"),
    ("Tokens of a rollout", r"rollout/tokens"),
    ("Learning rate", r"(.*[/_])?learning_rate"),
    ("Gradient norm", r"(.*[/_])?grad_norm"),
    ("Tokens per second", r"(rollout/)?tokens_per_second"),
    ("Seconds of a step by phase", r"time/.*|rollout/seconds"),
    ("Peak memory, GiB", r"mem/.*"),
)
"""Metrics that share a panel have the same unit: shares are not drawn over counts."""
NOTES = {
    "rewards/accuracies": "Share of pairs whose chosen completion has the strictly higher reward: ties count as wrong, "
    "so a policy that still is its reference has 0.",
}
"""What a reader of a curve should know."""
_COUNTERS = {"step", "epoch", "num_tokens", "episode"}


@dataclass(frozen=True)
class Curve:
    """A metric over the steps at which it was logged."""

    name: str
    steps: tuple[int | float, ...]
    """Numbers of steps; of a curve that is drawn over something else, its places there."""
    values: tuple[float, ...]
    """NaN and infinities as they were logged."""

    @property
    def held_out(self) -> bool:
        """Whether it was measured on held-out data."""
        return _HELD_OUT.fullmatch(self.name) is not None

    @property
    def scheduled(self) -> bool:
        """Whether it follows a plan: there is no noise to smooth away."""
        return self.name.endswith("learning_rate")

    @property
    def wild(self) -> tuple[int | float, ...]:
        """Steps at which the value was not finite."""
        return tuple(s for s, v in zip(self.steps, self.values, strict=True) if not math.isfinite(v))


def curves(rows: Iterable[dict[str, object]]) -> list[Curve]:
    """The curves in the lines of metrics.jsonl, in order of first appearance; counters and words are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = number(row.get("step"))
        for name, value in row.items():
            amount = number(value)
            if step is not None and amount is not None and name not in _COUNTERS:
                found.setdefault(name, []).append((int(step), amount))
    return [Curve(name, tuple(s for s, _ in points), tuple(v for _, v in points)) for name, points in found.items()]


def grouped(found: Sequence[Curve], most: int = len(HUES)) -> list[tuple[str, list[Curve]]]:
    """The curves by subject, held-out ones beside their training twins; a panel holds at most `most` of them."""
    panels: dict[str, list[Curve]] = {}
    for curve in found:
        plain = _plain(curve.name)
        subject = next((title for title, pattern in _SUBJECTS if re.fullmatch(pattern, plain)), plain.split("/")[0])
        panels.setdefault(subject, []).append(curve)
    order = [title for title, _ in _SUBJECTS]
    titles = sorted(panels, key=lambda t: (order.index(t) if t in order else len(order), t))
    result = []
    for title in titles:
        members = panels[title]
        for start in range(0, len(members), most):
            part = f" ({start // most + 1})" if len(members) > most else ""
            result.append((title + part, members[start : start + most]))
    return result


def repeats(found: Mapping[str, Curve]) -> bool:
    """Whether the metric nll only says again, but for rounding, what the loss says."""
    loss, nll = found.get("loss"), found.get("nll")
    if loss is None or nll is None or loss.steps != nll.steps:
        return False
    return all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-8) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(loss.values, nll.values, strict=True)
    )


def notes(members: Iterable[Curve]) -> str:
    """What a reader of these curves should know, as paragraphs."""
    known = dict.fromkeys(NOTES[plain] for c in members if (plain := _plain(c.name)) in NOTES)
    return "".join(f"<p>{escape(note)}</p>" for note in known)


def _plain(name: str) -> str:
    """A metric without the word for held-out data."""
    match = _HELD_OUT.fullmatch(name)
    return match[1] if match else name


def svg(title: str, members: Sequence[Curve], where: Axis = STEPS) -> str:
    """One panel of curves."""
    return drawn(title, lambda axes: _draw(axes, [on(curve, where) for curve in members], where))


def drawn(title: str, draw: Callable[[Axes], None]) -> str:
    """One panel as an SVG element without a date, a script or a colour of its own. `title` keeps its ids apart."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.hashsalt": title,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.unicode_minus": False,
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        draw(axes)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return _themed(out.getvalue(), title)


def _draw(axes: Axes, members: Sequence[Curve], where: Axis) -> None:
    """Lines, held-out points, marks where a value was not finite."""
    mark(axes, where)
    names = {curve.name for curve in members}
    for hue, curve in zip(HUES, members, strict=False):
        finite = [v if math.isfinite(v) else math.nan for v in curve.values]
        few = len(curve.steps) <= 12 or curve.held_out
        style = {"color": hue, "marker": "o" if few else "", "markersize": 3.5}
        steps: Sequence[float] = curve.steps
        if len(finite) > _ENDLESS:
            steps, finite, low, high = thinned(curve)
            axes.fill_between(steps, low, high, color=hue, alpha=0.2, linewidth=0)
            finite = finite if curve.scheduled else moving(finite, len(finite) // 40)
        elif len(finite) > _CROWDED and not curve.scheduled:
            axes.plot(curve.steps, finite, color=hue, alpha=0.3, linewidth=0.7)
            finite = moving(finite, len(finite) // 40)
        dash = "--" if curve.held_out and len(names) > 1 else "-"
        axes.plot(steps, finite, linewidth=1.5, linestyle=dash, label=curve.name, **style)  # type: ignore[arg-type]
        for step in curve.wild[:50]:
            axes.axvline(step, color=hue, linewidth=1, linestyle=":")
    axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5, handlelength=1.6)


def moving(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values; NaN where one of them is."""
    return [math.fsum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - width + 1) : i + 1])]


def thinned(curve: Curve, most: int = STRETCHES) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, means, lowest and highest values of at most `most` stretches of a curve; NaN where none is finite."""
    width = max(1, math.ceil(len(curve.steps) / most))
    steps, means, low, high = list[float](), list[float](), list[float](), list[float]()
    for start in range(0, len(curve.steps), width):
        finite = [v for v in curve.values[start : start + width] if math.isfinite(v)] or [math.nan]
        steps.append(curve.steps[min(start + width, len(curve.steps)) - 1])
        means.append(math.fsum(finite) / len(finite))
        low.append(min(finite))
        high.append(max(finite))
    return steps, means, low, high


def _themed(text: str, title: str) -> str:
    """Only the svg element, scalable, its colours taken from the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', _opening(title), text, count=1, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    for index, hue in enumerate(HUES):
        text = text.replace(hue, f"var(--hue{index})")
    return text.strip()


def _opening(title: str) -> str:
    label = title.replace("&", "").replace("<", "").replace('"', "").replace("\\", "")
    return (
        rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" '
        rf'aria-label="{label}">'
    )
