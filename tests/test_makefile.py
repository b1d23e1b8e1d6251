"""The Makefile: its demo targets depend on what they read, and its pins cover what the project needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("world", "pretrain", "sft", "rm", "ppo", "dpo", "orpo", "simpo")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def touch(path: Path, time: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time, time))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A finished demo: inputs at time 1000, runs after them in the order of the chain, the table last."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "scripts", "recipes"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1000, 1000))
    touch(tmp_path / ".venv" / "ready", 2000)
    for number, run in enumerate(RUNS):
        touch(tmp_path / "demo" / run / "DONE", 3000 + number)
    touch(tmp_path / "demo" / "table.md", 4000)
    return tmp_path


def planned(tree: Path, target: str = "demo/table.md") -> list[str]:
    """The commands that make would run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", target], cwd=tree, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return [line for line in done.stdout.splitlines() if line.startswith(".venv/bin/")]


def test_a_finished_demo_is_up_to_date(tree: Path) -> None:
    (tree / "demo" / "table.md").write_text("| the table |\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "demo"], cwd=tree, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["| the table |", "demo is up to date"]


def test_a_changed_recipe_reruns_what_depends_on_it(tree: Path) -> None:
    touch(tree / "recipes" / "tiny" / "dpo.yaml", 5000)
    assert planned(tree) == [
        ".venv/bin/rlhf dpo recipes/tiny/dpo.yaml --resume auto",
        ".venv/bin/python scripts/demo_table.py --demo demo --out demo/table.md",
    ]


def test_a_new_reward_model_reruns_ppo_only(tree: Path) -> None:
    touch(tree / "recipes" / "tiny" / "rm.yaml", 5000)
    commands = [line.split()[1] for line in planned(tree)]
    assert commands == ["train-rm", "ppo", "scripts/demo_table.py"]


def test_from_nothing_the_chain_runs_in_order(tree: Path) -> None:
    shutil.rmtree(tree / "demo")
    commands = [line.split()[1] for line in planned(tree)]
    assert commands[:3] == ["scripts/make_tiny.py", "sft", "sft"]
    assert sorted(commands[3:-1]) == ["dpo", "orpo", "ppo", "simpo", "train-rm"]
    assert commands.index("train-rm") < commands.index("ppo")
    assert commands[-1] == "scripts/demo_table.py"


@pytest.mark.parametrize("target", ["demo", "test", "check", "gpu-check"])
def test_every_target_sets_up_first(tree: Path, target: str) -> None:
    (tree / ".venv" / "ready").unlink()
    commands = planned(tree, target)
    assert "torch==" in commands[0]
    assert "-e '.[dev]'" in commands[1]


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.sub(r"[-_.]+", "-", re.split(r"[<>=]", need)[0]).lower() for need in wanted} <= names
    assert f"torch=={pins['torch']} " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not any("+" in version for version in pins.values())


# --- the loops -------------------------------------------------------------------------------------------

LOOPS = sorted(path.parent.name for path in (ROOT / "recipes" / "loops").glob("*/Makefile"))


def loop_plan(tree: Path, name: str, **variables: object) -> list[str]:
    """The commands of a loop that make would run."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    given = [f"{key}={value}" for key, value in variables.items()]
    done = subprocess.run(
        ["make", "-n", "-f", f"recipes/loops/{name}/Makefile", f"loops/{name}/table.md", *given],
        cwd=tree, env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if line.startswith(".venv/bin/")]


def finish(tree: Path, name: str, plan: list[str]) -> list[str]:
    """The run directories of a plan, as if each had been made."""
    made = [line.partition(" -o ")[2].split()[0] for line in plan if " -o " in line]
    for number, folder in enumerate(made):
        touch(tree / folder / "DONE", 5000 + number)
    touch(tree / "loops" / name / "table.md", 9000)
    return made


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_goes_on_where_it_was_stopped(tree: Path, name: str) -> None:
    plan = loop_plan(tree, name)
    made = finish(tree, name, plan)
    assert len(made) == len(set(made)) == len(plan) - 1
    assert "loop_table.py" in plan[-1]
    assert loop_plan(tree, name) == []
    last = max(made, key=lambda folder: (tree / folder / "DONE").stat().st_mtime)
    (tree / last / "DONE").unlink()
    again = loop_plan(tree, name)
    assert 1 <= len(again) - 1 <= 3
    assert any(f" -o {last}" in line for line in again)


@pytest.mark.parametrize("name", LOOPS)
def test_an_iteration_starts_from_the_model_of_the_one_before(tree: Path, name: str) -> None:
    plan = loop_plan(tree, name, ITERATIONS=2)
    trained = [line for line in plan if line.split()[1] in ("sft", "dpo", "ppo") and "/2/" in line.partition(" -o ")[2]]
    assert trained, "the second iteration trains a model"
    assert any(f"model=loops/{name}/1/" in line for line in plan if "/2/" in line.partition(" -o ")[2])
    for line in plan[:-1]:
        assert (tree / line.split()[2]).is_file(), "its recipe is there"


@pytest.mark.parametrize("name", LOOPS)
def test_the_recipes_of_a_loop_are_read(name: str) -> None:
    from rlhf_cli.recipe.reader import read_recipe

    folder = ROOT / "recipes" / "loops"
    for path in [*(folder / name).glob("*.yaml"), *(folder / "common").glob("*.yaml")]:
        assert read_recipe(path, [], None).stage
