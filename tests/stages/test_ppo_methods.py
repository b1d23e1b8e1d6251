"""Every way to run `ppo`: estimators, ratios, aggregates, places of the KL, penalties, other text along."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rlhf_cli.catalog import ESTIMATORS
from rlhf_cli.recipe.lineage import inputs
from rlhf_cli.recipe.reader import read_recipe
from rlhf_cli.rollouts.experience import Experience, token_rewards
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.test_interrupted import DROPOUT, OFTEN, assert_same, interrupted

Toy = Callable[..., dict[str, Any]]
OF_CRITIC = {"loss/value", "val/clipfrac", "val/grad_norm", "val/explained_variance", "val/mean"}
UNWHITENED = {"whiten_advantages": False}
METHODS: dict[str, dict[str, Any]] = {
    "gae": {"advantage": {"name": "gae", "lam_critic": 1.0}},
    "gae-length": {"advantage": {"name": "gae", "length_adaptive": 0.5}},
    "reinforce": {"advantage": {"name": "reinforce"}},
    "reinforce-full": {"advantage": {"name": "reinforce", "credit": "full", "baseline": "none"}},
    "reinforce_pp": {"advantage": {"name": "reinforce_pp"}},
    "rloo": {"advantage": {"name": "rloo"}, **UNWHITENED},
    "grpo": {"advantage": {"name": "grpo"}, **UNWHITENED, "kl_in": "loss", "aggregate": "sequence"},
    "gspo": {"advantage": {"name": "grpo"}, **UNWHITENED, "ratio": "sequence", "aggregate": "sequence",
             "kl_in": "loss", "kl_estimator": "k3", "clip_low": 3e-4, "clip_high": 4e-4},
    "dr_grpo": {"advantage": {"name": "dr_grpo"}, **UNWHITENED, "kl": {"name": "fixed", "coef": 0.0},
                "aggregate": "constant"},
    "remax": {"advantage": {"name": "remax"}, **UNWHITENED},
    "penalty": {"advantage": {"name": "reinforce"}, "penalty": {"controller": "doubling"}},
    "penalty-proportional": {"advantage": {"name": "reinforce"}, "penalty": {"controller": "proportional"}},
}  # fmt: skip


def content(toy: Toy, world: Path, ppo: dict[str, Any], name: str = "run", **more: Any) -> dict[str, Any]:
    """A recipe on the true reward: rollouts of 32 completions, 4 to a prompt."""
    settings = {
        "rewards": [{"function": f"{world / 'reward.py'}:true_reward"}],
        "rollout": {"max_new_tokens": 6, "completions_per_prompt": 4},
        "ppo": {"mini_batches": 2, **ppo},
        "training": {"max_steps": 2, "learning_rate": 5e-3},
    }
    return toy("ppo", "prompts", name, **w.merged(settings, more))


def explained_loss(row: dict[str, float]) -> float:
    """The loss of the policy, from its parts."""
    kl = row["kl_coef"] * row.get("loss/kl", 0.0)
    return row["loss/policy"] + kl + row.get("policy/penalty_coef", 0.0) * row.get("loss/penalty", 0.0)


def test_every_estimator_is_tried() -> None:
    assert {str(m["advantage"]["name"]) for m in METHODS.values()} == set(ESTIMATORS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs(toy: Toy, world: Path, name: str) -> None:
    settings = METHODS[name]
    run = train(content(toy, world, settings))
    first, second = (row for row in w.metrics(run) if row["step"] > 0)
    assert all(math.isfinite(v) for v in [*first.values(), *second.values()])
    assert first["policy/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert second["objective/kl"] != first["objective/kl"]
    assert first["grad_norm"] > 0
    assert 0 <= first["frac_reward_zero_std"] <= 1
    entry = ESTIMATORS[settings["advantage"]["name"]]
    assert set(first) & OF_CRITIC == (OF_CRITIC if entry.critic else set())
    assert ("critic/learning_rate" in first) == entry.critic
    assert ("greedy/scores" in first) == entry.greedy
    assert first.get("greedy/completions", 8.0) == 8.0
    assert ("loss/kl" in first) == (settings.get("kl_in") == "loss")
    assert second.get("loss/kl", 1.0) > 0
    for row in (first, second):
        assert row["loss"] == pytest.approx(explained_loss(row), rel=1e-5, abs=1e-7)
        assert row["policy/clipfrac"] == pytest.approx(row["policy/clipfrac_high"] + row["policy/clipfrac_low"])
        assert ("loss/penalty" in row) == ("penalty" in settings)
    assert (run / "final" / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "remax"])
def test_a_reward_of_the_prompt_teaches_nothing(toy: Toy, world: Path, tmp_path: Path, name: str) -> None:
    """Completions are compared with those of their own prompt, exactly; the greedy one is scored by the same rules."""
    (tmp_path / "reward.py").write_text("def of_prompt(completions, number):\n    return [n / 7 for n in number]\n")
    ppo = {"advantage": {"name": name}, **UNWHITENED, "kl": {"name": "fixed", "coef": 0.0}, "missing_eos_penalty": 0.0}
    more = {"rewards": [{"function": f"{tmp_path / 'reward.py'}:of_prompt"}], "training": {"max_steps": 1}}
    (row,) = (row for row in w.metrics(train(content(toy, world, ppo, **more))) if row["step"] == 1)
    assert row["objective/scores_std"] > 1
    assert row["frac_reward_zero_std"] == 1.0
    assert row["loss/policy"] == row["grad_norm"] == 0.0


def test_the_greedy_completion_is_not_sampled(toy: Toy, world: Path) -> None:
    """It is the same at any temperature; what is sampled is not."""
    ppo = {"advantage": {"name": "remax"}, **UNWHITENED}
    rows = []
    for temperature in (1.0, 3.0):
        more = {"rollout": {"temperature": temperature}, "training": {"max_steps": 1}}
        rows.append(w.metrics(train(content(toy, world, ppo, f"run-{temperature}", **more)))[-1])
    assert rows[0]["greedy/scores"] == rows[1]["greedy/scores"]
    assert rows[0]["objective/scores"] != pytest.approx(rows[1]["objective/scores"], abs=1e-3)


@pytest.mark.parametrize(("kl_in", "coef"), [("reward", 0.2), ("loss", 0.0)])
def test_the_kl_stands_in_one_place(
    toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, kl_in: str, coef: float
) -> None:
    seen = []

    def spy(experience: Experience, scores: Tensor, kl_coef: float) -> Tensor:
        seen.append(kl_coef)
        return token_rewards(experience, scores, kl_coef)

    monkeypatch.setattr("rlhf_cli.stages.ppo.token_rewards", spy)
    ppo = {"advantage": {"name": "rloo"}, "kl": {"name": "fixed", "coef": 0.2}, "kl_in": kl_in}
    run = train(content(toy, world, ppo))
    assert seen == [coef, coef]
    assert w.column(run, "kl_coef") == [0.2, 0.2]


@pytest.mark.parametrize("controller", ["doubling", "proportional"])
def test_the_penalty_follows_its_target(toy: Toy, world: Path, controller: str) -> None:
    penalty = {"coef": 2.0, "target_kl": 1e-6, "controller": controller}
    run = train(content(toy, world, {"advantage": {"name": "rloo"}, "penalty": penalty}))
    assert w.column(run, "policy/penalty_coef") == pytest.approx(
        [2.0, {"doubling": 4.0, "proportional": 2.04}[controller]]
    )


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_a_method(toy: Toy, world: Path, aggregate: str) -> None:
    ppo = {"advantage": {"name": "grpo"}, **UNWHITENED, "kl_in": "loss", "aggregate": aggregate, "entropy_coef": 0.01,
           "ratio": "sequence" if aggregate == "sequence" else "token", "penalty": {}}  # fmt: skip
    ppo["ptx"] = {"data": str(world / "chat.jsonl"), "coef": 0.5, "batch_size": 4}
    found = []
    for budget in (40, 10**6):
        training = {"max_steps": 1, "micro_batch_tokens": budget, "optimizer": "sgd", "max_grad_norm": None}
        found.append(w.metrics(train(content(toy, world, ppo, f"run-{budget}", training=training)))[-1])
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5)


# --- other text along ------------------------------------------------------------------------------------


def test_ptx_is_added_to_the_loss(toy: Toy, world: Path) -> None:
    ptx: dict[str, Any] = {"data": {"path": str(world / "text.jsonl"), "limit": 20}, "coef": 3.0, "batch_size": 4}
    run = train(content(toy, world, {"advantage": {"name": "rloo"}, "ptx": ptx}))
    for row in w.metrics(run)[1:]:
        assert row["loss"] == pytest.approx(row["loss/policy"] + 3 * row["loss/ptx"], rel=1e-5)
        assert row["loss/ptx"] > 0.5
    report = json.loads((run / "data-report.json").read_text())
    assert [(s["split"], s["kept"]) for s in report["sources"]] == [("train", 96), ("eval", 16), ("ptx", 20)]
    assert ptx["data"]["path"] in inputs(read_recipe(run / "recipe.yaml", [], None))
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    # 2 rollouts x 2 epochs x 2 updates x 4 examples of 20
    assert state["kept"]["ptx"] == {"epoch": 1, "index": 12}


def test_ptx_has_no_temperature(toy: Toy, world: Path) -> None:
    """The temperature belongs to sampling: before the first update the text is as likely at any."""
    ptx = {"data": str(world / "text.jsonl"), "batch_size": 8}
    ppo = {"advantage": {"name": "rloo"}, "ptx": ptx, "epochs": 1, "mini_batches": 1}
    found = []
    for temperature in (0.5, 1.0):
        more = {"rollout": {"temperature": temperature}, "training": {"max_steps": 1}}
        found += w.column(train(content(toy, world, ppo, f"run-{temperature}", **more)), "loss/ptx")
    assert found[0] == found[1]


def test_ptx_holds_on_to_the_text(toy: Toy, world: Path, tmp_path: Path) -> None:
    """With a reward for nothing, the likelihood of the text is all there is to learn."""
    (tmp_path / "nothing.py").write_text("def nothing(completions):\n    return [0.0] * len(completions)\n")
    ptx = {"data": str(world / "text.jsonl"), "coef": 1.0, "batch_size": 16}
    more = {"rewards": [{"function": f"{tmp_path / 'nothing.py'}:nothing"}], "training": {"max_steps": 6}}
    run = train(content(toy, world, {"advantage": {"name": "rloo"}, "missing_eos_penalty": 0.0, "ptx": ptx}, **more))
    values = w.column(run, "loss/ptx")
    assert values[-1] < values[0] - 0.2
    assert w.column(run, "frac_reward_zero_std")[0] == 1.0


def test_a_stopped_run_without_critic_goes_on_exactly(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = {
        "advantage": {"name": "grpo"}, **UNWHITENED, "kl_in": "loss", "aggregate": "sequence",
        "kl": {"name": "doubling", "target_kl_per_sequence": 0.5},
        "ptx": {"data": str(world / "chat.jsonl"), "coef": 0.5, "batch_size": 5},
        "penalty": {"controller": "proportional"},
    }  # fmt: skip
    more = w.merged(OFTEN, DROPOUT, {"training": {"max_steps": 5, "lr_scheduler": "linear"}})
    run = interrupted(content(toy, world, ppo, "stopped", **more), 2, monkeypatch, signal.SIGTERM)
    whole = train(content(toy, world, ppo, "whole", **more))
    assert_same(run, whole)
    assert len(set(w.column(whole, "loss/ptx"))) == 5


# --- what is refused -------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "k1 in the loss": ({"kl_in": "loss", "kl_estimator": "k1"}, 2, "its gradient is zero on average"),
    "k2 in the reward": ({"kl_estimator": "k2"}, 2, "only k1 gives the gradient of the KL"),
    "k3 in the reward": ({"kl_in": "reward", "kl_estimator": "k3"}, 2, "only k1 gives the gradient of the KL"),
    "groups of one": ({"advantage": {"name": "rloo"}}, 2, "rollout.completions_per_prompt must be at least 2, found 1"),
    "an unknown estimator": ({"advantage": {"name": "grp"}}, 2, "did you mean 'grpo'?"),
    "an unknown controller": ({"penalty": {"controller": "fixed"}}, 2, "ppo.penalty.controller"),
    "ptx without data": ({"ptx": {"coef": 1.0}}, 2, "ppo.ptx"),
    "ptx without a file": ({"ptx": {"data": "nowhere.jsonl"}}, 3, "nowhere.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(toy: Toy, world: Path, tmp_path: Path, name: str) -> None:
    settings, code, words = WRONG[name]
    recipe = content(toy, world, settings, rollout={"completions_per_prompt": 1})
    outcome = quick("ppo", w.save(recipe, tmp_path / "recipe.yaml"))
    assert (outcome.code, len(outcome.errors)) == (code, 1), outcome.err
    assert words in outcome.errors[0]
    assert not (tmp_path / "run").exists()


def test_check_reads_the_ptx_rows(toy: Toy, world: Path, tmp_path: Path) -> None:
    broken = w.write_rows(tmp_path / "broken.jsonl", [{"text": "good"}, {"text": ""}])
    rewards = [{"function": f"{world / 'reward.py'}:true_reward"}]
    content = toy("ppo", "prompts", rewards=rewards, rollout={"max_new_tokens": 6}, ppo={"ptx": {"data": str(broken)}})
    outcome = quick("check", w.save(content, tmp_path / "ptx.yaml"))
    assert outcome.code == 3
    assert "broken.jsonl:2: empty text" in outcome.errors[0]


def test_held_out_scores_are_on_a_scale_that_does_not_move(toy: Toy, world: Path) -> None:
    """In training the running statistics apply, in evaluation they do not: the same text has the same score."""
    reward = {"function": f"{world / 'reward.py'}:true_reward", "normalize": "running", "clip": 0.5, "weight": 2.0}
    ppo = {"advantage": {"name": "rloo"}, **UNWHITENED}
    run = train(content(toy, world, ppo, rewards=[reward], evaluation={"every": 1, "samples": 16}))
    shown = w.lines(run / "samples.jsonl")
    assert [row["score"] for row in shown] == pytest.approx([2 * w.true_reward(row["completion"]) for row in shown])
    rows = w.metrics(run)[-2:]
    for step, row in enumerate(rows, 1):
        scores = [one["score"] for one in shown if one["step"] == step]
        assert row["eval/objective/scores"] == pytest.approx(sum(scores) / 16, abs=1e-6)
        assert row["eval/rewards/true_reward/mean"] == pytest.approx(sum(scores) / 32, abs=1e-6)
        assert row["rewards/true_reward/mean"] != pytest.approx(row["rewards/true_reward/raw_mean"], rel=1e-2)
        assert row["rewards/true_reward/clipped"] > 0
        assert "eval/rewards/true_reward/clipped" not in row


def test_a_policy_that_was_trained_to_judge(toy: Toy, world: Path, tmp_path: Path) -> None:
    """A reward run that is a language model starts a policy, with a word about it; it goes on as a judge without."""
    objective = {"name": "two_token", "good": "good", "bad": "bad"}
    judge = toy("train-rm", "steps", "judge", 16, objective=objective, training={"max_steps": 1})
    start = {"model": {"name_or_path": str(train(judge))}}
    again = w.merged(judge, start, {"output_dir": str(tmp_path / "again")})
    policy = content(toy, world, {"advantage": {"name": "rloo"}}, "policy", training={"max_steps": 1}, **start)
    said = []
    for recipe in (again, policy):
        outcome = quick(recipe["stage"], w.save(recipe, tmp_path / "r.yaml"))
        assert outcome.code == 0, outcome.err
        said.append([line for line in outcome.err.splitlines() if "trained to judge" in line])
    assert said[0] == []
    (line,) = said[1]
    assert line.startswith(f"warning: model.name_or_path: {start['model']['name_or_path']} was trained to judge")
