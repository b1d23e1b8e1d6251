from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rlhf_cli.errors import ModelError
from rlhf_cli.report import compare, overlay, plots
from rlhf_cli.report.axes import STEPS
from rlhf_cli.report.page import shown, write_report
from rlhf_cli.report.plots import Curve, curves, grouped, moving, svg

EVIL = "<script>alert('x')</script>&\"$x^{"
RUN = {"stage": "dpo", "recipe": {"model": {"name_or_path": EVIL}, "objective": {"name": "dpo"}, "lora": {"r": 4}}}


def make_run(folder: Path, rows: list[dict[str, Any]], samples: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


class Seen(HTMLParser):
    """Tags, addresses and words of a page; unclosed tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def page(folder: Path) -> Seen:
    seen = Seen(write_report(folder).read_text())
    assert seen.open == []
    return seen


def test_everything_is_there_and_escaped(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 1 / (step + 1), "eval/loss": 1.0 - step / 10, EVIL: 1.0, "rewards/margins": step}
        for step in range(4)
    ]
    samples = [
        {"step": 0, "prompt": EVIL, "completion": "before " + EVIL, "score": -1.5},
        {"step": 1, "prompt": EVIL, "completion": "middle"},
        {"step": 3, "prompt": EVIL, "completion": "after", "score": "NaN"},
        {"step": 0, "prompt": [{"role": "user", "content": "hi"}], "completion": "alone"},
    ]
    folder = make_run(tmp_path / "dpo", rows, samples)
    (folder / "recipe.yaml").write_text(f"stage: dpo\nmodel: {EVIL}\n")
    (folder / "data-report.json").write_text(json.dumps({"train": {"kept": 1234, "dropped": [{EVIL: "a.jsonl:3"}]}}))
    seen = page(folder)
    assert "script" not in seen.tags
    assert seen.words.count("alert('x')") >= 6
    assert "before <script>" in seen.words
    assert "middle" not in seen.words
    for word in ("after", "score -1.5", "score NaN", "user: hi", "alone", "1,234", "a.jsonl:3", "adapter of rank 4"):
        assert word in seen.words, word
    assert "eval/loss1 (step 0)0.7000 (step 3)-0.3000" in seen.words
    assert seen.tags.count("svg") == 3
    assert all(link.startswith("#") for link in seen.links)


def test_nothing_is_loaded_and_nothing_is_dated(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [{"step": i, "loss": 1.0 * i} for i in range(300)])
    text = write_report(folder).read_text()
    addresses = set(re.findall(r"https?://[^\"' )<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"20\d\d-\d\d-\d\d", text)
    assert "prefers-color-scheme: dark" in text
    os.utime(folder / "metrics.jsonl", (0, 0))
    assert write_report(folder).read_text() == text


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 0.5}], [{"step": 1, "loss": "NaN"}]])
def test_short_runs(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    seen = page(make_run(tmp_path / "a", rows))
    assert seen.tags.count("svg") == len(rows)
    assert "Samples" not in seen.words


def test_nan_stays_visible(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": "NaN" if s == 3 else 1.0, "grad_norm": "Infinity" if s == 2 else 1} for s in range(5)]
    seen = page(make_run(tmp_path / "a", rows))
    assert "loss was not finite at step 3" in seen.words
    assert "grad_norm was not finite at step 2" in seen.words


def test_damage_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [])
    (folder / "run.json").write_text("{")
    with pytest.raises(ModelError, match=r"run\.json: is not valid JSON"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_duration(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [])
    assert "1 h 01 min" in write_report(folder, 3661).read_text()
    assert "2 min 05 s" in write_report(folder, 125.4).read_text()


def test_a_likelihood_that_is_the_loss_is_drawn_once(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 2.0 / i, "nll": 2.0 / i + 1e-9, "entropy": 1.0} for i in (1, 2, 3)]
    other = [row | {"nll": row["nll"] + 0.1} for row in rows]
    a, b = make_run(tmp_path / "a", rows), make_run(tmp_path / "b", other)
    c = make_run(tmp_path / "c", rows[:2])
    drawn = [re.search("<h3>nll</h3>", write_report(run).read_text()) is not None for run in (a, b)]
    assert drawn == [False, True]
    for runs, shown_ in (([a, c], False), ([a, b], True)):
        compare.write([str(run) for run in runs], str(tmp_path / "page.html"))
        page = (tmp_path / "page.html").read_text()
        assert ("<h3>nll" in page, "<h3>loss" in page) == (shown_, True), "an other run may be compared with it"


def test_subjects() -> None:
    names = [
        "loss", "eval_loss", "loss/policy", "rewards/chosen", "rewards/accuracies", "eval/rewards/accuracies",
        "objective/kl", "kl_coef", "objective/scores", "learning_rate", "grad_norm", "tokens_per_second", "step",
        "num_tokens", "odd/thing",
    ]  # fmt: skip
    panels = {t: [c.name for c in m] for t, m in grouped(curves([dict.fromkeys(names, 1.0)]))}
    assert panels["Loss"] == ["loss", "eval_loss", "loss/policy"]
    assert panels["Accuracy"] == ["rewards/accuracies", "eval/rewards/accuracies"]
    assert panels["Rewards"] == ["rewards/chosen"]
    assert (panels["KL"], panels["Coefficients"]) == (["objective/kl"], ["kl_coef"])
    assert panels["odd"] == ["odd/thing"]
    assert all("step" not in members for members in panels.values())
    many = grouped([Curve(f"logps/{i}", (1,), (0.0,)) for i in range(8)])
    assert [(t, len(m)) for t, m in many] == [("Log-probabilities (1)", 6), ("Log-probabilities (2)", 2)]


def test_shares_counts_and_lengths_have_panels_of_their_own() -> None:
    units = {
        "tokens": ("completions/mean_length", "eval/completions/mean_length", "completions/finished_length_mean"),
        "share": ("completions/eos_rate", "eval/completions/eos_rate", "completions/truncated", "rollout/unique_share",
                  "rollout/unscorable", "policy/clipfrac_low", "val/clipfrac", "rewards/accuracies", "rewards/best"),
        "count": ("rewards/rm/invalid", "eval/rewards/rm/clipped", "rollout/halvings", "policy/updates"),
        "reward": ("rewards/rm/mean", "rewards/chosen"), "value": ("val/mean", "val/returns_mean"),
        "norm": ("grad_norm", "val/grad_norm"), "many tokens": ("rollout/tokens",),
        "variance": ("val/explained_variance",),
        "ratio": ("val/ratio", "policy/ratio_max"), "speed": ("tokens_per_second", "rollout/tokens_per_second"),
        "seconds": ("time/rollout_s", "rollout/seconds"),
        "nats a token": ("policy/approxkl", "objective/kl_k3_per_token"),
        "nats": ("objective/kl", "eval/objective/kl"),
    }  # fmt: skip
    of = {name: unit for unit, names in units.items() for name in names}
    for title, members in grouped(curves([dict.fromkeys(("step", *of), 1.0)])):
        assert len({of[curve.name] for curve in members}) == 1, title


@pytest.mark.parametrize("count", [300, 3000])
def test_a_learning_rate_is_drawn_as_it_was(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    smoothed: list[str] = []
    monkeypatch.setattr(plots, "moving", lambda values, width: smoothed.append("page") or list(values))
    monkeypatch.setattr(overlay, "smoothed", lambda values: smoothed.append("overlay") or list(values))
    for name in ("learning_rate", "critic/learning_rate", "loss"):
        curve = Curve(name, tuple(range(count)), tuple(float(i % 7) for i in range(count)))
        svg(name, [curve])
        overlay.panel(name, [(0, curve)], ["a"], [STEPS])
        assert smoothed == ([] if name != "loss" else ["page", "overlay"])


def test_what_a_figure_means_stands_below_it(tmp_path: Path) -> None:
    rows = [{"step": i, "rewards/accuracies": 0.0, "eval/rewards/accuracies": 0.0, "loss": 1.0} for i in range(3)]
    text = write_report(make_run(tmp_path / "a", rows)).read_text()
    assert text.count("strictly higher reward: ties count as wrong") == 1
    page = overlay.panel("loss", [(0, curves(rows)[-1])], ["a"], [STEPS])
    assert "ties count" not in page
    assert "ties count" in overlay.panel("rewards/accuracies", [(0, curves(rows)[0])], ["a"], [STEPS])


def test_names_of_models_are_not_cut_at_the_edges() -> None:
    long = "/some/where/runs/dpo-of-a-long-name"
    trace = overlay.Trace([0.0, 1.0, 4.0], [0.1, 0.2, 0.3], ["left", "near", long])
    text = plots.drawn("t", lambda axes: overlay._draw_traces(axes, [(0, trace)]))
    written = re.findall(r'<text style="([^"]*)"[^>]*>([^<]+)</text>', text)
    ends = {said for style, said in written if "text-anchor: end" in style}
    assert "\N{HORIZONTAL ELLIPSIS}runs/dpo-of-a-long-name" in ends
    assert {"left", "near"} <= {said for style, said in written if "text-anchor: start" in style}
    assert long not in text


def test_pictures_take_their_colours_from_the_page() -> None:
    text = svg("Loss", [Curve("loss", (1, 2, 3), (1.0, 0.5, 0.2)), Curve("eval_loss", (1, 3), (1.0, math.nan))])
    ElementTree.fromstring(text)
    assert "currentColor" in text
    assert "var(--hue0)" in text
    assert "var(--hue1)" in text
    assert not re.search(r"#[0-9a-f]{6}", text)
    assert ">eval_loss<" in text


def test_moving_mean() -> None:
    assert moving([1.0, 2.0, 3.0, 6.0], 2) == [1.0, 1.5, 2.5, 4.5]
    assert math.isnan(moving([1.0, math.nan, 3.0, 6.0], 2)[2])
    assert moving([1.0, math.nan, 3.0, 6.0], 2)[3] == 4.5


def test_numbers_for_people() -> None:
    assert [shown(v) for v in (0.0, 3.0, 12345.678, 0.5, 1e-5, math.nan, -math.inf, None)] == [
        "0", "3", "12,345.7", "0.5000", "1e-05", "NaN", "-infinity", "",
    ]  # fmt: skip
