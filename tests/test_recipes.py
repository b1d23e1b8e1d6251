"""Every shipped recipe is valid and is rehearsed on the tiny model: its own settings, other model, data and lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.recipe.reader import read_recipe
from rlhf_cli.recipe.settings.blocks import terms_of
from tests.conftest import Outcome, run_cli
from tests.stages import world as w

ROOT = Path(__file__).parents[1]
FOUND = sorted((ROOT / "recipes").rglob("*.yaml"))
SHIPPED = {str(path.relative_to(ROOT / "recipes")): path for path in FOUND}
KINDS = {"demonstration": "chat", "comparison": "pairs", "verdict": "verdicts", "task": "prompts"}
JUDGED = {kind: kind for kind in w.JUDGED}
JUDGED |= {"strict-rankings": "strict", "gsm8k": "questions", "PKU-SafeRLHF": "safety"}
"""Data of other kinds, and what the toy task calls them."""
Make = Callable[[str], Path]


def rehearse(*arguments: object) -> Outcome:
    """The command line without drawing the report."""
    with patch("rlhf_cli.stages.common.write_report", lambda path: path / "report.html"):
        return run_cli(*arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each kind, in the columns that the recipes ask for."""
    folder = tmp_path_factory.mktemp("rehearsal")
    for kind in w.KINDS + w.JUDGED:
        w.write_rows(folder / f"{kind}.jsonl", w.rows(kind, 12, 1))
        w.write_rows(folder / f"{kind}-eval.jsonl", w.rows(kind, 4, 2))
    return folder


@pytest.fixture(scope="module")
def start(tiny_model: Path, world: Path) -> Make:
    """A short run of the kind that a recipe starts from: sft, sft-lora or rm. Each is made once."""
    done: dict[str, Path] = {}
    stages: dict[str, tuple[str, str, Any]] = {
        "sft": ("sft", "chat", None), "sft-lora": ("sft", "chat", {"r": 16}), "rm": ("train-rm", "pairs", {"r": 16})
    }  # fmt: skip

    def make(name: str) -> Path:
        if name not in done:
            stage, kind, lora = stages[name]
            parent = tiny_model if name == "sft" else make("sft")
            content = w.recipe(stage, parent, world, kind, world / name, training={"max_steps": 1}, lora=lora)
            outcome = rehearse(stage, w.save(content, world / f"{name}.yaml"))
            assert outcome.code == 0, outcome.err
            done[name] = world / name
        return done[name]

    return make


def overrides(recipe: Any, plain: dict[str, Any], world: Path, start: Make, tiny: Path, out: Path) -> list[str]:
    """What makes a recipe fit for a rehearsal: everything that decides its size, and nothing else."""
    block = getattr(recipe, "objective", None)
    kind = JUDGED.get(Path(recipe.data.train[0].path).stem)
    kind = kind or KINDS[OBJECTIVES[terms_of(block)[0][1].name].data if block else "task"]
    name = recipe.model.name_or_path
    chained = name.startswith(("runs/", "demo/")) and not name.endswith("/model")
    model = (start("sft-lora") if "lora" in name else start("sft")) if chained else tiny
    found = {
        "model.name_or_path": model,
        "data.train.path" if isinstance(plain["data"]["train"], dict) else "data.train": world / f"{kind}.jsonl",
        "data.eval.path" if isinstance(plain["data"]["eval"], dict) else "data.eval": world / f"{kind}-eval.jsonl",
        "data.max_length": 64, "training.batch_size": 4, "training.max_steps": 2,
        "evaluation.max_new_tokens": 4, "evaluation.samples": min(2, recipe.evaluation.samples), "output_dir": out,
    }  # fmt: skip
    if recipe.stage == "ppo":
        found |= {"rollout.max_new_tokens": 6, "ppo.mini_batches": 2}
        found |= {"ppo.ptx.data": world / "text.jsonl"} if recipe.ppo.ptx else {}
        for i, reward in enumerate(recipe.rewards):
            if reward.run is not None:
                found[f"rewards.{i}.run"] = start("rm")
    return [f"{key}={value}" for key, value in found.items()]


def test_recipes_were_found() -> None:
    assert len(SHIPPED) >= 20
    stages = {read_recipe(str(path), [], None).stage for path in FOUND}
    assert stages == {"sft", "train-rm", "dpo", "orpo", "simpo", "ppo"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_valid_and_says_how_to_run_it(name: str) -> None:
    path = SHIPPED[name]
    recipe = read_recipe(str(path), [], None)
    head = path.read_text().splitlines()
    schema = head[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == ROOT / "recipes" / "schema.json"
    assert f"#   rlhf {recipe.stage} recipes/{name}" in head


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_rehearsed(
    name: str, world: Path, start: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # reward functions are named from there
    path, out = SHIPPED[name], tmp_path / "run"
    recipe = read_recipe(str(path), [], None)
    plain = yaml.safe_load(path.read_text())
    changes = overrides(recipe, plain, world, start, tiny_model, out)
    outcome = rehearse(recipe.stage, path, *(part for change in changes for part in ("--set", change)))
    assert (outcome.code, outcome.out, outcome.errors) == (0, "", []), outcome.err

    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    written = recipe.model_dump(mode="json")
    same = ("objective", "logging", "checkpoint", "seed", "critic")
    assert [key for key in same if kept.get(key) != written.get(key)] == []
    asked = plain.get("lora") or {}  # the rest comes from the adapter, where the recipe starts from one
    assert {key: kept["lora"][key] for key in asked} == asked
    assert (kept["lora"] is None) == (recipe.lora is None)
    assert kept["model"] | {"name_or_path": ""} == written["model"] | {"name_or_path": ""}
    for key in ("learning_rate", "lr_scheduler", "warmup_ratio", "optimizer", "weight_decay", "adam_epsilon"):
        assert kept["training"][key] == written["training"][key]
    bits = recipe.model.quantization.removeprefix("none")
    assert f"{bits}, {'all' if recipe.lora is None else 'LoRA'}:" in outcome.err.replace("float32,", ",")
    assert json.loads((out / "DONE").read_text())["step"] == 2
    assert (out / "final" / ("config.json" if recipe.lora is None else "adapter_config.json")).exists()
