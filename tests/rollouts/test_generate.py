"""Sampling: the ids of transformers' generate, the right log-probabilities, and nothing but the seed decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.batch import collate
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models.base import Base
from rlhf_cli.models.roles import Role, RoleError
from rlhf_cli.rollouts import cache, generate
from rlhf_cli.rollouts.generate import Completed, Sampling, sample
from rlhf_cli.rollouts.rows import draw, uniforms
from tests.models.worlds import EOS, PAD, VOCABULARY, full_role, lora_role, make_base, tokens

NAMES = ["llama", "gpt2", "qwen2", "mistral-window-8", "gemma3-window-32", "gemma2", "mixtral", "bloom", "falcon",
         "lfm2"]  # fmt: skip
LENGTHS = (12, 3, 40, 7, 1, 7)


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [tokens(random, n) for n in lengths]


def ids_of(drawn: list[list[Completed]]) -> list[list[list[int]]]:
    return [[c.ids.tolist() for c in group] for group in drawn]


def everything(drawn: list[list[Completed]]) -> list[Completed]:
    return [c for group in drawn for c in group]


def recomputed(role: Role, asked: list[np.ndarray], drawn: list[list[Completed]], temperature: float) -> torch.Tensor:
    """Log-probabilities of all sampled tokens, from one forward over whole rows."""
    rows = [
        Sample(p, tuple(Completion(c.ids, np.ones(len(c.ids), bool)) for c in group), {}, "")
        for p, group in zip(asked, drawn, strict=True)
    ]
    with role.active():
        return role.logp(collate(rows, packed=role.base.packed), temperature).logp


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_generate(name: str) -> None:
    """Prompts of different lengths at once against transformers' own generation of each alone."""
    base = make_base(name)
    role = full_role(base)
    drawn = sample(role, prompts(), 1, [EOS], Sampling(20, greedy=True), 0)
    for prompt, (completed,) in zip(prompts(), drawn, strict=True):
        whole = torch.from_numpy(prompt.astype(np.int64))[None]
        out = base.model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), max_new_tokens=20,
                                  do_sample=False, eos_token_id=EOS, pad_token_id=PAD)  # fmt: skip
        assert completed.ids.tolist() == out[0, len(prompt) :].tolist()


def test_greedy_of_an_adapter_is_generate() -> None:
    """With the role's adapter on, whatever was on before."""
    base = make_base("llama")
    policy, other = lora_role(base, "policy", seed=1), lora_role(base, "other", seed=2)
    results = []
    for role in (policy, other, Role("reference", base)):
        with other.active():
            pass
        drawn = sample(role, prompts(), 1, [EOS], Sampling(12, greedy=True), 0)
        with role.active():
            for prompt, (completed,) in zip(prompts(), drawn, strict=True):
                whole = torch.from_numpy(prompt.astype(np.int64))[None]
                out = base.model.generate(input_ids=whole, attention_mask=torch.ones_like(whole), max_new_tokens=12,
                                          do_sample=False, eos_token_id=EOS, pad_token_id=PAD)  # fmt: skip
                assert completed.ids.tolist() == out[0, len(prompt) :].tolist()
        results.append(ids_of(drawn))
    assert results[0] != results[1] != results[2]


def test_sampling_while_checkpointing() -> None:
    """transformers drops the cache under checkpointing in training mode; sampling is done in evaluation mode."""
    results = []
    for on in (False, True):
        base = make_base("llama")
        role = lora_role(base, "policy")
        if on:
            base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.model.train()
        results.append(ids_of(sample(role, prompts(), 2, [EOS], Sampling(12), 0)))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_sampled_logp_is_recomputed_logp(name: str, temperature: float) -> None:
    role = full_role(make_base(name))
    drawn = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(16, temperature), 4)
    sampled = torch.from_numpy(np.concatenate([c.logp for c in everything(drawn)]))
    torch.testing.assert_close(sampled, recomputed(role, prompts(), drawn, temperature), rtol=1e-5, atol=1e-5)
    assert bool((sampled < 0).all())


