"""`rlhf check` and the first steps of a project: what is found before a model is read, as the command line says it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_cli.cli import init, plan
from rlhf_cli.errors import counted
from rlhf_cli.runs import files
from tests.conftest import Outcome

CLI = Callable[..., Outcome]
CHAT = {"messages": [{"role": "user", "content": "tell of red"}, {"role": "assistant", "content": "good"}]}
ELSEWHERE = "(choose another output_dir, where you may write)"


@pytest.fixture
def bare(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model without a chat template, in an empty working directory with a row of chat and one of text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "bare")
    Path("bare/chat_template.jinja").unlink()
    Path("chat.jsonl").write_text(json.dumps(CHAT) + "\n")
    Path("text.jsonl").write_text(json.dumps({"text": "tell of red"}) + "\n")
    return Path("bare")


def write(name: str, stage: str, model: str, data: dict[str, Any], **more: Any) -> str:
    content = {"stage": stage, "model": model, "data": data, "output_dir": f"runs/{name}"} | more
    if stage in ("sft", "dpo", "ppo"):
        content["training"] = {"learning_rate": 1e-3}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"


def test_a_template_that_is_missing_is_found_and_can_be_copied(cli: CLI, bare: Path) -> None:
    assert cli("init", "project", "--model", bare, "--quantization", "none").code == 0
    template = Path("project/recipes/chat.jinja")
    recipe = yaml.safe_load(Path("project/recipes/sft.yaml").read_text())
    assert recipe["model"]["chat_template"] == "recipes/chat.jinja"
    sft = write("sft", "sft", "bare", {"train": "chat.jsonl", "max_length": 64})
    for command in ("check", "sft"):
        outcome = cli(command, sft)
        assert (outcome.code, len(outcome.errors)) == (3, 1)
        assert "chat.jsonl:1: the tokenizer has no chat template" in outcome.err
        assert "`rlhf init` writes a template to copy, recipes/chat.jinja" in outcome.err
    assert cli("check", sft, "--set", f"model.chat_template={template}").code == 0
    assert cli("check", sft, "--set", "data.train=text.jsonl").code == 0
    assert cli("sft", sft, "--set", f"model.chat_template={template}", "--max-steps", "1", "-q").code == 0
    again = write("again", "sft", "runs/sft", {"train": "chat.jsonl", "max_length": 64})
    assert cli("check", again).code == 0  # a run has its template with it


def test_the_template_of_the_pages_is_the_one_that_is_written() -> None:
    root = Path(__file__).parent.parent
    block = (root / "docs/data.md").read_text().split("```jinja\n")[1].split("```")[0]
    assert block == (root / "rlhf_cli/cli/starter/chat.jinja").read_text()


def test_lengths_beyond_the_context_are_found(cli: CLI, bare: Path) -> None:
    for stage, data in (("sft", {"train": "text.jsonl"}), ("sample", {"prompts": "p.jsonl"})):
        Path("p.jsonl").write_text('{"prompt": "q "}\n')
        recipe = write(stage, stage, "bare", data | {"max_length": 129}, **(
            {"rollout": {"max_new_tokens": 8}} if stage == "sample" else {}))  # fmt: skip
        outcome = cli("check", recipe)
        assert (outcome.code, outcome.errors) == (2, [
            f"error: {recipe}: data.max_length: 129 tokens are asked of a model with a context of 128 (lower it to 128 "
            "or less)"])  # fmt: skip
        assert cli("check", recipe, "--set", "data.max_length=128").code == 0


def test_a_project_fits_the_context_of_its_model(cli: CLI, bare: Path) -> None:
    assert cli("init", "small", "--model", bare, "--quantization", "none").code == 0
    recipes = {name: yaml.safe_load(Path(f"small/recipes/{name}.yaml").read_text()) for name in ("sft", "dpo", "ppo")}
    assert [r["data"]["max_length"] for r in recipes.values()] == [128] * 3
    assert recipes["ppo"]["rollout"]["max_new_tokens"] == 64
    assert cli("init", "large", "--model", "org/model").code == 0
    recipe = yaml.safe_load(Path("large/recipes/ppo.yaml").read_text())
    assert (recipe["data"]["max_length"], recipe["rollout"]["max_new_tokens"]) == (init.LENGTH, init.ANSWER)
    assert "chat_template" not in Path("large/recipes/sft.yaml").read_text()
    outcome = cli("init", "none", "--model", "large")  # a folder without a model
    assert (outcome.code, len(outcome.errors)) == (4, 1)


@pytest.fixture
def chain(bare: Path) -> list[str]:
    """Recipes of which each needs the runs of those before."""
    Path("pairs.jsonl").write_text('{"prompt": "tell of red ", "chosen": "good", "rejected": "bad"}\n')
    Path("p.jsonl").write_text('{"prompt": "tell of red "}\n')
    return [
        write("sft", "sft", "bare", {"train": "text.jsonl", "max_length": 64}),
        write("dpo", "dpo", "./runs/sft/", {"train": "pairs.jsonl", "max_length": 64}, objective={"name": "dpo"}),
        write("sample", "sample", "runs/dpo", {"prompts": "p.jsonl", "max_length": 64}, rollout={"max_new_tokens": 8}),
        write("select", "select", "x", {"completions": "runs/sample"}, selection={"name": "best"}),
    ]


def test_a_chain_is_checked_before_its_first_run(cli: CLI, chain: list[str]) -> None:
    text = Path("select.yaml").read_text()
    Path("select.yaml").write_text(text.replace("model: x\n", ""))
    outcome = cli("check", *chain)
    assert (outcome.code, outcome.errors) == (0, [])
    lines = outcome.err.splitlines()
    assert lines[0].endswith("; new run")
    assert "dpo.yaml: fit for rlhf dpo; ./runs/sft/ is made by sft.yaml; train pairs.jsonl" in lines[1]
    assert [line.rpartition("; ")[2] for line in lines[1:]] == ["to be run after that"] * 3
    assert "runs/sample is made by sample.yaml" in lines[3]
    assert not Path("runs").exists()
    alone = cli("check", *chain[1:])
    assert alone.code == 4
    assert not any(line.startswith("dpo.yaml: fit") for line in alone.err.splitlines())


def test_the_rest_of_a_chain_is_checked_all_the_same(cli: CLI, chain: list[str]) -> None:
    Path("pairs.jsonl").write_text('{"prompt": "tell of red ", "chosen": "bad", "rejected": "bad"}\n')
    Path("file").write_text("x")
    outcome = cli("check", *chain[:3], "--set", "seed=1")
    assert (outcome.code, len(outcome.errors)) == (3, 2)
    assert "dpo.yaml: pairs.jsonl:1: chosen equals rejected" in outcome.err
    sample = yaml.safe_load(Path("sample.yaml").read_text())
    sample["output_dir"] = "file/below"
    Path("sample.yaml").write_text(yaml.safe_dump(sample))
    Path("dpo.yaml").write_text(Path("dpo.yaml").read_text().replace("pairs.jsonl", "none.jsonl"))
    outcome = cli("check", *chain[:3])
    assert (outcome.code, len(outcome.errors)) == (3, 2)
    assert "sample.yaml: output_dir file/below: cannot be created: file is not a folder" in outcome.err
    assert "dpo.yaml: none.jsonl: file not found" in outcome.err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_place_where_nothing_can_be_written(cli: CLI, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft = write("sft", "sft", "bare", {"train": "none.jsonl", "max_length": 64})
    Path("file").write_text("x")
    before = sorted(os.listdir())
    cases = {
        "/proc/x": "cannot write into /proc: nothing can be created there", "file": "is a file",
        "file/x": "cannot be created: file is not a folder",
    }  # fmt: skip
    for command in ("check", "sft"):
        for place, reason in cases.items():
            outcome = cli(command, sft, "--set", f"output_dir={place}")
            (line,) = [line for line in outcome.errors if "output_dir" in line]
            assert line.endswith(f"output_dir {place}: {reason} {ELSEWHERE}")
            if command == "sft":
                assert (outcome.code, len(outcome.errors)) == (2, 1)  # said before anything else is read
    assert sorted(os.listdir()) == before
    monkeypatch.setattr(files, "_refused", lambda place: "Read-only file system")
    outcome = cli("sft", sft, "-o", "new")
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "Read-only file system" in outcome.err


def test_two_makers_and_a_circle_are_refused(cli: CLI, chain: list[str]) -> None:
    Path("select.yaml").write_text(Path("select.yaml").read_text().replace("model: x\n", ""))
    twice = write("twice", "sft", "bare", {"train": "text.jsonl", "max_length": 64}, output_dir="runs/./sft")
    outcome = cli("check", chain[0], twice)
    assert (outcome.code, outcome.err.splitlines()) == (
        2,
        ["error: twice.yaml: sft.yaml makes it too: output_dir runs/./sft (give each an output_dir of its own)"],
    )
    assert cli("check", chain[0], f"./{chain[0]}").code == 0  # one recipe by two names
    back = write("sft", "sft", "runs/sample", {"train": "text.jsonl", "max_length": 64})
    outcome = cli("check", *chain[1:], back)
    circle = "dpo.yaml, which reads the run of sft.yaml, which reads the run of sample.yaml, which reads the run of dpo"
    assert (outcome.code, outcome.errors) == (
        2, [f"error: a circle of recipes: {circle}.yaml (let one of them start from something else)"],
    )  # fmt: skip
    assert outcome.err.splitlines()[0].startswith("select.yaml: fit for rlhf select; runs/sample is made by sample")


def test_a_run_that_is_not_there_is_named_with_its_recipe(cli: CLI, chain: list[str]) -> None:
    line = "error: dpo.yaml: ./runs/sft/: no such folder (made by sft.yaml: run that first, or check both together)"
    outcome = cli("check", "dpo.yaml")
    assert (outcome.code, outcome.errors) == (4, [line])
    Path("pairs.jsonl").write_text('{"prompt": "tell of red ", "chosen": "bad", "rejected": "bad"}\n')
    outcome = cli("check", "dpo.yaml")
    assert (outcome.code, outcome.errors[0]) == (4, line)
    assert "error: dpo.yaml: pairs.jsonl:1: chosen equals rejected" in outcome.err
    Path("sft.yaml").rename("sft.txt")
    assert "made by" not in cli("check", "dpo.yaml").err


def test_what_a_recipe_names_besides_is_looked_at(cli: CLI, bare: Path) -> None:
    Path("p.jsonl").write_text('{"prompt": "q ", "gold": 4}\n')
    Path("none.txt").write_text("# nothing\n")
    common: dict[str, Any] = {"rollout": {"max_new_tokens": 8}}
    evaluation = write("e", "eval", "bare", {"prompts": "p.jsonl", "max_length": 64}, **common)
    rewards = "rewards=[{rule: {name: words, plus: [a]}}, {rule: {name: numeric_answer}}]"
    judged = ("against=nope/x", "judge={model: nope/x, principles: PLACE}")
    cases = {
        (rewards,): (3, "p.jsonl:1: no column 'answer' for the rule numeric_answer; columns besides the prompt: gold "
                        "(name it in rewards.1.rule.column)"),
        tuple(w.replace("PLACE", "nope.txt") for w in judged): (
            2, "judge.principles nope.txt: cannot be read: No such file or directory (a text file, a principle a line)"
        ),
        tuple(w.replace("PLACE", "none.txt") for w in judged): (
            2, "judge.principles none.txt: holds no principle (write one a line)"),
    }  # fmt: skip
    for changes, (code, message) in cases.items():
        outcome = cli("check", evaluation, *changes)
        assert (outcome.code, outcome.errors) == (code, [f"error: {evaluation}: {message}"])
    outcome = cli("check", evaluation, "against=nope/x", rewards.replace("answer}", "answer, column: gold}"))
    assert (outcome.code, outcome.err.count("nope/x: taken as a hub id, not looked up")) == (0, 1)
    assert "bare: taken" not in outcome.err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_other_places_where_nothing_can_be_written(cli: CLI, bare: Path) -> None:
    sft = write("sft", "sft", "bare", {"train": "none.jsonl", "max_length": 64})
    Path("folder.html").mkdir()
    there = "cannot write into /proc: nothing can be created there"
    cases: dict[tuple[Any, ...], str] = {
        ("init", "/proc/zz"): f"/proc/zz: {there} (choose another folder)",
        ("merge", "none", "-o", "/proc/x"): f"--output-dir /proc/x: {there} (choose another folder)",
        ("data", sft, "--html", "/nope/x.html"): "--html /nope/x.html: there is no folder /nope (name another file)",
        ("data", sft, "--html", "/proc/x.html"): f"--html /proc/x.html: {there} (name another file)",
        (
            "data",
            sft,
            "--html",
            "folder.html",
        ): "--html folder.html: is a folder (name a file: --html folder.html/data.html)",
        ("data", sft, "--html", "new/"): "--html new/: is a folder (name a file: --html new/data.html)",
        ("data", sft, "--html", "new"): "--html new: does not end in .html (name a page: --html new.html)",
        ("data", sft, "--html", ""): "--html '': is a folder (name a file: --html data.html)",
    }
    for arguments, message in cases.items():
        outcome = cli(*arguments)
        assert (outcome.code, outcome.errors) == (2, [f"error: {message}"])


def test_pairs_are_no_demonstrations(cli: CLI, bare: Path) -> None:
    asked, said = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    pair = {"conversations": [asked], "chosen": said, "rejected": {"from": "gpt", "value": "b"}}
    sft = write("sft", "sft", "bare", {"train": "pairs.jsonl", "max_length": 64})
    advice = ("their columns are those of pairs, format sharegpt_preference: give them to rlhf dpo or rlhf train-rm, "
              "or map other columns with `columns:`")  # fmt: skip
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    outcome = cli("check", sft)
    assert (outcome.code, outcome.errors[-1]) == (3, f"error: {sft}: 1 bad row in all ({advice})")
    Path("pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (pair, {"conversations": [asked, said]})))
    outcome = cli("check", sft)
    drop = "correct them, or set data.on_bad_row: drop to leave them out"
    assert (outcome.code, outcome.errors[-1]) == (3, f"error: {sft}: 1 bad row in all ({drop}; {advice})")
    Path("pairs.jsonl").write_text(json.dumps({"conversations": [asked]}) + "\n")
    outcome = cli("check", sft)
    assert outcome.errors[-1] == f"error: {sft}: 1 bad row in all (correct them: the data hold no others)"


def test_numbers_are_said_as_people_say_them() -> None:
    assert [counted(number, "step") for number in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    estimate, target = SimpleNamespace(peak=2**30), SimpleNamespace(kind="cpu", world=3, beside=None, room=2**31)
    found: Any = SimpleNamespace(estimate=estimate, target=target)
    assert plan._fit(found, [], None) == ["fits: 1.00 of 2.00 GiB of 1/3 of this machine's free memory, 1.00 to spare"]
    estimate.peak = 2**32
    change: Any = SimpleNamespace(fits=True, peak=2**30, sets=("seed=1", "lora={r: 1}"), words="same result")
    shown = "  1.00 GiB with --set seed=1 --set 'lora={r: 1}'   (same result)"
    assert plan._fit(found, [change], None) == ["with changes that make it fit:", shown]
    change.fits = False
    assert plan._fit(found, [change], None)[0] == "nothing that is known here makes it fit; the least:"
    assert str(plan._unfit(found, "r.yaml", [])).startswith(
        "r.yaml: does not fit: 4.00 GiB, 2.00 more than the 2.00 of"
    )


def test_a_list_that_is_too_long(cli: CLI, bare: Path) -> None:
    recipe = write("e", "eval", "bare", {"prompts": "p.jsonl", "max_length": 64}, rollout={"max_new_tokens": 8},
                   against="nope/x", judge={"model": "nope/x", "labels": ["A", "B", "C"]})  # fmt: skip
    outcome = cli("check", recipe)
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "judge.labels: the list has 3 entries (give 2 at most)" in outcome.err
