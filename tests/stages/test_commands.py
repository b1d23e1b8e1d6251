"""Every command on the toy task, as a user runs it: exit code, run directory, the first step's numbers, learning."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Outcome, run_cli
from tests.stages import world as w
from tests.stages.conftest import train

BASICS = {"step", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_second"}
PAIR = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
LOGPS = {"logps/chosen", "logps/rejected"}
ROLLOUT = {
    "objective/scores", "objective/kl", "objective/entropy", "objective/rlhf_reward", "objective/non_score_reward",
    "policy/approxkl", "policy/clipfrac", "policy/entropy", "loss/policy", "loss/value", "val/clipfrac", "val/ratio",
    "val/explained_variance", "completions/mean_length", "completions/eos_rate", "kl_coef", "episode",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command on the toy task."""

    stage: str
    kind: str
    names: set[str]
    settings: dict[str, Any]
    untrained: bool = False
    """Starts from the untrained model, all weights."""


def dpo(name: str, rate: float = 1e-3, **more: Any) -> dict[str, Any]:
    return {"objective": {"name": name, **more}, "training": {"learning_rate": rate, "num_epochs": 2}}


CASES = {
    "chat": Case("sft", "chat", BASICS, {"training": {"num_epochs": 3}}, untrained=True),
    "completion": Case("sft", "completion", BASICS, {"training": {"num_epochs": 3}}, untrained=True),
    "text": Case("sft", "text", BASICS, {"training": {"num_epochs": 3}}, untrained=True),
    "rm": Case("train-rm", "pairs", BASICS | PAIR, {"objective": {"name": "bradley_terry", "centring": 0.01}}),
    "dpo": Case("dpo", "pairs", BASICS | PAIR | LOGPS, dpo("dpo")),
    "ipo": Case("dpo", "pairs", BASICS | PAIR | LOGPS, dpo("ipo")),
    "odpo": Case("dpo", "pairs", BASICS | PAIR | LOGPS, dpo("odpo", offset="log1p")),
    "kto": Case("dpo", "verdicts", BASICS | LOGPS | {"rewards/chosen", "rewards/rejected", "kl"}, dpo("kto", 3e-3)),
    "orpo": Case("orpo", "pairs", BASICS | PAIR | LOGPS, {"training": {"num_epochs": 2}}),
    "simpo": Case("simpo", "pairs", BASICS | PAIR | LOGPS, {"training": {"learning_rate": 1e-3, "num_epochs": 2}}),
    "ppo": Case("ppo", "prompts", BASICS | ROLLOUT, {
        "training": {"num_epochs": 1, "learning_rate": 1e-2}, "ppo": {"mini_batches": 2, "epochs": 2},
        "rollout": {"max_new_tokens": 6}, "evaluation": {"samples": 3},
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(
    tiny_model: Path, base: Path, rm: Path, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Outcome]]:
    """The run of a case and what its command said; each is trained once."""
    folder, done = tmp_path_factory.mktemp("commands"), dict[str, tuple[Path, Outcome]]()
    rewards = [{"run": str(rm)}, {"function": f"{world / 'reward.py'}:true_reward", "weight": 0.5}]

    def get(name: str) -> tuple[Path, Outcome]:
        if name not in done:
            case, out = CASES[name], folder / name
            more = case.settings | ({} if case.untrained else {"lora": w.LORA})
            more |= {"rewards": rewards} if case.stage == "ppo" else {}
            content = w.recipe(case.stage, tiny_model if case.untrained else base, world, case.kind, out, **more)
            done[name] = out, run_cli(case.stage, w.save(content, folder / f"{name}.yaml"))
        return done[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_the_run_directory_is_complete(ran: Callable[[str], tuple[Path, Outcome]], name: str) -> None:
    run, outcome = ran(name)
    assert (outcome.code, outcome.out, outcome.errors) == (0, "", [])
    assert {p.name for p in run.iterdir()} == {
        "recipe.yaml", "run.json", "metrics.jsonl", "data-report.json", "report.html", "run.log", "DONE", "checkpoints",
        "final", *(["samples.jsonl"] if name != "rm" else []),
    }  # fmt: skip
    case = CASES[name]
    found = w.lines(run / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(len(found)))
    for row in found[1:]:
        assert case.names <= row.keys(), case.names - row.keys()
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in row.values())
    assert any(key.startswith("eval/") for key in found[0])
    assert found[0].keys() - {"step"} <= found[-1].keys()

    head = json.loads((run / "run.json").read_text())
    assert (head["stage"], head["role"]) == (case.stage, "reward" if name == "rm" else "policy")
    assert head["lineage"]["base"]["fingerprint"].startswith("sha256:")
    assert len(head["lineage"]["template"]) == 64
    assert [len(parent["digest"]) for parent in head["lineage"]["parents"]] == ([] if case.untrained else [64])
    assert any(key.endswith(f"{case.kind}.jsonl") for key in head["inputs"])
    assert {"torch", "transformers", "peft"} <= head["versions"].keys()
    assert head["hardware"]["cpus"] >= 1
    assert head["command"].startswith("rlhf ")

    report = json.loads((run / "data-report.json").read_text())
    assert [(s["split"], s["rows"], s["kept"]) for s in report["sources"]] == [("train", 240, 240), ("eval", 48, 48)]
    done = json.loads((run / "DONE").read_text())
    assert (done["digest"], done["step"]) == (head["digest"], len(found) - 1)
    assert "<svg" in (run / "report.html").read_text()
    assert f"{len(found) - 1}/{len(found) - 1}" in (run / "run.log").read_text()


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_and_samples(ran: Callable[[str], tuple[Path, Outcome]], name: str) -> None:
    run, _ = ran(name)
    last = len(w.lines(run / "metrics.jsonl")) - 1
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    checkpoint = run / "checkpoints" / f"step-{last:06d}"
    files = {p.name: p for p in checkpoint.iterdir()}
    manifest = json.loads(files.pop("manifest.json").read_text())
    assert {f: (e["size"], e["sha256"]) for f, e in manifest["files"].items()} == {
        f: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for f, p in files.items()
    }
    assert all(f.endswith((".safetensors", ".json")) for f in files)
    if name == "rm":
        return
    samples = w.lines(run / "samples.jsonl")
    assert {row["step"] for row in samples} == {0, last}
    assert all((row["prompt"] != "") == (name != "text") and isinstance(row["completion"], str) for row in samples)
    if name == "ppo":
        assert all(isinstance(row["score"], float) for row in samples)


@pytest.mark.parametrize("name", ["chat", "rm", "dpo", "ppo"])
def test_the_resolved_recipe_runs_again(ran: Callable[[str], tuple[Path, Outcome]], tmp_path: Path, name: str) -> None:
    run, _ = ran(name)
    content = yaml.safe_load((run / "recipe.yaml").read_text()) | {"output_dir": str(tmp_path / "again")}
    again = train(content)
    assert w.metrics(again) == w.metrics(run)
    assert w.contents(again / "final") == w.contents(run / "final")


STEP_ONE = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}


@pytest.mark.parametrize("name", STEP_ONE)
def test_first_loss_where_policy_is_reference(ran: Callable[[str], tuple[Path, Outcome]], name: str) -> None:
    run, _ = ran(name)
    zero, one = w.lines(run / "metrics.jsonl")[:2]
    assert (zero["eval/loss"], one["loss"]) == pytest.approx((STEP_ONE[name],) * 2, abs=1e-5)
    assert one["rewards/chosen"] == one["rewards/rejected"] == 0
    if name == "kto":
        assert (zero["eval/kl"], one["kl"]) == (0, 0)
    else:
        assert one["rewards/accuracies"] == 0


def test_first_loss_of_odpo_is_that_of_its_offset(ran: Callable[[str], tuple[Path, Outcome]], world: Path) -> None:
    gaps = [r["chosen_score"] - r["rejected_score"] for r in w.lines(world / "pairs-eval.jsonl")]
    expected = sum(math.log1p(math.exp(math.log1p(gap))) for gap in gaps) / len(gaps)
    assert w.column(ran("odpo")[0], "eval/loss")[0] == pytest.approx(expected, abs=1e-5)


def test_first_loss_of_a_reward_model(ran: Callable[[str], tuple[Path, Outcome]], world: Path, toy: Any) -> None:
    """With margins, -log sigmoid(-margin); without, log 2."""
    margins = [r["margin"] for r in w.lines(world / "pairs-eval.jsonl")]
    expected = sum(math.log1p(math.exp(m)) for m in margins) / len(margins)
    assert w.column(ran("rm")[0], "eval/loss")[0] == pytest.approx(expected, abs=1e-5)
    bare = [{k: v for k, v in r.items() if k != "margin"} for r in w.lines(world / "pairs.jsonl")]
    content = toy("train-rm", "pairs", training={"max_steps": 1})
    content["data"]["train"] = str(w.write_rows(Path(content["output_dir"]).with_name("bare.jsonl"), bare))
    del content["data"]["eval"]
    run = train(content)
    assert w.column(run, "loss") == pytest.approx([math.log(2)], abs=1e-6)
    assert w.column(run, "rewards/margins") == [0]


def test_first_rollout_of_ppo(ran: Callable[[str], tuple[Path, Outcome]]) -> None:
    run, outcome = ran("ppo")
    zero, one = w.lines(run / "metrics.jsonl")[:2]
    assert zero["eval/objective/kl"] == pytest.approx(0, abs=1e-5)
    assert one["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert one["objective/kl_k3_per_token"] == pytest.approx(0, abs=1e-6)
    assert one["policy/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert one["rollout/logprob_gap_max"] < 1e-4
    assert one["episode"] == 32
    assert "critic: starts from rm" in outcome.err


HELD_OUT = {
    "chat": lambda first, last: last["eval/loss"] < 2.0 < 6.0 < first["eval/loss"],
    "completion": lambda first, last: last["eval/loss"] < 2.0 < 6.0 < first["eval/loss"],
    "text": lambda first, last: last["eval/loss"] < 2.0 < 6.0 < first["eval/loss"],
    "rm": lambda first, last: last["eval/rewards/accuracies"] >= 0.9 > first["eval/rewards/accuracies"],
    "dpo": lambda first, last: last["eval/rewards/accuracies"] >= 0.9 and last["eval/loss"] < 0.5,
    "ipo": lambda first, last: last["eval/rewards/accuracies"] >= 0.9 and last["eval/loss"] < 15,
    "odpo": lambda first, last: last["eval/rewards/accuracies"] >= 0.9 and last["eval/loss"] < 0.8,
    "kto": lambda first, last: last["eval/rewards/chosen"] - last["eval/rewards/rejected"] > 1,
    "orpo": lambda first, last: last["eval/rewards/accuracies"] >= 0.9 and last["eval/loss"] < first["eval/loss"] - 0.1,
    "simpo": lambda first, last: last["eval/rewards/accuracies"] >= 0.9 and last["eval/loss"] < first["eval/loss"] / 2,
    "ppo": lambda first, last: last["eval/rewards/true_reward/mean"] - first["eval/rewards/true_reward/mean"] > 0.4,
}


@pytest.mark.parametrize("name", CASES)
def test_it_learns(ran: Callable[[str], tuple[Path, Outcome]], name: str) -> None:
    rows = w.lines(ran(name)[0] / "metrics.jsonl")
    assert HELD_OUT[name](rows[0], rows[-1]), (rows[0], rows[-1])


@pytest.mark.parametrize("name", ["dpo", "ipo", "odpo", "kto", "orpo", "simpo", "ppo"])
def test_the_true_reward_rises(ran: Callable[[str], tuple[Path, Outcome]], base: Path, world: Path, name: str) -> None:
    """Sampled from final/ with plain transformers and peft on held-out prompts."""
    before, after = (w.sampled_reward(run / "final", world / "prompts-eval.jsonl") for run in (base, ran(name)[0]))
    assert after > before + 0.5, (before, after)
