"""What holds of a step of PPO and of a whole run: ratios, masks, targets, where a critic starts, faults."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch
from rlhf_cli.models.build import with_values
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.kl import ProportionalKL
from rlhf_cli.objectives.masked import whiten
from rlhf_cli.recipe.schema import CriticSettings, PPOSettings
from rlhf_cli.rollouts.experience import Drawn, measure
from rlhf_cli.rollouts.figures import kl_of
from rlhf_cli.rollouts.functions import FunctionReward
from rlhf_cli.rollouts.rewards import Rollout, Scores
from rlhf_cli.stages import ppo_losses
from rlhf_cli.stages.ppo_losses import Coefficients, Lesson, counts, joint_loss, policy_loss, value_loss
from rlhf_cli.stages.ppo_update import Updates
from rlhf_cli.train.checkpoint import newest
from rlhf_cli.train.engine import Losses
from tests.models.worlds import full_role, lora_role, make_base
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.ppo_world import Toy, content, watch
from tests.stages.test_interrupted import assert_same
from tests.stages.test_ppo_losses import LENGTHS, ROOM, make_engine, make_lesson, make_samples

GAE: dict[str, Any] = {"advantage": {"name": "gae"}}
OFF = Coefficients(0.0, None)
ROWS = np.arange(len(LENGTHS))


# --- the first pass ----------------------------------------------------------------------------------------------


def first_pass(folder: Path, role: Role, packed: bool, budgets: tuple[int, int]) -> dict[str, float]:
    """Metrics of the first update on completions that were measured in micro-batches of budgets[0] tokens, the update
    itself in those of budgets[1]."""
    samples = make_samples(LENGTHS, 1)
    engine = make_engine(folder, role, budgets[0], packed=packed)
    drawn = Drawn(Rollout([], [], samples, [True] * len(samples)), torch.arange(len(samples)),
                  [torch.zeros(n) for n in LENGTHS])  # fmt: skip
    made = measure(engine.infer, role, role, None, drawn, 0.7)
    lesson = replace(make_lesson(samples), experience=made, temperature=0.7)
    engine.budget = budgets[1]
    settings, divisors = PPOSettings(), counts(lesson, ROWS, ROOM)
    if role.value_head is not None:
        loss = joint_loss(role, settings, CriticSettings(shared=True), lesson, ROWS, OFF)
    else:
        loss = policy_loss(role, settings, lesson, ROWS, OFF)
    return engine.update(role, samples, loss, divisors)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora", "shared", "gpt2"])
def test_the_first_ratio_is_one(tmp_path: Path, kind: str, packed: bool) -> None:
    """To the last bit where the micro-batches are the same; to 1e-5 where they are others."""

    def role() -> Role:
        base = make_base("gpt2" if kind == "gpt2" else "llama")
        made = lora_role(base, "policy") if kind == "lora" else full_role(base)
        return with_values(made, 2) if kind == "shared" else made

    for number, budgets in enumerate(((20, 20), (10**6, 10**6))):
        found = first_pass(tmp_path / f"same-{number}", role(), packed, budgets)
        assert found["policy/ratio_max"] == found["val/ratio"] == 1.0
        assert found["policy/approxkl"] == found["policy/clipfrac"] == 0.0
    for number, budgets in enumerate(((10**6, 12), (12, 10**6))):
        found = first_pass(tmp_path / f"other-{number}", role(), packed, budgets)
        assert abs(found["policy/ratio_max"] - 1) <= 1e-5
        assert abs(found["val/ratio"] - 1) <= 1e-5
        assert found["policy/clipfrac"] == 0.0


# --- what stands where nothing counts ----------------------------------------------------------------------------


def spoilt(lesson: Lesson, junk: float) -> Lesson:
    """With this number in every slot that is masked."""
    mask = lesson.experience.mask

    def put(x: Tensor) -> Tensor:
        return torch.where(mask, x, junk)

    made = lesson.experience
    experience = replace(made, logp=put(made.logp), reference_logp=put(made.reference_logp))
    targets = tuple(replace(t, old=put(t.old), returns=put(t.returns)) for t in lesson.targets)
    return replace(lesson, experience=experience, advantages=put(lesson.advantages), targets=targets)


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_nothing_in_masked_slots_reaches_a_loss(tmp_path: Path, junk: float) -> None:
    """Numbers of the rollout, and ids in the padding of its rows."""
    samples = make_samples(LENGTHS, 1)
    found = []
    for number, dirty in enumerate((False, True)):
        role = full_role(make_base("gpt2"), head=True)
        engine = make_engine(tmp_path / str(number), role, 40, packed=False)
        lesson = spoilt(make_lesson(samples), junk) if dirty else make_lesson(samples)

        def over(loss: Callable[[Batch, list[int]], Losses], dirty: bool = dirty) -> Any:
            def wrapped(batch: Batch, group: list[int]) -> Losses:
                if dirty:
                    batch.ids[batch.segment < 0] = 55
                return loss(batch, group)

            return wrapped

        settings = PPOSettings(kl_in="loss", entropy_coef=0.1)
        policy = policy_loss(role, settings, lesson, ROWS, Coefficients(0.3, 0.7))
        metrics = engine.update(role, samples, over(policy), counts(lesson, ROWS, ROOM))
        critic = value_loss(role, lesson.targets[0], 0.2, lesson, ROWS)
        metrics |= {f"critic {k}": v for k, v in engine.update(role, samples, over(critic), counts(lesson, ROWS, ROOM))
                    .items()}  # fmt: skip
        found.append((metrics, role.tensors()))
    assert found[1][0] == found[0][0]
    assert [name for name, x in found[0][1].items() if not torch.equal(x, found[1][1][name])] == []


def test_a_kl_in_the_loss_has_the_gradient_of_k2(tmp_path: Path) -> None:
    """With k3 another number is shown, the same step is made."""
    samples, found = make_samples(LENGTHS, 1), []
    for name in ("k2", "k3"):
        role = full_role(make_base("llama"))
        engine, lesson = make_engine(tmp_path / name, role, 40, packed=True), make_lesson(samples)
        settings = PPOSettings.model_validate({"kl_in": "loss", "kl_estimator": name})
        loss = policy_loss(role, settings, lesson, ROWS, Coefficients(3.0, None))
        found.append((engine.update(role, samples, loss, counts(lesson, ROWS, ROOM)), role.tensors()))
    (square, by_square), (other, by_other) = found
    assert abs(square["loss/kl"] - other["loss/kl"]) > 1e-3
    assert square["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    for key, tensor in by_square.items():
        torch.testing.assert_close(by_other[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


# --- targets, controllers and critics ------------------------------------------------------------------------------


def test_critics_learn_returns_that_nobody_whitened(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns are made from advantages as they are; only then are those whitened, over the whole rollout."""
    seen = watch(monkeypatch)
    train(content(toy, world, GAE | {"whiten_advantages": True}, training={"max_steps": 2}))
    state = seen[0]
    rolled = state.newest
    assert rolled is not None
    lesson, _ = state.lesson(rolled, warming=False)
    plain = state.estimate(rolled.experience, rolled.reward, state.kl.coef, False)
    assert torch.equal(lesson.targets[0].returns, plain.returns)
    assert torch.equal(lesson.advantages, whiten(plain.advantages, rolled.experience.mask))
    assert float((lesson.advantages - plain.advantages).abs().max()) > 0.1


