"""What holds of a rollout and of what is measured of it, however it was batched, padded, ordered and ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import collate
from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models import adapters
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import load_reference
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.advantage import Estimate, gae
from rlhf_cli.objectives.kl import k1, k2, k3, k3_plus
from rlhf_cli.recipe.schema import LoraSettings, ModelSettings
from rlhf_cli.rollouts.experience import Drawn, Experience, draw, measure, token_rewards
from rlhf_cli.rollouts.generate import Sampling, by_own_loop, sample
from rlhf_cli.rollouts.rewards import Rollout
from tests.models.test_roles import described, train
from tests.models.worlds import EOS, full_role, lora_role, make_base, make_sample, tokens
from tests.properties.test_layouts import own_logp
from tests.rollouts.test_experience import infer_with
from tests.rollouts.test_generate import prompts

STOPS = [EOS, 5, 6]


def measured(role: Role, reference: Role, critic: Role | None, samples: list[Sample], budget: int = 40) -> Experience:
    """What the roles say of completions that somebody sampled, at temperature 0.7."""
    n = len(samples)
    given = Drawn(Rollout([], [], samples, [True] * n), torch.arange(n), [torch.zeros(len(s.completions[0].ids))
                  for s in samples])  # fmt: skip
    return measure(infer_with(budget, role.base.packed), role, reference, critic, given, 0.7, around=True)


# --- policy and reference at the start -----------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fresh adapter", "adapter", "full"])
def test_at_the_start_every_estimate_of_the_kl_is_zero(start: str) -> None:
    """Exactly, for the three ways a policy may start; once it has learned, for none."""
    base = make_base("llama")
    if start == "full":
        policy = full_role(base)
    elif start == "adapter":
        policy = lora_role(base, "policy")
    else:
        adapters.add_adapter(base, "policy", adapters.lora_config(LoraSettings(r=4, alpha=8.0)))
        policy = Role("policy", base, "policy", trained=True)
    reference, _ = load_reference(policy, described("adapter" if start == "adapter" else "full"))
    random = np.random.default_rng(1)
    samples = [make_sample(random, p, n) for p, n in ((4, 6), (1, 1), (12, 9), (7, 3))]

    def estimates() -> list[float]:
        made = measured(policy, reference, None, samples)
        return [float(k(made.logp, made.reference_logp).abs().max()) for k in (k1, k2, k3, k3_plus)]

    assert estimates() == [0.0] * 4
    train(policy)
    assert min(estimates()) > 1e-3


# --- padding ---------------------------------------------------------------------------------------------------


def credited(made: Experience, scores: Tensor) -> Estimate:
    """Advantages and returns of these completions."""
    rewards = token_rewards(made, scores, 0.3)
    return gae(rewards, made.values, made.mask, None, None, gamma=0.99, lam=0.9, lam_critic=None, length_adaptive=None)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_longer_neighbours_change_nothing(name: str, packed: bool, model_folder: Path) -> None:
    """A prompt sampled, measured and credited alone, and beside others: beside longer prompts it is padded on the left
    while tokens are drawn, beside longer completions on the right afterwards. Rotary and absolute positions."""
    base = make_base(name, packed=packed)
    policy, reference = lora_role(base, "policy", seed=1), lora_role(base, "reference", seed=2)
    critic = lora_role(base, "critic", seed=3, head=True)
    template = load_text(ModelSettings(name_or_path=str(model_folder))).template
    asked = prompts(2, (3, 40, 17))
    found: list[Experience] = []
    for count, budget in ((1, 10**6), (3, 10**6), (3, 70)):
        tasks = [Task("?", str(i)) for i in range(count)]
        drawn = draw(policy, tasks, asked[:count], template, STOPS, 4, Sampling(24, 0.7), 11)
        found.append(measure(infer_with(budget, packed), policy, reference, critic, drawn, 0.7, around=True))
    alone, width = found[0], found[0].mask.shape[1]
    assert max(int(f.lengths.max()) for f in found) > int(alone.lengths.min()), "there is padding on the right"
    scores = torch.linspace(-1, 2, 12)
    first = credited(alone, scores[:4])
    for other in found[1:]:
        assert torch.equal(other.lengths[:4], alone.lengths)
        for mine, theirs in zip(alone.rollout.samples, other.rollout.samples, strict=False):
            assert mine.completions[0].ids.tolist() == theirs.completions[0].ids.tolist()
        for field in ("sampled_logp", "logp", "reference_logp", "entropy", "values"):
            own, again = getattr(alone, field), getattr(other, field)
            torch.testing.assert_close(again[:4, :width], own, rtol=1e-5, atol=1e-5, msg=field)
            assert bool((again[~other.mask] == 0).all())
        assert alone.last_values is not None
        assert other.last_values is not None
        torch.testing.assert_close(other.last_values[:4], alone.last_values, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(first, credited(other, scores), strict=True):
            torch.testing.assert_close(theirs[:4, :width], mine, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_end_token_that_also_pads_is_a_token_like_any_other(name: str) -> None:
    """It keeps its place in the mask, its log-probability, its KL and its gradient; and in prompts its attention."""
    random = np.random.default_rng(4)
    end = Completion(np.array([9, 11, EOS], np.int32), np.ones(3, bool))
    alone = Completion(np.array([EOS], np.int32), np.ones(1, bool))
    prompt = np.array([EOS, 7, EOS], np.int32)
    samples = [Sample(prompt, (end,), {}, ""), Sample(prompt, (alone,), {}, ""), make_sample(random, 5, 8)]
    base = make_base(name, packed=False)
    base.model.config.pad_token_id = EOS
    policy, reference = lora_role(base, "policy", seed=1), lora_role(base, "reference", seed=2)
    made = measured(policy, reference, None, samples)
    assert made.lengths.tolist() == [3, 1, 8]
    for row, given in enumerate(samples[:2]):
        n, place = len(given.completions[0].ids), int(made.lengths[row]) - 1
        for role, logp in ((policy, made.logp), (reference, made.reference_logp)):
            torch.testing.assert_close(logp[row, :n], own_logp(role, given, given.completions[0], 0.7))
        kl = float(made.logp[row, place] - made.reference_logp[row, place])
        assert abs(kl) > 1e-3
        rewards = token_rewards(made, torch.zeros(3), 0.5)
        assert float(rewards[row, place]) == pytest.approx(-0.5 * kl)
    with policy.active(train=True):
        policy.backward(policy.logp(collate(samples[1:2], packed=False)).logp.sum())
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for _, p in policy.parameters)


# --- the smallest rollouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (9,), (1, 12)])
def test_the_smallest_rollouts_are_finite(lengths: tuple[int, ...]) -> None:
    """One completion, completions of one token, one that was cut: shapes and numbers are as for any other."""
    base = make_base("llama")
    policy, critic = lora_role(base, "policy"), lora_role(base, "critic", seed=6, head=True)
    random = np.random.default_rng(2)
    samples = [make_sample(random, 3, n) for n in lengths]
    made = measured(policy, Role("reference", base), critic, samples)
    assert made.mask.shape == (len(lengths), max(lengths))
    assert made.lengths.tolist() == list(lengths)
    out = credited(made, torch.ones(len(lengths)))
    for x in (made.logp, made.reference_logp, made.entropy, made.values, *out):
        assert x is not None
        assert x.shape == made.mask.shape
        assert bool(torch.isfinite(x).all())
        assert bool((x[~made.mask] == 0).all())
    assert bool((out.advantages[made.mask] != 0).all())


def test_no_completion_is_empty() -> None:
    """Even when the first token that is drawn ends it."""
    role = full_role(make_base("llama"))
    every = list(range(97))
    drawn = sample(role, prompts(), 3, every, Sampling(5), 0)
    assert {len(c.ids) for group in drawn for c in group} == {1}
    assert all(c.finished and len(c.logp) == 1 for group in drawn for c in group)


# --- order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_order_of_rows_in_a_batch_does_not_matter(name: str) -> None:
    """Rows that keep their number keep their tokens, wherever they stand in the batch."""
    role, asked, order = full_role(make_base(name)), prompts(), [4, 2, 0, 5, 1, 3]

    def rows(places: list[int]) -> Callable[[], list[list[int]]]:
        given = [asked[i] for i in places]
        numbers = [2 * i + k for i in places for k in range(2)]
        return lambda: [c.ids.tolist() for c in by_own_loop(role, given, numbers, 2, STOPS, Sampling(14), 9)]

    plain, turned = rows(list(range(6)))(), rows(order)()
    assert turned == [plain[2 * i + k] for i in order for k in range(2)]
    assert len({tuple(ids) for ids in plain}) == 12


def test_rows_come_back_with_their_prompt_and_group(model_folder: Path) -> None:
    """Prompts are sorted by length to be decoded, a few at a time: what comes back stands where it was asked."""
    role = full_role(make_base("llama"))
    template = load_text(ModelSettings(name_or_path=str(model_folder))).template
    random = np.random.default_rng(3)
    asked = [tokens(random, n) for n in (7, 2, 11, 2, 30, 1)]
    tasks = [Task(f"prompt {i}", f"t:{i}") for i in range(6)]
    drawn = draw(role, tasks, asked, template, STOPS, 3, Sampling(9, max_batch=4), 17)
    assert drawn.group.tolist() == [i for i in range(6) for _ in range(3)]
    given = zip(drawn.group.tolist(), drawn.rollout.samples, drawn.rollout.tasks, drawn.logp, strict=True)
    for group, one, task, logp in given:
        assert one.prompt.tolist() == asked[group].tolist()
        assert task is tasks[group]
        (completion,) = one.completions
        torch.testing.assert_close(logp, own_logp(role, one, completion), rtol=1e-5, atol=1e-5)
    assert [s.where for s in drawn.rollout.samples] == [f"t:{i}" for i in range(6) for _ in range(3)]
