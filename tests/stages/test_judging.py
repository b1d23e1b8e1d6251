"""What stands between samples and objectives: the state of a step, scores as exact as the data, strangers for KTO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.stages.strangers import Strangers
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]


def row(prompt: str, completion: str) -> Sample:
    ids = np.frombuffer(completion.encode(), dtype=np.uint8).astype(np.int32)
    asked = np.frombuffer(prompt.encode(), dtype=np.uint8).astype(np.int32)
    return Sample(asked, (Completion(ids, np.ones(len(ids), dtype=bool)),), {}, f"{prompt}{completion}")


def paired(rows: list[Sample], longest: int = 99) -> list[tuple[str, str]]:
    _, found = Strangers(rows, longest).of(np.arange(len(rows)))
    return [(bytes(s.prompt.astype(np.uint8)).decode(), bytes(s.completions[0].ids.astype(np.uint8)).decode())
            for s in found]  # fmt: skip


def test_strangers_have_another_prompt() -> None:
    rows = [row("p", "1"), row("p", "2"), row("q", "3"), row("q", "4")]
    assert paired(rows) == [("p", "3"), ("p", "3"), ("q", "1"), ("q", "1")]
    assert paired([row("p", "1"), row("p", "2"), row("q", "3")]) == [("p", "3"), ("p", "3"), ("q", "1")]
    assert paired([row("p", "1"), row("p", "2")]) == []
    assert paired([row("p", "1")]) == []
    assert paired([row("prompt", "1"), row("q", "three")], 8) == [("mpt", "three"), ("q", "1")], "the end of the prompt"


def kept(run: Path) -> dict[str, Any]:
    last = max((run / "checkpoints").iterdir())
    state = json.loads((last / "state.json").read_text())
    return {key: value for key, value in state["kept"].items() if key.startswith("running")}


@pytest.mark.parametrize("first", ["dpo", "aot"])
def test_running_means_move_whatever_else_is_in_the_mix(toy: Toy, first: str) -> None:
    terms = [{"name": first}, {"name": "bco_pair", "shift": "mean"}]
    content = toy("dpo", "pairs", first, 32, objective={"terms": terms}, training={"max_steps": 3, "batch_size": 16})
    (state,) = kept(train(content)).values()
    assert state["counts"] == [48.0, 48.0]
    assert abs(state["sums"][0]) > 0.01
    assert abs(state["sums"][1]) > 0.01


def test_scores_are_compared_as_they_stand(toy: Toy, world: Path, tmp_path: Path) -> None:
    """Three whole numbers that float32 cannot tell apart."""
    close = [16777217.0, 16777216.0, 16777215.0]
    rows = [r | {"completions": (r["completions"] * 2)[:3], "scores": close} for r in w.lines(world / "strict.jsonl")]
    rows = [r for r in rows if len(set(r["completions"])) == 3][:16]
    data = {"train": {"path": str(w.write_rows(tmp_path / "close.jsonl", rows))}, "eval": None}
    more = {"data": data, "training": {"max_steps": 1, "batch_size": 16}, "objective": {"name": "plackett_luce"}}
    out = train(w.merged(toy("train-rm", "strict", "run"), more))
    assert w.column(out, "loss")[0] == pytest.approx(np.log(6), abs=1e-5)
    pairs = w.lines(world / "pairs.jsonl")[:16]
    pairs = [p | {"chosen_score": close[0], "rejected_score": close[1]} for p in pairs]
    data = {"train": {"path": str(w.write_rows(tmp_path / "pairs.jsonl", pairs))}, "eval": None}
    odpo = toy("dpo", "pairs", "odpo", objective={"name": "odpo", "offset": "log1p"}, training={"max_steps": 1})
    out = train(w.merged(odpo, {"data": data}))
    assert w.column(out, "loss")[0] == pytest.approx(np.log1p(2.0), abs=1e-5), "softplus(log1p(1))"


def test_ratings_beyond_the_scale_are_refused(toy: Toy) -> None:
    objective = {"name": "stable_alignment", "rating_scale": 0.5}
    content = toy("dpo", "strict", "run", objective=objective)
    outcome = quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert outcome.code == 2
    assert "objective.rating_scale" in outcome.errors[0]


def test_an_architecture_without_a_classifier_is_refused_before_training(toy: Toy, tmp_path: Path, base: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(base / "final")
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    content = toy(
        "train-rm", "steps", "run", objective={"name": "step_labels"}, model={"name_or_path": str(tmp_path / "gpt2")}
    )
    outcome = quick("train-rm", w.save(content, tmp_path / "r.yaml"), "--dry-run")
    assert outcome.code == 4
    assert "the token classifier of gpt2 has no `score` layer" in outcome.errors[0]
    assert not (tmp_path / "run").exists()


def test_a_cost_model_is_no_reward_model(toy: Toy, tmp_path: Path) -> None:
    cost = train(toy("train-rm", "safety", "cost", 32, objective={"name": "cost"}, training={"max_steps": 1}))
    content = toy("ppo", "prompts", "ppo", rewards=[{"run": str(cost)}], rollout={"max_new_tokens": 6})
    outcome = quick("ppo", w.save(content, tmp_path / "ppo.yaml"))
    assert outcome.code == 4
    assert "this is a cost model, whose scores are high for harm" in outcome.errors[0]
