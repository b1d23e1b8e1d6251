"""The command line around the stages: exit codes, one line a problem, stdout only for data, the displays."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from rlhf_cli.catalog import Stage
from rlhf_cli.cli import tools, view
from rlhf_cli.cli.app import run_command_line
from rlhf_cli.errors import DataError, DivergedError, Interrupted, ModelError, Problem
from rlhf_cli.runs.display import Plain, step_line
from rlhf_cli.runs.options import Options

RECIPE = """\
stage: dpo
model: base
data: {train: pairs.jsonl}
objective: {name: dpo}
training: {learning_rate: 5e-6}
output_dir: run
"""


@dataclass
class World:
    """What the stand-ins saw: the stage's arguments, and what it shall do."""

    status: str = "fresh"
    error: BaseException | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    closed: int = 0
    path: Path = Path("run")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A folder with a recipe; the run directory and the stage are stand-ins."""
    import rlhf_cli.runs.directory as directory

    seen = World()
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)

    class FakeRun:
        status = property(lambda self: seen.status)
        path = seen.path

        @classmethod
        def open(cls, recipe: Any, command: str, resume: str) -> FakeRun:
            return cls()

        def close(self) -> None:
            seen.closed += 1

    def stage(*arguments: Any) -> None:
        seen.calls.append(arguments)
        if seen.error:
            raise seen.error

    monkeypatch.setattr(directory, "Run", FakeRun)
    monkeypatch.setattr(Stage, "load", lambda self: stage)
    return seen


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit code and the lines of stderr; stdout must stay empty."""
    code = run_command_line(list(arguments))
    caught = capsys.readouterr()
    assert caught.out == ""
    return code, caught.err.splitlines()


def test_a_stage_gets_recipe_run_display_and_options(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--set", "seed=1", "--seed", "7", "--max-steps", "9", "-o", "1e5", "--report-to", "wandb", "--dry-run"]
    assert run(capsys, "dpo", "r.yaml", "lora.r=4", *given, "training.batch_size=2", "--resume=never") == (0, [])
    recipe, opened, display, options = world.calls[0]
    assert recipe.lora.r == 4
    assert (recipe.seed, recipe.training.max_steps, recipe.output_dir) == (7, 9, "1e5")
    assert (recipe.logging.report_to, recipe.training.batch_size) == (["wandb"], 2)
    assert options == Options("never", True, False)
    assert isinstance(display, Plain)
    assert opened.path == Path("run")
    assert world.closed == 1


def test_up_to_date(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.status = "done"
    assert run(capsys, "dpo", "r.yaml") == (0, ["run: up to date"])
    assert run(capsys, "dpo", "r.yaml", "--quiet") == (0, [])
    assert world.calls == []
    assert world.closed == 2


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (DataError([Problem("a [bold] row", "p.jsonl:7", "fix it"), Problem("b")]), 3,
         ["error: p.jsonl:7: a [bold] row (fix it)", "error: b"]),
        (ModelError("no end token"), 4, ["error: no end token"]),
        (DivergedError("loss is nan"), 5, ["error: loss is nan"]),
        (Interrupted(15, "stopped at step 3"), 143, ["error: stopped at step 3"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (MemoryError("cannot"), 4, ["error: out of memory: cannot"]),
        (OSError(errno.ENOSPC, "No space left"), 4, ["error: the disk is full: [Errno 28] No space left"]),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 4,
         ["error: no temporary file can be written: No usable temporary directory found in ['/tmp'] (free some space"]),
        (KeyError("x\ny"), 1, ["error: KeyError: 'x\\ny'; this is a bug of rlhf"]),
    ],
)  # fmt: skip
def test_errors_of_a_stage(
    world: World, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, lines: list[str]
) -> None:
    world.error = error
    found, said = run(capsys, "dpo", "r.yaml")
    assert found == code
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True))
    assert world.closed == 1