def test_the_controller_is_told_nats_per_completion(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over the tokens of a completion, averaged over completions; and how many of these there were."""
    seen, told = watch(monkeypatch), list[tuple[float, int]]()
    update = ProportionalKL.update

    def spy(self: ProportionalKL, kl_per_sequence: float, episodes: int) -> None:
        rolled = seen[0].newest
        assert rolled is not None
        told.append((kl_per_sequence, episodes))
        wanted = float(kl_of(rolled.experience).mean())
        assert (kl_per_sequence, episodes) == (pytest.approx(wanted), 32)
        assert float(rolled.experience.lengths.min()) > 1
        update(self, kl_per_sequence, episodes)

    monkeypatch.setattr(ProportionalKL, "update", spy)
    kl = {"name": "proportional", "coef": 0.2, "target_kl_per_sequence": 0.01, "horizon": 100}
    train(content(toy, world, {"advantage": {"name": "rloo"}, "kl": kl}))
    assert len(told) == 3
    assert told[-1][0] != 0.0


@pytest.mark.parametrize("normalize", [True, False])
def test_a_critic_starts_as_its_reward_model(
    toy: Toy, world: Path, rm: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    """Before its first update its value after the last token is the score as it is paid: shifted, scaled, weighted."""
    seen, learn, checked = watch(monkeypatch), Updates.learn, []

    def before(self: Updates, lesson: Lesson, seed: int) -> dict[str, float]:
        critic, rolled = seen[0].roles.critic, seen[0].newest
        assert critic is not None
        assert rolled is not None
        around = seen[0].engine.infer(critic, rolled.experience.rollout.samples, critic.values_around)
        last = torch.stack([values[-1, 1] for values in around])
        torch.testing.assert_close(last, rolled.reward.raw, rtol=1e-4, atol=1e-4)
        assert float(last.std()) > 1e-3
        checked.append(float(last.mean()))
        return learn(self, lesson, seed)

    monkeypatch.setattr(Updates, "learn", before)
    rewards = [{"run": str(rm), "weight": 0.5, "normalize": normalize}]
    train(content(toy, world, GAE, rewards=rewards, training={"max_steps": 1}))
    statistics = json.loads((rm / "final" / "reward.json").read_text())
    assert abs(statistics["mean"]) > 1e-2
    assert abs(statistics["std"] - 1) > 1e-2
    assert len(checked) == 1


def test_an_adapter_of_ppo_says_the_same_in_plain_peft(
    toy: Toy, world: Path, sft_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    seen = watch(monkeypatch)
    run = train(content(toy, world, GAE, model={"name_or_path": str(sft_lora)}, training={"max_steps": 2}))
    policy = seen[0].roles.policy
    plain = AutoPeftModelForCausalLM.from_pretrained(run / "final").eval()
    start = AutoPeftModelForCausalLM.from_pretrained(sft_lora / "final").eval()
    ids = torch.randint(7, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.active():
        ours: Tensor = policy.base.model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)
        assert float((start(input_ids=ids).logits - ours).abs().max()) > 1e-2


# --- the smallest runs, and faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gae", "rloo", "reinforce_pp"])
def test_a_rollout_of_one_token(toy: Toy, world: Path, name: str) -> None:
    """A single completion, or a single group, of a single token, cut by the limit: every figure is a number."""
    group = 2 if name == "rloo" else 1
    more: dict[str, Any] = {
        "rollout": {"max_new_tokens": 1, "completions_per_prompt": group},
        "training": {"max_steps": 2, "batch_size": group},
    }  # fmt: skip
    run = train(content(toy, world, {"advantage": {"name": name}, "mini_batches": 1}, **more))
    rows = w.metrics(run)[1:]
    assert [row["completions/max_length"] for row in rows] == [1.0, 1.0]
    assert max(row["completions/truncated"] for row in rows) == 1.0
    assert all(np.isfinite(list(row.values())).all() for row in rows)


@pytest.mark.parametrize("fault", ["loss", "score"])
def test_a_number_that_is_not_finite_ends_the_run_before_its_step(
    toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Exit code 5; no weight moves; the last whole checkpoint stays, and the run goes on from it as if nothing were."""
    ppo, often = {"advantage": {"name": "rloo"}, "epochs": 1}, {"checkpoint": {"every": 1}}
    recipe = content(toy, world, ppo, "stopped", **often)
    run, seen = Path(recipe["output_dir"]), watch(monkeypatch)
    clipped, call = ppo_losses.clipped_policy, FunctionReward.__call__

    def bad() -> float:
        return math.nan if seen[0].engine.step == 1 else 1.0

    def lossy(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        loss, decided = clipped(*arguments, **named)
        return loss * bad(), decided

    def scored(self: FunctionReward, rollout: Rollout, infer: Any = None) -> Scores:
        found = call(self, rollout, infer)
        return replace(found, sequence=found.sequence * bad())

    with monkeypatch.context() as patched:
        patched.setattr(ppo_losses, "clipped_policy", lossy if fault == "loss" else clipped)
        patched.setattr(FunctionReward, "__call__", scored if fault == "score" else call)
        outcome = quick("ppo", w.save(recipe, run.with_suffix(".yaml")))
    assert (outcome.code, len(outcome.errors)) == (5, 1), outcome.err
    assert "nan" in outcome.errors[0]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]
    saved = newest(run / "checkpoints", seen[0].engine.display)
    assert saved is not None
    kept = saved.tensors("policy")
    assert all(torch.equal(kept[name], x) for name, x in seen[0].roles.policy.tensors().items())
    assert not (run / "DONE").exists()
    again = quick("ppo", run.with_suffix(".yaml"))
    assert again.code == 0, again.err
    assert "going on after step 1" in again.err
    assert_same(run, train(content(toy, world, ppo, "whole", **often)))
