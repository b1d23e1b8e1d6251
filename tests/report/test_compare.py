"""`rlhf report`: one run anew, several on one page, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.cli.app import run_command_line
from rlhf_cli.report.axes import axis, on
from rlhf_cli.report.overlay import MOST, phases, smoothed
from rlhf_cli.report.plots import Curve, svg, thinned
from rlhf_cli.report.story import leaves, names
from tests.report.test_page import EVIL, Seen

SPREAD = {"min": 1, "mean": 2.5, "p95": 4, "max": 5}
SOURCE = {"split": "train", "path": "a.jsonl", "format": "prompt", "rows": 1234, "kept": 1230}
DATA = {
    "sources": [{**SOURCE, "dropped": [{"reason": "too long", "count": 4, "where": ["a.jsonl:7"]}]}],
    "tokens": [{"split": "train", "samples": 9, "prompt": SPREAD, "completion": None, "total": 777}],
    "warnings": ["few rows"], "duplicates": {"count": 3},
    "lints": [{"split": "eval", "found": {"reason": "equal pairs", "count": 6}}], "bad_rows": 2,
}  # fmt: skip
FINDING = {"step": 3, "kind": "finding", "wires": ["kl"], "sentences": [f"the KL is large {EVIL}"]}
ESTIMATE = {"low": 0.0, "high": 9.0, "k3": 1.5}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "step": step, "loss": loss, "objective/kl": step / 10, "objective/scores": step / 5, "num_tokens": 10 * step,
        "time/rollout_s": 0.25, "time/update_s": 0.75, "mem/peak_gib": 0.5,
        **({"eval/objective/kl": step / 8, "eval/objective/scores": 1.5} if step % 5 == 0 else {}),
    }  # fmt: skip


def ppo_run(folder: Path, recipe: str = "ppo: {epochs: 2}\n", rows: int = 11) -> Path:
    folder.mkdir(parents=True)
    meaning = {"model": {"name_or_path": EVIL}, "lora": {"r": 4}}
    (folder / "run.json").write_text(json.dumps({"stage": "ppo", "role": "policy", "recipe": meaning}))
    (folder / "recipe.yaml").write_text(f"stage: ppo\noutput_dir: {folder.name}\nseed: 7\n{recipe}")
    (folder / "data-report.json").write_text(json.dumps(DATA))
    lines(folder / "metrics.jsonl", [row(step) for step in range(rows)])
    lines(folder / "doctor.jsonl", [FINDING])
    lines(folder / "samples.jsonl", [
        {"step": step, "prompt": "\nShared?", "completion": f"{folder.name} {word}"}
        for step, word in ((0, "before"), (4, "middle"), (9, "after " + EVIL))
    ])  # fmt: skip
    return folder


def data_run(folder: Path, stage: str, name: str, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stage": stage, "role": "data", "recipe": {}}))
    (folder / name).write_text(json.dumps(content))
    (folder / "DONE").write_text("{}")
    return folder


def evaluation(folder: Path) -> Path:
    models = {
        name: {"score": {"mean": score, "low": 0, "high": 1}, "kl": {"mean": kl, **ESTIMATE}}
        for name, score, kl in (("runs/a", 0.5, 2.0), ("runs/b", 0.25, 0.0))
    }
    return data_run(folder, "eval", "eval.json", {"model": "runs/a", "models": models})


def report(*arguments: Any) -> int:
    return run_command_line(["report", *map(str, arguments)])


def seen(page: Path) -> Seen:
    text = page.read_text()
    found = Seen(text)
    assert found.open == []
    assert "script" not in found.tags
    assert all(link.startswith("#") for link in found.links)
    assert set(re.findall(r"https?://[^\"' )<]+", text)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    for name in set(re.findall(r'(?:href="|url\()#([^")]+)', text)):
        assert text.count(f'id="{name}"') == 1, name
    assert not re.search(r"url\((?!#)|@import|20\d\d-\d\d-\d\d", text)
    return found


def test_several_runs_on_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    first = ppo_run(tmp_path / "a" / "ppo", "ppo: {epochs: 2}\nlora: {r: 4}\ndata: {train: [{path: x.jsonl}]}\n")
    second = ppo_run(tmp_path / "b" / "ppo", "ppo: {epochs: 4}\nlora: null\ndata: {train: [{path: x.jsonl}]}\n", 500)
    (first / "DONE").write_text("{}")
    lines(second / "metrics.jsonl", [row(s, math.nan if s == 9 else 1 / (s + 1)) | {"odd": 1} for s in range(500)])
    best = [{"n": n, "score": float(n), "kl_bound": n / 4} for n in (1, 2)]
    chosen = data_run(tmp_path / "chosen", "select", "summary.json", {"rows": 4321, "best_of_n": best, "left_out": {}})
    monkeypatch.chdir(tmp_path)
    assert report("a/ppo", second, chosen, evaluation(tmp_path / "judged")) == 0
    assert capsys.readouterr().err.splitlines() == [f"{second} is not finished: step 499", "report: report.html"]
    page = tmp_path / "report.html"
    found = seen(page)
    for words in (
        "4 runs", "a/ppoppo<script>", "LoRA, rank\N{NO-BREAK SPACE}4".replace(" ", "\N{NO-BREAK SPACE}"), "0.5000done",
        "not\N{NO-BREAK SPACE}finished", "eval/objective/kl0\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}1.2500",
        "Score against KL, while training", "Score against KL, on held-out prompts", "Score against KL, by rlhf eval",
        "runs/b", "Score against the most KL, best of n", "b/ppo: not finite at step 9", "Metrics of b/ppo alone: 1",
        "rollout 0.2500 s, update 0.7500 s", "ppo before", "ppo after <script>",
        "Step 3: found the KL is large <script>",
        "ppo.epochs24", "lora.r4\N{EM DASH}", "few rows", "eval prompts that are also train prompts (kept): 3",
        "eval (kept): equal pairs: 6", "bad rows dropped: 2", "too long: 4", "1,234", "2.5000 / 4 / 5", "rlhf select",
        "4,321", "best of n.1.n1", "judged: models", "KL to the reference, nats2 (0 to 9)0 (0 to 9)",
    ):  # fmt: skip
        assert words in found.words, words
    for words in ("middle", "x.jsonl", "output_dir", "seed", "left out", "lora\N{EM DASH}null"):
        assert words not in found.words, words
    text = page.read_text()
    assert found.tags.count("input") == 4
    for run in range(4):
        assert f"body:has(#show{run}:not(:checked)) .run{run}" in text
        assert f'<g class="run{run}">' in text
    assert "fill-opacity: 0.2" in text  # 500 points are drawn as a band
    assert not re.search(r"(?<!&)#[0-9a-f]{6}", text[text.index("<body>") :])
    os.utime(first / "metrics.jsonl", (0, 0))
    assert report("a/ppo", second, chosen, "judged", "-o", "again.htm") == 0
    assert (tmp_path / "again.htm").read_text() == text


def test_one_run(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "ppo")
    (run / "postmortem.html").write_text("x")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed while it wrote
    assert report(run) == 0
    text = (run / "report.html").read_text()
    found = Seen(text)
    assert "postmortem.html" in found.links
    for words in ("Reward against KL", "Step 3: found the KL is large", "Time of a step by phase", "steps10"):
        assert words in found.words, words
    assert report(run, "-o", tmp_path / "here.html") == 0
    assert "ppo/postmortem.html" in Seen((tmp_path / "here.html").read_text()).links


@pytest.mark.parametrize(("name", "words"), [("select", "mean best1.5000"), ("eval", "KL to the reference, nats")])
def test_one_run_without_training(tmp_path: Path, name: str, words: str) -> None:
    run = tmp_path / name
    evaluation(run) if name == "eval" else data_run(run, name, "summary.json", {"rows": 3, "mean_best": 1.5})
    assert report(run) == 0
    found = seen(run / "report.html")
    assert words in found.words
    assert "all weights" not in found.words


DAMAGE = "holds something else than rlhf writes there (the file is damaged; restore it)"
DAMAGED = [
    ("metrics.jsonl", '{"step": 1}\n{\n{"step": 2}\n', ":2: is not valid JSON (the file is damaged)"),
    ("metrics.jsonl", '{"loss": 1}\n', f": {DAMAGE}"),
    ("metrics.jsonl", '{"step": "NaN", "loss": 1}\n', f": {DAMAGE}"),
    ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}\n", f": {DAMAGE}"),
    ("doctor.jsonl", '{"step": 1}\n', f": {DAMAGE}"),
    ("data-report.json", '{"sources": [{}]}', f": {DAMAGE}"),
    ("data-report.json", "[]", ": is not a JSON object (the file is damaged; restore it)"),
    ("eval.json", '{"models": {"a": {"kl": 3}}}', f": {DAMAGE}"),
    ("summary.json", '{"best_of_n": [{"n": 1}]}', f": {DAMAGE}"),
    ("run.json", "{}", f": {DAMAGE}"),
    ("run.json", "{", ": is not valid JSON (the file is damaged; restore it)"),
    ("recipe.yaml", "- 1\n", f": {DAMAGE}"),
    ("recipe.yaml", "a: [\n", ":2:1: this is not YAML: did not find expected node content (the file is damaged; "
                              "restore it)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED)
def test_damage_is_named(tmp_path: Path, capsys: Any, name: str, content: str, words: str) -> None:
    run, other = ppo_run(tmp_path / "a", rows=2), ppo_run(tmp_path / "b", rows=2)
    (run / name).write_text(content)
    assert report(run, other, "-o", tmp_path / "x.html") == 4
    assert capsys.readouterr().err == f"error: {run / name}{words}\n"
    assert not (tmp_path / "x.html").exists()


OWN = "would lie in a run directory, which holds its run's own pages (name another file with -o)"
REFUSED = [
    (["nope"], ["nope: no such run (name a run directory)"]),
    (["ppp"], ["ppp: no such run (did you mean 'ppo'?)"]),
    (["folder"], ["folder: is no run: it holds no run.json (name a run directory)"]),
    (["."], [".: is no run but holds some (name them: rlhf report other ppo)"]),
    (["ppo/run.json"], ["ppo/run.json: is a file (name its run: ppo)"]),
    ([""], ["rlhf report: an empty name is no run (name a run directory)"]),
    (["n" * 300], ["n" * 300 + ": cannot be read: File name too long (name a run directory)"]),
    (["ppo", "folder/../ppo"], ["folder/../ppo: is the same run as ppo (name each run once)"]),
    (["nope", "ppo", "folder"], ["nope: no such run (name a run directory)",
                                 "folder: is no run: it holds no run.json (name a run directory)"]),
    (["ppo", "other", "-o", "folder"], ["-o folder: is a folder (name a file: -o folder/report.html)"]),
    (["ppo", "-o", "x.txt"], ["-o x.txt: does not end in .html (name a page: -o x.html)"]),
    (["ppo", "-o", "gone/x.html"],
     ["-o gone/x.html: there is no folder gone (create it, or name another file with -o)"]),
    (["ppo", "other", "-o", "ppo/report.html"],
     [f"-o ppo/report.html: {OWN}"]),
    (["ppo", "-o", "other/report.html"],
     [f"-o other/report.html: {OWN}"]),
    ([], ["rlhf report: Missing argument 'RUN...'. (rlhf report --help shows the usage)"]),
]  # fmt: skip


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("ppo", "other"):
        ppo_run(tmp_path / name, rows=1)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for arguments, errors in REFUSED:
        assert report(*arguments) == 2, arguments
        assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in errors]
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert report("ppo", "other") == 4
    assert capsys.readouterr().err == (
        "error: report.html: cannot be written: Read-only file system (name another file with -o)\n"
    )
    assert not list(tmp_path.glob("**/*.html"))


def refuse(**_: Any) -> None:
    raise OSError(30, os.strerror(30))


def test_more_runs_than_can_be_told_apart(tmp_path: Path, capsys: Any) -> None:
    runs = [ppo_run(tmp_path / str(n), rows=1) for n in range(MOST + 1)]
    assert report(*runs, "-o", tmp_path / "x.html") == 2
    assert capsys.readouterr().err == (
        f"error: rlhf report: {MOST + 1} of the runs have curves, and a page can tell {MOST} apart (name fewer)\n"
    )


def test_short_names() -> None:
    paths = [Path(p) for p in ("/r/a/1/sft", "/r/a/2/sft", "/r/b/2/sft", "/r/dpo")]
    assert names(paths) == ["1/sft", "a/2/sft", "b/2/sft", "dpo"]
    assert names([]) == []


def test_smoothing() -> None:
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]
    line = smoothed([float(v) for v in range(80)])  # two on either side
    assert line == [float(v) for v in range(80)]
    spiked = smoothed([0.0] * 40 + [5.0] + [0.0] * 38 + [math.nan])
    assert spiked[37:44] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert math.isnan(spiked[-1])


def test_bands() -> None:
    curve = Curve("loss", (1, 2, 3, 4, 5), (1.0, 3.0, math.nan, math.inf, 7.0))
    steps, means, low, high = thinned(curve, 3)
    assert (steps, low[0], high[0], low[2]) == ([2, 4, 5], 1.0, 3.0, 7.0)
    assert (means[0], means[2]) == (2.0, 7.0)
    assert math.isnan(means[1])
    assert thinned(curve)[0] == [1, 2, 3, 4, 5]
    assert thinned(Curve("", (), ())) == ([], [], [], [])
    pages = [svg("Loss", [Curve("loss", tuple(range(n)), (0.0, 1.0) * (n // 2))]) for n in (2000, 2002)]
    assert ["fill-opacity: 0.2" in page for page in pages] == [False, True]
    assert len(pages[1]) < len(pages[0])


def test_settings_as_a_recipe_spells_them() -> None:
    found = {"a": {"b": None, "c": [{"d": True}, {"d": 1.5}]}, "e": [1, "x"], "f": " ", "g": {}, "h": []}
    assert dict(leaves(found)) == {
        "a.b": "null", "a.c.1.d": "true", "a.c.2.d": "1.5", "e": "1, x", "f": '" "', "g": "{}", "h": "[]",
    }  # fmt: skip


# --- runs that are under way, and what curves are drawn over -----------------------------------------------


def under_way(folder: Path, training: str, **more: Any) -> Path:
    """A run of which 40 steps are there."""
    ppo_run(folder, f"training: {training}\n")
    found = [row(step) | {"tokens_per_second": 2.0, "epoch": step / 100, **more} for step in range(1, 41)]
    lines(folder / "metrics.jsonl", found)
    return folder


@pytest.mark.parametrize(
    ("training", "far"),
    [("{max_steps: 200}", "step 40 of 200"), ("{max_steps: null, num_epochs: 1.5}", "step 40, epoch 0.40 of 1.5")],
)
def test_a_run_under_way_says_how_far_it_is(tmp_path: Path, capsys: Any, training: str, far: str) -> None:
    run = under_way(tmp_path / "run", training)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss"')
    assert report(run) == 0
    assert capsys.readouterr().err.splitlines() == [f"{run} is not finished: {far}", f"report: {run / 'report.html'}"]
    assert f"not finished{far}" in seen(run / "report.html").words
    (run / "DONE").write_text("{}")
    assert report(run) == 0
    assert "finished" not in capsys.readouterr().err
    assert "not finished" not in seen(run / "report.html").words


def test_curves_over_tokens_and_time(tmp_path: Path, capsys: Any) -> None:
    run = under_way(tmp_path / "run", "{max_steps: 40}")
    placed = {x: axis(x, [row(s) | {"tokens_per_second": 2.0} for s in range(4)]) for x in ("tokens", "time")}  # type: ignore[arg-type]
    assert placed["tokens"].places == {0: 0, 1: 10, 2: 20, 3: 30}
    assert placed["time"].places == {s: pytest.approx(5 * s) for s in range(4)}
    assert on(Curve("loss", (1, 3, 9), (1.0, 0.5, 0.1)), placed["tokens"]) == Curve("loss", (10, 30), (1.0, 0.5))
    pages = {}
    for x in ("step", "tokens", "time"):
        assert report(run, "-o", tmp_path / f"{x}.html", "--x", x) == 0
        pages[x] = seen(tmp_path / f"{x}.html").words
    assert "time of training" in pages["time"]
    assert re.search(r"[1-9]\d* min", pages["time"])
    assert "time of training" not in pages["tokens"]
    assert report(run, ppo_run(tmp_path / "other"), "-o", tmp_path / "both.html", "--x", "tokens") == 0
    assert "400" in seen(tmp_path / "both.html").words
    capsys.readouterr()
    assert report(run, "--x", "days") == 2
    assert capsys.readouterr().err == "error: --x: 'days' is not one of step, tokens, time\n"


def test_time_that_not_every_step_takes_is_spread_over_all() -> None:
    found = {"time/update_s": Curve("time/update_s", tuple(range(10)), (1.0,) * 10),
             "time/evaluation_s": Curve("time/evaluation_s", (9,), (5.0,))}  # fmt: skip
    assert "update 1 s, evaluation 0.5000 s" in phases([found], ["run"])
