"""What a rollout leaves behind: shapes and masks from lengths, and rewards at the right tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.batch import collate, micro_batches
from rlhf_cli.data.examples import Task
from rlhf_cli.models.base import load_text
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.experience import Experience, draw, measure, pad, token_rewards
from rlhf_cli.rollouts.generate import Sampling
from rlhf_cli.rollouts.rewards import Rollout
from tests.models.worlds import EOS, lora_role, make_base, tokens


def experience(lengths: list[int], seed: int = 0) -> Experience:
    """Made-up log-probabilities of completions of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    logp, mask = pad([-torch.rand(n, generator=generator) for n in lengths])
    reference, _ = pad([-torch.rand(n, generator=generator) for n in lengths])
    n = len(lengths)
    done, group = torch.ones(n, dtype=torch.bool), torch.arange(n)
    return Experience(Rollout([], [], []), done, group, mask, logp, logp, reference, torch.zeros_like(logp))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 2), st.integers(0, 99))
def test_the_score_lies_on_the_last_token(lengths: list[int], coef: float, seed: int) -> None:
    made = experience(lengths, seed)
    scores = torch.linspace(-3.0, 5.0, len(lengths))
    rewards = token_rewards(made, scores, coef)
    kl = made.logp - made.reference_logp
    for i, n in enumerate(lengths):
        for t in range(made.mask.shape[1]):
            wanted = -coef * float(kl[i, t]) + (float(scores[i]) if t == n - 1 else 0.0) if t < n else 0.0
            assert float(rewards[i, t]) == pytest.approx(wanted, abs=1e-5)
        whole = float(scores[i]) - coef * float(kl[i, :n].sum())
        assert float(rewards[i].sum()) == pytest.approx(whole, abs=1e-4)


def test_by_hand() -> None:
    made = replace(
        experience([2, 1]),
        logp=torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), reference_logp=torch.tensor([[-1.5, -1.0], [-0.5, 0.0]]),
    )  # fmt: skip
    rewards = token_rewards(made, torch.tensor([10.0, -4.0]), 0.2)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2 + 10.0], [-4.0, 0.0]]))
    assert token_rewards(made, torch.tensor([10.0, -4.0]), 0.0).tolist() == [[0.0, 10.0], [-4.0, 0.0]]


def test_what_stands_in_masked_slots_does_not_matter() -> None:
    made = experience([3, 1, 2])
    spoilt = {k: torch.where(made.mask, getattr(made, k), torch.nan) for k in ("logp", "reference_logp")}
    scores = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(token_rewards(replace(made, **spoilt), scores, 0.5), token_rewards(made, scores, 0.5))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_pad(lengths: list[int]) -> None:
    parts = [torch.arange(1, n + 1, dtype=torch.float64) for n in lengths]
    out, mask = pad(parts)
    assert out.shape == mask.shape == (len(lengths), max(lengths))
    assert out.dtype == torch.float32
    assert mask.sum(1).tolist() == lengths
    assert bool((mask[:, 1:] <= mask[:, :-1]).all())
    for i, part in enumerate(parts):
        assert out[i, : lengths[i]].tolist() == part.tolist()
    assert bool((out[~mask] == 0).all())


# --- a whole rollout ---------------------------------------------------------------------------------------


def infer_with(budget: int, packed: bool = True) -> Callable[..., list[torch.Tensor]]:
    """`Engine.infer` with micro-batches of so many tokens."""

    def infer(role: Role, samples: Any, function: Any, unit: str = "token") -> list[torch.Tensor]:
        out: list[Any] = [None] * len(samples)
        for group in micro_batches(samples, budget, packed=packed):
            batch = collate([samples[i] for i in group], packed=packed)
            with role.active():
                result = function(batch)
            for place, i in enumerate(group):
                out[i] = result[batch.example[batch.owners] == place]
        return out

    return infer


def rolled(
    model_folder: Path, *, budget: int = 10**6, reference: str = "other", temperature: float = 1.3
) -> Experience:
    base = make_base("llama")
    policy, other = lora_role(base, "policy", seed=1), lora_role(base, "reference", seed=2)
    critic = lora_role(base, "critic", seed=3, head=True)
    text = load_text(ModelSettings(name_or_path=str(model_folder)))
    random = np.random.default_rng(3)
    prompts = [tokens(random, n) for n in (7, 2, 11)]
    tasks = [Task(f"prompt {i}", f"tasks.jsonl:{i + 1}") for i in range(3)]
    frozen = policy if reference == "policy" else other
    drawn = draw(policy, tasks, prompts, text.template, [EOS, 5, 6], 4, Sampling(9, temperature), 17)
    return measure(infer_with(budget), policy, frozen, critic, drawn, temperature)


def test_a_rollout(model_folder: Path) -> None:
    made = rolled(model_folder)
    assert made.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    shape = (12, int(made.lengths.max()))
    for name in ("mask", "sampled_logp", "logp", "reference_logp", "entropy", "values"):
        assert getattr(made, name).shape == shape, name
        assert bool(torch.isfinite(getattr(made, name).float()).all())
    assert [len(s.completions[0].ids) for s in made.rollout.samples] == made.lengths.tolist()
    for sample, done, text in zip(made.rollout.samples, made.finished.tolist(), made.rollout.completions, strict=True):
        (completion,) = sample.completions
        assert done == (int(completion.ids[-1]) in {EOS, 5, 6})
        assert bool(completion.scored.all())
        assert "</s>" not in text
    assert {bool(f) for f in made.finished} == {True, False}
    assert [t.where for t in made.rollout.tasks] == [f"tasks.jsonl:{g + 1}" for g in made.group.tolist()]
    torch.testing.assert_close(made.logp, made.sampled_logp, rtol=1e-5, atol=1e-5)
    assert float((made.logp - made.reference_logp).abs().max()) > 0.1
    assert float(made.entropy[made.mask].min()) > 0
    assert made.values is not None
    assert float(made.values[made.mask].std()) > 0


def test_micro_batches_do_not_change_a_rollout(model_folder: Path) -> None:
    """Property 1: log-probabilities of the first pass are the same to 1e-5 for any micro-batch."""
    one, other = rolled(model_folder), rolled(model_folder, budget=20)
    for name in ("sampled_logp", "logp", "reference_logp", "entropy", "values"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(one.mask, other.mask)


def test_the_same_reference_gives_no_kl_at_all(model_folder: Path) -> None:
    """Property 2: exactly zero, since both go the same way."""
    made = rolled(model_folder, reference="policy")
    assert torch.equal(made.logp, made.reference_logp)
    rewards = token_rewards(made, torch.arange(12.0), 0.5)
    assert float(rewards.sum()) == float(torch.arange(12.0).sum())
