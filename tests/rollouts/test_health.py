"""The doctor's rules, each by figures that trip it and figures just short of it, and what it remembers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_cli.recipe.settings.doctor import ThresholdSettings, TripwireSettings, WireSettings
from rlhf_cli.rollouts.doctor import EVENTS, TEXT, Doctor
from rlhf_cli.rollouts.health import RULES, WATCHED
from rlhf_cli.train.encode import encode_state

WELL = {
    "objective/kl": 1.0, "objective/scores": 0.0, "objective/scores_std": 1.0, "objective/entropy": 2.0,
    "completions/eos_rate": 0.9, "completions/truncated": 0.1, "completions/mean_length": 100.0,
    "rollout/repetition": 0.05, "val/explained_variance": 0.4, "rollout/reward_length_correlation": 0.2,
    "policy/clipfrac": 0.1, "val/ratio": 1.0, "policy/ratio_max": 1.5, "frac_reward_zero_std": 0.3,
    "rollout/unscorable": 0.0, "completions/learned_from": 1.0,
}  # fmt: skip
ILL = {"objective/kl": 31.0}


def doctor(every: int = 1000, target: float | None = None, **settings: Any) -> Doctor:
    return Doctor(TripwireSettings(**settings), target, every)


def after(rows: list[dict[str, float]], seen: Doctor | None = None) -> dict[str, int]:
    """The wires that trip, with the step of these rows (from 1) at which each does for the first time; ten good steps
    come before."""
    found: dict[str, int] = {}
    seen = seen or doctor()
    for step in range(1, 11):
        assert seen.examine(step, WELL).action == "go"
    for place, row in enumerate(rows, start=1):
        for finding in seen.examine(10 + place, WELL | row).findings:
            found.setdefault(finding.wire, place)
    return found


def rising(name: str, *values: float, **more: float) -> list[dict[str, float]]:
    return [{name: value, **more} for value in values]


CASES: dict[str, tuple[str, list[dict[str, float]], int]] = {
    "kl": ("kl", rising("objective/kl", 30.1), 1),
    "kl short": ("kl", rising("objective/kl", *[30.0] * 20), 0),
    "negative kl": ("negative_kl", rising("objective/kl", *[-0.06] * 5), 5),
    "negative kl once not": ("negative_kl", rising("objective/kl", *[-1.0] * 4, 0.0, *[-1.0] * 4), 0),
    "negative kl of noise": ("negative_kl", rising("objective/kl", *[-0.04] * 9), 0),
    "hacking": ("hacking", rising("objective/kl", 31.0, **{"objective/scores": 1.1}), 1),
    "hacking short": ("hacking", rising("objective/kl", 31.0, **{"objective/scores": 0.9}), 0),
    "cut": ("eos_rate", rising("completions/truncated", *[0.91] * 5), 5),
    "cut short": ("eos_rate", rising("completions/truncated", *[0.9] * 9), 0),
    "nothing learned from": ("eos_rate", rising("completions/learned_from", *[0.0] * 5), 5),
    "little learned from": ("eos_rate", rising("completions/learned_from", *[0.0] * 4, 0.1, *[0.0] * 4), 0),
    "fewer ends": ("eos_rate", rising("completions/eos_rate", 0.22), 1),
    "fewer ends short": ("eos_rate", rising("completions/eos_rate", 0.23), 0),
    "longer": ("length", rising("completions/mean_length", 301.0), 1),
    "longer short": ("length", rising("completions/mean_length", 299.0), 0),
    "shorter": ("length", rising("completions/mean_length", 24.0), 1),
    "shorter short": ("length", rising("completions/mean_length", 26.0), 0),
    "repetition": ("repetition", rising("rollout/repetition", *[0.6] * 5), 5),
    "repetition short": ("repetition", rising("rollout/repetition", *[0.6] * 4, 0.4, *[0.6] * 4), 0),
    "entropy": ("entropy", rising("objective/entropy", *[0.19] * 5), 5),
    "entropy short": ("entropy", rising("objective/entropy", *[0.21] * 9), 0),
    "critic": ("explained_variance", rising("val/explained_variance", *[-0.1] * 10), 10),
    "critic short": ("explained_variance", rising("val/explained_variance", *[-0.1] * 9, 0.1), 0),
    "length pays": (
        "length_correlation",
        [{"rollout/reward_length_correlation": 0.95, "completions/mean_length": 105.0 + 5 * i} for i in range(9)], 5,
    ),
    "length pays, stays": (
        "length_correlation", [{"rollout/reward_length_correlation": 0.95} for _ in range(12)], 0
    ),
    "clipped": ("clip_fraction", rising("policy/clipfrac", *[0.6] * 5), 5),
    "clipped short": ("clip_fraction", rising("policy/clipfrac", *[0.5] * 9), 0),
    "ratio of a token": ("ratio", rising("policy/ratio_max", 10.1), 1),
    "ratio without end": ("ratio", rising("policy/ratio_max", float("inf")), 1),
    "ratio on average": ("ratio", rising("val/ratio", 2.1), 1),
    "ratio short": ("ratio", rising("val/ratio", 1.9, **{"policy/ratio_max": 9.9}), 0),
    "contrast": ("contrast", rising("frac_reward_zero_std", *[1.0] * 5), 5),
    "contrast short": ("contrast", rising("frac_reward_zero_std", *[0.9] * 9), 0),
    "unscorable": ("unscorable", rising("rollout/unscorable", 0.21), 1),
    "unscorable short": ("unscorable", rising("rollout/unscorable", 0.2), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_rule_trips_at_its_step_and_not_before(name: str) -> None:
    wire, rows, wanted = CASES[name]
    found = after(rows)
    assert found.get(wire, 0) == wanted, found
    beside = {"kl": {"hacking"}, "hacking": {"kl"}}.get(wire, set())
    assert found.keys() <= {wire} | beside, found


def test_every_wire_has_a_rule_and_a_case_and_every_figure_a_reader() -> None:
    wires = set(WireSettings.model_fields)
    assert {rule.wire for rule in RULES} == wires
    assert {wire for wire, _, wanted in CASES.values() if wanted} == wires
    assert {wire for wire, _, wanted in CASES.values() if not wanted} == wires
    assert set(WELL) == set(WATCHED)
    assert [rule.severity for rule in RULES] == sorted((rule.severity for rule in RULES), reverse=True)
    assert all(": " in remedy for rule in RULES for remedy in rule.remedies)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_sentences_hold_the_numbers_and_say_what_to_do(name: str) -> None:
    wire, rows, _ = CASES[name]
    seen = doctor()
    after(rows, seen)
    sentence = seen.active[wire][2]
    assert any(c.isdigit() for c in sentence)
    assert any(word in sentence for word in ("lower", "raise", "look", "read", "give")), sentence
    assert "nan" not in sentence
    assert sentence[0].islower() or sentence[0].isdigit() or sentence[0] == "-"


def test_figures_that_are_not_there_or_not_numbers_trip_nothing() -> None:
    seen = doctor()
    assert all(seen.examine(step, {"loss": 1.0}).action == "go" for step in range(1, 30))
    nan = dict.fromkeys(WATCHED, float("nan"))
    assert all(seen.examine(step, nan).action == "go" for step in range(30, 60))


def test_the_limit_of_the_kl_follows_the_target() -> None:
    assert after(rising("objective/kl", 18.1), doctor(target=6.0)) == {"kl": 1}
    assert after(rising("objective/kl", 17.9), doctor(target=6.0)) == {}
    assert after(rising("objective/kl", 5.1), doctor(target=6.0, thresholds={"kl": 5.0})) == {"kl": 1}


def test_a_finding_is_said_once_until_it_has_stayed_away() -> None:
    seen = doctor(every=1)
    bad = [WELL | ILL, WELL]
    order = [WELL, bad[0], bad[0], WELL, bad[0], *[WELL] * 6, bad[0]]
    lines = {step: v.lines for step, row in enumerate(order, 1) if (v := seen.examine(step, row)).lines}
    assert list(lines) == [1, 2, 10, 12]
    assert lines[1] == lines[10] == ["health: ok"]
    assert lines[2] == lines[12]
    assert lines[2][0].startswith("health: the KL to the reference is 31 nats per completion, over its limit of 30")


def test_the_health_line_comes_every_so_many_steps_and_names_the_worst() -> None:
    seen = doctor(every=10)
    rows = [WELL | {"frac_reward_zero_std": 1.0} for _ in range(20)]
    rows[13] |= ILL
    said = {step: v.lines[0] for step, row in enumerate(rows, 1) if (v := seen.examine(step, row)).lines}
    assert list(said) == [5, 14, 20]
    assert "100% of the prompts" in said[5]
    assert said[20].startswith("health: still, 100% of the prompts")


@pytest.mark.parametrize(
    ("wires", "wanted"),
    [
        ({}, "warn"), ({"kl": "ignore"}, "go"), ({"kl": "pause"}, "pause"), ({"kl": "rollback"}, "rollback"),
        ({"kl": "rollback", "ratio": "pause"}, "pause"), ({"kl": "rollback", "ratio": "ignore"}, "rollback"),
    ],
)  # fmt: skip
def test_the_gravest_action_is_taken(wires: dict[str, str], wanted: str) -> None:
    seen = doctor(wires=wires)
    seen.examine(1, WELL)
    row = WELL | ILL | ({"policy/ratio_max": 99.0} if "ratio" in wires else {})
    assert seen.examine(2, row).action == wanted
    assert seen.examine(3, row).action == "go"  # it was obeyed, or accepted, already


def test_no_rollback_more_than_allowed() -> None:
    seen = doctor(wires={"kl": "rollback"}, max_rollbacks=2, rollback_lr_factor=0.5)
    saved = json.loads(json.dumps(seen.state_dict()))
    for number, wanted in enumerate(["rollback", "rollback", "stop"]):
        assert seen.rollbacks == number
        seen.examine(1, WELL)
        assert seen.examine(2, WELL | ILL).action == wanted
        before = seen.state_dict()
        seen.load_state_dict(saved)
        assert seen.undone(before) == 0.5 ** (number + 1)  # of what the first checkpoint holds
        assert seen.active == {}
    assert seen.undone(seen.state_dict()) == 0.5  # of its own


def test_a_checkpoint_is_trusted_once_the_next_step_was_well() -> None:
    seen = doctor()
    states = {}
    for step in range(1, 12):
        seen.examine(step, WELL | (ILL if step == 4 else {}))
        states[step] = {"step": step, "kept": {"doctor": json.loads(json.dumps(seen.state_dict()))}}
        trusted = [s for s in states if seen.trusts(states[s])]
        assert trusted == [s for s in (1, 2, 9, 10) if s < step], step


def test_going_on_from_a_checkpoint_gives_the_same_verdicts() -> None:
    rows = [WELL | (ILL if n in (3, 9, 17) else {"frac_reward_zero_std": 1.0 if n > 6 else 0.0}) for n in range(20)]
    texts = [{"prompt": "p", "completion": "c", "score": 1.0}]
    whole = doctor(every=3)
    expected = [whole.examine(step, row, texts) for step, row in enumerate(rows, 1)]
    for stop in range(20):
        seen = doctor(every=3)
        found = [seen.examine(step, row, texts) for step, row in enumerate(rows[:stop], 1)]
        state = json.loads(encode_state(seen.state_dict()))
        seen = doctor(every=3)
        seen.load_state_dict(state)
        found += [seen.examine(step, row, texts) for step, row in enumerate(rows[stop:], stop + 1)]
        assert found == expected
        assert seen.state_dict() == whole.state_dict()


def test_the_state_stays_small() -> None:
    seen = doctor(thresholds=ThresholdSettings(patience=1))
    long = [{"prompt": "p", "completion": "x" * 10 * TEXT, "score": 1.0}]
    for step in range(1, 3 * EVENTS):
        seen.examine(step, WELL | (ILL if step % 2 else {}), long)
    assert len(seen.events) == EVENTS
    assert len(encode_state(seen.state_dict())) < 200_000
    assert len(seen.texts["texts"][0]["completion"]) < TEXT + 10
