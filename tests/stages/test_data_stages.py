"""sample, score and select through the command line: equal to what ppo does, exact after a stop, clear when wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.stages import product, sample
from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick

MODEL = {"dtype": "float32"}
ROLLOUT = {"max_new_tokens": 8, "completions_per_prompt": 3, "max_batch": 16}


def sampling(model: Path, world: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A recipe for `rlhf sample` on a few prompts."""
    prompts = [{"path": str(world / "prompts.jsonl"), "limit": 20}]
    return w.merged(
        {"stage": "sample", "model": {"name_or_path": str(model), **MODEL}, "seed": 3, "output_dir": str(out),
         "data": {"prompts": prompts, "max_length": 48}, "rollout": ROLLOUT}, more,
    )  # fmt: skip


def scoring(model: Path, source: Path, out: Path, rewards: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return w.merged(
        {"stage": "score", "model": {"name_or_path": str(model), **MODEL}, "data": {"completions": str(source)},
         "rewards": rewards, "output_dir": str(out)}, more,
    )  # fmt: skip


def selecting(source: Path, out: Path, name: str, **more: Any) -> dict[str, Any]:
    return w.merged(
        {"stage": "select", "data": {"completions": str(source)}, "selection": {"name": name}, "output_dir": str(out)},
        more,
    )  # fmt: skip


def go(content: dict[str, Any], *options: object, code: int = 0) -> Outcome:
    out = Path(content["output_dir"])
    outcome = quick(content["stage"], w.save(content, out.with_suffix(".yaml")), *options)
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    return outcome


def made(run: Path) -> list[dict[str, Any]]:
    return w.lines(run / "data.jsonl")


def told(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.fixture(scope="session")
def true(world: Path) -> dict[str, Any]:
    return {"function": f"{world}/reward.py:true_reward"}


@pytest.fixture(scope="session")
def sampled(base: Path, world: Path, runs: Path) -> Path:
    """Three completions of each of 20 prompts."""
    go(sampling(base, world, runs / "sampled"))
    return runs / "sampled"


@pytest.fixture(scope="session")
def scored(base: Path, sampled: Path, runs: Path, true: dict[str, Any]) -> Path:
    go(scoring(base, sampled, runs / "scored", [true]))
    return runs / "scored"


# --- sample ----------------------------------------------------------------------------------------------


def test_a_row_says_what_was_sampled_and_how(sampled: Path, base: Path, world: Path) -> None:
    rows = made(sampled)
    asked = w.lines(world / "prompts.jsonl")[:20]
    assert [r["prompt"] for r in rows] == [a["prompt"] for a in asked for _ in range(3)]
    assert [r["index"] for r in rows] == [0, 1, 2] * 20
    assert [r["row"] for r in rows[::3]] == [{"number": n} for n in range(20)]
    first = rows[0]
    assert first["where"] == f"{world}/prompts.jsonl:1"
    assert (first["by"]["model"], first["by"]["seed"], first["by"]["temperature"]) == (str(base), 3, 1.0)
    assert len(first["completion_ids"]) <= 8
    assert all(r["finished"] == (r["completion_ids"][-1] in (2, 6)) for r in rows)
    assert told(sampled)["completions"] == told(sampled)["rows"] == 60
    assert told(sampled)["tokens"] == sum(len(r["completion_ids"]) for r in rows)
    assert not (sampled / "data.pieces").exists()
    assert json.loads((sampled / "run.json").read_text())["role"] == "data"


def test_neither_batches_nor_pieces_change_what_is_drawn(
    sampled: Path, base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "AT_ONCE", 7)
    go(sampling(base, world, tmp_path / "other", rollout={"max_batch": 4}))
    assert made(tmp_path / "other") == made(sampled)
    assert quick("sample", tmp_path / "other.yaml", "rollout.max_batch=64").err.count("up to date") == 1
    go(sampling(base, world, tmp_path / "seed", seed=4))
    assert made(tmp_path / "seed") != made(sampled)


def test_sampling_equals_the_rollouts_of_ppo_and_scoring_its_scores(
    base: Path, world: Path, rm: Path, tmp_path: Path
) -> None:
    """The evaluation of ppo before its first step, prompt by prompt."""
    more = {"rollout": {"max_new_tokens": 8}, "training": {"max_steps": 1}, "evaluation": {"every": 1, "samples": 12}}
    rewards = [{"run": str(rm)}]
    ppo = w.recipe("ppo", base, world, "prompts", tmp_path / "ppo", lora=w.LORA, rewards=rewards, **more)
    ppo["data"]["eval"] = {"path": ppo["data"]["eval"], "limit": 12}
    go(ppo)
    known = [row for row in w.lines(tmp_path / "ppo" / "samples.jsonl") if row["step"] == 0]
    prompts = [{"path": str(world / "prompts-eval.jsonl"), "limit": 12}]
    go(sampling(base, world, tmp_path / "s", data={"prompts": prompts}, rollout={"completions_per_prompt": 1}))
    go(scoring(base, tmp_path / "s", tmp_path / "c", [{"run": str(rm)}]))
    rows = made(tmp_path / "c")
    assert len(known) == len(rows) == 12
    assert [r["completion"] for r in rows] == [k["completion"] for k in known]
    assert [r["finished"] for r in rows] == [k["finished"] for k in known]
    assert [r["score"] for r in rows] == pytest.approx([k["score"] for k in known], abs=1e-5)
    assert len({r["score"] for r in rows}) > 6


def test_an_adapter_writes_otherwise_than_its_base(sft_lora: Path, base: Path, world: Path, tmp_path: Path) -> None:
    go(sampling(sft_lora, world, tmp_path / "lora"))
    go(sampling(base, world, tmp_path / "base"))
    assert [r["completion"] for r in made(tmp_path / "lora")] != [r["completion"] for r in made(tmp_path / "base")]


def test_a_quantised_base_writes(sft_lora: Path, world: Path, tmp_path: Path) -> None:
    go(w.merged(sampling(sft_lora, world, tmp_path / "q"), {"model": {"quantization": "nf4"}}))
    assert len(made(tmp_path / "q")) == 60


def test_greedy_is_the_likeliest_token(base: Path, world: Path, tmp_path: Path) -> None:
    go(sampling(base, world, tmp_path / "g", rollout={"temperature": 0, "completions_per_prompt": 1}))
    rows = made(tmp_path / "g")
    go(sampling(base, world, tmp_path / "h", seed=9, rollout={"temperature": 0, "completions_per_prompt": 1}))
    assert [r["completion"] for r in made(tmp_path / "h")] == [r["completion"] for r in rows]


def test_best_of_keeps_the_highest_score_of_all(base: Path, world: Path, tmp_path: Path, true: dict[str, Any]) -> None:
    content = sampling(base, world, tmp_path / "best", rewards=[true])
    del content["rollout"]["completions_per_prompt"]
    go(content, "--best-of", 5)
    go(sampling(base, world, tmp_path / "all", rollout={"completions_per_prompt": 5}))
    best, every = made(tmp_path / "best"), made(tmp_path / "all")
    assert len(best) == 20
    for n, row in enumerate(best):
        rewards = [w.true_reward(r["completion"]) for r in every[5 * n : 5 * n + 5]]
        assert row["score"] == pytest.approx(max(rewards))
        assert row["index"] == rewards.index(max(rewards))
    facts = told(tmp_path / "best")
    assert facts["rows"] == 20
    assert facts["mean_best"] > facts["mean_score"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_and_ends_the_same(
    signum: int, sampled: Path, base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL: what lies on the disk is copied at that moment, its last line torn."""
    monkeypatch.setattr(sample, "AT_ONCE", 12)
    content, append, calls = sampling(base, world, tmp_path / "run"), product.Lines.append, []

    def stopping(self: Any, record: dict[str, Any]) -> None:
        append(self, record)
        calls.append(record)
        if len(calls) == 2:
            if signum == signal.SIGKILL:
                shutil.copytree(tmp_path / "run", tmp_path / "killed")
            else:
                os.kill(os.getpid(), signum)

    with monkeypatch.context() as patched:
        patched.setattr(product.Lines, "append", stopping)
        outcome = go(content, code=0 if signum == signal.SIGKILL else 128 + signum)
    if signum == signal.SIGKILL:
        shutil.rmtree(tmp_path / "run")
        os.rename(tmp_path / "killed", tmp_path / "run")
        with (tmp_path / "run" / "data.pieces").open("r+b") as file:
            file.truncate((tmp_path / "run" / "data.pieces").stat().st_size - 5)
    else:
        assert "stopped after piece 2 of 5; the same command goes on from here" in outcome.errors[0]
    assert not (tmp_path / "run" / "data.jsonl").exists()
    again = go(content)
    done = 1 if signum == signal.SIGKILL else 2
    assert f"going on after step {done} of 5" in again.err
    assert made(tmp_path / "run") == made(sampled)
    assert told(tmp_path / "run") == told(sampled)


def test_completions_are_revised_by_principles(
    sampled: Path, base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.txt").write_text("# by these\ngood\nsweet\n")
    revise = {
        "principles": str(tmp_path / "c.txt"),
        "critique": "{principle}?",
        "revision": "{principle}!",
        "rounds": 2,
    }
    go(sampling(base, world, tmp_path / "r", revise=revise))
    rows, plain = made(tmp_path / "r"), made(sampled)
    assert [r["draft"] for r in rows] == [p["completion"] for p in plain]
    assert all(len(r["critiques"]) == 2 and "completion_ids" not in r for r in rows)
    assert {p for r in rows for p in r["principles"]} == {"good", "sweet"}
    assert sum(r["completion"] != r["draft"] for r in rows) > 30
    assert told(tmp_path / "r")["revised"] == 60
    monkeypatch.setattr(sample, "AT_ONCE", 7)
    go(sampling(base, world, tmp_path / "again", revise=revise))
    assert made(tmp_path / "again") == rows
    go(sampling(base, world, tmp_path / "long", revise=revise | {"critique": "{principle} " + "why " * 25}))
    rows = made(tmp_path / "long")
    assert [r["completion"] for r in rows] == [p["completion"] for p in plain], "the context holds no such question"
    assert told(tmp_path / "long")["revised"] == 0


# --- score -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_function(scored: Path) -> None:
    rows = made(scored)
    assert [r["score"] for r in rows] == pytest.approx([w.true_reward(r["completion"]) for r in rows])
    assert rows[0]["scores"] == {"true_reward": rows[0]["score"]}
    assert rows[0]["by"]["seed"] == 3
    assert told(scored)["mean_score"] == pytest.approx(np.mean([r["score"] for r in rows]))


def test_several_rewards_are_weighed_and_a_cost_stands_apart(
    base: Path, sampled: Path, rm: Path, tmp_path: Path, true: dict[str, Any]
) -> None:
    length = {"rule": {"name": "length", "limit": 8, "margin": 4}, "weight": 0.5}
    rewards = [true | {"weight": 2.0}, length, {"run": str(rm), "role": "cost", "name": "rm"}]
    go(scoring(base, sampled, tmp_path / "c", rewards))
    for row in made(tmp_path / "c"):
        parts = row["scores"]
        assert set(parts) == {"true_reward", "length", "rm"}
        assert row["score"] == pytest.approx(2 * parts["true_reward"] + 0.5 * parts["length"])
        assert row["cost"] == pytest.approx(parts["rm"])


def test_a_text_without_ids_is_tokenised(base: Path, sampled: Path, rm: Path, tmp_path: Path) -> None:
    rows = [r for r in made(sampled) if r["completion"].strip()]
    count = len(rows)
    plain = [{k: r[k] for k in ("prompt", "completion", "finished")} for r in rows]
    source = w.write_rows(tmp_path / "plain.jsonl", plain)
    outcome = go(scoring(base, source, tmp_path / "plain", [{"run": str(rm)}]))
    assert f"{count} completions, 0 of them by the tokens that were sampled" in outcome.err
    source = w.write_rows(tmp_path / "ids.jsonl", rows)
    outcome = go(scoring(base, source, tmp_path / "ids", [{"run": str(rm)}]))
    assert f"{count} completions, {count} of them by the tokens that were sampled" in outcome.err
    alike = [
        a["score"] == pytest.approx(b["score"], abs=1e-4)
        for a, b in zip(made(tmp_path / "plain"), made(tmp_path / "ids"), strict=True)
    ]
    assert sum(alike) > count / 2  # a text may have been sampled in other tokens than the tokenizer gives


def test_what_cannot_be_scored_is_null_and_is_not_selected(base: Path, sampled: Path, tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(
        "def some(completions, index):\n    return [None if i == 0 else float(i) for i in index]\n"
    )
    rows = [r | {"row": {"index": r["index"]}} for r in made(sampled)]
    path = w.write_rows(tmp_path / "in.jsonl", rows)
    go(scoring(base, path, tmp_path / "c", [{"function": f"{tmp_path}/some.py:some"}]))
    found = made(tmp_path / "c")
    assert [r["score"] for r in found[:3]] == [None, 1.0, 2.0]
    assert told(tmp_path / "c")["scored"] == 40
    go(selecting(tmp_path / "c", tmp_path / "p", "pairs"))
    assert told(tmp_path / "p")["left_out"]["no score"] == 20


def judging(model: Path, source: Path, out: Path, **more: Any) -> dict[str, Any]:
    judge = {"model": {"name_or_path": str(model), **MODEL}, "question": "{a} or {b}?", **more}
    return {"stage": "score", "data": {"completions": str(source)}, "judge": judge, "output_dir": str(out)}


def test_a_judge_compares_the_completions_of_a_prompt(
    base: Path, sampled: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = go(judging(base, sampled, tmp_path / "j"))
    rows, facts = made(tmp_path / "j"), told(tmp_path / "j")
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"]), []).append(row["score"])
    assert all(np.mean(scores) == pytest.approx(0.5) for scores in groups.values()), "what one wins another loses"
    assert len({row["score"] for row in rows}) > 20
    pairs = w.lines(tmp_path / "j" / "comparisons.jsonl")
    assert facts["matches"] == sum(len(g) * (len(g) - 1) // 2 for g in groups.values()) >= len(pairs) > 30
    assert all(0.5 <= pair["target"] <= 1 for pair in pairs)
    assert all(p["target"] == pytest.approx((p["asked_first"] + p["asked_second"]) / 2) for p in pairs)
    assert facts["position_bias"] == pytest.approx(facts["first_place"] - 0.5)
    assert f"{facts['matches']} matches of 60 completions, no principles" in outcome.err
    content = w.recipe("train-rm", base, world, "pairs", tmp_path / "rm", lora=w.LORA, training={"max_steps": 1})
    content["data"] |= {"train": str(tmp_path / "j" / "comparisons.jsonl"), "eval": None, "on_bad_row": "drop"}
    go(content)
    monkeypatch.setattr("rlhf_cli.stages.judged.AT_ONCE", 5)
    go(judging(base, sampled, tmp_path / "k"))
    assert [r["score"] for r in made(tmp_path / "k")] == pytest.approx([r["score"] for r in rows], abs=1e-6)


def test_wrong_judges_are_named(
    base: Path, sampled: Path, rm: Path, world: Path, tmp_path: Path, true: dict[str, Any]
) -> None:
    alone = w.write_rows(tmp_path / "alone.jsonl", [{"prompt": f"p {n}", "completion": "c"} for n in range(3)])
    right = judging(base, sampled, tmp_path / "x")
    for content, code, message in (
        (judging(base, alone, tmp_path / "x"), 3, "no prompt has two completions to compare"),
        (judging(rm, sampled, tmp_path / "x"), 4, "this is a reward model"),
        (judging(base, sampled, tmp_path / "x", labels=["A", "AB"]), 2, "cannot tell 'A' from 'AB' at their start"),
        (judging(base, sampled, tmp_path / "x", question="{a}?"), 2, "question does not hold {b}"),
        (
            judging(base, sampled, tmp_path / "x", question="{a} {b} {promt}"),
            2,
            "holds {promt}, which stands for nothing",
        ),
        (
            judging(base, sampled, tmp_path / "x", question="why " * 40 + "{a} {b}"),
            2,
            "of a model with a context of 128",
        ),
        (right | {"rewards": [true]}, 2, "give rewards or a judge, one of them"),
        (right | {"model": str(base)}, 2, "the judge has its own"),
        ({k: v for k, v in right.items() if k != "judge"}, 2, "give rewards or a judge, one of them"),
    ):
        outcome = go(content, code=code)
        assert len(outcome.errors) == 1
        assert message in outcome.err, outcome.err
        assert not (tmp_path / "x").exists(), message


def test_an_edited_text_is_scored_and_not_the_tokens_of_the_old_one(
    base: Path, sampled: Path, rm: Path, tmp_path: Path
) -> None:
    rows = made(sampled)[:6]
    edited = [r | {"completion": "awful bad poor"} for r in rows[:2]] + [
        r | {"prompt": [{"role": "user", "content": "tell of old"}]} for r in rows[2:4]] + rows[4:]  # fmt: skip
    plain = [{k: r[k] for k in ("prompt", "completion", "finished")} for r in edited]
    for name, found in (("ids", edited), ("text", plain)):
        source = w.write_rows(tmp_path / f"{name}.jsonl", found)
        outcome = go(scoring(base, source, tmp_path / name, [{"run": str(rm)}]))
        if name == "ids":
            assert "6 completions, 2 of them by the tokens that were sampled" in outcome.err
            assert "warning: 4 completions are read by their text" in outcome.err
    scores = [[r["score"] for r in made(tmp_path / name)] for name in ("ids", "text")]
    assert scores[0][:4] == pytest.approx(scores[1][:4], abs=1e-5)


def test_a_completion_that_cannot_be_scored_is_a_bad_row_of_its_source(
    base: Path, sampled: Path, rm: Path, tmp_path: Path
) -> None:
    rows = [r for r in made(sampled) if r["completion"].strip()][:6]
    rows[1] |= {"completion": "good " * 40, "by": {}}
    first, second = w.write_rows(tmp_path / "a.jsonl", rows[2:]), w.write_rows(tmp_path / "b.jsonl", rows[:2])
    content = scoring(base, first, tmp_path / "c", [{"run": str(rm)}], data={"max_length": 32})
    content["data"]["completions"] = [str(first), str(second)]
    outcome = go(content, code=3)
    assert f"{second}:2: longer than data.max_length 32" in outcome.errors[0]
    content["data"]["on_bad_row"] = "drop"
    go(content)
    assert len(made(tmp_path / "c")) == 5
    report = json.loads((tmp_path / "c" / "data-report.json").read_text())
    assert [(s["rows"], s["kept"]) for s in report["sources"]] == [(4, 4), (2, 1)]
    assert report["bad_rows"] == 1
    (bad,) = w.lines(tmp_path / "c" / "bad-rows.jsonl")
    assert (bad["where"], bad["reason"]) == (f"{second}:2", "longer than data.max_length 32")


def test_a_score_too_large_to_compute_with_stops(base: Path, sampled: Path, tmp_path: Path) -> None:
    (tmp_path / "g.py").write_text("def g(completions):\n    return [1e200 * len(c) for c in completions]\n")
    outcome = go(scoring(base, sampled, tmp_path / "x", [{"function": f"{tmp_path}/g.py:g"}]), code=4)
    assert len(outcome.errors) == 1
    assert "too large to compute with (rescale it)" in outcome.err
    assert "RuntimeWarning" not in outcome.err


def test_a_judge_that_does_not_know_its_labels_is_told_of(base: Path, sampled: Path, tmp_path: Path) -> None:
    outcome = go(judging(base, sampled, tmp_path / "j", labels=["Q", "Z"]))
    assert "it does not know what it is asked, and its scores are noise" in outcome.err
    assert told(tmp_path / "j")["label_probability"] < 0.1
    assert "position bias" in outcome.err


def test_rows_of_two_shapes_or_of_none_are_bad(tmp_path: Path) -> None:
    for row, message in (
        ({"prompt": "p", "completions": [], "scores": []}, "'completions' is empty"),
        ({"prompt": "p", "completions": ["a"], "scores": [1], "completion": "b"}, "which is meant?"),
    ):
        path = w.write_rows(tmp_path / "r.jsonl", [{"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}, row])
        outcome = go(selecting(path, tmp_path / "x", "pairs"), code=3)
        assert f"{path}:2: {row and message}" in outcome.err or message in outcome.errors[0]


def test_a_data_run_has_no_checkpoints(scored: Path, runs: Path, base: Path) -> None:
    outcome = quick("score", runs / "scored.yaml", "--resume", base / "checkpoints" / "step-000001")
    assert (outcome.code, "a run of rlhf score has no checkpoints (auto or never)" in outcome.err) == (2, True)


# --- select, and what comes after ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "objective"),
    [("best", "sft", None), ("pairs", "dpo", {"name": "odpo"}), ("ranking", "dpo", {"name": "rrhf"}),
     ("verdict", "dpo", {"name": "kto"}), ("pairs", "train-rm", None),
     ("ranking", "train-rm", {"name": "plackett_luce"})],
)  # fmt: skip
def test_a_stage_trains_on_what_was_selected(
    name: str, stage: str, objective: dict[str, Any] | None, scored: Path, base: Path, world: Path, tmp_path: Path
) -> None:
    go(selecting(scored, tmp_path / "sel", name))
    more = {} if objective is None else {"objective": objective}
    content = w.recipe(stage, base, world, "pairs", tmp_path / "run", lora=w.LORA, training={"max_steps": 1}, **more)
    content["data"] |= {"train": str(tmp_path / "sel"), "eval": None}
    outcome = go(content)
    assert f"train {tmp_path}/sel: format" in outcome.err
    read = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    assert str(tmp_path / "sel") in read


def test_selection_is_told_with_the_curve_and_repeats(scored: Path, tmp_path: Path) -> None:
    outcome = go(selecting(scored, tmp_path / "one", "best"))
    facts = told(tmp_path / "one")
    assert facts["rows"] == facts["prompts"] == len({json.dumps(r["prompt"]) for r in made(scored)})
    curve = [point["score"] for point in facts["best_of_n"]]
    assert len(curve) == 3
    assert curve == sorted(curve)
    assert facts["mean_score_kept"] > facts["mean_score"]
    assert "best of 3: " in outcome.err
    go(selecting(scored, tmp_path / "two", "best"))
    assert (tmp_path / "one" / "data.jsonl").read_bytes() == (tmp_path / "two" / "data.jsonl").read_bytes()


def test_prompts_without_a_good_completion_are_sampled_again(
    scored: Path, base: Path, world: Path, tmp_path: Path
) -> None:
    go(selecting(scored, tmp_path / "t", "threshold", selection={"min_score": 0.9}))
    again = w.lines(tmp_path / "t" / "again.jsonl")
    assert 0 < len(again) < 20
    assert told(tmp_path / "t")["prompts_without_one"] == len(again)
    prompts = [{"path": str(tmp_path / "t" / "again.jsonl")}]
    go(sampling(base, world, tmp_path / "s2", data={"prompts": prompts}, seed=8))
    assert len(made(tmp_path / "s2")) == 3 * len(again)
    go(scoring(base, tmp_path / "s2", tmp_path / "c2", [{"function": f"{world}/reward.py:true_reward"}]))
    both = selecting(scored, tmp_path / "t2", "threshold", selection={"min_score": 0.9})
    both["data"]["completions"] = [str(scored), str(tmp_path / "c2")]
    go(both)
    assert told(tmp_path / "t2")["rows"] > told(tmp_path / "t")["rows"]


def test_two_models_play_and_are_rated(base: Path, sft_lora: Path, world: Path, tmp_path: Path, scored: Path) -> None:
    go(sampling(sft_lora, world, tmp_path / "s"))
    go(scoring(base, tmp_path / "s", tmp_path / "c", [{"function": f"{world}/reward.py:true_reward"}]))
    content = selecting(scored, tmp_path / "g", "games", selection={"samples": 20})
    content["data"]["completions"] = [str(scored), str(tmp_path / "c")]
    outcome = go(content)
    first, second = told(tmp_path / "g")["ratings"]
    assert {first["model"], second["model"]} == {str(base), str(sft_lora)}
    assert first["rating"] >= second["rating"]
    assert first["low"] <= first["rating"] <= first["high"]
    assert "rating of " in outcome.err


# --- wrong input -----------------------------------------------------------------------------------------


def test_wrong_runs_are_named(
    base: Path, sampled: Path, scored: Path, rm: Path, world: Path, tmp_path: Path, true: dict[str, Any]
) -> None:
    unfinished = shutil.copytree(sampled, tmp_path / "unfinished")
    (unfinished / "DONE").unlink()
    first = sampling(base, world, tmp_path / "x")
    for content, code, message in (
        (selecting(sampled, tmp_path / "x", "best"), 3, "no column 'score'"),
        (selecting(base, tmp_path / "x", "best"), 3, "is a run of `rlhf sft` and holds no rows"),
        (selecting(unfinished, tmp_path / "x", "best"), 3, "this run has no DONE"),
        (sampling(sampled, world, tmp_path / "x"), 4, "is a run of `rlhf sample`: it holds rows, no model"),
        (sampling(rm, world, tmp_path / "x"), 4, "this is a reward model"),
        (scoring(base, sampled, tmp_path / "x", [{"run": str(base)}]), 4, "this is a language model"),
        (scoring(base, sampled, tmp_path / "x", [true | {"normalize": "running"}]), 2, "needs a run that goes on"),
        (scoring(base, world / "prompts.jsonl", tmp_path / "x", [true]), 3, "no column 'completion'"),
        (selecting(scored, tmp_path / "x", "threshold", selection={"min_score": 99.0}), 3, "selected by threshold"),
        (selecting(scored, tmp_path / "x", "games"), 3, "give the completions of two models on the same prompts"),
        (selecting(scored, tmp_path / "x", "spin"), 3, "nothing is selected by spin"),
        (selecting(scored, tmp_path / "x", "bets"), 2, "best"),
        (first | {"best_of": 4}, 2, "best_of needs rewards"),
        (first | {"rewards": [true]}, 2, "rewards are only read with best_of"),
        (first | {"best_of": 4, "rewards": [true]}, 2, "leave rollout.completions_per_prompt out"),
        (first | {"rollout": {"max_new_tokens": 64}}, 2, "leaves no room for a prompt"),
        (first | {"rollout": ROLLOUT | {"temperature": 0}}, 2, "at temperature 0 all of them are the same"),
        (first | {"rollout": ROLLOUT | {"completions_per_prompt": 10**9}}, 2, "must be at most 4096"),
        (selecting(scored, tmp_path / "x", "best", data={"completions": [str(scored)] * 2}), 2, "name it once"),
        (selecting(scored, scored / "final", "best"), 2, "lies inside the run"),
        (first | {"revise": {"principles": "none.txt"}}, 2, "revise.principles none.txt: cannot be read"),
        (first | {"revise": {"principles": "c", "critique": "x", "revision": "y"}}, 2, "do not hold {principle}"),
        (first | {"training": {}}, 2, "unknown key"),
    ):  # fmt: skip
        outcome = go(content, code=code)
        assert len(outcome.errors) >= 1
        assert message in outcome.err, outcome.err
        assert not (tmp_path / "x").exists(), message
        assert not (scored / "final").exists()


def test_one_completion_a_prompt_makes_no_pairs(base: Path, world: Path, tmp_path: Path, true: dict[str, Any]) -> None:
    prompts = w.write_rows(tmp_path / "p.jsonl", [{"prompt": f"tell of {thing}"} for thing in w.THINGS])
    go(sampling(base, world, tmp_path / "s", rollout={"completions_per_prompt": 1}, data={"prompts": str(prompts)}))
    go(scoring(base, tmp_path / "s", tmp_path / "c", [true]))
    outcome = go(selecting(tmp_path / "c", tmp_path / "x", "pairs"), code=3)
    assert "sample several completions of each prompt" in outcome.errors[0]
    assert not (tmp_path / "x").exists()


def test_the_same_again_is_up_to_date_and_another_is_refused(scored: Path, runs: Path) -> None:
    outcome = quick("score", runs / "scored.yaml")
    assert (outcome.code, "up to date" in outcome.err) == (0, True)
    outcome = quick("score", runs / "scored.yaml", "seed=99")
    assert (outcome.code, "seed: 42 -> 99" in outcome.err) == (2, True)


def test_a_damaged_piece_is_named(base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "AT_ONCE", 12)

    def damaged(run: Any) -> Any:
        path = run.path / "data.pieces"
        path.write_bytes(b"x" + path.read_bytes()[1:])
        return rows(run)

    rows = product.made_rows
    monkeypatch.setattr(product, "made_rows", damaged)
    outcome = go(sampling(base, world, tmp_path / "run"), code=4)
    assert "data.pieces:1: is not what was written there" in outcome.errors[0]


def test_dry_run_and_check_write_nothing(base: Path, sampled: Path, world: Path, tmp_path: Path) -> None:
    outcome = go(sampling(base, world, tmp_path / "x"), "--dry-run")
    assert "dry run: 3 completions of each of 20 prompts" in outcome.err
    outcome = quick("check", tmp_path / "x.yaml")
    assert (outcome.code, "fit for rlhf sample" in outcome.err) == (0, True), outcome.err
    w.save(selecting(sampled, tmp_path / "y", "best"), tmp_path / "y.yaml")
    outcome = quick("check", tmp_path / "y.yaml")
    assert (outcome.code, "no column 'score'" in outcome.err) == (3, True), outcome.err
    assert not (tmp_path / "x").exists()
    assert torch.get_num_threads() == 1
