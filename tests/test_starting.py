"""`rlhf deps` and `rlhf init`: rules that make understands, and a project that can be started with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import Outcome

CLI = Callable[..., Outcome]


def rules(text: str) -> dict[str, tuple[list[str], str]]:
    """Target -> what it needs, and its command."""
    found = {}
    for block in text.split("\n\n")[1:]:
        head, command, touch = block.splitlines()
        target, _, needed = head.partition(": ")
        assert touch == "\t@touch $@"
        found[target] = needed.split(" "), command.strip()
    return found


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    recipes = {
        "sft": {"stage": "sft", "model": "org/model", "data": {"train": "a b.jsonl"}, "output_dir": "runs/sft",
                "training": {"learning_rate": 1e-4}},
        "sample": {"stage": "sample", "model": "runs/sft", "data": {"prompts": ["p.jsonl", "org/prompts"]},
                   "output_dir": "runs/sample/"},
        "score": {"stage": "score", "model": "runs/sft", "data": {"completions": "runs/sample"},
                  "rewards": [{"run": "runs/rm"}, {"function": "rewards.py:good"}], "output_dir": "out/score"},
        "select": {"stage": "select", "data": {"completions": "out/score"}, "selection": {"name": "best"},
                   "output_dir": "out/select"},
    }  # fmt: skip
    for name, content in recipes.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_a_rule_names_all_that_a_recipe_reads(cli: CLI, chain: Path) -> None:
    outcome = cli("deps", "sft.yaml", "sample.yaml", "score.yaml", "select.yaml")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("RLHF ?= rlhf\n\nruns/sft/DONE: sft.yaml a\\ b.jsonl\n")
    found = rules(outcome.out.replace("a\\ b", "a_b"))
    assert found == {
        "runs/sft/DONE": (["sft.yaml", "a_b.jsonl"], "$(RLHF) sft sft.yaml"),
        "runs/sample/DONE": (["sample.yaml", "p.jsonl", "runs/sft/DONE"], "$(RLHF) sample sample.yaml"),
        "out/score/DONE": (
            ["score.yaml", "runs/sample/DONE", "runs/sft/DONE", "runs/rm/DONE", "rewards.py"],
            "$(RLHF) score score.yaml",
        ),
        "out/select/DONE": (["select.yaml", "out/score/DONE"], "$(RLHF) select select.yaml"),
    }  # fmt: skip


def test_overrides_are_part_of_the_rule(cli: CLI, chain: Path) -> None:
    outcome = cli("deps", "sample.yaml", "--set", "model=runs/x", "--set", "output_dir=runs/it's $1")
    assert outcome.code == 0, outcome.err
    (target,) = [line for line in outcome.out.splitlines() if ": sample.yaml" in line]
    assert target == "runs/it's\\ $$1/DONE: sample.yaml p.jsonl runs/x/DONE"
    assert "$(RLHF) sample sample.yaml model=runs/x 'output_dir=runs/it'\"'\"'s $$1'" in outcome.out
    wrong = cli("deps", "sample.yaml", "--set", "modle=x")
    assert (wrong.code, len(wrong.errors), wrong.out) == (2, 1, "")


def test_a_circle_and_two_makers_are_refused(cli: CLI, chain: Path) -> None:
    outcome = cli("deps", "sample.yaml", "score.yaml", "--set", "output_dir=runs/x")
    assert (outcome.code, outcome.out, len(outcome.errors)) == (2, "", 1)
    assert "sample.yaml and score.yaml both make it" in outcome.err
    Path("back.yaml").write_text(Path("select.yaml").read_text().replace("out/select", "runs/sft"))
    outcome = cli("deps", "score.yaml", "back.yaml")
    assert (outcome.code, outcome.out, len(outcome.errors)) == (2, "", 1)
    assert "each is made of the one before: " in outcome.err


def test_the_model_of_a_starter_project_is_what_was_named(
    cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert cli("init", "one", "--model", "models/mine").code == 0
    content = yaml.safe_load(Path("one/recipes/sft.yaml").read_text())
    assert content["model"]["name_or_path"] == str(tmp_path / "models" / "mine")
    for name in ("/nope", "", "models/none"):
        outcome = cli("init", "two", "--model", name)
        assert (outcome.code, len(outcome.errors)) == (2, 1), name
        assert "no such folder, and not spelled like a hub id" in outcome.err
        assert not Path("two").exists()


def test_a_starter_project_is_planned_in_the_order_of_its_chain(cli: CLI, tmp_path: Path) -> None:
    outcome = cli("init", tmp_path / "mine", "--model", "org/some-model", "--quantization", "none")
    assert outcome.code == 0, outcome.err
    root = tmp_path / "mine"
    assert (root / ".gitignore").read_text() == "runs/\nrules.mk\n"
    assert "# mine" in (root / "README.md").read_text()
    assert yaml.safe_load((root / "recipes" / "sft.yaml").read_text())["model"] == {
        "name_or_path": "org/some-model", "quantization": "none",
    }  # fmt: skip
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", f"RLHF={sys.executable} -m rlhf_cli"]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    order = [line.split()[3] for line in done.stdout.splitlines() if line.endswith(".yaml")]
    assert sorted(order) == ["dpo", "ppo", "sft", "train-rm"]
    assert order[0] == "sft"
    assert order.index("train-rm") < order.index("ppo")


def test_the_starter_recipes_and_data_are_fit(
    cli: CLI, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("init", tmp_path / "mine", "--model", tiny_model, "--quantization", "none").code == 0
    monkeypatch.chdir(tmp_path / "mine")
    small = ("--set", "data.max_length=128", "--set", "training.max_steps=1", "--set", "lora.r=2")
    outcome = cli("sft", "recipes/sft.yaml", *small)
    assert outcome.code == 0, outcome.err
    outcome = cli("check", "recipes/sft.yaml", "recipes/rm.yaml", "recipes/dpo.yaml", *small[:2])
    assert (outcome.code, outcome.err.count("fit for rlhf")) == (2, 2), "sft has other settings now"
    for name in ("rm", "dpo"):
        outcome = cli("check", f"recipes/{name}.yaml")
        assert outcome.code == 0, outcome.err


def test_init_overwrites_nothing(cli: CLI, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    outcome = cli("init", tmp_path)
    assert (outcome.code, outcome.errors) == (
        2, [f"error: {tmp_path}: is there already and not empty (choose another folder)"],
    )  # fmt: skip
    outcome = cli("init", tmp_path / "new", "--quantization", "int3")
    assert (outcome.code, outcome.errors) == (2, ["error: --quantization: 'int3' is not one of none, nf4, int8"])
    outcome = cli("init", tmp_path / "file" / "below")
    assert (outcome.code, outcome.errors) == (
        2,
        [f"error: {tmp_path}/file/below: cannot be created: {tmp_path}/file is not a folder (choose another folder)"],
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