def by_hand(role: Role, prompt: np.ndarray, number: int, stops: list[int], settings: Sampling, seed: int) -> list[int]:
    """One completion by the definition: whole rows read anew for each token, no cache, no batch, no padding."""
    at = np.random.Generator(np.random.Philox(key=[seed, number])).random(settings.max_new_tokens)
    ids: list[int] = []
    while len(ids) < settings.max_new_tokens and not (ids and ids[-1] in stops):
        with role.active():
            logits = role.base.model(torch.tensor([[*prompt.tolist(), *ids]]), use_cache=False).logits[0, -1]
        summed = torch.log_softmax(logits / settings.temperature, -1).double().exp().cumsum(0).numpy()
        ids.append(int(np.searchsorted(summed, at[len(ids)] * summed[-1], side="right")))
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_sampling_is_the_definition(name: str) -> None:
    role, settings, stops = full_role(make_base(name)), Sampling(14, 1.2, max_batch=11), [EOS, 5, 9, 30, 31]
    drawn = sample(role, prompts(), 3, stops, settings, 21)
    for i, group in enumerate(ids_of(drawn)):
        assert group == [by_hand(role, prompts()[i], i * 3 + k, stops, settings, 21) for k in range(3)]


# --- what may not change the tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8", "lfm2"])
def test_max_batch_does_not_matter(name: str) -> None:
    role = full_role(make_base(name))
    results = [sample(role, prompts(), 3, [EOS, 5, 9], Sampling(12, max_batch=m), 7) for m in (3, 7, 64)]
    for other in results[1:]:
        assert ids_of(other) == ids_of(results[0])
        for a, b in zip(everything(other), everything(results[0]), strict=True):
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
            assert a.finished == b.finished


def test_prompts_after_do_not_matter() -> None:
    """A completion's uniforms depend on the seed and its number: others in the call may be there or not."""
    role = full_role(make_base("gpt2"))
    settings = Sampling(12)
    whole = ids_of(sample(role, prompts(), 2, [EOS, 5], settings, 3))
    for n in range(1, len(LENGTHS)):
        assert ids_of(sample(role, prompts()[:n], 2, [EOS, 5], settings, 3)) == whole[:n]
    changed = [*prompts()[:2], *prompts(9)[2:4], *prompts()[4:]]
    other = ids_of(sample(role, changed, 2, [EOS, 5], settings, 3))
    assert [other[i] == whole[i] for i in range(6)] == [True, True, False, False, True, True]


def test_stop_tokens_do_not_change_what_comes_before() -> None:
    """Rows that end and leave the batch do not move the others: each is a prefix of its run to the limit."""
    role = full_role(make_base("llama"))
    free = ids_of(sample(role, prompts(), 4, [], Sampling(20), 1))
    stopped = ids_of(sample(role, prompts(), 4, [3, 8, 15, 40, 41, 77], Sampling(20), 1))
    lengths = set()
    for a, b in zip(free, stopped, strict=True):
        for whole, part in zip(a, b, strict=True):
            assert whole[: len(part)] == part
            lengths.add(len(part))
    assert len(lengths) > 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8", "gemma3-window-32", "gemma2", "lfm2"])
def test_when_finished_rows_are_dropped_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, by and by, never."""
    role, stops, results = full_role(make_base(name)), [3, 8, 15, 40, 41, 77], []
    for share in (0.0, 0.3, 1.0):
        monkeypatch.setattr(generate, "CARRIED", share)
        settings = Sampling(20)
        results.append(sample(role, prompts(), 4, stops, settings, 1))
        useful = settings.stats.take()["rollout/useful_share"]
        assert (useful == 1.0) == (share == 0.0)
    for other in results[1:]:
        assert ids_of(other) == ids_of(results[0])
        for a, b in zip(everything(other), everything(results[0]), strict=True):
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-6)
            assert a.finished == b.finished


@pytest.mark.parametrize("name", ["llama", "mistral-window-32", "mistral-window-8"])
def test_buffers_that_must_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly any spare slots at a time, and with plenty."""
    role, results = full_role(make_base(name)), []
    for spare in (1, 200):
        monkeypatch.setattr(cache, "SPARE", spare)
        results.append(ids_of(sample(role, prompts(lengths=(1, 2)), 3, [EOS], Sampling(40), 1)))
        results.append(ids_of(sample(role, prompts(lengths=(1, 2, 3)), 1, [EOS], Sampling(40), 1)))
    assert results[:2] == results[2:]


def test_seeds_and_completions_differ() -> None:
    role = full_role(make_base("llama"))
    first, second, again = (ids_of(sample(role, prompts(), 2, [], Sampling(10), s)) for s in (1, 2, 1))
    assert first == again
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert all(a[0] != a[1] for a in first)
    alike = ids_of(sample(role, [prompts()[0]] * 4, 1, [], Sampling(10), 1))
    assert len({tuple(c) for (c,) in alike}) == 4, "equal prompts draw different completions"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8", "gemma2"])
