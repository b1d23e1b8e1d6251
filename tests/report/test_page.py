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
    assert panels["KL"] == ["objective/kl", "kl_coef"]
    assert panels["odd"] == ["odd/thing"]
    assert all("step" not in members for members in panels.values())
    many = grouped([Curve(f"logps/{i}", (1,), (0.0,)) for i in range(8)])
    assert [(t, len(m)) for t, m in many] == [("Log-probabilities (1)", 6), ("Log-probabilities (2)", 2)]


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
