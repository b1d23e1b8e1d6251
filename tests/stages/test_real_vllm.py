"""A real vLLM, where there is one: RLHF_VLLM=PATH/bin/vllm pytest tests/stages/test_real_vllm.py.

One server, started by `rlhf serve-rollouts`, samples for ppo, sample and eval and judges; what it says is compared with
what our own loop says of the same weights.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import run_cli, write_model
from tests.stages import world as w
from tests.stages.conftest import quick, train

PROGRAM = os.environ.get("RLHF_VLLM", "")
STARTS = 900.0
"""Seconds that it may take to start."""
SLEEPS = torch.cuda.is_available()
"""Whether it shares a card with the training: it cannot on a CPU."""
NEAR = 1e-3
"""Log-probabilities of its kernels and of ours, both in float32 (on a CPU: 6e-6)."""

pytestmark = [
    pytest.mark.skipif(not PROGRAM, reason="RLHF_VLLM does not say where a vLLM is"),
    pytest.mark.timeout(STARTS + 600),
]


@pytest.fixture(scope="module")
def start(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model with heads as wide as vLLM's kernels want them."""
    folder = tmp_path_factory.mktemp("real")
    model = write_model(folder / "model", hidden=128)
    return train(w.recipe("sft", model, world, "chat", folder / "sft", training={"num_epochs": 3, "batch_size": 24}))


@pytest.fixture(scope="module")
def recipe(start: Path, world: Path) -> Iterator[dict[str, Any]]:
    """A recipe of ppo whose server runs."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = f"http://127.0.0.1:{found.getsockname()[1]}"
    content = w.recipe("ppo", start, world, "prompts", start.parent / "ppo", **{
        "lora": {"r": 8}, "rewards": [{"function": f"{world / 'reward.py'}:true_reward"}], "seed": 5,
        "rollout": {"engine": "vllm", "server": address, "max_new_tokens": 12, "completions_per_prompt": 2,
                    "temperature": 0.8, "max_batch": 16, "sleep": SLEEPS},
        "ppo": {"advantage": {"name": "rloo"}, "importance_correction": {"cap": 2.0}},
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 5e-3}, "logging": {"every": 1},
    })  # fmt: skip
    content["data"] |= {"eval": None, "max_length": 128}
    path = w.save(content, start.parent / "served.yaml")
    command = [sys.executable, "-m", "rlhf_cli", "serve-rollouts", str(path), "--vllm", PROGRAM]
    log = start.parent / "server.log"
    environment = (
        {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"PATH": f"{Path(PROGRAM).parent}:{os.environ['PATH']}"}
    )
    with log.open("wb") as told, subprocess.Popen(command, env=environment, stdout=told, stderr=told) as child:
        until = time.monotonic() + STARTS
        while not _answers(address):
            assert child.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < until, "it does not start"
            time.sleep(1)
        yield content
        assert _models(address) == [_base(start)], "adapters stay with it"
        child.send_signal(signal.SIGTERM)
        child.wait(60)


def _answers(address: str) -> bool:
    try:
        return bool(_models(address))
    except OSError:
        return False


def _models(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=10) as said:
        return [card["id"] for card in json.load(said)["data"]]


def _base(start: Path) -> str:
    return str(start / "final")


@pytest.fixture(scope="module")
def trained(recipe: dict[str, Any]) -> Path:
    return train(recipe)


def test_it_samples_from_what_is_trained(trained: Path) -> None:
    """Its log-probabilities are those of the policy of each step, at the temperature that it samples with."""
    rows = [row for row in w.metrics(trained) if "rollout/logprob_gap_max" in row]
    assert len(rows) == 4
    assert max(row["rollout/logprob_gap_max"] for row in rows) < NEAR
    assert all(abs(row["rollout/importance_mean"] - 1) < NEAR for row in rows)
    assert max(row["objective/kl"] for row in rows) > 100 * NEAR, "the adapter says nothing"


def test_the_likeliest_completions_are_ours(recipe: dict[str, Any], trained: Path, world: Path, tmp_path: Path) -> None:
    """Of the adapter and of its base."""
    for name, model in (("adapter", trained), ("base", Path(recipe["model"]["name_or_path"]))):
        found = []
        for where in ({}, {"engine": "vllm", "server": recipe["rollout"]["server"]}):
            out = tmp_path / f"{name}-{len(found)}"
            content = {"stage": "sample", "model": {"name_or_path": str(model), "dtype": "float32"},
                       "rollout": {"max_new_tokens": 12, "temperature": 0, **where}, "output_dir": str(out),
                       "data": {"prompts": str(world / "prompts-eval.jsonl"), "max_length": 64}}  # fmt: skip
            outcome = quick("sample", w.save(content, out.with_suffix(".yaml")))
            assert outcome.code == 0, outcome.err
            found.append([(row["completion"], row["finished"]) for row in w.lines(out / "data.jsonl")])
        same = sum(a == b for a, b in zip(*found, strict=True))
        assert same >= 0.95 * len(found[0]) > 20, f"{name}: {same} of {len(found[0])}"


@pytest.mark.parametrize("labels", [["A", "B"], ["good", "bad"]])
def test_it_judges_as_we_do(
    labels: list[str], recipe: dict[str, Any], trained: Path, world: Path, tmp_path: Path
) -> None:
    """Labels of one token and of several; the base, and an adapter on it."""
    rows = [{"prompt": f"tell of {thing}", "completions": ["good", "bad", "dull"]} for thing in ("a book", "the sea")]
    data = str(w.write_rows(tmp_path / "c.jsonl", rows))
    for name, model in (("adapter", trained), ("base", Path(recipe["model"]["name_or_path"]))):
        found = []
        for more in ({}, {"engine": "vllm", "server": recipe["rollout"]["server"]}):
            out = tmp_path / f"{name}-{len(found)}"
            judge = {"model": {"name_or_path": str(model), "dtype": "float32"}, "labels": labels, **more,
                     "question": "{prompt}: {a} or {b}?"}  # fmt: skip
            content = {"stage": "score", "data": {"completions": data}, "judge": judge, "output_dir": str(out)}
            outcome = quick("score", w.save(content, out.with_suffix(".yaml")))
            assert outcome.code == 0, outcome.err
            found.append(w.lines(out / "comparisons.jsonl"))
        ours, theirs = (np.array([[row["asked_first"], row["asked_second"]] for row in rows]) for rows in found)
        assert len(ours) == 6
        assert np.allclose(ours, theirs, atol=NEAR)


def test_its_refusals_are_one_line(recipe: dict[str, Any], base: Path, tmp_path: Path) -> None:
    for more, words in (
        ({"lora": {"r": 32}}, "LoRA rank 32 is greater than max_lora_rank 8"),
        ({"model": {"name_or_path": str(base)}}, "and the base of the recipe is"),
        *[({"rollout": {"sleep": True}}, "it was not started for this")][SLEEPS:],
    ):
        content = w.merged(recipe, more, {"output_dir": str(tmp_path / words[:8])})
        outcome = run_cli("ppo", w.save(content, tmp_path / "x.yaml"))
        assert (outcome.code, len(outcome.errors)) == (4, 1), outcome.err
        assert words in outcome.errors[0]
