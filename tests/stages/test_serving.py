"""`rlhf merge` and `rlhf chat`: the merged model answers as the run does, and conversations are what was typed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]
IDS = torch.arange(10, 40)[None]


@pytest.fixture(scope="module")
def nf4(base: Path, world: Path, runs: Path) -> Path:
    """A LoRA SFT on the base in 4 bits."""
    more = {"model": {"quantization": "nf4"}, "lora": w.LORA, "training": {"max_steps": 4}}
    return train(w.recipe("sft", base, world, "chat", runs / "merge-nf4", **more))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    return out


def adapted(run: Path) -> torch.Tensor:
    """By plain peft."""
    from peft import AutoPeftModelForCausalLM

    with torch.no_grad():
        out: torch.Tensor = AutoPeftModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)(IDS).logits
    return out


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_a_merged_model_opens_without_peft_and_answers_the_same(toy: Toy, more: dict[str, Any], tmp_path: Path) -> None:
    run = train(toy("sft", "chat", lora=w.LORA | more, training={"max_steps": 3}))
    outcome = quick("merge", run, "-o", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    assert "merged into the base's own weights, float32" in outcome.err
    assert "opened again, it answers the same" in outcome.err
    torch.testing.assert_close(logits(tmp_path / "merged"), adapted(run), atol=1e-4, rtol=1e-4)
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "README.md", "config.json"} <= files
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    said = quick("sample", w.save(sample_of(tmp_path / "merged", tmp_path, "a"), tmp_path / "a.yaml"))
    assert said.code == 0, said.err
    quick("sample", w.save(sample_of(run, tmp_path, "b"), tmp_path / "b.yaml"))
    texts = [[row["completion"] for row in w.lines(tmp_path / name / "data.jsonl")] for name in "ab"]
    assert texts[0] == texts[1]


def sample_of(model: Path, folder: Path, name: str) -> dict[str, Any]:
    """A recipe that samples the likeliest completions of a few prompts."""
    prompts = w.write_rows(folder / "p.jsonl", w.rows("prompts", 6, 1))
    return {
        "stage": "sample", "model": {"name_or_path": str(model), "dtype": "float32"}, "output_dir": str(folder / name),
        "data": {"prompts": str(prompts), "max_length": 48}, "rollout": {"max_new_tokens": 6, "temperature": 0},
    }  # fmt: skip


def test_a_quantised_run_merges_into_either_weights(nf4: Path, tmp_path: Path) -> None:
    outcome = quick("merge", nf4, "-o", tmp_path / "trained", "--weights", "trained")
    assert outcome.code == 0, outcome.err
    assert "merged into the nf4 weights it was trained on, dequantised" in outcome.err
    near = float(outcome.err.split("differs by ")[1].split()[0])
    outcome = quick("merge", nf4, "-o", tmp_path / "original")
    assert outcome.code == 0, outcome.err
    assert "merged into the base's original weights (it was trained on nf4)" in outcome.err
    far = float(outcome.err.split("differs by ")[1].split()[0])
    assert near < 1e-3 < 0.05 < far
    assert not torch.allclose(logits(tmp_path / "trained"), logits(tmp_path / "original"), atol=1e-2)
    torch.testing.assert_close(logits(tmp_path / "original"), adapted(nf4), atol=1e-4, rtol=1e-4)


def test_a_reward_model_merges_into_a_classifier(rm: Path, tmp_path: Path) -> None:
    assert quick("merge", rm, "-o", tmp_path / "merged").code == 0
    from peft import AutoPeftModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(rm / "final", dtype=torch.float32, num_labels=1)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, adapter(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_merged_is_named(base: Path, sft_lora: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for arguments, code, message in (
        ((base, "-o", tmp_path / "m"), 4, "is no adapter: its weights are whole already"),
        ((sft_lora, "-o", tmp_path / "full"), 2, "is there already and not empty"),
        ((sft_lora, "-o", tmp_path / "m", "--dtype", "int8"), 2, "'int8' is not one of auto"),
        ((sft_lora, "-o", tmp_path / "m", "--weights", "new"), 2, "'new' is not one of original, trained"),
        ((tmp_path / "none", "-o", tmp_path / "m"), 4, "no such folder"),
        ((sft_lora, "-o", tmp_path / "full" / "mine" / "m"), 2, "mine is not a folder (choose another folder)"),
    ):
        outcome = quick("merge", *arguments)
        assert (outcome.code, len(outcome.errors)) == (code, 1), outcome.err
        assert message in outcome.err
        assert not (tmp_path / "m").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


# --- chat ------------------------------------------------------------------------------------------------


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, *arguments: object) -> Outcome:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return quick("chat", *arguments, "--max-new-tokens", 6)


def test_an_answer_is_what_sampling_gives(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick("sample", w.save(sample_of(base, tmp_path, "s"), tmp_path / "s.yaml")).code == 0
    rows = w.lines(tmp_path / "s" / "data.jsonl")
    for row in rows[:3]:
        outcome = talk(monkeypatch, f"{row['prompt'][0]['content']}\n", base, "--temperature", 0)
        assert (outcome.code, outcome.out) == (0, f"{row['completion']}\n"), outcome.err


def test_a_conversation_goes_on_is_repeated_and_starts_anew(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = talk(monkeypatch, "tell of red\n", base, "--temperature", 0).out
    lines = talk(monkeypatch, "tell of red\n/again\n/new\ntell of red\n", base, "--temperature", 0).out
    assert lines == 3 * once
    hot = talk(monkeypatch, "tell of red\n/again\n/again\n", base, "--temperature", 1.5).out.splitlines()
    assert len(set(hot)) > 1
    assert talk(monkeypatch, "tell of red\n/again\n/again\n", base, "--temperature", 1.5).out.splitlines() == hot
    two = talk(monkeypatch, "tell of red\nand of blue\n/quit\nnever\n", base, "--temperature", 0).out.splitlines()
    assert len(two) == 2
    assert talk(monkeypatch, "/again\n/what\n\n", base).out.splitlines()[0] == "nothing was answered yet"


def test_two_runs_answer_side_by_side(base: Path, sft_lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = talk(monkeypatch, "tell of red\n", base, sft_lora, "--temperature", 0)
    lines = outcome.out.splitlines()
    assert (lines[0], lines[2]) == (f"[{base}]", f"[{sft_lora}]")
    same = talk(monkeypatch, "tell of red\n", base, base)
    assert (same.code, same.errors) == (4, [f"error: {base}: is named twice (name two different models)"])


def test_a_conversation_that_outgrows_the_context_is_told(
    base: Path, rm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = talk(monkeypatch, "tell " * 200 + "\n", base)
    assert (outcome.code, len(outcome.errors)) == (3, 1)
    assert "the model a context of 128 (/new starts again)" in outcome.err
    outcome = talk(monkeypatch, "hi\n", rm)
    assert (outcome.code, "this is a reward model" in outcome.err) == (4, True)
