"""Completions that the length limit cut: each rule, from the scores to the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.rollouts.experience import Experience, token_rewards
from rlhf_cli.stages.ppo_losses import Lesson
from rlhf_cli.stages.ppo_update import Updates
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.ppo_world import Toy, content, cost_of, true_reward, watch

GAE: dict[str, Any] = {"advantage": {"name": "gae"}, "kl": {"name": "fixed", "coef": 0.0}}
SHORT = {"rollout": {"max_new_tokens": 3}, "training": {"max_steps": 2}}
"""Three words and the end are four tokens: most completions are cut."""


def spied(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Lesson], list[Tensor]]:
    """What was learned from, and what stood at the last tokens."""
    lessons: list[Lesson] = []
    learn, last = Updates.learn, list[Tensor]()

    def seen(self: Updates, lesson: Lesson, seed: int) -> dict[str, float]:
        lessons.append(lesson)
        return learn(self, lesson, seed)

    def scored(experience: Experience, scores: Tensor, kl_coef: float) -> Tensor:
        last.append(scores)
        return token_rewards(experience, scores, kl_coef)

    monkeypatch.setattr(Updates, "learn", seen)
    monkeypatch.setattr("rlhf_cli.stages.ppo.token_rewards", scored)
    return lessons, last


RULES: dict[str, dict[str, Any]] = {
    "score": {"truncation": "score"},
    "penalty": {"truncation": "penalty", "missing_eos_penalty": 2.0},
    "replace": {"truncation": "replace", "truncated_score": -3.0},
    "bootstrap": {"truncation": "bootstrap"},
    "drop": {"truncation": "drop"},
}


@pytest.mark.parametrize("critic", [{}, {"shared": True}], ids=["own", "shared"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_for_completions_that_were_cut(
    toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch, rule: str, critic: dict[str, Any]
) -> None:
    seen, (lessons, last) = watch(monkeypatch), spied(monkeypatch)
    more = w.merged(SHORT, {"critic": critic, "rollout": {"max_new_tokens": 4, "temperature": 2.0}})
    run = train(content(toy, world, GAE | RULES[rule], **more))
    rolled, lesson, stood = seen[0].newest, lessons[-1], last[-1]
    assert rolled is not None
    done, raw = rolled.experience.finished, rolled.reward.raw
    assert 0 < int(done.sum()) < len(done)
    if rule == "drop":
        assert len(lesson.advantages) == int(done.sum()) == len(stood)
        assert lesson.experience.group.tolist() == rolled.experience.group[done].tolist()
        assert torch.equal(stood, raw[done])
    else:
        wanted = {"score": raw, "penalty": raw - 2.0, "replace": torch.full_like(raw, -3.0),
                  "bootstrap": torch.zeros_like(raw)}[rule]  # fmt: skip
        assert torch.equal(stood, torch.where(done, raw, wanted))
    assert (rolled.experience.last_values is not None) == (rule == "bootstrap")
    if rule == "bootstrap":
        experience, values = rolled.experience, rolled.experience.values
        assert values is not None
        assert experience.last_values is not None
        rows, ends = torch.arange(len(done)), experience.lengths - 1
        after = torch.where(done, 0.0, experience.last_values)
        delta = torch.where(done, raw, 0.0) + after - values[rows, ends]
        returns = delta + values[rows, ends]
        torch.testing.assert_close(lesson.targets[0].returns[rows, ends], returns, rtol=0, atol=1e-5)
        assert float(after.abs().max()) > 0  # the second rollout: the critic has learned something
    assert w.column(run, "objective/scores")[-1] == pytest.approx(float(raw.mean()))


def test_all_cut_and_none_learned_from(toy: Toy, world: Path) -> None:
    """With `drop` there may be nothing left: said, survived, and the policy is as it was."""
    more = w.merged(SHORT, {"rollout": {"max_new_tokens": 1}})
    run = train(content(toy, world, GAE | RULES["drop"], **more))
    rows = w.metrics(run)[1:]
    assert [row["completions/eos_rate"] for row in rows] == [0.0, 0.0]
    assert [row["objective/kl"] for row in rows] == [0.0, 0.0]
    assert [row["completions/learned_from"] for row in rows] == [0.0, 0.0]
    log = (run / "run.log").read_text()
    assert "every completion of this rollout was cut" not in log
    assert log.count("100% of the completions of the first rollout were cut") == 1
    more = w.merged(more, {"training": {"max_steps": 5}, "doctor": {"enabled": False}})
    train(content(toy, world, GAE | RULES["drop"], **more))
    log = (run / "run.log").read_text()
    assert log.count("every completion of this rollout was cut: there is nothing to learn from") == 1  # of three
    assert "every completion of this run was cut, and ppo.truncation: drop learns from none" in log


def test_steps_without_a_lesson_are_a_finding_and_are_counted_across_a_stop(toy: Toy, world: Path) -> None:
    """Though no share of cut completions is too large for this recipe."""
    more = w.merged(SHORT, {"rollout": {"max_new_tokens": 1}, "logging": {"every": 1}})
    more["doctor"] = {"wires": {"eos_rate": "pause"}, "thresholds": {"patience": 2, "truncated": 1.0}}
    recipe = content(toy, world, GAE | RULES["drop"], **w.merged(more, {"training": {"max_steps": 3}}))
    run = train(recipe, code=5)
    (found, pause) = w.lines(run / "doctor.jsonl")
    assert (found["step"], found["wires"], pause["kind"]) == (2, ["eos_rate"], "pause")
    assert "every completion of the last 2 rollouts was cut" in found["sentences"][0]
    train(recipe)
    assert "every completion of this run was cut" in (run / "run.log").read_text()


WHAT: dict[str, str] = {
    "score": "each is scored as it stands", "penalty": "ppo.missing_eos_penalty = 2 is taken from each score",
    "replace": "each gets ppo.truncated_score = -3", "bootstrap": "none is scored",
}  # fmt: skip


@pytest.mark.parametrize("rule", WHAT)
def test_all_cut_is_said_at_the_first_step(toy: Toy, world: Path, rule: str) -> None:
    more = w.merged(SHORT, {"rollout": {"max_new_tokens": 1}, "training": {"max_steps": 1}, "data": {"eval": None}})
    run = train(content(toy, world, GAE | RULES[rule] | {"epochs": 1}, **more))
    (line,) = [x for x in (run / "run.log").read_text().splitlines() if "100% of the completions" in x]
    assert WHAT[rule] in line
    assert "raise rollout.max_new_tokens" in line
    assert "every completion of this run was cut" not in (run / "run.log").read_text()


LIMITS = {(3, "at_most", 1): False, (4, "at_most", 2): False, (4, "at_most", 1): True, (4, "near", 2): True,
          (5, "at_most", 5): True}  # fmt: skip


@pytest.mark.parametrize("rule", LIMITS)
def test_a_length_that_is_cut_first_is_warned_of(
    toy: Toy, world: Path, tmp_path: Path, rule: tuple[int, str, int]
) -> None:
    limit, aim, margin = rule
    length = {"rule": {"name": "length", "limit": limit, "aim": aim, "margin": margin}}
    recipe = content(toy, world, GAE, rewards=[true_reward(world), length], rollout={"max_new_tokens": 4})
    outcome = quick("ppo", w.save(recipe, tmp_path / "recipe.yaml"), "--dry-run")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if "reward length: its limit" in line]
    assert len(lines) == LIMITS[rule]
    assert all("rollout.max_new_tokens = 4" in line for line in lines)


def test_the_groups_of_what_is_left(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped completion is in no baseline: its partner, alone then, has advantage 0."""
    lessons, _ = spied(monkeypatch)
    ppo = {"advantage": {"name": "rloo"}, "whiten_advantages": False, "truncation": "drop"}
    train(content(toy, world, ppo, **w.merged(SHORT, {"rollout": {"max_new_tokens": 4, "temperature": 2.0}})))
    checked = 0
    for lesson in lessons:
        group = lesson.experience.group
        for i, own in enumerate(group.tolist()):
            if int((group == own).sum()) == 1:
                assert float(lesson.advantages[i].abs().max()) == 0.0
                checked += 1
    assert checked


