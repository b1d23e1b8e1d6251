"""rlhf eval through the command line: figures as of training, sampling and scoring, exact after a stop."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from rlhf_cli.models.roles import Role
from rlhf_cli.report.evaluation import lines_of
from rlhf_cli.stages import evaluated, matches, product
from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]
MODEL = {"dtype": "float32"}
QUESTION = "of {a} or {b} tell A or B"


def judging(model: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A recipe for `rlhf eval`; more: its data and whatever lies on top."""
    head = {"stage": "eval", "model": {"name_or_path": str(model), **MODEL}, "data": {"max_length": 48}, "seed": 3}
    return w.merged(head | {"output_dir": str(out)}, more)


def speaking(model: Path, world: Path, out: Path, **more: Any) -> dict[str, Any]:
    prompts = {"path": str(world / "prompts.jsonl"), "limit": 12}
    rollout = {"max_new_tokens": 6, "completions_per_prompt": 2, "max_batch": 16}
    return judging(model, out, **w.merged({"data": {"prompts": prompts}, "rollout": rollout}, more))


def go(content: dict[str, Any], *options: object, code: int = 0, page: bool = False) -> Outcome:
    out = Path(content["output_dir"])
    path = w.save(content, out.with_suffix(".yaml"))
    if page:
        outcome = quick("eval", path, *options)
    else:
        with patch("rlhf_cli.stages.evaluated.write_evaluation"):
            outcome = quick("eval", path, *options)
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    return outcome


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return found


@pytest.fixture(scope="session")
def true(world: Path) -> dict[str, Any]:
    return {"function": f"{world}/reward.py:true_reward"}


# --- reward models ---------------------------------------------------------------------------------------