def test_out_of_memory_on_the_device(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    world.error = torch.OutOfMemoryError("CUDA out of memory")
    code, lines = run(capsys, "dpo", "r.yaml")
    assert code == 4
    assert lines[0].startswith("error: out of memory: CUDA out of memory (lower data.max_length")


def test_a_bug_leaves_its_traceback_in_the_log_of_the_run(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.error = ZeroDivisionError("a bug")
    assert run(capsys, "dpo", "r.yaml")[0] == 1
    assert not Path("run").exists()
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    _, lines = run(capsys, "dpo", "r.yaml")
    assert lines == [
        "error: ZeroDivisionError: a bug; this is a bug of rlhf (run again with --debug for the traceback)"
    ]
    assert "Traceback" in Path("run/run.log").read_text()
    _, lines = run(capsys, "dpo", "r.yaml", "--debug")
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: ZeroDivisionError")


def test_nothing_happens_after_a_wrong_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["dpo", "r.yaml", "-q", "-v"], ["dpo", "r.yaml", "seed"], ["ppo", "r.yaml"], ["dpo", "x.yaml"]):
        code, lines = run(capsys, *arguments)
        assert (code, len(lines)) == (2, 1)
        assert lines[0].startswith("error: ")
    assert run(capsys, "ppo", "r.yaml")[1] == [
        "error: r.yaml:1:8 stage: this is a recipe for `rlhf dpo`, not for `rlhf ppo`"
    ]
    assert world.calls == []
    assert sorted(p.name for p in Path().iterdir()) == ["r.yaml"]


def test_check(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf_cli.data.prepare as prepare

    monkeypatch.setattr(prepare, "check_data", lambda recipe, made: ["12 rows kept", "3 dropped"])
    fit = "r.yaml: fit for rlhf dpo; base: taken as a hub id, not looked up; 12 rows kept"
    assert run(capsys, "check", "r.yaml") == (0, [f"{fit}; 3 dropped; new run"])
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "check_data", lambda *_: ["12 rows kept", "warning: few; odd", "warning: old", "done"])
        warned = [f"{fit}; done; new run", "r.yaml: warning: few; odd",
                  "r.yaml: warning: old"]  # fmt: skip
        assert run(capsys, "check", "r.yaml") == (0, warned)
    Path("bad.yaml").write_text("stage: dpo\nlr: 1\n")
    code, lines = run(capsys, "check", "bad.yaml", "r.yaml", "none.yaml")
    assert code == 2
    assert lines[0] == f"{fit}; 3 dropped; new run"
    assert sum(line.startswith("error: bad.yaml:") for line in lines) == 6
    assert lines[-1].startswith("error: none.yaml: no such recipe")

    code, lines = run(capsys, "check", "r.yaml", "seed=x")
    assert (code, len(lines)) == (2, 1)
    assert "seed" in lines[0]
    assert run(capsys, "check", "seed=1") == (2, ["error: rlhf check: no recipe is named (name it before the changes)"])

    def broken(recipe: Any, made: Any) -> list[str]:
        raise DataError("cut line", "p.jsonl:7777")

    monkeypatch.setattr(prepare, "check_data", broken)
    code, lines = run(capsys, "check", "bad.yaml", "r.yaml")
    assert code == 3
    assert lines[-1] == "error: r.yaml: p.jsonl:7777: cut line"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("kto", "kto is set in a recipe: objective.name: kto, for rlhf dpo"),
        ("kto r.yaml", "kto is set in a recipe: objective.name: kto, for rlhf dpo r.yaml"),
        ("grpo r.yaml", "grpo is set in a recipe: ppo.advantage.name: grpo, for rlhf ppo"),
        ("nothing r.yaml", "try: rlhf dpo r.yaml"),
        ("nothing", "rlhf --help shows the usage"),
    ],
)
def test_a_method_that_is_no_command(world: World, capsys: pytest.CaptureFixture[str], words: str, hint: str) -> None:
    code, lines = run(capsys, *words.split())
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"error: rlhf: No such command '{words.split(maxsplit=1)[0]}'.")
    assert lines[0].endswith(f"({hint})")


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "env")
    assert code == 0
    assert any(line.startswith("torch ") for line in lines)
    assert any("processors" in line for line in lines)


def test_a_reader_of_stdout_who_leaves_is_no_error() -> None:
    program = [sys.executable, "-m", "rlhf_cli", "schema"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- displays --------------------------------------------------------------------------------------------

METRICS = {"tokens_per_second": 1234.5, "loss": 0.69314, "learning_rate": 1e-5, "rewards/accuracies": 0.5, "other": 1.0}
LINE = "step 10/200  loss 0.6931  lr 1.0e-05  accuracy 0.500  tokens/s 1234"


def test_a_line_has_a_fixed_order() -> None:
    assert step_line(10, 200, METRICS) == LINE
    assert step_line(1, 0, {"loss": float("nan")}) == "step 1  loss nan"


@pytest.mark.parametrize(
    ("quiet", "verbose", "shown"),
    [
        (False, False, ["a [note]", "warning: b", LINE]),
        (True, False, ["warning: b"]),
        (False, True, ["a [note]", "warning: b", LINE, LINE.replace("10/", "11/")]),
    ],
)
def test_plain_lines(quiet: bool, verbose: bool, shown: list[str]) -> None:
    stream = io.StringIO()
    display = Plain(quiet, verbose, stream)
    display.note("a [note]")
    display.warn("b")
    display.start(200, 0)
    display.step(10, METRICS, True)
    display.step(11, METRICS, False)
    display.stop()
    display.stop()
    assert stream.getvalue().splitlines() == shown


def test_the_log_has_every_shown_line_with_its_time_even_when_quiet(tmp_path: Path) -> None:
    display = Plain(quiet=True, stream=io.StringIO())
    display.note("before")
    display.attach(tmp_path / "run.log")
    display.start(200, 5)
    display.step(10, METRICS, True)
    display.step(11, METRICS, False)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["before", "going on after step 5 of 200", LINE]
    assert all(line[4] == "-" and line[13] == ":" for line in lines)


def test_a_terminal_that_went_away_stops_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    stream.close()
    display = Plain(stream=stream)
    display.attach(tmp_path / "missing" / "run.log")
    display.note("a")
    display.step(1, METRICS, True)


def test_the_bar_shows_the_numbers_that_matter(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = view.View(console=Console(file=stream, force_terminal=True, width=120))
    display.attach(tmp_path / "run.log")
    display.note("a [bold]note[/bold] :smile:")
    display.start(200, 0)
    display.step(10, METRICS, True)
    display.step(11, {"loss": 0.5}, False)
    display.stop()
    display.stop()
    said = Text.from_ansi(stream.getvalue()).plain
    assert "a [bold]note[/bold] :smile:" in said
    assert "loss 0.5000   lr 1.0e-05   accuracy 0.500   1234 tokens/s" in said
    assert "step 11/200" in said
    assert [line[20:] for line in (tmp_path / "run.log").read_text().splitlines()] == [
        "a [bold]note[/bold] :smile:", LINE
    ]  # fmt: skip


def test_which_display(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(view.make_display(False, False), Plain)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "true")
    assert isinstance(view.make_display(False, False), Plain)
    monkeypatch.delenv("CI")
    assert isinstance(view.make_display(False, False), view.View)
    assert isinstance(view.make_display(True, False), Plain)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(view.make_display(False, False), Plain)


def test_problems_together_keep_the_worst_code() -> None:
    error = tools.together([DataError("a", "x"), ModelError("b", "y"), DataError("c", "x")])
    assert (type(error), [str(p) for p in error.problems]) == (ModelError, ["x: a", "y: b"])
