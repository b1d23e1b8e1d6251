"""Help, schema and every recipe error answer quickly and never import torch and its like."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlhf_cli"
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "bitsandbytes", "accelerate", "pandas", "pyarrow")
CHILD = """
import sys
from rlhf_cli.cli.app import run_command_line
code = run_command_line(sys.argv[1:])
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, loaded
sys.exit(code)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own that fails when something heavy was imported."""
    program = CHILD.format(heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A recipe with a wrong key."""
    file = tmp_path / "broken.yaml"
    file.write_text("stage: dpo\nlr: 1\n")
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "Usage: rlhf"),
        ([], "Usage: rlhf"),
        (["dpo", "--help"], "Usage: rlhf dpo"),
        (["ppo", "-h"], "Usage: rlhf ppo"),
        (["--version"], "rlhf "),
        (["schema"], '"$schema"'),
        (["schema", "ppo"], '"$schema"'),
        (["list", "--json"], '"objectives"'),
    ],
)
def test_what_goes_to_stdout_is_light(arguments: list[str], shown: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_recipe_errors_are_light(broken: str) -> None:
    for command in (["dpo", broken], ["check", broken], ["dpo", broken, "seed=x"], ["ppo", broken]):
        done = run(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {broken}:1:")
        assert "Traceback" not in done.stderr


def test_usage_errors_are_light(broken: str) -> None:
    for command in (["dpo"], ["dqo", broken], ["dpo", broken, "--foo"], ["schema", "x"], ["dpo", "nope.yaml"]):
        done = run(*command)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_help_takes_less_than_a_second_of_work() -> None:
    program = "import time; import rlhf_cli.cli.app as a; a.run_command_line(['--help']); print(time.process_time())"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1.0, f"{time.perf_counter() - started:.1f} s on the wall"


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "rlhf_cli", "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout == run("--help").stdout


@pytest.mark.parametrize("package", ["recipe", "runs", "cli", "report", "data.prepare"])
def test_modules_below_the_torch_line(package: str) -> None:
    folder = ROOT / package
    names = [f"{package}.{path.stem}" for path in folder.glob("[a-z]*.py")] if folder.is_dir() else [package]
    imports = "; ".join(f"import rlhf_cli.{name}" for name in names)
    program = f"{imports}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
