"""The page about what went wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import ModelError
from rlhf_cli.report.page import write_report
from rlhf_cli.report.postmortem import MOST, title_of, write_postmortem
from tests.report.test_page import EVIL, Seen, make_run

RECIPE = {
    "training": {"learning_rate": 0.03},
    "ppo": {"kl": {"name": "fixed", "coef": 0.05}},
    "rewards": [{"run": "r"}],
}
TEXTS = [{"prompt": EVIL, "completion": "at " + EVIL, "score": 2.5, "kl": 40.0, "length": 7, "finished": True}]
BEFORE = {"step": 4, "texts": [{"prompt": EVIL, "completion": "before", "score": 1.5, "kl": 2.0, "length": 9}]}


def event(step: int, kind: str, wires: list[str], **more: Any) -> dict[str, Any]:
    sentences = [f"{wire} is bad {EVIL}" for wire in wires]
    return {
        "step": step,
        "kind": kind,
        "wires": wires,
        "sentences": sentences,
        "texts": TEXTS,
        "before": BEFORE,
        **more,
    }


def row(step: int, kl: float) -> dict[str, Any]:
    return {"step": step, "objective/kl": kl, "objective/scores": step / 10, "completions/mean_length": 20.0}


def ill_run(folder: Path, rows: list[dict[str, Any]], *events: dict[str, Any]) -> Path:
    run = make_run(folder, rows)
    (run / "run.json").write_text(json.dumps({"stage": "ppo", "recipe": RECIPE}))
    (run / "doctor.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return run


def seen(run: Path) -> Seen:
    text = write_postmortem(run).read_text()
    found = Seen(text)
    assert found.open == []
    assert "script" not in found.tags
    assert all(link.startswith("#") or link == "report.html" for link in found.links)
    assert set(re.findall(r"https?://[^\"' )<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for name in set(re.findall(r'(?:href="|url\()#([^")]+)', text)):
        assert text.count(f'id="{name}"') == 1, name
    assert not re.search(r"20\d\d-\d\d-\d\d", text)
    return found


def test_a_pause(tmp_path: Path) -> None:
    rows = [row(step, float(step)) for step in range(6)]
    finding = event(3, "finding", ["length"])
    run = ill_run(tmp_path / "ppo", rows, finding, event(5, "pause", ["kl", "entropy"], action="pause"))
    found = seen(run)
    for words in ("Step 5: paused", "kl is bad <script>", "at <script>", "before", "score 2.5000, kl 40, length 7",
                  "score 1.5000, kl 2, length 9", "training.learning_rate0.03lower", "ppo.kl.coef0.05higher",
                  "ppo.entropy_coef0.01", "objective/kl15"):  # fmt: skip
        assert words in found.words, words
    assert "length is bad" not in found.words  # a finding that set nothing off
    assert found.words.count("training.learning_rate") == 1
    assert found.tags.count("svg") == 3


def test_a_rollback_shows_what_was_taken_back_and_what_came_of_it(tmp_path: Path) -> None:
    rows = [row(step, 1.0) for step in range(9)]
    back = {"to": 2, "lr_scale": 0.5}
    events = [event(5, "rollback", ["kl"], number=n, **back) for n in (1, 2)]
    run = ill_run(tmp_path / "ppo", rows, *events)
    for n in (1, 2):
        (run / "rollbacks" / f"{n:02d}").mkdir(parents=True)
        lost = [row(3, 1.0), row(4, 5.0), row(5, 1234.5 * n)]
        (run / "rollbacks" / f"{n:02d}" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lost))
    found = seen(run)
    for words in ("Step 5: rolled back to step 2, learning rates x 0.5 from there", "objective/kl, after the rollback",
                  "1,234.5", "2,469"):  # fmt: skip
        assert words in found.words, words
    assert found.tags.count("svg") == 6
    first = (run / "postmortem.html").read_bytes()
    assert write_postmortem(run).read_bytes() == first


def test_a_divergence_has_no_wire(tmp_path: Path) -> None:
    broken = {"step": 3, "loss": "NaN"}
    diverged = event(3, "diverged", [], texts=[]) | {"sentences": ["loss is nan at step 3"]}
    found = seen(ill_run(tmp_path / "ppo", [row(1, 0.0), row(2, 1.0), broken], diverged))
    for words in ("Step 3: training diverged", "loss is nan", "training.learning_rate0.03lower"):
        assert words in found.words


def test_only_the_newest_events_are_shown(tmp_path: Path) -> None:
    events = [event(n, "pause", ["kl"], texts=[]) for n in range(1, MOST + 3)]
    words = seen(ill_run(tmp_path / "ppo", [], *events)).words
    assert "Step 2: paused" not in words
    assert all(f"Step {n}: paused" in words for n in range(3, MOST + 3))


def test_the_report_leads_there(tmp_path: Path) -> None:
    run = ill_run(tmp_path / "ppo", [row(1, 0.0)], event(1, "stop", ["kl"]))
    assert "postmortem.html" not in write_report(run).read_text()
    write_postmortem(run)
    assert "postmortem.html" in Seen(write_report(run).read_text()).links
    assert title_of(event(1, "stop", [])) == "Step 1: stopped, no rollback was left"


def test_damage_is_named(tmp_path: Path) -> None:
    run = ill_run(tmp_path / "ppo", [row(1, 0.0)])
    (run / "doctor.jsonl").write_text("{\n{}\n")
    with pytest.raises(ModelError, match=r"doctor\.jsonl:1: is not valid JSON"):
        write_postmortem(run)
