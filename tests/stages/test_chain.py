"""Runs that start from runs: which reference, which weights are shared, and that final/ opens outside this toolkit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from rlhf_cli.models import build
from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick, train

Toy = Callable[..., dict[str, Any]]
SHORT = {"training": {"max_steps": 4, "learning_rate": 3e-3}}
DPO = w.merged(SHORT, {"objective": {"name": "dpo"}})


def started(content: dict[str, Any]) -> tuple[Path, Outcome]:
    """The run of a recipe and what its command said."""
    run = Path(content["output_dir"])
    outcome = quick(content["stage"], w.save(content, run.with_suffix(".yaml")))
    assert outcome.code == 0, outcome.err
    return run, outcome


@pytest.fixture
def bases() -> Iterator[list[str]]:
    """The base weights that were loaded, one entry each time."""
    loaded: list[str] = []
    load = build.load_base

    def counted(source: str, *arguments: Any, **options: Any) -> Any:
        loaded.append(source)
        return load(source, *arguments, **options)

    with patch("rlhf_cli.models.build.load_base", counted):
        yield loaded


def pairs(final: Path, world: Path, count: int = 16) -> list[list[Any]]:
    """Token ids of held-out prompts with both completions, as a plain tokenizer gives them: (prompt, chosen, rejected)
    each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(final)
    out = []
    for row in w.lines(world / "pairs-eval.jsonl")[:count]:
        start = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        texts = [start, *(f"{start}{row[name]}<|end|>" for name in ("chosen", "rejected"))]
        out.append([tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts])
    return out


