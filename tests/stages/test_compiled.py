"""Ways of computing that a GPU asks for, tried where there is none: compiled chains, attention as one kernel."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.objectives import fused
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.test_interrupted import assert_same, interrupted

Toy = Callable[..., dict[str, Any]]
CALM = {"training": {"max_steps": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-6, "batch_size": 12},
        "data": {"eval": None}}  # fmt: skip
COMPILED = {"model": {"kernels": "compiled"}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "chat", {"lora": None}),
    "dpo": ("dpo", "pairs", {"objective": {"name": "dpo"}}),
    "orpo": ("orpo", "pairs", {"lora": None}),
    "ppo": ("ppo", "prompts", {"rollout": {"max_new_tokens": 6}, "ppo": {"mini_batches": 2, "entropy_coef": 0.01}}),
}


def same_numbers(one: Path, other: Path) -> None:
    for old, new in zip(w.metrics(one), w.metrics(other), strict=True):
        assert old.keys() == new.keys()
        for key in old.keys() - {"num_tokens"}:
            assert new[key] == pytest.approx(old[key], rel=1e-5, abs=1e-5), (key, old["step"])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_change_nothing(toy: Toy, rm: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, kind, settings = CASES[name]
    called: set[str] = set()
    by = fused.Fused.by

    def seen(self: fused.Fused[..., Any], compiled: bool) -> object:
        if compiled:
            called.add(self.plain.__name__)
        return by(self, compiled)

    monkeypatch.setattr(fused.Fused, "by", seen)
    more = w.merged(CALM, settings, {"rewards": [{"run": str(rm)}]} if stage == "ppo" else {})
    known = train(toy(stage, kind, "plain", **more))
    assert not called
    same_numbers(known, train(toy(stage, kind, "compiled", **w.merged(more, COMPILED))))
    assert {"_norm", "_norm_back", "_turn", "_turn_back", "_gate", "_gate_back"} <= called
    assert called & {"absorb", "_exponentiate"}


@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_resumes_bit_for_bit(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    more = w.merged(CALM, COMPILED, {"objective": {"name": "dpo"}, "training": {"max_steps": 4}})
    content = toy("dpo", "pairs", "whole", **more)
    whole = train(content)
    broken = interrupted(content | {"output_dir": str(whole.parent / "broken")}, 2, monkeypatch, signal.SIGTERM)
    assert_same(broken, whole)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_attention_in_one_kernel_changes_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    more = w.merged(CALM, {"objective": {"name": "dpo"}})
    known = train(toy("dpo", "pairs", "plain", **more))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr("rlhf_cli.models.levers.has_flex", lambda _: True)
    monkeypatch.setattr("rlhf_cli.objectives.fused.attempt", lambda _: None)
    calls: list[int] = []
    from rlhf_cli.models import attention

    attend = attention.flex.attend
    monkeypatch.setattr(attention.flex, "attend", lambda *a: calls.append(1) or attend(*a))
    same_numbers(known, train(toy("dpo", "pairs", "one", **w.merged(more, FLEX))))
    assert calls


FLEX = {"model": {"attn_implementation": "flex_attention"}, "training": {"layout": "packed"}}


def test_what_this_machine_lacks_is_said_before_rows_are_read(
    toy: Toy, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"x": 1}\n')
    bad = str(tmp_path / "bad.jsonl")

    def refused(content: dict[str, Any], code: int = 4) -> str:
        path = w.save(content, tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml")
        outcome = quick(content["stage"], path, "--dry-run")
        assert outcome.code == code, outcome.err
        assert len(outcome.errors) == 1 or code == 3
        return outcome.errors[0]

    def said(name: str, **more: Any) -> str:
        content = toy("orpo", "pairs", name, **w.merged(CALM, more))
        content["data"]["train"] = bad
        return refused(content)

    assert "flex_attention has no backward pass on a CPU" in said("flex", **FLEX)
    monkeypatch.setattr("rlhf_cli.objectives.fused.attempt", lambda _: "InvalidCxxCompiler: none found")
    line = said("compiled", **COMPILED)
    assert "model.kernels: compiled cannot be had here: InvalidCxxCompiler" in line
    assert "a C++ compiler" in line
    flex = {"name_or_path": str(base), "attn_implementation": "flex_attention"}
    sample = {
        "stage": "sample",
        "model": flex,
        "data": {"prompts": bad, "max_length": 64},
        "rollout": {"max_new_tokens": 8},
        "output_dir": str(tmp_path / "out"),
    }
    judge = {
        "stage": "score",
        "judge": {"model": flex},
        "data": {"completions": bad},
        "output_dir": str(tmp_path / "o"),
    }
    score = {"stage": "score", "model": flex, "rewards": [{"run": str(base)}], "data": {"completions": bad},
             "output_dir": str(tmp_path / "o")}  # fmt: skip
    for content in (sample, judge, score, sample | {"stage": "eval"}):
        assert "flex_attention has no backward pass on a CPU" in refused(content)
    server = {"engine": "vllm", "server": "http://127.0.0.1:1", "max_new_tokens": 8}
    refused(sample | {"rollout": server}, code=3)  # weights that are elsewhere
    function = [{"rule": {"name": "stop"}}]
    refused(score | {"rewards": function}, code=3)  # no weights at all
