from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import DataError, ModelError, RecipeError
from rlhf_cli.recipe import model_path
from rlhf_cli.recipe.lineage import differences, digest, fingerprint, inputs, resolve_model, semantic
from rlhf_cli.recipe.schema import DPORecipe, PPORecipe, Recipe
from tests.runs.helpers import make_model, make_recipe


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def finished(path: Path, role: str = "policy", **lineage: Any) -> Path:
    make_model(path / "final")
    head = {"stage": "sft", "role": role, "digest": "d1", "lineage": lineage}
    (path / "run.json").write_text(json.dumps(head))
    (path / "DONE").write_text("{}")
    return path


def adapter(path: Path, base: str, **settings: Any) -> Path:
    make_model(path)
    (path / "config.json").unlink()
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, **settings}))
    return path


def changed(recipe: Recipe, dotted: str, value: Any) -> Recipe:
    plain = recipe.model_dump(mode="json", exclude_unset=True)
    holder = plain
    *parents, last = dotted.split(".")
    for key in parents:
        holder = holder.setdefault(key, {})
    holder[last] = value
    return type(recipe).model_validate(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "runs/other"),
        ("logging.every", 1),
        ("logging.report_to", ["wandb"]),
        ("checkpoint.every", None),
        ("evaluation.every", 7),
        ("evaluation.samples", 0),
        ("training.max_steps", 5),
        ("training.micro_batch_tokens", 64),
        ("training.layout", "padded"),
        ("model.gradient_checkpointing", False),
    ],
)
def test_what_cannot_change_the_result_is_left_out(tmp_path: Path, key: str, value: Any) -> None:
    recipe = make_recipe(tmp_path)
    assert digest(changed(recipe, key, value)) == digest(recipe)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 1), ("training.batch_size", 2), ("training.num_epochs", 3.0), ("lora", {}), ("data.max_length", 99)],
)
def test_what_can_change_the_result_counts(tmp_path: Path, key: str, value: Any) -> None:
    recipe = make_recipe(tmp_path)
    assert digest(changed(recipe, key, value)) != digest(recipe)


