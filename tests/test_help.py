"""What a person at a shell meets: help with examples, completion, and answers that name the next thing to type."""

from __future__ import annotations

import os
import shlex
from functools import partial
from pathlib import Path

import pytest
import typer

from rlhf_cli.cli.app import app, main, run_command_line
from rlhf_cli.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == {"", *COMMANDS}
    assert all(2 <= len(found) <= 4 for found in EXAMPLES.values())


def note(seen: list[str], command: str, /, **_: object) -> None:
    seen.append(command)


@pytest.mark.parametrize("line", [line for found in EXAMPLES.values() for line in found])
def test_an_example_is_a_command_line(line: str) -> None:
    words = shlex.split(line.partition(" | ")[2] or line)
    redirect = next((i for i, word in enumerate(words) if word.endswith(">")), len(words))
    assert words[0] == "rlhf"
    seen: list[str] = []
    command = typer.main.get_command(app)
    for name, one in command.commands.items():  # type: ignore[attr-defined]
        one.callback = partial(note, seen, name)
    arguments = words[1:redirect]
    with command.make_context("rlhf", list(arguments), obj=tuple(arguments)) as context:
        command.invoke(context)
    assert seen == [words[1]]
    for word in words:
        if word.startswith("recipes/") and word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_help_ends_in_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line([*filter(None, [name]), "--help"]) == 0
    said = capsys.readouterr().out
    tail = said.partition("\nExamples:\n")[2]
    assert [line.strip() for line in tail.strip().splitlines()] == list(EXAMPLES[name])


def test_options_and_commands_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    run_command_line(["dpo", "--help"])
    said = capsys.readouterr().out
    places = [said.index(f"\n{title}:\n") for title in ("Arguments", "Options", "What it does", "What it shows")]
    assert places == sorted(places)
    assert places[1] < said.index("--max-steps") < places[2] < said.index("--resume") < places[3]
    assert said.index("-h, --help") > said.index("--debug") > places[3]
    run_command_line(["--help"])
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in said, name


# --- completion ------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes and runs."""
    for path, stage in (("a.yaml", "dpo"), ("more/b.yaml", "dpo"), ("more/c.yaml", "sft"), (".hidden/d.yaml", "dpo")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"# a recipe\nstage: {stage}\noutput_dir: runs/{stage}\n")
    (tmp_path / "more" / "mkdocs.yml").write_text("site_name: x\n")
    for path, made in (("runs/dpo", True), ("runs/sft", False)):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "run.json").write_text("{}")
        if made:
            (tmp_path / path / "final").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setenv("_RLHF_COMPLETE", "complete_bash")
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rlhf tr", ["train-rm"]),
        ("rlhf dpo ", ["a.yaml", "more/b.yaml"]),
        ("rlhf sft mo", ["more/c.yaml"]),
        ("rlhf check more/", ["more/b.yaml", "more/c.yaml"]),
        ("rlhf report ", ["runs/dpo", "runs/sft"]),
        ("rlhf report runs/s", ["runs/sft"]),
        ("rlhf chat ", ["runs/dpo"]),
        ("rlhf merge runs/", ["runs/dpo"]),
        ("rlhf explain odp", ["odpo"]),
        ("rlhf schema si", ["simpo"]),
        ("rlhf dpo a.yaml --resume ", ["auto", "never"]),
        ("rlhf dpo a.yaml --report-to w", ["wandb"]),
        ("rlhf report x --x t", ["tokens", "time"]),
        ("rlhf report nothing/", []),
    ],
)
def test_the_shell_is_offered(
    place: Path, line: str, offered: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completed(line, capsys, monkeypatch) == offered


@pytest.mark.parametrize(("shell", "words"), [("bash", "complete -o default"), ("zsh", "#compdef rlhf"),
                                              ("fish", "complete --command rlhf")])  # fmt: skip
def test_each_shell_has_its_script(
    shell: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, f"/bin/{shell}"))
    with pytest.raises(SystemExit) as left:
        run_command_line(["--show-completion"])
    assert left.value.code == 0
    assert words in capsys.readouterr().out


def test_an_unknown_shell_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import shellingham

    def fail(*_: object) -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr("shellingham.detect_shell", fail)
    assert run_command_line(["--install-completion"]) == 2
    assert capsys.readouterr().err == (
        "error: --install-completion: which shell this is cannot be told (type it in bash, zsh or fish)\n"
    )


# --- wrong things ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("dpoo a.yaml", 2, "Did you mean 'dpo'?"),
        ("train a.yaml", 2, "try: rlhf dpo a.yaml"),
        ("a.yaml", 2, "try: rlhf dpo a.yaml"),
        ("dpo a.yaml --sed 3", 2, "--seed"),
        ("dpo --lerning-rate 3", 2, "KEY.PATH=VALUE"),
        ("dpo", 2, "rlhf dpo --help"),
        ("dpo more", 2, "name the .yaml file"),
        ("dpo b.yaml", 2, "a.yaml"),
        ("dpo more/d.yaml", 2, "recipes in that folder: b.yaml, c.yaml"),
        ("dpo more/c.yaml", 2, "this is a recipe for `rlhf sft`"),
        ("report a.yaml", 2, "name its run: runs/dpo"),
        ("report runs", 2, "rlhf report runs/dpo runs/sft"),
        ("report nothing", 2, "no such run"),
        ("chat a.yaml", 4, "the run of this recipe: runs/dpo"),
        ("merge a.yaml -o out", 4, "the run of this recipe: runs/dpo"),
        ("merge runs/sft", 2, "Missing option '--output-dir'"),
        ("chat runs/sft", 4, "finish it first"),
        ("explain odp", 2, "did you mean 'odpo'?"),
        ("init more", 2, "choose another folder"),
    ],
)
def test_a_wrong_thing_is_answered_with_the_next_one(
    place: Path, line: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(place))
    assert run_command_line(line.split()) == code
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert said in errors[0]
    assert sorted(os.listdir(place)) == before
