"""Real data through `rlhf check`, and a small real model through the main commands. Skipped where they are absent."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import cli
from tests.conftest import run_cli
from tests.stages import world as w
from tests.stages.conftest import quick

SHARED = Path(__file__).parents[2].parent / "shared"
DATA, MODEL = SHARED / "data", SHARED / "models" / "stories260K"
TEMPLATE = str(Path(cli.__file__).parent / "starter" / "chat.jinja")
"""The model has none of its own."""
pytestmark = pytest.mark.skipif(
    not (DATA.is_dir() and MODEL.is_dir()), reason="no real data or model beside the project"
)

QA = {"prompt": "question", "completion": "answer"}
SCORED = {"completion": "text", "score": "reward"}
CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize(
    ("name", "stage", "objective", "columns", "format_", "kept"),
    [
        ("alpaca_en_demo.json", "sft", None, {}, "alpaca", "849"),
        ("alpaca_zh_demo.json", "sft", None, {}, "alpaca", "300"),
        ("identity.json", "sft", None, {}, "alpaca", "74"),
        ("glaive_toolcall_en_demo.json", "sft", None, {}, "sharegpt", ""),
        ("gsm8k_train.jsonl", "sft", None, QA, "prompt_completion", "2000"),
        ("imdb_scored.jsonl", "sft", None, {"completion": "text"}, "prompt_completion", "1392"),
        ("dpo_en_demo.json", "dpo", "dpo", {}, "sharegpt_preference", ""),
        ("dpo_zh_demo.json", "dpo", "ipo", {}, "sharegpt_preference", ""),
        ("dpo_en_demo.json", "train-rm", "bradley_terry", {}, "sharegpt_preference", ""),
        ("dpo_en_demo.json", "orpo", "orpo", {}, "sharegpt_preference", ""),
        ("dpo_en_demo.json", "dpo", "kto", {}, "sharegpt_preference", ""),
        ("kto_en_demo.json", "dpo", "kto", {}, "verdict", "194"),
        ("imdb_scored.jsonl", "dpo", "odpo", SCORED, "scored", ""),
        ("imdb_scored.jsonl", "train-rm", "bradley_terry", SCORED, "scored", ""),
        ("gsm8k_train.jsonl", "ppo", None, {"prompt": "question"}, "prompt", "2000"),
    ],
)
def test_a_real_file_is_read_in_its_format(
    tmp_path: Path, name: str, stage: str, objective: str | None, columns: dict[str, str], format_: str, kept: str
) -> None:
    content: dict[str, Any] = {
        "stage": stage, "model": {"name_or_path": str(MODEL), "chat_template": TEMPLATE},
        "training": {"learning_rate": 1e-4}, "output_dir": str(tmp_path / "run"),
        "data": {"train": {"path": str(DATA / name), "columns": columns}, "on_bad_row": "drop", "max_length": 512},
    }  # fmt: skip
    if objective:
        content["objective"] = {"name": objective}
    if stage == "ppo":
        (tmp_path / "f.py").write_text("def f(completions, answer):\n    return [0.0] * len(completions)\n")
        content["rewards"] = [{"function": str(tmp_path / "f.py:f")}]
    outcome = run_cli("check", w.save(content, tmp_path / "r.yaml"))
    assert (outcome.code, outcome.out, outcome.errors) == (0, "", []), outcome.err
    assert f"fit for rlhf {stage}" in outcome.err
    assert f"format {format_} (detected)" in outcome.err
    assert kept == "" or f" {kept} examples kept" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def real(tmp_path: Path) -> Callable[..., Path]:
    """`real(stage, name, source, **more)`: a short training of stories260K; the run directory."""

    def run(stage: str, name: str, source: dict[str, Any], **more: Any) -> Path:
        source = {"limit": 96} | source | {"path": str(DATA / source["path"])}
        content = w.merged(w.FAST, {
            "stage": stage, "model": {"name_or_path": str(MODEL)}, "output_dir": str(tmp_path / name),
            "data": {"train": source, "eval": source | {"limit": 24}, "max_length": 128, "truncation": "right",
                     "on_bad_row": "drop"},
            "training": {"batch_size": 8, "max_steps": 8, "learning_rate": 1e-3, "lr_scheduler": "cosine"},
            "evaluation": {"samples": 1},
        }, more)  # fmt: skip
        outcome = quick(stage, w.save(content, tmp_path / f"{name}.yaml"))
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    return run


IMDB = {"path": "imdb_scored.jsonl", "columns": SCORED}
LORA = {"r": 8, "alpha": 16}


def test_sft_then_preferences_on_a_real_model(real: Callable[..., Path]) -> None:
    sft = real("sft", "sft", {"path": "imdb_scored.jsonl", "columns": {"completion": "text"}})
    losses = w.column(sft, "eval/loss")
    assert losses[-1] < losses[0] - 0.3
    start = {"model": {"name_or_path": str(sft)}, "lora": LORA}
    dpo = real("dpo", "dpo", IMDB, objective={"name": "dpo"}, **start)
    assert w.column(dpo, "eval/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert w.column(dpo, "eval/loss")[-1] < math.log(2) - 0.01
    assert w.column(dpo, "eval/rewards/accuracies")[-1] > 0.6
    four = w.merged(start, {"model": {"quantization": "nf4"}})
    odpo = real("dpo", "odpo", IMDB, objective={"name": "odpo"}, **four)
    assert w.column(odpo, "eval/loss")[-1] < w.column(odpo, "eval/loss")[0]


def test_a_reward_model_learns_real_pairs_by_heart(real: Callable[..., Path]) -> None:
    settings = {"learning_rate": 1e-2, "max_steps": 20, "lr_scheduler": "constant"}
    rm = real("train-rm", "rm", IMDB | {"limit": 24}, lora=LORA, training=settings)
    assert w.column(rm, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert w.column(rm, "eval/rewards/accuracies")[-1] > 0.8


def test_kto_on_real_verdicts(real: Callable[..., Path]) -> None:
    verdicts = {"path": "kto_en_demo.json"}
    more = {"model": {"chat_template": CHATML}, "data": {"max_length": 256}}
    kto = real("dpo", "kto", verdicts, objective={"name": "kto"}, lora=LORA, training={"max_steps": 3}, **more)
    assert w.column(kto, "loss")[0] == pytest.approx(0.5, abs=1e-5)
    assert w.column(kto, "eval/loss")[-1] < 0.5