def test_several_completions_are_repeated_prompts(name: str) -> None:
    """A prompt read once for n completions, against the prompt n times."""
    role = full_role(make_base(name))
    once = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(12), 11)
    repeated = sample(role, [p for p in prompts() for _ in range(3)], 1, [EOS, 5, 9], Sampling(12), 11)
    assert [c.ids.tolist() for c in everything(once)] == [c.ids.tolist() for c in everything(repeated)]
    for a, b in zip(everything(once), everything(repeated), strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


def test_the_order_of_prompts_is_kept() -> None:
    """They are decoded by length; what comes back is in the order asked for."""
    role = full_role(make_base("llama"))
    drawn = sample(role, prompts(), 1, [EOS], Sampling(8, greedy=True, max_batch=2), 0)
    alone = [sample(role, [p], 1, [EOS], Sampling(8, greedy=True), 0)[0] for p in prompts()]
    assert ids_of(drawn) == ids_of(alone)


# --- ends --------------------------------------------------------------------------------------------------


def biased(name: str = "llama", **towards: float) -> Role:
    """A role whose head prefers some tokens: t7=50.0 is 50 more on the logit of token 7."""
    role = full_role(make_base(name))
    head = role.base.model.get_output_embeddings()

    def add(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        out = logits.clone()
        for token, more in towards.items():
            out[..., int(token[1:])] += more
        return out

    head.register_forward_hook(add)
    return role


def test_every_row_stops_at_once() -> None:
    drawn = everything(sample(biased(t2=80.0), prompts(), 2, [EOS], Sampling(10), 0))
    assert all(c.ids.tolist() == [EOS] and c.finished and c.logp.shape == (1,) for c in drawn)


def test_nobody_stops() -> None:
    drawn = everything(sample(biased(t2=-80.0), prompts(), 2, [EOS], Sampling(10), 0))
    assert all(len(c.ids) == 10 and not c.finished and EOS not in c.ids for c in drawn)


@pytest.mark.parametrize("stops", [[4], [4, 5], [4, 5, 6, 50, 51, 52]])
def test_the_first_stop_token_ends_a_row_and_belongs_to_it(stops: list[int]) -> None:
    drawn = everything(sample(biased(t4=3.0, t5=3.0), prompts(), 4, stops, Sampling(12), 0))
    for completed in drawn:
        found = [i for i, t in enumerate(completed.ids.tolist()) if t in stops]
        assert completed.finished == bool(found)
        assert len(completed.ids) == (found[0] + 1 if found else 12)
        assert len(completed.logp) == len(completed.ids)
    assert {c.finished for c in drawn} == {True, False} or len(stops) > 1


def test_a_limit_of_one_token() -> None:
    drawn = everything(sample(biased(t2=2.0), prompts(), 8, [EOS], Sampling(1), 0))
    assert all(len(c.ids) == 1 and c.finished == (c.ids[0] == EOS) for c in drawn)
    assert {c.finished for c in drawn} == {True, False}


def test_a_stop_token_in_the_last_slot_counts_as_finished() -> None:
    drawn = everything(sample(biased(t4=1.5), prompts(), 40, [4], Sampling(3), 0))
    last = [c for c in drawn if len(c.ids) == 3]
    assert {c.finished for c in last} == {True, False}
    assert all(c.finished == (c.ids[2] == 4) for c in last)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pad_may_be_the_end_token(name: str) -> None:
    """Masks come from lengths: prompts that hold the pad id, or end with it, are read whole."""
    base = make_base(name)
    base.model.config.pad_token_id = EOS
    role = full_role(base)
    asked = [np.array(p, np.int32) for p in ([EOS, 9, 10], [7, EOS, EOS], [EOS], [0, 0, 5, 0], [8, 9, 11, 12, 13, EOS])]
    drawn = sample(role, asked, 2, [EOS, PAD], Sampling(8, 1.3), 5)
    sampled = torch.from_numpy(np.concatenate([c.logp for c in everything(drawn)]))
    torch.testing.assert_close(sampled, recomputed(role, asked, drawn, 1.3), rtol=1e-5, atol=1e-5)
    alone = [sample(role, [p], 1, [EOS], Sampling(8, greedy=True), 0)[0] for p in asked]
    assert ids_of(sample(role, asked, 1, [EOS], Sampling(8, greedy=True), 0)) == ids_of(alone)


# --- frequencies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    """First tokens of many completions of one prompt: chi-square within five standard deviations."""
    role = full_role(make_base("llama"))
    prompt, count = prompts()[0], 6000
    drawn = sample(role, [prompt], count, [], Sampling(1, temperature, max_batch=count), 3)[0]
    counts = np.bincount([int(c.ids[0]) for c in drawn], minlength=VOCABULARY)
    with role.active():
        logits = role.base.model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1].double()
    wanted = torch.softmax(logits / temperature, -1).numpy() * count
    likely = wanted >= 5
    counts = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(wanted[likely], wanted[~likely].sum())
    chi, freedom = float(((counts - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()), len(wanted) - 1
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)
    assert freedom > 5


def test_drawing_by_hand() -> None:
    """p = (.1, .2, .3, .4): the token is where the cumulative sum passes the uniform number."""
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(8, 1)
    at = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    drawn, logp = draw(logits, at, Sampling(1))
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]))
    drawn, logp = draw(logits, at, Sampling(1, greedy=True))
    assert drawn.tolist() == [3] * 8


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((4, 6), -torch.inf)
    logits[:, 2] = 1.0
    at = torch.tensor([0.0, 0.5, 0.999, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    drawn, logp = draw(logits, at, Sampling(1))
    assert drawn.tolist() == [2] * 4
    assert logp.tolist() == [0.0] * 4


def test_uniforms_are_a_function_of_seed_and_number() -> None:
    some = uniforms(3, [5, 0, 2], 6)
    more = uniforms(3, [0, 1, 2, 3, 4, 5], 9)
    np.testing.assert_array_equal(some, more[[5, 0, 2], :6])
    assert not np.array_equal(uniforms(4, [0], 6)[0], more[0, :6])
    assert bool((more >= 0).all())
    assert bool((more < 1).all())


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_out_of_memory_halves_and_gives_the_same(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    role = full_role(make_base("llama"))
    wanted = ids_of(sample(role, prompts(), 2, [EOS, 5], Sampling(8), 2))
    right, tried = generate.ENGINES["own"], []

    def small(policy: Role, group: Any, *rest: Any) -> Any:
        tried.append(len(group))
        if len(group) > limit:
            raise torch.OutOfMemoryError("simulated")
        return right(policy, group, *rest)

    monkeypatch.setitem(generate.ENGINES, "own", small)
    assert ids_of(sample(role, prompts(), 2, [EOS, 5], Sampling(8), 2)) == wanted
    assert max(tried) == 6


def test_out_of_memory_for_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setitem(generate.ENGINES, "own", none)
    with pytest.raises(ModelError, match="a single completion") as caught:
        sample(full_role(make_base("llama")), prompts(), 2, [EOS], Sampling(8), 2)
    assert caught.value.problems[0].where == "llama"


@pytest.mark.parametrize("change", [-1, 1])
def test_an_engine_that_returns_too_few_or_too_many(change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = generate.ENGINES["generate"]

    def wrong(*rest: Any) -> Any:
        completed = right(*rest)
        return completed[:change] if change < 0 else [*completed, completed[0]]

    monkeypatch.setitem(generate.ENGINES, "generate", wrong)
    with pytest.raises(ModelError, match=rf"'generate' returned {12 + change} completions of 12") as caught:
        sample(full_role(make_base("llama")), prompts(), 2, [EOS], Sampling(4, engine="generate"), 2)
    assert caught.value.problems[0].where == "rollout.engine"


def test_stats_count_what_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    role, settings = full_role(make_base("llama")), Sampling(9)
    assert settings.stats.take() == {}
    drawn = everything(sample(role, prompts(), 2, [EOS, 5], settings, 2))
    drawn += everything(sample(role, prompts(), 1, [EOS, 5], replace(settings, greedy=True), 2))
    found = settings.stats.take()
    assert found["rollout/tokens"] == sum(len(c.ids) for c in drawn)
    assert found["rollout/tokens_per_second"] == pytest.approx(found["rollout/tokens"] / found["rollout/seconds"])
    assert 0 < found["rollout/useful_share"] <= 1
    assert found["rollout/halvings"] == 0
    assert settings.stats.take() == {}


def test_no_prompts_and_no_open_graph() -> None:
    base: Base = make_base("llama")
    role, other = lora_role(base, "policy"), lora_role(base, "other")
    assert sample(role, [], 3, [EOS], Sampling(4), 0) == []
    with other.active(train=True):
        other.logp(collate([Sample(prompts()[0], (Completion(prompts()[1], np.ones(3, bool)),), {}, "")], packed=True))
    with pytest.raises(RoleError):
        sample(role, prompts(), 1, [EOS], Sampling(4), 0)
