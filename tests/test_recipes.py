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
FOUND = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if {"loops", "eval"}.isdisjoint(path.parts))
"""All that train, but for the links of loops, which are nothing without those before them (tests/test_makefile.py)."""
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
    """A short run of the kind that a recipe starts from: sft, sft-lora, rm or a process model. Each is made once."""
    done: dict[str, Path] = {}
    process = {"name": "step_labels"}
    stages: dict[str, tuple[str, str, dict[str, Any]]] = {
        "sft": ("sft", "chat", {"lora": None}),
        "sft-lora": ("sft", "chat", {}),
        "rm": ("train-rm", "pairs", {}),
        "step_labels": ("train-rm", "steps", {"objective": process}),
        "fine_grained": ("train-rm", "spans", {"objective": process, "data": {"segments": {"by": "sub_sentence"}}}),
    }

    def make(name: str) -> Path:
        if name not in done:
            stage, kind, more = stages[name]
            parent = tiny_model if name == "sft" else make("sft")
            content = w.recipe(
                stage, parent, world, kind, world / name, **({"training": {"max_steps": 1}, "lora": {"r": 16}} | more)
            )
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
        "evaluation.samples": min(2, recipe.evaluation.samples), "output_dir": out,
    }  # fmt: skip
    for split in ("train", "eval"):  # a file has neither
        source = plain["data"][split] if isinstance(plain["data"][split], dict) else {}
        found |= {f"data.{split}.{key}": v for key, v in (("split", "train"), ("name", "null")) if key in source}
    if recipe.stage != "ppo":
        found["evaluation.max_new_tokens"] = 4
    if recipe.stage == "ppo":
        found |= {"rollout.max_new_tokens": 6, "ppo.mini_batches": 2}
        found |= {"ppo.ptx.data": world / "text.jsonl"} if recipe.ppo.ptx else {}
        for i, reward in enumerate(recipe.rewards):
            if reward.run is not None:
                found[f"rewards.{i}.run"] = start(Path(reward.run).name if reward.place == "steps" else "rm")
    return [f"{key}={value}" for key, value in found.items()]


def test_recipes_were_found() -> None:
    assert len(SHIPPED) >= 20
    stages = {read_recipe(str(path), [], None).stage for path in FOUND}
    assert stages == {"sft", "train-rm", "dpo", "orpo", "simpo", "ppo"}


def test_every_way_of_ppo_has_a_recipe() -> None:
    """What people come for, by what the recipes themselves say."""
    recipes = {name: read_recipe(str(path), [], None) for name, path in SHIPPED.items()}
    online: dict[str, Any] = {name: r for name, r in recipes.items() if r.stage == "ppo"}
    ways: dict[str, Callable[[Any], bool]] = {
        "an answer that is right or wrong, with rloo": lambda r: rules(r) and r.ppo.advantage.name == "rloo",
        "an answer that is right or wrong, with grpo": lambda r: rules(r) and r.ppo.advantage.name == "grpo",
        "a cost": lambda r: r.ppo.lagrange is not None and any(one.role == "cost" for one in r.rewards),
        "fine-grained rewards": lambda r: len(r.rewards) > 1 and any(one.step_value == "sign" for one in r.rewards),
        "a process reward": lambda r: any(one.place == "steps" for one in r.rewards) and len(r.rewards) == 1,
        "one trunk": lambda r: r.critic.shared and r.critic.coef == 0.1,
        "a penalty": lambda r: r.ppo.penalty is not None,
        "other text": lambda r: r.ppo.ptx is not None,
        "a critic for what was cut": lambda r: r.ppo.truncation == "bootstrap",
        "a reference that moves": lambda r: r.ppo.reference_update is not None,
    }
    assert [way for way, found in ways.items() if not any(found(r) for r in online.values())] == []
    seven = [n for n, r in online.items() if "-7b-" in n and r.model.quantization == "nf4"]
    assert {name.split("-")[-1] for name in seven} == {"12gb.yaml", "24gb.yaml"}


def rules(recipe: Any) -> bool:
    """Whether a number is the reward."""
    return any(one.rule is not None and one.rule.name == "numeric_answer" for one in recipe.rewards)


@pytest.mark.parametrize("name", [name for name, path in SHIPPED.items() if path.parent.name == "recipes"])
def test_memory_is_not_said_to_be_measured(name: str) -> None:
    head = [line for line in SHIPPED[name].read_text().splitlines() if line.startswith("#")]
    (size,) = (part.removesuffix("gb") for part in Path(name).stem.split("-") if part.endswith("gb"))
    assert f", for {size} GB" in head[1]
    assert f"# That it fits {size} GB is computed, not measured." in head


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
    if recipe.stage == "ppo":
        shape = ("weight", "role", "place", "step_value", "normalize", "clip", "rule")
        for reward, asked in zip(kept["rewards"], written["rewards"], strict=True):
            assert {key: reward[key] for key in shape} == {key: asked[key] for key in shape}
        size = {"mini_batches", "ptx"}
        assert {k: v for k, v in kept["ppo"].items() if k not in size} == {
            k: v for k, v in written["ppo"].items() if k not in size
        }
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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "eval").glob("*.yaml")), ids=lambda path: path.name)
def test_an_evaluation_is_rehearsed(path: Path, start: Make, world: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    kinds = {"pairs": "pairs", "rankings": "rankings", "prompts": "prompts"}
    content["data"] |= {key: str(world / f"{kinds[key]}-eval.jsonl") for key in content["data"] if key in kinds}
    content["model"]["name_or_path"] = str(start("rm" if "pairs" in content["data"] else "sft-lora"))
    if "against" in content:
        content |= {
            "against": [str(start("sft"))],
            "reference": str(start("sft")),
            "rewards": [{"rule": {"name": "stop"}}],
        }
        content["rollout"]["max_new_tokens"] = 8
    outcome = rehearse("eval", w.save(content | {"output_dir": str(tmp_path / "run")}, tmp_path / "r.yaml"))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "eval.json").is_file()
