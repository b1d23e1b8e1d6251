"""transformers' engines behind the own loop's interface: same structure, reproducible, nothing left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from rlhf_cli.models.roles import Role
from rlhf_cli.rollouts import continuous
from rlhf_cli.rollouts.generate import Sampling, sample
from tests.models.worlds import EOS, full_role, lora_role, make_base, refused
from tests.rollouts.test_generate import NAMES, biased, everything, ids_of, prompts, recomputed

PAGED = ["llama", "gpt2", "qwen2", "mistral-window-8", "gemma2"]
"""A few that continuous batching takes."""
ENGINES = ["generate", "continuous"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{"greedy": True}, {"temperature": 1.3}, {"top_k": 5}], ids=str)
def test_generate_draws_what_the_own_loop_draws(name: str, settings: dict[str, Any]) -> None:
    role = full_role(make_base(name))
    own = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(12, **settings), 4)
    other = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(12, engine="generate", max_batch=7, **settings), 4)
    assert ids_of(own) == ids_of(other)
    for a, b in zip(everything(own), everything(other), strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
        assert a.finished == b.finished


@pytest.mark.parametrize("name", PAGED)
def test_continuous_batching(name: str) -> None:
    role = full_role(make_base(name))
    own = sample(role, prompts(), 1, [EOS, 5, 9], Sampling(12, greedy=True), 4)
    other = sample(role, prompts(), 1, [EOS, 5, 9], Sampling(12, greedy=True, engine="continuous"), 4)
    assert ids_of(own) == ids_of(other)
    drawn = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(12, 1.3, engine="continuous"), 4)
    assert [len(group) for group in drawn] == [3] * len(prompts())
    sampled = torch.from_numpy(np.concatenate([c.logp for c in everything(drawn)]))
    torch.testing.assert_close(sampled, recomputed(role, prompts(), drawn, 1.3), rtol=1e-4, atol=1e-4)


def test_continuous_batching_knows_its_ends() -> None:
    for c in everything(sample(biased(t4=3.0, t5=3.0), prompts(), 4, [4, 5], Sampling(6, engine="continuous"), 0)):
        found = [n for n, token in enumerate(c.ids.tolist(), 1) if token in (4, 5)]
        assert c.finished == bool(found)
        assert len(c.ids) == len(c.logp) == (found[0] if found else 6)
    none = everything(sample(biased(t2=-80.0), prompts(), 1, [], Sampling(6, engine="continuous"), 0))
    assert all(len(c.ids) == 6 and not c.finished for c in none)


def test_frequencies_of_continuous_batching() -> None:
    role, count = full_role(make_base("llama")), 400
    settings = Sampling(1, 0.8, engine="continuous", max_batch=count)
    drawn = np.array([int(c.ids[0]) for c in sample(role, [prompts()[0]], count, [], settings, 3)[0]])
    with role.active():
        logits = role.base.model(torch.from_numpy(prompts()[0].astype(np.int64))[None]).logits[0, -1]
    wanted = torch.softmax(logits / 0.8, -1).double().numpy()
    found = np.bincount(drawn, minlength=len(wanted)) / count
    likely = wanted * count >= 5
    assert likely.sum() > 5
    assert float((np.abs(found - wanted) / np.sqrt(wanted / count))[likely].max()) < 4
    assert abs(found[~likely].sum() - wanted[~likely].sum()) < 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_seed_decides(engine: str) -> None:
    """Not torch's global generator, which is left as it was."""
    role, results = full_role(make_base("llama")), []
    for state, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        results.append(ids_of(sample(role, prompts(), 3, [EOS], Sampling(10, engine=engine), seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert results[0] != results[2]
    alike = ids_of(sample(role, [prompts()[0]] * 4, 1, [], Sampling(10, engine=engine), 1))
    assert len({tuple(c) for (c,) in alike}) == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_model_brings_along_is_not_used(engine: str) -> None:
    """Penalties, filters and lengths of generation_config.json; they are back afterwards."""
    results = []
    own = GenerationConfig(repetition_penalty=1.8, top_k=2, temperature=0.1, min_new_tokens=9, eos_token_id=7)
    for settings in (GenerationConfig(), own):
        role = full_role(make_base("llama"))
        role.base.model.generation_config = settings
        results.append(ids_of(sample(role, prompts(), 3, [EOS, 5, 9], Sampling(10, engine=engine), 6)))
        assert role.base.model.generation_config is settings
    assert results[0] == results[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_with_the_adapter_of_the_role(engine: str) -> None:
    base = make_base("llama")
    policy, other = lora_role(base, "policy", seed=1), lora_role(base, "other", seed=2)
    attention, results = base.model.config._attn_implementation, []
    for role in (policy, other, Role("reference", base)):
        greedy = Sampling(12, greedy=True)
        results.append(ids_of(sample(role, prompts(), 1, [EOS], Sampling(12, greedy=True, engine=engine), 0)))
        assert results[-1] == ids_of(sample(role, prompts(), 1, [EOS], greedy, 0))
        assert base.model.config._attn_implementation == attention
    assert results[0] != results[1] != results[2]


def test_a_model_that_continuous_batching_cannot_take() -> None:
    role = full_role(make_base("lfm2"))
    attention = role.base.model.config._attn_implementation
    refused(
        lambda: sample(role, prompts(), 2, [EOS], Sampling(4, engine="continuous"), 0),
        "lfm2", "continuous batching cannot sample from this model", "use rollout.engine: own or generate",
    )  # fmt: skip
    assert role.base.model.config._attn_implementation == attention
    assert sample(role, prompts(), 1, [EOS], Sampling(2, engine="generate"), 0)


def test_continuous_batching_that_fails_or_loses_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    role, settings = full_role(make_base("llama")), Sampling(4, engine="continuous")
    right = continuous._results
    monkeypatch.setattr(continuous, "_results", lambda *rest: right(*rest)[:-1])
    refused(lambda: sample(role, prompts(), 2, [EOS], settings, 0), "rollout.engine", "'continuous' returned 11", "12")
    monkeypatch.setattr(continuous, "_results", right)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken kernel\nand more")

    handle = role.base.model.model.layers[1].register_forward_pre_hook(fail)
    refused(lambda: sample(role, prompts(), 2, [EOS], settings, 0), "llama", "broken kernel", "own or generate")
    handle.remove()
    assert len(sample(role, prompts(), 2, [EOS], settings, 0)) == 6


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (2, 1), (2, 3)])
def test_prompts_of_a_token_or_two(lengths: tuple[int, ...]) -> None:
    role = full_role(make_base("llama"))
    drawn = sample(role, prompts(lengths=lengths), 3, [EOS], Sampling(5, engine="continuous"), 0)
    assert [len(group) for group in drawn] == [3] * len(lengths)
    sampled = torch.from_numpy(np.concatenate([c.logp for c in everything(drawn)]))
    again = recomputed(role, prompts(lengths=lengths), drawn, 1.0)
    torch.testing.assert_close(sampled, again, rtol=1e-4, atol=1e-4)


def test_continuous_batching_out_of_memory_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    role, settings, right = full_role(make_base("llama")), Sampling(4, engine="continuous"), continuous._results

    def small(manager: Any, asked: list[list[int]], count: int, source: str) -> Any:
        if len(asked) * count > 4:
            raise torch.OutOfMemoryError("simulated")
        return right(manager, asked, count, source)

    monkeypatch.setattr(continuous, "_results", small)
    assert [len(g) for g in sample(role, prompts(), 2, [EOS], settings, 0)] == [2] * 6
    assert settings.stats.take()["rollout/halvings"] == 2