def test_defaults_written_out_are_the_same_recipe(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    assert digest(changed(recipe, "training.batch_size", 32)) == digest(recipe)


def test_inputs_of_a_preference_recipe(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    finished(tmp_path / "runs" / "sft", base="base")
    adapter(tmp_path / "extra", "base")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    (tmp_path / "template.jinja").write_text("{{ x }}")
    recipe = DPORecipe.model_validate(
        {
            "stage": "dpo",
            "model": {"name_or_path": "runs/sft", "chat_template": "template.jinja"},
            "reference": "extra",
            "data": {"train": ["data", {"path": "user/set", "split": "test"}]},
            "objective": {"name": "dpo"},
            "training": {"learning_rate": 1e-3},
            "output_dir": "runs/dpo",
        }
    )
    found = inputs(recipe)
    assert found.keys() == {
        "data", "user/set", "runs/sft", "runs/sft tokenizer", "template.jinja", "extra", "extra tokenizer", "base",
        "base tokenizer",
    }  # fmt: skip
    assert found["user/set"] == "hub:user/set/default/test"
    assert found["runs/sft"].startswith("run:d1 sha256:")
    (tmp_path / "data" / "b.jsonl").write_text("{}")
    assert inputs(recipe)["data"] != found["data"]


def test_inputs_of_a_ppo_recipe(tmp_path: Path) -> None:
    finished(tmp_path / "runs" / "rm", role="reward")
    (tmp_path / "p.jsonl").write_text("{}")
    (tmp_path / "good.py").write_text("def f(): ...")
    plain = {
        "stage": "ppo",
        "model": {"name_or_path": "Qwen/Qwen2.5-0.5B", "revision": "v1"},
        "rewards": [{"run": "runs/rm"}, {"function": "good.py:f"}],
        "data": {"train": "p.jsonl"},
        "training": {"learning_rate": 1e-3},
        "output_dir": "runs/ppo",
    }
    recipe = PPORecipe.model_validate(plain)
    found = inputs(recipe)
    assert found["Qwen/Qwen2.5-0.5B"] == "hub:Qwen/Qwen2.5-0.5B@v1"
    assert found.keys() == {"Qwen/Qwen2.5-0.5B", "runs/rm", "runs/rm tokenizer", "good.py", "p.jsonl"}
    assert "timeout" not in semantic(recipe)["rewards"][1]
    assert "max_batch" not in semantic(recipe)["rollout"]
    (tmp_path / "good.py").write_text("def f(): return 1")
    assert inputs(recipe)["good.py"] != found["good.py"]
    plain["rewards"] = [{"function": "god.py:f"}]
    with pytest.raises(RecipeError, match=r"did you mean 'good.py'"):
        inputs(PPORecipe.model_validate(plain))


def test_a_data_file_that_is_missing(tmp_path: Path) -> None:
    recipe = changed(make_recipe(tmp_path), "data.train", "nowhere/pairs.jsonl")
    with pytest.raises(DataError, match=r"there is no folder nowhere either"):
        inputs(recipe)


def test_fingerprint_sees_weights_and_configuration(tmp_path: Path) -> None:
    one = fingerprint(make_model(tmp_path / "a"))
    assert one == fingerprint(make_model(tmp_path / "b"))
    assert one != fingerprint(make_model(tmp_path / "b", b"w" * 99 + b"x"))
    assert one != fingerprint(make_model(tmp_path / "a", vocab_size=3))


def test_fingerprint_of_large_files_samples_blocks(tmp_path: Path) -> None:
    big = bytes(model_path.WHOLE + 1000)
    make_model(tmp_path / "a", big)
    one = fingerprint(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    for place in (5, 100, -1, len(big) // 63 * 7 + 20):
        data = bytearray(path.read_bytes())
        whole = bytes(data)
        data[place] ^= 1
        path.write_bytes(data)
        assert fingerprint(tmp_path / "a") != one, place
        path.write_bytes(whole)
    assert fingerprint(tmp_path / "a") == one


def test_kinds_of_models(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    full = resolve_model("base")
    assert (full.source, full.kind, full.role, full.base, full.weights) == (
        "folder",
        "full",
        "policy",
        None,
        Path("base"),
    )
    make_model(tmp_path / "rm", architectures=["LlamaForSequenceClassification"])
    assert resolve_model("rm").role == "reward"
    adapter(tmp_path / "lora", "base", task_type="SEQ_CLS")
    lora = resolve_model("lora")
    assert (lora.source, lora.kind, lora.role, lora.base) == ("folder", "adapter", "reward", "base")
    run = resolve_model(str(finished(tmp_path / "runs" / "x", role="reward", base={"name": "base"})))
    assert (run.source, run.kind, run.role, run.base, run.done) == ("run", "full", "reward", "base", True)
    assert run.weights == tmp_path / "runs" / "x" / "final"
    hub = resolve_model("Qwen/Qwen2.5-0.5B")
    assert (hub.source, hub.weights) == ("hub", None)
    assert resolve_model("gpt2").source == "hub"


def test_models_that_are_refused(tmp_path: Path) -> None:
    path = finished(tmp_path / "runs" / "sft")
    with pytest.raises(ModelError, match=r"runs/stf: no such folder .did you mean 'runs/sft'"):
        resolve_model("runs/stf")
    (path / "DONE").unlink()
    with pytest.raises(ModelError, match=r"has no DONE .finish it first: rlhf sft runs/sft/recipe.yaml"):
        resolve_model("runs/sft")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config.json and no adapter_config.json"):
        resolve_model("empty")
    (make_model(tmp_path / "pickle") / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickle .pytorch_model.bin"):
        resolve_model("pickle")
    adapter(tmp_path / "lost", "models/gone/away")
    with pytest.raises(ModelError, match=r"'models/gone/away' does not exist in the working directory"):
        resolve_model("lost")
    with pytest.raises(ModelError, match=r"is a file"):
        resolve_model(str(tmp_path / "empty" / "..") + "/pickle/config.json")


def test_runs_prefix_is_never_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder runs either"):
        resolve_model("runs/sft")


def test_an_adapter_of_itself(tmp_path: Path) -> None:
    adapter(tmp_path / "loop", "loop")
    with pytest.raises(ModelError, match=r"base is itself"):
        inputs(changed(make_recipe(tmp_path), "model.name_or_path", "loop"))


def test_differences() -> None:
    old = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": None, "same": {}}
    new = {"a": {"b": 1.5, "c": [1, {"d": 3}, 4]}, "f": "x", "same": {}}
    assert differences(old, new) == [
        "a.b: 1 -> 1.5",
        "a.c.1.d: 2 -> 3",
        "a.c.2: (absent) -> 4",
        "e: null -> (absent)",
        'f: (absent) -> "x"',
    ]
    assert differences(old, old) == []