def plain_logps(final: Path, world: Path, **options: Any) -> dict[str, float]:
    """Mean summed log-probabilities of held-out completions by plain transformers and peft."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapter = (final / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(final, **options).eval()
    sums: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for prompt, *completed in pairs(final, world):
        for name, ids in zip(sums, completed, strict=True):
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].float().log_softmax(-1)
            each = logp.gather(1, ids[0, 1:, None])
            sums[name].append(float(each[prompt.shape[1] - 1 :].sum()))
    return {name: sum(found) / len(found) for name, found in sums.items()}


def assert_opens(run: Path, world: Path, **options: Any) -> None:
    """final/ gives the log-probabilities that the run itself measured last."""
    found = plain_logps(run / "final", world, **options)
    for name, value in found.items():
        assert value == pytest.approx(w.column(run, f"eval/logps/{name}")[-1], rel=1e-4, abs=1e-4)
    assert abs(w.column(run, "eval/logps/chosen")[0] - w.column(run, "eval/logps/chosen")[-1]) > 1e-2


# --- preference tuning on an SFT run ---------------------------------------------------------------------


def test_lora_sft_then_lora_dpo(toy: Toy, sft_lora: Path, world: Path, bases: list[str]) -> None:
    before = w.contents(sft_lora)
    content = w.merged(toy("dpo", "pairs", **DPO), {"model": {"name_or_path": str(sft_lora)}, "lora": {"r": 8}})
    run, outcome = started(content)
    assert f"reference: a frozen copy of the adapter in {sft_lora}" in outcome.err
    assert w.column(run, "eval/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert w.column(run, "eval/loss")[-1] < 0.65
    assert len(bases) == 1
    assert_opens(run, world)
    first = w.column(run, "eval/logps/chosen")[0]
    assert plain_logps(sft_lora / "final", world)["chosen"] == pytest.approx(first, rel=1e-4)
    assert w.contents(sft_lora) == before


def test_full_sft_then_lora_dpo(toy: Toy, base: Path, world: Path, bases: list[str]) -> None:
    before = w.contents(base)
    run, outcome = started(toy("dpo", "pairs", **DPO))
    assert f"reference: {base / 'final'} with adapters off" in outcome.err
    assert w.column(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(bases) == 1
    assert_opens(run, world)
    assert w.contents(base) == before


def test_full_dpo(toy: Toy, base: Path, world: Path) -> None:
    run, outcome = started(toy("dpo", "pairs", **w.merged(DPO, {"lora": None})))
    assert f"reference: a frozen copy of {base}" in outcome.err
    assert w.column(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert w.column(run, "eval/loss")[-1] < 0.65
    assert_opens(run, world)
    assert not (run / "final" / "adapter_config.json").exists()


def test_dpo_against_a_named_reference(toy: Toy, tiny_model: Path) -> None:
    """Another reference than the start: the loss does not begin at log 2."""
    run, outcome = started(toy("dpo", "pairs", **w.merged(DPO, {"reference": str(tiny_model)})))
    assert f"reference: {tiny_model}" in outcome.err
    assert abs(w.column(run, "loss")[0] - math.log(2)) > 0.05


def test_dpo_on_a_base_in_four_bits(toy: Toy, base: Path, world: Path) -> None:
    more = {"model": {"quantization": "nf4"}, "training": {"max_steps": 8, "learning_rate": 1e-2}}
    run, outcome = started(toy("dpo", "pairs", **w.merged(DPO, more)))
    assert "nf4" in outcome.err
    assert "with adapters off" in outcome.err
    assert w.column(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert w.column(run, "eval/loss")[-1] < 0.5
    found = plain_logps(run / "final", world)  # opened without quantisation: near, not equal
    assert found["chosen"] - found["rejected"] > 2


# --- reward models and PPO -------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_a_reward_model_opens_as_a_classifier(toy: Toy, world: Path, sft_lora: Path, base: Path, full: bool) -> None:
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    more = w.merged(SHORT, {"model": {"name_or_path": str(base if full else sft_lora)}})
    content = toy("train-rm", "pairs", **more) | {"lora": None if full else {"r": 8}}
    run, outcome = started(content)
    assert "round trip: the saved reward model scores equally" in outcome.err
    if full:
        model = AutoModelForSequenceClassification.from_pretrained(run / "final").eval()
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(run / "final", num_labels=1).eval()
    scores: list[list[float]] = [[], []]
    for _, *completed in pairs(run / "final", world):
        for side, ids in zip(scores, completed, strict=True):
            with torch.no_grad():
                side.append(float(model(ids).logits[0, 0]))
    for name, side in zip(("chosen", "rejected"), scores, strict=True):
        assert sum(side) / len(side) == pytest.approx(w.column(run, f"eval/rewards/{name}")[-1], rel=1e-4, abs=1e-5)
    assert len({round(s, 3) for s in scores[0]}) > 3


def ppo(toy: Toy, start: Path, rm: Path, **more: Any) -> dict[str, Any]:
    settings = {
        "model": {"name_or_path": str(start)}, "rewards": [{"run": str(rm)}], "rollout": {"max_new_tokens": 6},
        "ppo": {"mini_batches": 2}, "training": {"max_steps": 2, "learning_rate": 3e-3},
    }  # fmt: skip
    return toy("ppo", "prompts", "ppo", **w.merged(settings, more))


def test_lora_sft_reward_model_and_ppo_share_one_base(toy: Toy, sft_lora: Path, rm: Path, bases: list[str]) -> None:
    before = w.contents(sft_lora), w.contents(rm)
    run, outcome = started(ppo(toy, sft_lora, rm, lora={"r": 8}))
    assert len(bases) == 1  # policy, reference, critic and reward
    assert f"reference: a frozen copy of the adapter in {sft_lora}" in outcome.err
    assert f"critic: starts from {rm.name}" in outcome.err
    assert w.column(run, "objective/kl")[0] == pytest.approx(0, abs=1e-5)
    assert w.column(run, "policy/ratio_first")[0] == pytest.approx(1, abs=1e-5)
    assert w.column(run, "objective/kl")[1] != 0
    assert (w.contents(sft_lora), w.contents(rm)) == before


def test_full_reward_model_and_full_ppo(toy: Toy, base: Path, world: Path, bases: list[str]) -> None:
    full = w.recipe("train-rm", base, world, "pairs", Path(toy("ppo", "prompts", "rm")["output_dir"]), **SHORT)
    rm = train(full)
    bases.clear()
    run, outcome = started(ppo(toy, base, rm, lora=None))
    assert bases == [str(base / "final"), str(rm / "final")]
    assert f"reference: a frozen copy of {base}" in outcome.err
    assert f"critic: starts from {rm.name}" in outcome.err
    assert w.column(run, "policy/ratio_first")[0] == pytest.approx(1, abs=1e-5)
    assert w.column(run, "objective/kl")[:2] == [pytest.approx(0, abs=1e-5), pytest.approx(0, abs=5)]
    assert w.column(run, "objective/kl")[1] != 0


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_reward_model_and_ppo_on_one_quantised_base(
    toy: Toy, base: Path, world: Path, bases: list[str], bits: str
) -> None:
    """int8 rounds activations by what else is in the batch, so its numbers are near, not equal."""
    quantised = {"model": {"quantization": bits}, "training": {"max_steps": 2}, "data": {"eval": None}}
    rm = train(toy("train-rm", "pairs", "rm", **quantised))
    bases.clear()
    run, _ = started(ppo(toy, base, rm, **quantised))
    assert len(bases) == 1
    near = 2e-2 if bits == "int8" else 1e-5
    assert w.column(run, "policy/ratio_first")[0] == pytest.approx(1, abs=near)
    assert w.column(run, "objective/kl")[0] == pytest.approx(0, abs=near)


def test_the_critic_may_start_from_the_policy(toy: Toy, base: Path, rm: Path) -> None:
    run, outcome = started(ppo(toy, base, rm, critic={"start": "policy"}))
    assert "critic: starts from the policy, zero head" in outcome.err
    assert w.column(run, "val/mean")[0] == 0


# --- dropout ---------------------------------------------------------------------------------------------


def test_dropout_is_off_where_a_model_is_compared_with_itself(toy: Toy) -> None:
    def numbers(dropout: float) -> list[dict[str, Any]]:
        name = f"dpo-{dropout}"
        return w.metrics(train(toy("dpo", "pairs", name, **w.merged(DPO, {"lora": {"dropout": dropout}}))))

    assert numbers(0.0) == numbers(0.3)


def test_dropout_is_off_in_all_roles_of_ppo(toy: Toy, base: Path, world: Path) -> None:
    def numbers(dropout: float) -> list[dict[str, Any]]:
        more = {"rewards": [{"function": f"{world / 'reward.py'}:true_reward"}], "lora": {"dropout": dropout}}
        content = ppo(toy, base, base) | {"output_dir": toy("ppo", "prompts", f"ppo-{dropout}")["output_dir"]}
        return w.metrics(train(w.merged(content, more)))

    assert numbers(0.0) == numbers(0.3)