def test_a_completion_without_a_score_is_as_if_it_were_not_there(
    toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons, _ = spied(monkeypatch)
    ppo = {"advantage": {"name": "rloo"}, "whiten_advantages": False}
    rewards = [true_reward(world), {"function": f"{world / 'cost.py'}:some"}]
    run = train(content(toy, world, ppo, rewards=rewards, training={"max_steps": 1}))
    (row,) = w.metrics(run)[1:]
    assert row["rollout/unscorable"] == pytest.approx(10 / 32)
    assert row["rewards/some/invalid"] == 10
    assert row["episode"] == 22
    (lesson,) = lessons
    group = lesson.experience.group.tolist()
    assert group == [i // 2 for i in range(32) if i % 3 != 2]
    alone = [i for i, own in enumerate(group) if group.count(own) == 1]
    assert len(alone) == 10
    assert float(lesson.advantages[alone].abs().max()) == 0.0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "bootstrap without a critic": ({"advantage": {"name": "rloo"}, "truncation": "bootstrap"}, "rloo has none"),
    "a penalty that is not paid": (
        {"truncation": "score", "missing_eos_penalty": 2.0}, "missing_eos_penalty is only read with truncation: penalty"
    ),
    "a replacement that replaces nothing": (
        {"truncated_score": 0.0}, "truncated_score is only read with truncation: replace"
    ),
    "an unknown rule": ({"truncation": "replaced"}, "ppo.truncation"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(toy: Toy, world: Path, tmp_path: Path, name: str) -> None:
    ppo, words = WRONG[name]
    outcome = quick("ppo", w.save(content(toy, world, ppo), tmp_path / "recipe.yaml"))
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert words in outcome.errors[0]


def test_the_cost_of_a_cut_completion_is_paid(toy: Toy, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties and replacements are the reward's."""
    _, last = spied(monkeypatch)
    seen = watch(monkeypatch)
    ppo = GAE | RULES["replace"] | {"lagrange": {}}
    train(content(toy, world, ppo, **w.merged(SHORT, {"rewards": [true_reward(world), cost_of(world)]})))
    rolled = seen[0].newest
    assert rolled is not None
    assert rolled.cost is not None
    assert torch.equal(last[-1], rolled.cost.raw)
    assert -3.0 in last[-2].tolist()


def test_replaced_scores_replace_rewards_inside_a_completion_too(
    toy: Toy, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tmp_path / "dense.py"
    dense.write_text("def dense(completions, **rest):\n    return [[(1, 5.0)] if c else [] for c in completions]\n")
    seen = watch(monkeypatch)
    more = w.merged(SHORT, {"rollout": {"max_new_tokens": 4, "temperature": 2.0}})
    recipe = content(toy, world, GAE | RULES["replace"], **more)
    recipe["rewards"] = [{"function": f"{dense}:dense"}]
    run = train(recipe)
    rolled = seen[0].newest
    assert rolled is not None
    done, tokens = rolled.experience.finished, rolled.reward.tokens.sum(1)
    assert 0 < int(done.sum()) < len(done)
    assert bool((tokens[~done] == 0).all())
    assert bool((rolled.reward.last[~done] == -3.0).all())
    assert bool((tokens[done] > 0).any())
    assert all(
        top >= mean for top, mean in zip(w.column(run, "policy/ratio_max"), w.column(run, "val/ratio"), strict=True)
    )
