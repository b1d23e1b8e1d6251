"""Wrong input: one clear line that names the place, the right exit code, no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick

Toy = Callable[..., dict[str, Any]]
DPO = {"objective": {"name": "dpo"}}


def refused(content: dict[str, Any], code: int, *said: str, command: str = "", options: tuple[str, ...] = ()) -> str:
    """The one line with which the recipe is refused; asserts its exit code, what it says, and that nothing is there."""
    out = Path(content["output_dir"])
    there = w.contents(out) if out.is_dir() else None
    outcome: Outcome = quick(command or content["stage"], w.save(content, out.parent / "r.yaml"), *options)
    assert outcome.code == code, outcome.err
    assert len(outcome.errors) == 1, outcome.err
    (line,) = outcome.errors
    assert [text for text in said if text not in line] == [], line
    assert "Traceback" not in outcome.err
    assert "bug of rlhf" not in outcome.err
    assert (w.contents(out) if out.is_dir() else None) == there
    return line


# --- the recipe ------------------------------------------------------------------------------------------


def test_an_unknown_key_has_line_and_column(toy: Toy, tmp_path: Path) -> None:
    recipe = w.save(toy("dpo", "pairs", **DPO), tmp_path / "r.yaml")
    text = recipe.read_text()
    recipe.write_text(text.replace("  batch_size:", "  batch_sise:"))
    place = next(n for n, row in enumerate(text.splitlines(), 1) if row.startswith("  batch_size:"))
    outcome = quick("dpo", recipe)
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert f"r.yaml:{place}:3 training.batch_sise" in outcome.errors[0]
    assert "batch_size" in outcome.errors[0].split("batch_sise", 1)[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"batch_size": "many"}}, ("r.yaml:", "training.batch_size")),
        ({"training": {"learning_rate": -1.0}}, ("r.yaml:", "training.learning_rate")),
        ({"lora": {"rnk": 4}}, ("r.yaml:", "lora.rnk")),
        ({"objective": {"name": "dpoo"}}, ("r.yaml:", "objective", "dpo")),
        ({"objective": {"name": "simpo"}}, ("r.yaml:", "rlhf simpo")),
        ({"model": {"quantization": "nf4"}, "lora": None}, ("quantization", "lora")),
        ({"data": {"max_length": 4096}}, ("data.max_length", "4096", "context of 128")),
    ],
)
def test_a_wrong_value(toy: Toy, change: dict[str, Any], said: tuple[str, ...]) -> None:
    refused(toy("dpo", "pairs", **w.merged(DPO, change)), 2, *said)


def test_a_recipe_of_another_command(toy: Toy, world: Path) -> None:
    rewards = [{"function": f"{world / 'reward.py'}:true_reward"}]
    refused(toy("ppo", "prompts", rewards=rewards, rollout={"max_new_tokens": 6}), 2, "rlhf ppo", "rlhf dpo",
            command="dpo")  # fmt: skip


def test_one_row_a_step_is_too_few_for_kto(toy: Toy) -> None:
    refused(toy("dpo", "verdicts", objective={"name": "kto"}, training={"batch_size": 1}), 2, "training.batch_size")


# --- the data --------------------------------------------------------------------------------------------


def test_a_missing_file(toy: Toy, world: Path) -> None:
    refused(toy("dpo", "pairs", **DPO, data={"train": str(world / "pears.jsonl")}), 3, "pears.jsonl", "pairs.jsonl")


@pytest.fixture
def bad(toy: Toy, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`bad(stage, kind, line, text, total)`: a recipe over `total` good lines, but `text` at line `line`."""

    def make(stage: str, kind: str, line: int, text: str, total: int = 20, **more: Any) -> dict[str, Any]:
        rows = w.rows(kind, 50, 5)
        lines = [json.dumps(rows[n % 50]) for n in range(total)]
        lines[line - 1] = text
        (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
        return toy(stage, kind, **w.merged({"data": {"train": str(tmp_path / "bad.jsonl"), "eval": None}}, more))

    return make


def test_line_7777_of_10000(bad: Toy) -> None:
    refused(bad("dpo", "pairs", 7777, '{"prompt": "a", "chosen": "b"', 10_000, **DPO), 3, "bad.jsonl:7777", "not JSON")


@pytest.mark.parametrize(
    ("stage", "kind", "text", "said"),
    [
        ("sft", "chat", '{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
        ("sft", "completion", '{"prompt": "a", "completion": ""}', "completion"),
        ("dpo", "pairs", '{"prompt": "a", "chosen": "", "rejected": "c"}', "completion"),
        ("dpo", "pairs", '{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen equals rejected"),
        ("dpo", "pairs", '{"prompt": "a", "chosen": 3, "rejected": "b"}', "chosen"),
        ("train-rm", "pairs", '{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen equals rejected"),
        ("dpo", "verdicts", '{"prompt": "a", "completion": "b", "label": "maybe"}', "label"),
        ("dpo", "pairs", '["a"]', "object"),
    ],
)
def test_a_bad_row_is_named(bad: Toy, stage: str, kind: str, text: str, said: str) -> None:
    more = {"objective": {"name": "kto" if kind == "verdicts" else "dpo"}} if stage == "dpo" else {}
    content = bad(stage, kind, 7, text, **more)
    outcome = quick(stage, w.save(content, Path(content["output_dir"]).parent / "r.yaml"))
    assert outcome.code == 3
    assert "bad.jsonl:7: " in outcome.errors[0]
    assert said in outcome.errors[0]
    assert all("1 bad row" in line for line in outcome.errors[1:])
    assert not Path(content["output_dir"]).exists()


def test_a_bad_row_is_dropped_and_counted_when_that_is_asked(bad: Toy) -> None:
    text = '{"prompt": [{"role": "user", "content": "tell"}], "chosen": "b", "rejected": "b"}'
    content = bad("dpo", "pairs", 7, text, **w.merged(DPO, {"data": {"on_bad_row": "drop"}}))
    outcome = quick("dpo", w.save(content, Path(content["output_dir"]).parent / "r.yaml"))
    assert outcome.code == 0, outcome.err
    (source,) = json.loads((Path(content["output_dir"]) / "data-report.json").read_text())["sources"]
    assert (source["rows"], source["kept"]) == (20, 19)
    assert source["dropped"][0]["where"][0].endswith("bad.jsonl:7")


def test_no_row_is_left(toy: Toy, tmp_path: Path) -> None:
    refused(toy("dpo", "pairs", **DPO, data={"max_length": 9}), 3, "no train example is left", "data.max_length")
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    path = w.write_rows(tmp_path / "equal.jsonl", [row] * 5)
    refused(toy("dpo", "pairs", **DPO, data={"train": str(path), "on_bad_row": "drop"}), 3, "equal.jsonl",
            "none of its 5 rows")  # fmt: skip


def test_an_empty_file(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    refused(toy("sft", "chat", data={"train": str(tmp_path / "empty.jsonl")}), 3, "empty.jsonl", "no rows")


def test_scores_are_missing_or_contradict(bad: Toy) -> None:
    more = {"objective": {"name": "odpo"}}
    base = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}
    for scores in ({}, {"chosen_score": 0.1, "rejected_score": 0.7}):
        content = bad("dpo", "pairs", 3, json.dumps(base | scores), **more)
        outcome = quick("dpo", w.save(content, Path(content["output_dir"]).parent / "r.yaml"))
        assert outcome.code == 3
        assert "bad.jsonl:3: " in outcome.errors[0]
        assert "score" in outcome.errors[0]


def test_chat_data_without_a_template(toy: Toy, base: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(base / "final", tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(toy("sft", "chat", model={"name_or_path": str(plain)}), 3, "no chat template", "model.chat_template")


# --- the model -------------------------------------------------------------------------------------------


def test_a_missing_model(toy: Toy, tmp_path: Path) -> None:
    refused(toy("dpo", "pairs", **DPO, model={"name_or_path": str(tmp_path / "nowhere" / "model")}), 4, "nowhere/model")


def test_a_reward_model_as_policy(toy: Toy, rm: Path) -> None:
    for name in (rm, rm / "final"):
        refused(toy("dpo", "pairs", **DPO, model={"name_or_path": str(name)}), 4, "this is a reward model")


def test_a_language_model_as_reward(toy: Toy, base: Path, sft_lora: Path) -> None:
    for name in (base, sft_lora, base / "final"):
        content = toy("ppo", "prompts", rewards=[{"run": str(name)}], rollout={"max_new_tokens": 6})
        refused(content, 4, str(name), "this is a language model")


def test_an_unfinished_run_as_model(toy: Toy, base: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(base, tmp_path / "cut"))
    (cut / "DONE").unlink()
    refused(toy("dpo", "pairs", **DPO, model={"name_or_path": str(cut)}), 4, str(cut), "no DONE", "rlhf sft")


def test_an_adapter_without_lora(toy: Toy, sft_lora: Path) -> None:
    refused(toy("dpo", "pairs", **DPO, lora=None, model={"name_or_path": str(sft_lora)}), 2, "lora", str(sft_lora))


def test_another_rank_than_the_adapter_has(toy: Toy, sft_lora: Path) -> None:
    refused(toy("dpo", "pairs", **DPO, lora={"r": 4}, model={"name_or_path": str(sft_lora)}), 2, "lora.r", "8")


def test_a_base_that_changed_under_its_adapter(toy: Toy, base: Path, world: Path, tmp_path: Path) -> None:
    """An adapter is refused on other weights than it was trained on."""
    from safetensors.torch import load_file, save_file

    from tests.stages.conftest import train

    mine = Path(shutil.copytree(base / "final", tmp_path / "mine"))
    short = {"training": {"max_steps": 1}, "data": {"eval": None}}
    sft = train(toy("sft", "chat", "sft", **w.merged(short, {"model": {"name_or_path": str(mine)}})))
    tensors = load_file(mine / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    refused(toy("dpo", "pairs", **DPO, model={"name_or_path": str(sft)}), 4, str(sft), "other base weights")


@pytest.mark.parametrize(("tensor", "said"), [("nan", "NaN"), ("missing", "missing"), ("extra", "extra")])
def test_damaged_weights_name_the_tensor(toy: Toy, base: Path, tmp_path: Path, tensor: str, said: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    mine = Path(shutil.copytree(base / "final", tmp_path / "mine"))
    tensors = load_file(mine / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if tensor == "nan":
        tensors[name][3, 3] = float("nan")
    elif tensor == "missing":
        del tensors[name]
    else:
        tensors[f"{name}.again"] = torch.zeros(2)
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    refused(toy("dpo", "pairs", **DPO, model={"name_or_path": str(mine)}), 4, str(mine), said, "mlp.up_proj.weight")


def test_cut_weights(toy: Toy, base: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(base / "final", tmp_path / "mine"))
    whole = (mine / "model.safetensors").read_bytes()
    (mine / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(toy("dpo", "pairs", **DPO, model={"name_or_path": str(mine)}), 4, str(mine))


# --- the run directory -----------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    content = toy("dpo", "pairs", **DPO)
    recipe = w.save(content, tmp_path / "r.yaml")
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        outcome = quick("dpo", recipe, "-o", out)
        assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
        assert str(out) in outcome.errors[0]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_with_other_things(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    refused(toy("dpo", "pairs", **DPO), 2, "thesis.txt", "output_dir")
