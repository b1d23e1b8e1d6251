"""README.md, CONTRIBUTING.md and docs/: their commands do something, their recipes are valid, their links lead on.

Each page's `sh` blocks are gone through in order, in a folder with the project's recipes and scripts. A command whose
models and data are there is run (training for a step or two); one that starts from a hub model is read by the command
line's own parser, and its recipe by the reader. What is neither stands in `LEFT_OUT` with its reason.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
import yaml

from rlhf_cli.catalog import STAGES
from rlhf_cli.errors import RlhfError
from rlhf_cli.recipe.reader import read_recipe
from tests.conftest import run_cli
from tests.scripts import load

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")))
}
GENERATED = ("docs/objectives.md", "docs/recipes.md")
BLOCK = re.compile(r"^```(sh|yaml)\n(.*?)^```", re.M | re.S)
LEFT_OUT = {
    "pip install": "installs",
    "export": "is of the shell around it",
    "docker": "needs docker and a GPU",
    "git": "writes a repository",
    "hf auth login": "asks for a token",
    "pytest": "is this very program; tests/test_adding.py runs the one of that page",
    "python scripts/make_docs.py": "writes pages; tests/test_adding.py runs it",
    "python scripts/bench": "takes hours",
}
"""Commands, by how they begin, that are not run here, and why."""
ADDED_BY_THE_PAGE = ("docs/adding-an-objective.md",)
"""Pages whose commands name what they themselves add; tests/test_adding.py does what they say."""
FROM_THE_HUB = ("runs/", "Qwen/", "trl-lib/")
"""What only a hub model, or a run of one, can give."""
FEW = 64
"""Rows of each file of the world."""
STEPS = ("--max-steps", "2", "--set", "evaluation.every=null", "--set", "evaluation.samples=1")


def blocks(text: str, language: str) -> list[str]:
    return [block for given, block in BLOCK.findall(text) if given == language]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page's `sh` blocks, as words."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.partition(" #")[0].split("&&"):
                if words := shlex.split(part, comments=True):
                    yield words


def unwrapped(words: list[str]) -> list[str]:
    """The `rlhf` command that several processes are started with; the starter's own options are read by its parser."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        assert (given.training_script, given.module) == ("rlhf_cli", True), words
        return ["rlhf", *given.training_script_args]
    if words[0] == "sbatch":
        assert (ROOT / words[1]).is_file(), words
        return ["rlhf", *words[2:]]
    return words


def left_out(words: list[str]) -> bool:
    return any(" ".join(words).startswith(head) for head in LEFT_OUT)


def pages_with(language: str) -> list[str]:
    return sorted(p for p in set(PAGES) - {*GENERATED, *ADDED_BY_THE_PAGE} if blocks(PAGES[p], language))


