"""The README.md of every final/: its code runs as it stands there, and a resumed run writes the same card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rlhf_cli.data.batch import collate
from rlhf_cli.data.examples import Message
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import frozen_role
from rlhf_cli.recipe.settings.model import ModelSettings
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(), re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


def executed(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The code of a card, run: what it left behind, and what it printed."""
    found = re.search(r"```python\n(.*?)\n```", parts(folder)[1], re.DOTALL)
    assert found is not None
    left: dict[str, Any] = {}
    capsys.readouterr()
    exec(compile(found[1], "card", "exec"), left)
    return left, capsys.readouterr().out.strip()


def our_score(run: Path, question: str, answer: str, quantization: Any = "none") -> float:
    """What the run itself thinks of an answer."""
    settings = ModelSettings(name_or_path=str(run), quantization=quantization)
    text = load_text(settings, "reward")
    role = frozen_role("reward", settings, text, None)
    prompt = (Message("user", question),)
    ids, scored = np.array(text.template.prompt_ids(prompt), np.int32), text.template.completion_ids(prompt, answer)
    sample = Sample(ids, (Completion(np.array(scored[0], np.int32), np.array(scored[1])),), {}, "card")
    with torch.no_grad(), role.active():
        return float(role.score(collate([sample], packed=False))[0])


def test_a_language_model_is_asked_as_its_card_says(
    base: Path, sft_lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, library in ((base, "transformers"), (sft_lora, "peft")):
        front, body = parts(run / "final")
        assert (front["library_name"], front["pipeline_tag"]) == (library, "text-generation")
        assert "license" not in front
        left, said = executed(run / "final", capsys)
        assert left["output"].shape[1] > left["shape"]
        assert said
        assert str(run) in body
    assert re.search(rf"2\. `{base}`: `rlhf sft`.*\n3\. \*\*`{sft_lora}`\*\*", body)


def test_a_reward_model_scores_as_its_card_says(rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    front, _ = parts(rm / "final")
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-classification")
    known = our_score(rm, "Hello!", "Hi, how can I help?")
    _, said = executed(rm / "final", capsys)
    assert float(said) == pytest.approx(known, abs=1e-4)
    assert quick("merge", rm, "-o", tmp_path / "merged").code == 0
    front, body = parts(tmp_path / "merged")
    assert (front["library_name"], front["tags"]) == ("transformers", ["rlhf", "merge"])
    assert f"`{rm}`: `rlhf train-rm`" in body
    _, said = executed(tmp_path / "merged", capsys)
    assert float(said) == pytest.approx(known, abs=1e-3)


def test_an_adapter_on_4_bits_is_opened_on_4_bits(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bitsandbytes.nn.modules.has_avx512bf16", lambda: False
    )  # its layout fails on layers this small
    run = train(toy("train-rm", "pairs", model={"quantization": "nf4"}))
    _, said = executed(run / "final", capsys)
    asked = (run, "Hello!", "Hi, how can I help?")
    assert float(said) == pytest.approx(our_score(*asked, "nf4"), abs=1e-4)
    assert float(said) != pytest.approx(our_score(*asked), abs=1e-3)
    merged = quick("merge", run, "-o", tmp_path / "merged")
    assert "trained on nf4 weights: --weights trained answers as the run does" in merged.err
    assert "trained on nf4" not in quick("merge", run, "-o", tmp_path / "same", "--weights", "trained").err


def test_a_process_model_judges_as_its_card_says(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"rows": 24, "training": {"max_steps": 1}, "objective": {"name": "step_labels"}}
    run = train(toy("train-rm", "steps", **more))
    assert parts(run / "final")[0]["pipeline_tag"] == "token-classification"
    left, said = executed(run / "final", capsys)
    classes = json.loads((run / "final" / "reward.json").read_text())["classes"]
    assert left["probabilities"].shape == (left["ids"].shape[1], len(classes))
    assert said.startswith("tensor([")


def test_licences_go_from_run_to_run_and_a_recipe_decides(
    toy: Toy, tmp_path: Path, base: Path, world: Path, tiny_model: Path
) -> None:
    import shutil

    start = shutil.copytree(tiny_model, tmp_path / "start")
    (start / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: [en]\n---\n")
    short = {"training": {"max_steps": 1, "num_epochs": 1}, "evaluation": {"samples": 0}}
    first = train(w.recipe("sft", start, world, "chat", tmp_path / "first", **short))
    head = json.loads((first / "run.json").read_text())
    assert (head["license"], head["base_license"], head["base_language"]) == (None, "cc-by-4.0", ["en"])
    assert set(head["data_licenses"].values()) == {None}
    second = train(w.recipe("sft", first, world, "chat", tmp_path / "second", license="mit", **short))
    front, body = parts(second / "final")
    assert (front["license"], front["language"]) == ("mit", ["en"])
    assert "Its base: `cc-by-4.0`." in body
    third = train(w.recipe("sft", second, world, "chat", tmp_path / "third", lora=w.LORA, **short))
    assert parts(third / "final")[0]["license"] == "mit"
    assert [one["name"] for one in json.loads((third / "run.json").read_text())["ancestry"]] == [
        str(first),
        str(second),
    ]
    again = quick("sft", second.with_suffix(".yaml"), "--set", "license=apache-2.0")
    assert (again.code, again.err.strip()) == (0, f"{second}: up to date")


def test_a_resumed_run_writes_the_same_card(toy: Toy, tmp_path: Path) -> None:
    more: dict[str, Any] = {"training": {"max_steps": 4}, "checkpoint": {"every": 2}, "evaluation": {"samples": 0}}
    run = train(toy("sft", "chat", rows=24, **more))
    card = (run / "final" / "README.md").read_text()
    (run / "DONE").unlink()
    for path in (run / "checkpoints" / "step-000004").iterdir():
        path.unlink()
    (run / "checkpoints" / "step-000004").rmdir()
    w.save(yaml.safe_load(run.with_suffix(".yaml").read_text()), tmp_path / "run.yaml")
    outcome = quick("sft", run.with_suffix(".yaml"))
    assert outcome.code == 0, outcome.err
    assert "going on after step 2 of 4" in outcome.err
    assert (run / "final" / "README.md").read_text() == card
