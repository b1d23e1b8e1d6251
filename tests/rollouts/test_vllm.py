"""Completions of a vLLM server: what it is asked and handed, and what its answers weigh.

The server is tests/rollouts/stand_in.py. Nothing here has met vLLM itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_cli.models.base import load_text
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.importance import truncated_importance
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.generate import sample
from rlhf_cli.rollouts.sampling import Sampling
from rlhf_cli.rollouts.stops import split
from tests.rollouts.served import NEW, PROMPTS, asked, policy, said, server_of
from tests.rollouts.stand_in import StandIn

# --- what is drawn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [NEW, replace(NEW, temperature=0.7, top_k=9), replace(NEW, greedy=True)])
def test_it_is_the_own_engine_with_the_same_draws(
    fresh: Callable[..., StandIn], tmp_path: Path, sampling: Sampling
) -> None:
    """Tokens, ends and log-probabilities; the prompts keep their order, and a request says all that decides a draw."""
    stand_in, count, stops = fresh(), 1 if sampling.greedy else 3, [6]
    role = policy(stand_in)
    stand_in.knows(11, range(0, len(PROMPTS) * count))
    by_server = asked(stand_in, tmp_path, replace(sampling, max_batch=6))
    theirs = sample(role, PROMPTS, count, stops, by_server, 11)
    assert by_server.stats.take()["rollout/tokens"] == sum(len(ids) for ids, _ in said(theirs))
    ours = sample(role, PROMPTS, count, stops, sampling, 11)
    assert said(theirs) == said(ours)
    for a, b in zip((c for g in theirs for c in g), (c for g in ours for c in g), strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=2e-5)
    if sampling.top_k:
        probes, bodies = stand_in.bodies[:2], stand_in.bodies[2:]
        assert [b["temperature"] for b in probes] == [0.7, 1.4]
    else:
        bodies = stand_in.bodies
    assert sorted(b["prompt"] for b in bodies) == sorted(p.tolist() for p in PROMPTS)
    assert {(b["n"], b["max_tokens"], tuple(b["stop_token_ids"]), b["ignore_eos"]) for b in bodies} == {
        (count, 6, (6,), True)
    }
    assert len({b["seed"] for b in bodies}) == len(PROMPTS)
    assert {b["model"] for b in bodies} == set(stand_in.loaded)


def test_numbers_decide_the_draws_and_not_the_batch(stand_in: StandIn, tmp_path: Path) -> None:
    role = Role("whole", stand_in.base)
    sampling = asked(stand_in, tmp_path)
    whole = said(sample(role, PROMPTS, 2, [6], sampling, 5))
    parts = [said(sample(role, [p], 2, [6], replace(sampling, max_batch=1), 5, [n])) for n, p in enumerate(PROMPTS)]
    assert whole == [one for part in parts for one in part]
    assert whole != said(sample(role, PROMPTS, 2, [6], sampling, 6))
    assert stand_in.loaded == {}  # a model without an adapter is the base itself
    assert {b["model"] for b in stand_in.bodies} == {stand_in.root}


def test_stop_strings_end_a_completion_where_they_end_ours(
    stand_in: StandIn,
    tmp_path: Path,
    tiny_model: Path,
) -> None:
    template = load_text(ModelSettings(name_or_path=str(tiny_model))).template
    ours = replace(NEW, stops=split(["o", "ee", "x", "y", "z"], template)[1])
    theirs = asked(stand_in, tmp_path, ours)
    stand_in.knows(3, range(0, 20))
    role = Role("whole", stand_in.base)
    cut = said(sample(role, PROMPTS, 4, [6], ours, 3))
    assert said(sample(role, PROMPTS, 4, [6], theirs, 3)) == cut
    assert cut != said(sample(role, PROMPTS, 4, [6], NEW, 3))
    assert stand_in.bodies[0]["stop"] == ["o", "ee", "x", "y"]  # more are refused by the server


# --- what it is handed -------------------------------------------------------------------------------------------


def test_the_adapter_is_handed_over_when_it_has_changed(fresh: Callable[..., StandIn], tmp_path: Path) -> None:
    stand_in = fresh()
    role, sampling = policy(stand_in), asked(stand_in, tmp_path)
    pushed: list[str] = []
    for changed in (False, False, True):
        if changed:
            role.parameters[0][1].data.add_(0.1)
        sample(role, PROMPTS[:1], 1, [], sampling, 0)
        (name,) = stand_in.loaded
        pushed.append(name)
        assert [p.name for p in (tmp_path / "rollout-adapter").iterdir()] == [name]
    assert pushed[0] == pushed[1] != pushed[2]
    assert stand_in.calls.count("/v1/load_lora_adapter") == 2
    again = asked(stand_in, tmp_path)  # a run that was killed finds what it left behind
    sample(role, PROMPTS[:1], 1, [], again, 0)
    assert stand_in.calls.count("/v1/load_lora_adapter") == 3
    other = asked(stand_in, tmp_path / "other")
    sample(role, PROMPTS[:1], 1, [], other, 0)
    assert len(stand_in.loaded) == 2  # two runs leave each other's adapters alone
    warned: list[str] = []
    server_of(again).close(warned.append)
    assert len(stand_in.loaded) == 1
    assert not (tmp_path / "rollout-adapter").exists()
    server_of(other).close(warned.append)
    assert stand_in.loaded == {}
    assert warned == []


def test_a_folder_that_the_server_sees(fresh: Callable[..., StandIn], tmp_path: Path) -> None:
    stand_in = fresh()
    sample(
        policy(stand_in), PROMPTS[:1], 1, [], asked(stand_in, tmp_path / "run", adapter_folder=str(tmp_path / "sh")), 0
    )
    (path,) = stand_in.loaded.values()
    assert Path(path).parents[1] == tmp_path / "sh"


def test_it_sleeps_between_rollouts(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.sleeps, stand_in.awake = True, False
    sampling = asked(stand_in, tmp_path, sleep=True)
    for _ in range(2):
        sample(Role("whole", stand_in.base), PROMPTS[:1], 1, [], sampling, 0)
        assert not stand_in.awake
    assert stand_in.calls[1:] == ["/wake_up", "/v1/completions", "/sleep?level=1"] * 2


# --- importance weights ------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    trained = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.6, 1.0]])).requires_grad_()
    sampled = torch.log(torch.tensor([[0.25, 0.4, 0.3], [0.1, 0.2, 1e-30]]))
    weights, cut = truncated_importance(trained, sampled, cap=2.5)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 2.5], [1.0, 2.5, 2.5]]))
    assert cut.tolist() == [[False, False, True], [False, True, True]]
    assert not weights.requires_grad


def test_the_weighted_mean_is_that_of_the_policy() -> None:
    """Over q, the weight of a token times a number is the number's mean over p, as long as the cap decides nowhere."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.2, 0.4])
    weights, _ = truncated_importance(p.log(), q.log(), cap=2.0)
    number = torch.tensor([1.0, -3.0, 7.0])
    torch.testing.assert_close((q * weights * number).sum(), (p * number).sum())