# --- rlhf ------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> Any:
    """The options of an `rlhf` command line, by its own parser; nothing is done. Fails for what it does not know."""
    from rlhf_cli.cli.app import app

    group: Any = typer.main.get_command(app)
    if "--help" in words or "--version" in words:
        return {}
    with group.make_context("rlhf", list(words)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with command.make_context(name, rest, parent=context) as inner:
            return inner.params


def recipe_of(words: list[str], parameters: dict[str, Any]) -> Any:
    """The recipe of a stage's command, with its overrides; None for other commands."""
    if words[0] not in STAGES:
        return None
    changes = [*(parameters.get("overrides") or []), *(parameters.get("set_") or parameters.get("sets") or [])]
    changes += [word for word in words[2:] if re.fullmatch(r"[\w.]+=.*", word) and word not in changes]
    return read_recipe(str(next(w for w in words[1:] if w.endswith(".yaml"))), changes, words[0])


def missing(words: list[str], recipe: Any) -> list[str]:
    """What a command reads and is not there."""
    names = [word for word in words[1:] if re.match(r"(runs|demo|recipes)/", word)]
    if recipe is not None:
        names = [source.path for source in recipe.data_read()] + [name for name, _ in recipe.models_read()]
        names += [reward.run for reward in recipe.rewards_read() if reward.run]
    outputs = {words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-o", "--output-dir", "--html")}
    return [name for name in names if name not in outputs and not Path(name).exists()]


def run(words: list[str], recipe: Any) -> None:
    short = STEPS if recipe is not None and STAGES[words[0]].trains else ()
    short = () if "--dry-run" in words or words[0] == "init" else short
    with patch("rlhf_cli.stages.common.write_report", lambda path: path / "report.html"):  # drawing takes its time
        outcome = run_cli(*words, *short)
    assert outcome.code == 0, f"rlhf {' '.join(words)}\n{outcome.err}"


# --- the pages -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes, scripts, and the runs that pages start from without making them."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("recipes", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as changed:
        changed.chdir(folder)
        changed.syspath_prepend(str(ROOT / "scripts"))
        assert load("scripts/make_tiny.py").main(["--out", "demo/world"]) == 0
        for path in Path("demo/world").glob("*.jsonl"):
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[:FEW]
            path.write_text("".join(rows), encoding="utf-8")
        for name in ("pretrain", "sft", "dpo", "sft-lora"):
            recipe = f"recipes/tiny/{name}.yaml"
            run(["sft" if name != "dpo" else "dpo", recipe], read_recipe(recipe, [], None))
    return folder


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_of_a_page(page: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    for words in commands(PAGES[page]):
        if left_out(words):
            continue
        words = unwrapped(words)
        if words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words[0] == "make":
            assert_target(words)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] == "rlhf", f"{page}: {' '.join(words)} is neither run nor read, and not in LEFT_OUT"
            recipe = recipe_of(words[1:], parse(words[1:]))
            absent = missing(words[1:], recipe)
            assert all(name.startswith(FROM_THE_HUB) for name in absent), f"{page}: {' '.join(words)} needs {absent}"
            if not absent:
                run(words[1:], recipe)


def assert_target(words: list[str]) -> None:
    """A target of a Makefile of ours."""
    folder = ROOT / words[words.index("-C") + 1] if "-C" in words else ROOT
    rules = (folder / "Makefile").read_text(encoding="utf-8")
    targets = [w for i, w in enumerate(words[1:]) if "=" not in w and not w.startswith("-") and words[i] != "-C"]
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", rules, re.M), " ".join(words)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_recipes_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `yaml` block that says its stage is a whole recipe."""
    monkeypatch.chdir(tmp_path)
    Path("constitution.txt").write_text("Choose the kinder answer.\n")
    for number, block in enumerate(blocks(PAGES[page], "yaml")):
        if re.search(r"^stage: ", block, re.M):
            Path(f"{number}.yaml").write_text(block, encoding="utf-8")
            try:
                read_recipe(f"{number}.yaml", [], None)
            except RlhfError as error:
                pytest.fail(f"{page}, block {number}: {error}")
        else:
            yaml.safe_load(block)


# --- links -----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\s-]", "", head.replace("`", "")).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (here / name).resolve() if name else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_that_are_named_are_there(page: str) -> None:
    for name in re.findall(r"`((?:recipes|scripts|docs|tests|rlhf_cli)/[^`\s:*]*)`", PAGES[page]):
        plain = name.replace("NAME", "raft")
        assert (ROOT / plain).exists() or page in ADDED_BY_THE_PAGE, f"{page}: {name}"


def test_every_page_is_in_the_menu() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = {page for part in config["nav"] for pages in part.values() for page in pages}
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_site_is_built(tmp_path: Path) -> None:
    """Without a warning: `make docs` has mkdocs."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html"))
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?://', pages), "a page fetches from elsewhere"


def test_the_page_of_keys_is_fresh() -> None:
    made = load("scripts/make_docs.py")
    assert made.KEYS.read_text(encoding="utf-8") == made.keys_page(), "run: python scripts/make_docs.py"
