"""`rlhf plan`: what it counts is what a run allocates, what it decides is what a run decides, and wrong inputs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.models import adapters, sizing
from rlhf_cli.models.base import load_base, load_text
from rlhf_cli.models.counting import Ledger
from rlhf_cli.models.scratch import HeadUse, head_bytes
from rlhf_cli.objectives.head import Head
from rlhf_cli.objectives.logprob import Statistics, token_logp
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings, Quantization
from tests.conftest import Outcome, run_cli
from tests.stages import world as w
from tests.stages.conftest import train

Toy = Callable[..., dict[str, Any]]


def asked(content: dict[str, Any], path: Path, *options: object) -> Outcome:
    return run_cli("plan", w.save(content, path), "--no-time", *options)


def planned(content: dict[str, Any], path: Path, *options: object) -> dict[str, Any]:
    outcome = asked(content, path, "--json", *options)
    found: dict[str, Any] = json.loads(outcome.out)
    assert outcome.code == (0 if found["fits"] else 4), outcome.err
    return found


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_outline_has_the_bytes_of_the_loaded_model(base: Path, quantization: Quantization) -> None:
    settings = ModelSettings(
        name_or_path=str(base), dtype="float32", quantization=quantization, kernels="reference"
    )  # int8 moves its scales when a layer is tried
    text, lora = load_text(settings), LoraSettings(r=8)
    outline = sizing.outline(text, settings, torch.float32, lora, trained=False)
    real = load_base(text.source, settings, trained=False)
    size = sizing.nbytes(real.model.buffers())
    for parameter in real.model.parameters():
        size += parameter.nbytes
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        if state is not None:
            nested = state.state2
            size += sizing.nbytes([state.absmax, state.code, nested.absmax, nested.code, state.offset])
        size += 0 if scales is None else scales.nbytes
    assert sizing.weights(outline, quantization).bytes == size
    adapters.add_adapter(real, "policy", adapters.lora_config(lora))
    shapes = {name: p.shape for name, p in sizing.adapter(outline)}
    assert shapes == {name: p.shape for name, p in adapters.adapter_parameters(real, "policy")}


def test_the_ledger_counts_what_is_alive() -> None:
    ledger = Ledger()
    with ledger:
        x = torch.ones(1000)
        y = x * 2
        del x
        z = y.view(10, 100)
        z += 1
    assert (ledger.live, ledger.peak) == (4000, 8000)
    del y, z
    assert ledger.live == 0


@pytest.mark.parametrize(
    ("statistics", "trained", "known", "tokens", "vocabulary"),
    [("entropy", True, True, 700, 20000), ("none", True, False, 700, 9000), ("entropy", False, False, 600, 9000),
     ("bonus", True, False, 300, 9000), ("usual", True, False, 300, 9000)],
)  # fmt: skip
def test_the_scratch_of_the_head_is_that_of_its_tiles(
    statistics: Statistics, trained: bool, known: bool, tokens: int, vocabulary: int
) -> None:
    weight = torch.randn(vocabulary, 16, requires_grad=trained)
    weight.grad = torch.zeros_like(weight) if trained else None
    hidden, ids = torch.randn(tokens, 16, requires_grad=True), torch.randint(0, vocabulary, (tokens,))
    head = (lambda x: x @ weight.T) if statistics == "usual" else Head(weight)
    ledger = Ledger()
    with ledger:
        of = token_logp(hidden, head, ids, vocabulary=vocabulary, statistics=statistics,
                        upstream=-1.0 / tokens if known else None)  # fmt: skip
        (-of.logp.sum() / tokens + (of.entropy.sum() if statistics in ("usual", "bonus") else 0.0)).backward()
    formula = head_bytes(HeadUse(statistics, trained, known), tokens, vocabulary, 16, "cpu", torch.float32)
    assert ledger.peak == pytest.approx(formula, rel=0.06)


# --- against runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [w.LORA, None])
def test_what_is_counted_is_what_a_run_holds(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    content = toy("dpo", "pairs", lora=lora, objective={"name": "dpo"}, training={"max_steps": 2})
    content["lora"] = lora
    found = planned(content, tmp_path / "r.yaml")
    held: dict[str, int] = {}
    from rlhf_cli.train import snapshot
    from rlhf_cli.train.engine import Engine

    plain = snapshot.save

    def save(engine: Engine, *arguments: Any) -> None:
        learner = engine.learners["policy"]
        tensors = [p for _, p in learner.role.parameters]
        states = [t for state in learner.optimizer.state.values() for t in state.values() if t.ndim]
        held.update(trained=sum(p.numel() for p in tensors), gradients=sizing.nbytes(tensors),
                    optimiser=sizing.nbytes(states), budget=engine.budget)  # fmt: skip
        plain(engine, *arguments)

    monkeypatch.setattr(snapshot, "save", save)
    run = train(content)
    memory = found["memory"]
    assert held["trained"] == found["parameters"]["trained"]
    assert (held["gradients"], held["optimiser"]) == (memory["gradients"], memory["optimiser"])
    assert held["budget"] == memory["micro_batch_tokens"]
    assert w.metrics(run)[-1]["step"] == found["data"]["steps"]
    assert w.metrics(run)[-1]["num_tokens"] == found["data"]["tokens"]
    assert memory["peak"] == max(memory["moments"].values()) == sum(part["bytes"] for part in memory["parts"])
    whole = [p for p in memory["parts"] if p["role"] == "reference"]
    assert (whole[0]["bytes"] == 0) == (lora is not None)


def test_of_ppo_every_role_and_moment_is_told(toy: Toy, rm: Path, tmp_path: Path) -> None:
    content = toy("ppo", "prompts", rewards=[{"run": str(rm)}], rollout={"max_new_tokens": 8})
    found = planned(content, tmp_path / "r.yaml")
    roles = {part["role"]: part for part in found["memory"]["parts"]}
    assert {"policy", "reference", "reward", "critic"} <= set(roles)
    assert roles["reward"]["what"] == "adapter on the policy's base"
    assert {"reading the prompts", "decoding", "training"} <= set(found["memory"]["moments"])
    assert found["data"]["updates"] > found["data"]["steps"]


def test_what_a_server_samples_is_not_planned(toy: Toy, tmp_path: Path) -> None:
    server = {"engine": "vllm", "server": "http://127.0.0.1:8000", "max_new_tokens": 8}
    content = toy("ppo", "prompts", rewards=[{"rule": {"name": "stop"}}], rollout=server)
    found = planned(content, tmp_path / "r.yaml")
    assert not {"reading the prompts", "decoding"} & set(found["memory"]["moments"])
    lines = asked(content, tmp_path / "r.yaml").err.splitlines()
    assert any(line.startswith("the vLLM server http://127.0.0.1:8000 samples: its weights") for line in lines)


def test_the_time_says_how_sure_it_is(toy: Toy, tmp_path: Path) -> None:
    path = w.save(toy("sft", "chat"), tmp_path / "r.yaml")
    outcome = run_cli("plan", path, "--json", "--vram", 8)
    time = json.loads(outcome.out)["time"]
    assert time["seconds_per_step"] > 0 <= time["spread"]
    said = run_cli("plan", path, "--vram", 8).err
    assert re.search(r"on this CPU, as busy as it is now \(its measurements lie \d+ % apart\): ", said)
    assert "(micro-batches are those of a card, which takes larger ones than a run on this CPU would)" in said


@pytest.mark.parametrize(
    ("stage", "kind", "more", "reference"),
    [
        ("train-rm", "pairs", {}, None),
        ("train-rm", "steps", {"objective": {"name": "step_labels"}}, None),
        ("dpo", "verdicts", {"objective": {"name": "kto"}}, "the policy with its adapter off"),
        ("dpo", "rankings", {"objective": {"name": "rrhf"}}, None),
        ("orpo", "pairs", {"training": {"layout": "padded"}}, None),
        ("sft", "chat", {"objective": {"label_smoothing": 0.1}, "lora": {"use_dora": True}}, None),
        ("ppo", "prompts", {"rewards": [{"rule": {"name": "stop"}}], "critic": {"shared": True},
                            "rollout": {"max_new_tokens": 8}}, "the policy with its adapter off"),
    ],
)  # fmt: skip
def test_every_command_that_trains_has_a_plan(
    toy: Toy, tmp_path: Path, stage: str, kind: str, more: dict[str, Any], reference: str | None
) -> None:
    found = planned(toy(stage, kind, **more), tmp_path / "r.yaml")
    told = {part["role"]: part["what"] for part in found["memory"]["parts"]}
    assert told.get("reference") == reference
    assert ("reward" if stage == "train-rm" else "policy") in told
    assert found["memory"]["measured_tokens"] > 0


def test_an_adapter_that_goes_on_is_copied(toy: Toy, sft_lora: Path, tmp_path: Path) -> None:
    content = toy("dpo", "pairs", objective={"name": "dpo"})
    content["model"]["name_or_path"] = str(sft_lora)
    parts = {part["role"]: part for part in planned(content, tmp_path / "r.yaml")["memory"]["parts"]}
    assert parts["reference"]["what"] == "a frozen copy of the adapter"
    assert parts["reference"]["bytes"] > 0


def test_without_weights_the_plan_is_the_same(toy: Toy, base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base / "final", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    content = toy("sft", "chat")
    with_weights = planned(content, tmp_path / "r.yaml")
    content["model"]["name_or_path"] = str(bare)
    without = planned(content, tmp_path / "r.yaml")
    assert (with_weights["weights_present"], without["weights_present"]) == (True, False)
    assert with_weights["parameters"] == without["parameters"]
    lines = asked(content, tmp_path / "r.yaml").err
    assert "holds no weights yet: planned from its config.json" in lines
    assert run_cli("sft", tmp_path / "r.yaml").code == 4, "a run does need them"


@pytest.mark.parametrize("change", [{"kernels": "compiled"}, {"attn_implementation": "flex_attention"}])
def test_what_is_compiled_for_a_card_is_planned_without_one(toy: Toy, tmp_path: Path, change: dict[str, str]) -> None:
    content = toy("sft", "chat")
    plain = planned(content, tmp_path / "r.yaml")
    found = planned(w.merged(content, {"model": change}), tmp_path / "r.yaml")
    assert found["memory"]["peak"] == pytest.approx(plain["memory"]["peak"], rel=0.02)


# --- a card ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_comes_with_changes_that_do(toy: Toy, tmp_path: Path) -> None:
    content = toy("sft", "chat")
    content["lora"] = None
    room = planned(content, tmp_path / "r.yaml", "--vram", 24)
    assert room["fits"]
    assert room["changes"] == []
    assert room["largest_micro_batch_tokens"] >= room["memory"]["micro_batch_tokens"]
    peak, optimiser = room["memory"]["peak"] / 2**30, room["memory"]["optimiser"] / 2**30
    told = asked(content, tmp_path / "r.yaml", "--json", "--vram", f"{peak - optimiser / 3:.6f}",
                 "--set", f"training.micro_batch_tokens={room['memory']['micro_batch_tokens']}")  # fmt: skip
    small = json.loads(told.out)
    assert (told.code, told.err.splitlines()) == (4, told.errors), "the whole plan all the same"
    (line,) = told.errors
    assert re.match(rf"error: {tmp_path}/r.yaml: does not fit: .* of the card \(take a change from above, or a larger "
                    r"card\)$", line)  # fmt: skip
    assert not small["fits"]
    assert small["changes"]
    for change in small["changes"][:2]:
        again = planned(content, tmp_path / "r.yaml", "--vram", 24,
                        "--set", f"training.micro_batch_tokens={small['memory']['micro_batch_tokens']}",
                        *(word for one in change["sets"] for word in ("--set", one)))  # fmt: skip
        assert again["memory"]["peak"] == pytest.approx(change["peak"], rel=0.02)
        assert change["fits"] == (change["peak"] <= small["memory"]["room"])


# --- wrong inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "change", "code", "words"),
    [
        (("--vram", "0"), {}, 2, "0 is no size of a card"),
        (("--vram", "-3"), {}, 2, "-3 is no size of a card"),
        (("--vram", "nan"), {}, 2, "is no size of a card"),
        (("--vram", "much"), {}, 2, "--vram"),
        (("--world-size", "0"), {}, 2, "0 is no number of processes"),
        (("--processes-per-machine", "2"), {}, 2, "2 processes on each machine, and 1 in all"),
        (("--world-size", "4", "--processes-per-machine", "8"), {}, 2, "8 processes on each machine, and 4 in all"),
        (("--world-size", "4", "--processes-per-machine", "0"), {}, 2, "0 processes on each machine"),
        (
            ("--world-size", "2", "--set", "distributed.shard=full"),
            {"model": {"quantization": "int8"}},
            2,
            "cannot share out",
        ),
        (("--world-size", "4", "--set", "distributed.shard=hybrid"), {}, 2, "--processes-per-machine"),
        (
            ("--world-size", "4", "--processes-per-machine", "3", "--set", "distributed.shard=hybrid"),
            {},
            2,
            "no machines of 3",
        ),
        (("--set", "lora.rnk=4"), {}, 2, "lora.rnk"),
        ((), {"data": {"train": "nowhere.jsonl", "eval": None}}, 3, "nowhere.jsonl"),
        ((), {"model": {"name_or_path": "EMPTY"}}, 4, "config.json"),
    ],
)
def test_wrong_inputs_are_one_line(
    toy: Toy, tmp_path: Path, options: tuple[str, ...], change: dict[str, Any], code: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    content = w.merged(toy("sft", "chat"), change)
    if content["model"]["name_or_path"] == "EMPTY":
        content["model"]["name_or_path"] = str(tmp_path / "empty")
    outcome = asked(content, tmp_path / "r.yaml", *options)
    assert outcome.code == code, outcome.err
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_no_recipe_and_recipes_that_train_nothing(tmp_path: Path, base: Path, world: Path) -> None:
    outcome = run_cli("plan", tmp_path / "nowhere.yaml")
    (line,) = outcome.err.splitlines()
    assert outcome.code == 2
    assert "nowhere.yaml" in line
    sample = {"stage": "sample", "model": {"name_or_path": str(base)},
              "data": {"prompts": str(world / "prompts.jsonl")}, "output_dir": str(tmp_path / "s")}  # fmt: skip
    outcome = asked(sample, tmp_path / "s.yaml")
    (line,) = outcome.err.splitlines()
    assert outcome.code == 2
    assert "trains nothing" in line