def test_the_bench_of_a_reward_model_is_what_its_training_said(rm: Path, world: Path, tmp_path: Path) -> None:
    data = {kind: str(world / f"{file}-eval.jsonl")
            for kind, file in (("pairs", "pairs"), ("rankings", "rankings"), ("scored", "scored"))}  # fmt: skip
    content = judging(rm, tmp_path / "e", data=data)
    outcome = go(content, "--json", page=True)
    found = told(tmp_path / "e")
    assert json.loads(outcome.out) == found
    assert found["pairs"]["accuracy"] == pytest.approx(w.column(rm, "eval/rewards/accuracies")[-1])
    assert found["pairs"]["mean_margin"] == pytest.approx(w.column(rm, "eval/rewards/margins")[-1], rel=1e-4)
    assert found["pairs"]["low"] < found["pairs"]["accuracy"] <= found["pairs"]["high"]
    assert (found["kind"], found["rankings"]["prompts"], found["scored"]["completions"]) == ("reward", 48, 48)
    rows = w.lines(tmp_path / "e" / "data.jsonl")
    assert len(rows) == 144
    said = [row["scores"][0] for row in rows if row["kind"] == "scored"]
    gold = [row["score"] for row in w.lines(world / "scored-eval.jsonl")]
    assert found["scored"]["correlation"] == pytest.approx(np.corrcoef(said, gold)[0, 1])
    assert "accuracy " in outcome.err
    assert "verdict" in outcome.err
    page = (tmp_path / "e" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "chosen shorter" in page
    again = go(content, "--json")
    assert ("up to date" in again.err, json.loads(again.out)) == (True, found)
    assert "data.max_length: 48 -> 40" in go(w.merged(content, {"data": {"max_length": 40}}), code=2).err


@pytest.mark.parametrize(
    ("objective", "kind", "names"),
    [
        ({"name": "step_labels"}, "steps", {"accuracy": "steps/accuracy", "right_found": "steps/right_found"}),
        ({"name": "two_token", "good": "good", "bad": "bad"}, "spans", {"wrong_found": "steps/wrong_found"}),
        ({"name": "cost"}, "safety", {"accuracy": "rewards/accuracies", "mean_margin": "rewards/margins"}),
    ],
)
def test_other_judges(objective: dict[str, Any], kind: str, names: dict[str, str], toy: Toy, tmp_path: Path) -> None:
    more: dict[str, Any] = {"data": {"segments": {"by": "sub_sentence"}}} if kind == "spans" else {}
    content = toy("train-rm", kind, "judge", 32, objective=objective, training={"max_steps": 2}, **more)
    judge = train(content)
    key = "pairs" if kind == "safety" else "steps"
    evaluation = judging(judge, tmp_path / "e", data={key: content["data"]["eval"]})
    assert quick("check", w.save(evaluation, tmp_path / "c.yaml")).code == 0
    go(evaluation)
    found = told(tmp_path / "e")
    assert found["kind"] == ("cost" if kind == "safety" else "process")
    for ours, theirs in names.items():
        assert found[key][ours] == pytest.approx(w.column(judge, f"eval/{theirs}")[-1], rel=1e-4), ours
    if key == "steps":
        whole = found[key]["solution_accuracy"]["accuracy"]
        assert whole == pytest.approx(w.column(judge, "eval/solutions/accuracy")[-1])
        shares = (found[key]["right_found"] + found[key]["wrong_found"]) / 2
        assert found[key]["balanced_accuracy"] == pytest.approx(shares)


# --- language models -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def dueled(base: Path, sft_lora: Path, tiny_model: Path, world: Path, runs: Path, true: dict[str, Any]) -> Path:
    """Three models on twelve prompts and the held-out conversations."""
    more = {"data": {"demonstrations": str(world / "chat-eval.jsonl")}, "reference": str(base), "rewards": [true],
            "against": [str(base), str(tiny_model)]}  # fmt: skip
    go(speaking(sft_lora, world, runs / "dueled", **more), page=True)
    return runs / "dueled"


def test_the_figures_of_language_models(dueled: Path, base: Path, sft_lora: Path, world: Path, tmp_path: Path) -> None:
    found, rows = told(dueled), w.lines(dueled / "data.jsonl")
    one, reference = found["models"][str(sft_lora)], found["models"][str(base)]
    for name, run in ((one, sft_lora), (reference, base)):
        loss = w.column(run, "eval/loss")[-1]
        assert name["perplexity"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert reference["kl"]["mean"] == reference["kl"]["k3"] == 0.0
    assert one["kl"]["k3"] > 0
    own = [row for row in rows if row["by"]["model"] == str(sft_lora)]
    sampling = {"stage": "sample", "model": {"name_or_path": str(sft_lora), **MODEL}, "seed": 3,
                "data": {"prompts": {"path": str(world / "prompts.jsonl"), "limit": 12}, "max_length": 48},
                "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2},
                "output_dir": str(tmp_path / "s")}  # fmt: skip
    assert quick("sample", w.save(sampling, tmp_path / "s.yaml")).code == 0
    assert [row["completion"] for row in own] == [r["completion"] for r in w.lines(tmp_path / "s" / "data.jsonl")]
    scores = [w.true_reward(row["completion"]) for row in own]
    assert one["scores"]["true_reward"]["mean"] == pytest.approx(np.mean(scores))
    assert one["eos_rate"] == np.mean([row["finished"] for row in own])
    per_prompt = np.array([row["k1"] for row in own]).reshape(12, 2).mean(1)
    assert one["kl"]["standard_error"] == pytest.approx(per_prompt.std(ddof=1) / math.sqrt(12))


def test_the_win_rate_is_that_of_the_scores(dueled: Path, base: Path, sft_lora: Path, tiny_model: Path) -> None:
    found, rows = told(dueled), w.lines(dueled / "data.jsonl")
    scores = {name: [row["score"] for row in rows if row["by"]["model"] == str(name)]
              for name in (base, sft_lora, tiny_model)}  # fmt: skip
    assert len({tuple(values) for values in scores.values()}) == 3
    assert [one["against"] for one in found["against"]] == [str(base), str(tiny_model)]
    for one in found["against"]:
        pairs = list(zip(scores[sft_lora], scores[Path(one["against"])], strict=True))
        assert one["win_rate"] == pytest.approx(np.mean([0.5 if a == b else float(a > b) for a, b in pairs]))
        assert one["low"] <= one["win_rate"] <= one["high"]
        assert one["wins"] + one["ties"] + one["losses"] == one["matches"] == 24
    assert {entry["model"] for entry in found["ratings"]} == {str(base), str(sft_lora), str(tiny_model)}
    assert all(entry["games"] == 48 for entry in found["ratings"])
    assert "Win rates" in (dueled / "report.html").read_text()


def test_two_models_draw_apart(base: Path, world: Path, tmp_path: Path, true: dict[str, Any]) -> None:
    """The same weights twice: other completions of the same distribution."""
    twin = shutil.copytree(base / "final", tmp_path / "twin")
    go(speaking(base, world, tmp_path / "run", rewards=[true], against=[str(twin)]))
    rows = w.lines(tmp_path / "run" / "data.jsonl")
    mine, theirs = ([row["completion"] for row in part] for part in (rows[:24], rows[24:]))
    assert sum(a != b for a, b in zip(mine, theirs, strict=True)) > 12
    assert told(tmp_path / "run")["against"][0]["verdict"] == "no difference seen"


def test_a_judge_decides_and_a_killed_evaluation_ends_the_same(
    base: Path, sft_lora: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on the disk at a kill is copied; once in the sampling and once in the judging."""
    monkeypatch.setattr(evaluated, "AT_ONCE", 9)
    monkeypatch.setattr(matches, "AT_ONCE", 10)
    judge = {"model": {"name_or_path": str(base), **MODEL}, "question": QUESTION}
    content = speaking(sft_lora, world, tmp_path / "run", judge=judge, data={"max_length": 40})
    append, calls = product.Lines.append, []

    def stopping(self: Any, record: dict[str, Any]) -> None:
        append(self, record)
        calls.append(record)
        if len(calls) in (2, 8):
            shutil.copytree(tmp_path / "run", tmp_path / f"killed-{len(calls)}")

    with monkeypatch.context() as patched:
        patched.setattr(product.Lines, "append", stopping)
        outcome = go(content, "--against", base)
    assert len(calls) == 9, "three pieces of each model, three of the judge"
    found = told(tmp_path / "run")
    one = found["against"][0]
    assert (one["by"], one["matches"], one["prompts"]) == ("judge", 24, 12)
    assert 0 < one["mean_probability"] < 1
    assert one["position_bias"] == pytest.approx(one["first_place"] - 0.5)
    assert "position bias" in outcome.err
    assert 0 < one["label_probability"] < 1
    whole = w.contents(tmp_path / "run")
    for killed in (2, 8):
        shutil.rmtree(tmp_path / "run")
        os.rename(tmp_path / f"killed-{killed}", tmp_path / "run")
        assert f"going on after step {killed} of 9" in go(content, "--against", base).err
        now = w.contents(tmp_path / "run")
        assert all(now[name] == whole[name] for name in ("eval.json", "data.jsonl"))


def test_a_judge_that_does_not_know_its_labels_is_told_of(
    base: Path, sft_lora: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the terminal and on the page; and a run that an older version began goes on."""
    judge = {"model": {"name_or_path": str(base), **MODEL}, "question": QUESTION, "labels": ["Q", "Z"]}
    content = speaking(sft_lora, world, tmp_path / "run", judge=judge, data={"max_length": 40}, against=[str(base)])
    append = product.Lines.append

    def older(self: Any, record: dict[str, Any]) -> None:
        record = record | {"more": [{k: v for k, v in row.items() if k != "mass"} for row in record["more"]]}
        append(self, record)
        if record["more"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(matches, "AT_ONCE", 10)
    with monkeypatch.context() as patched:
        patched.setattr(product.Lines, "append", older)
        go(content, code=130)
    outcome = go(content, page=True)
    assert "going on after step" in outcome.err
    (one,) = told(tmp_path / "run")["against"]
    assert one["label_probability"] < 0.1
    mass = f"{one['label_probability']:.3g}"
    words = f"{sft_lora} against {base}: the judge says one of its labels with probability {mass}"
    deaf = f"{words}: it does not know what it is asked, and its scores are noise; look at judge.labels, "
    assert f"warning: {deaf}" in outcome.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert f'<p class="wild">{deaf}' in page
    (line,) = [line for line in lines_of(told(tmp_path / "run")) if line.startswith("winner changes with the order")]
    assert line.endswith(f" {100 * one['flips']:.0f} % of the matches")
    assert "winner changes with the order" in page


# --- wrong input -----------------------------------------------------------------------------------------


def test_wrong_recipes_are_one_clear_line(
    base: Path, sft_lora: Path, rm: Path, world: Path, tmp_path: Path, true: dict[str, Any]
) -> None:
    pairs, out = {"pairs": str(world / "pairs.jsonl")}, tmp_path / "x"
    twin = tmp_path / "twin"
    twin.symlink_to(base)
    bench, lone = judging(rm, out, data=pairs), speaking(base, world, out)
    duel = lone | {"rewards": [true]}
    judge = {"model": str(base), "question": QUESTION}
    greedy = w.merged(lone, {"reference": str(sft_lora), "rollout": {"temperature": 0}})
    empty = w.write_rows(tmp_path / "empty.jsonl", [])
    for content, code, message in (
        (judging(rm, out), 2, "there is nothing to evaluate on: give one of pairs, rankings"),
        (w.merged(lone, {"data": pairs}), 2, "a recipe evaluates one kind"),
        (judging(base, out, data=pairs), 2, f"data.pairs: not for {base}: this is a language model"),
        (speaking(rm, world, out), 2, f"data.prompts, rollout: not for {rm}: this is a reward model"),
        (judging(rm, out, data={"steps": str(world / "steps.jsonl")}), 2, "it is evaluated on data.pairs"),
        (judging(rm, out, data={"pairs": str(world / "prompts.jsonl")}), 3, "prompts.jsonl"),
        (judging(rm, out, data={"pairs": str(empty)}), 3, "holds no rows"),
        (bench | {"against": [str(sft_lora)]}, 2, "against is only read with data.prompts"),
        (duel | {"against": [str(rm)]}, 4, "this is a reward model"),
        (lone | {"against": [str(sft_lora)]}, 2, "against needs rewards or a judge"),
        (duel | {"against": [f"{base}/"]}, 2, "which is the model itself"),
        (duel | {"against": [str(sft_lora), str(sft_lora)]}, 2, f"against names {sft_lora} twice"),
        (duel | {"against": [str(twin)]}, 2, f"is the same model as {base}"),
        (duel | {"judge": judge}, 2, "judge is only read with against"),
        (duel | {"against": [str(sft_lora)], "judge": judge | {"opponents": "next"}}, 2, "judge.opponents"),
        (w.merged(greedy, {"rollout": {"completions_per_prompt": 1}}), 2, "rollout.temperature is 0"),
        (w.merged(lone, {"reference": str(base), "rollout": {"top_k": 3}}), 2, "leave rollout.top_k out"),
        (w.merged(lone, {"rollout": {"max_new_tokens": 60}}), 2, "leaves no room for a prompt"),
        (bench | {"rewards": [true]}, 2, "rewards is only read with data.prompts"),
        (judging(base / "final" / "nothing", out, data=pairs), 4, "no such folder"),
    ):  # fmt: skip
        outcome = go(content, code=code)
        assert len(outcome.errors) == 1, outcome.err
        assert message in outcome.errors[0], outcome.err
        assert not out.exists(), message
    outcome = go(bench, "--json", "--dry-run", code=2)
    assert "--json and --dry-run exclude each other" in outcome.errors[0]
    assert "dry run: 240 examples" in go(bench, "--dry-run").err
    assert not out.exists()


def test_a_number_that_is_none_is_not_averaged(
    rm: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Role, "score", lambda self, batch: torch.full((batch.sequences,), math.nan))
    outcome = go(judging(rm, tmp_path / "e", data={"pairs": str(world / "pairs-eval.jsonl")}), code=5)
    assert "pairs-eval.jsonl:1: the score is nan" in outcome.errors[0]
    assert not (tmp_path / "e" / "DONE").exists()


def test_models_that_cannot_read_the_same_prompts(
    base: Path, sft_lora: Path, world: Path, tmp_path: Path, true: dict[str, Any]
) -> None:
    """The template of the other model says "tell of" too, which leaves no room for the longer prompt."""
    asked = [[{"role": "user", "content": text}] for text in ("tell of", "tell of red blue green tall small old")]
    prompts = {"path": str(w.write_rows(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in asked]))}
    long = shutil.copytree(sft_lora / "final", tmp_path / "long")
    template = long / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|' + m['role']", "tell of <|' + m['role']")
                        .replace("{{ '<|assistant|>'", "{{ 'tell of <|assistant|>'"))  # fmt: skip
    content = speaking(base, world, tmp_path / "x", rewards=[true], against=[str(long)],
                       data={"max_length": 19, "prompts": prompts})  # fmt: skip
    outcome = go(content, code=3)
    assert len(outcome.errors) == 1
    assert "p.jsonl:2: 1 prompts fit only one of" in outcome.errors[0]
    same = w.merged(content, {"against": [], "reference": str(long), "data": {"max_length": 48}})
    outcome = go(same, code=4)
    assert "has another tokenizer or chat template" in outcome.errors[0]
