"""Packed and padded rows, one row alone and a model's own forward give the same numbers and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.models.attention import plan
from rlhf_cli.models.roles import Role, RoleError
from tests.models.worlds import PACKED, PADDED, full_role, kinds, lora_role, make_base, make_sample

KINDS = list(kinds())


def measured(role: Role, batch: Batch, temperature: float = 1.0) -> dict[str, Tensor]:
    """Everything a role says of a batch."""
    with role.active():
        of = role.logp(batch, temperature)
        return {"logp": of.logp, "entropy": of.entropy, "mean": of.mean, "values": role.values(batch),
                "score": role.score(batch)}  # fmt: skip


def own_logp(role: Role, sample: Sample, completion: Completion, temperature: float = 1.0) -> Tensor:
    """Scored tokens of one completion, from the model's own logits on one row without any padding."""
    ids = torch.from_numpy(np.concatenate([sample.prompt, completion.ids]).astype(np.int64))[None]
    with role.active():
        logits = role.base.model(input_ids=ids).logits[0].float() / temperature
    logp = torch.log_softmax(logits, dim=-1)
    at = len(sample.prompt) + np.flatnonzero(completion.scored)
    return torch.stack([logp[i - 1, ids[0, i]] for i in at])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_padded(name: str, kind: str) -> None:
    role = full_role(make_base(name), head=True)
    samples = kinds()[kind]
    packed, padded = (measured(role, collate(samples, packed=p)) for p in (True, False))
    for key in packed:
        assert packed[key].shape == padded[key].shape
        torch.testing.assert_close(packed[key], padded[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logp_is_the_models_own(name: str, temperature: float) -> None:
    """Against a plain forward of each row alone: an offset shared by both layouts would show here."""
    base = make_base(name)
    role = full_role(base, head=True)
    samples = [s for kind in ("demonstrations", "pairs", "rankings") for s in kinds(3)[kind]]
    ours = measured(role, collate(samples, packed=base.packed), temperature)["logp"]
    theirs = torch.cat([own_logp(role, s, c, temperature) for s in samples for c in s.completions])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_score_is_read_at_the_last_token(name: str) -> None:
    role = full_role(make_base(name), head=True)
    samples = kinds(1)["pairs"]
    score = measured(role, collate(samples, packed=True))["score"]
    rows = [np.concatenate([s.prompt, c.ids]).astype(np.int64) for s in samples for c in s.completions]
    with role.active():
        assert role.head is not None
        wanted = [
            role.head(role.base.model.base_model(torch.from_numpy(r)[None]).last_hidden_state[0, -1]) for r in rows
        ]
    torch.testing.assert_close(score, torch.cat(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_value_is_of_the_state_before_its_token(name: str, packed: bool) -> None:
    """Against a plain forward of each row alone: nothing of the token itself is in its value, all before it is."""
    role = full_role(make_base(name, packed=packed), head=True)
    samples = kinds(1)["demonstrations"] + kinds(1)["pairs"]
    values = measured(role, collate(samples, packed=packed))["values"]
    wanted = []
    for sample in samples:
        for completion in sample.completions:
            row = torch.from_numpy(np.concatenate([sample.prompt, completion.ids]).astype(np.int64))
            for at in len(sample.prompt) + np.flatnonzero(completion.scored):
                with role.active():
                    assert role.head is not None
                    wanted.append(role.head(role.base.model.base_model(row[None, :at]).last_hidden_state[0, -1]))
    torch.testing.assert_close(values, torch.cat(wanted), rtol=1e-5, atol=1e-5)


def gradients(role: Role, samples: list[Sample], packed: bool, loss: Callable[[Role, Batch], Tensor]) -> list[Tensor]:
    """Of every trained parameter."""
    with role.active(train=True):
        role.backward(loss(role, collate(samples, packed=packed)))
    out = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for _, p in role.parameters]
    for _, p in role.parameters:
        p.grad = None
    return out


def weighted_logp(role: Role, batch: Batch) -> Tensor:
    of = role.logp(batch)
    weight = torch.linspace(0.5, 1.5, len(of.logp))
    return -(weight * of.logp).sum() + 0.1 * of.entropy.sum() + 0.01 * of.mean.sum()


def weighted_values(role: Role, batch: Batch) -> Tensor:
    values = role.values(batch)
    return (torch.linspace(0.5, 1.5, len(values)) * values**2).sum()


def weighted_score(role: Role, batch: Batch) -> Tensor:
    score = role.score(batch)
    return (torch.linspace(-1.5, 1.5, len(score)) * score).sum()


LOSSES = {"logp": weighted_logp, "values": weighted_values, "score": weighted_score}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_equal(name: str, loss: str) -> None:
    role = full_role(make_base(name), head=loss != "logp")
    samples = [s for kind in KINDS for s in kinds(2)[kind] if s.completions]
    pairs = zip(*(gradients(role, samples, p, LOSSES[loss]) for p in (True, False)), role.parameters, strict=True)
    moved = 0
    for packed, padded, (parameter, _) in pairs:
        scale = float(padded.abs().max())
        moved += scale > 0
        assert float((packed - padded).abs().max()) <= 1e-5 * max(scale, 1.0), parameter
    assert moved >= 0.9 * len(role.parameters)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8"])
def test_gradients_of_an_adapter_are_equal(name: str) -> None:
    role = lora_role(make_base(name), "policy", head=True)
    samples = kinds(4)["pairs"]
    for loss in LOSSES.values():
        for packed, padded in zip(*(gradients(role, samples, p, loss) for p in (True, False)), strict=True):
            assert float((packed - padded).abs().max()) <= 1e-5 * max(float(padded.abs().max()), 1.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-8", "gemma2", "bloom"])
def test_neighbours_and_padding_do_not_matter(name: str) -> None:
    """A sample alone, and the same beside others that are longer: equal log-probabilities."""
    base = make_base(name)
    role = full_role(base, head=True)
    random = np.random.default_rng(8)
    sample, others = make_sample(random, 6, 4, 9), [make_sample(random, 50, 60), make_sample(random, 3, 2)]
    for packed in {base.packed, False}:
        alone = measured(role, collate([sample], packed=packed))
        beside = measured(role, collate([others[0], sample, others[1]], packed=packed))
        first = int(others[0].completions[0].scored.sum())
        torch.testing.assert_close(beside["logp"][first : first + 13], alone["logp"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(beside["score"][1:3], alone["score"], rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    role = full_role(make_base("gpt2"), head=True)
    batch = collate(kinds()["demonstrations"], packed=False)
    empty = batch.segment < 0
    assert bool(empty.any())
    before = measured(role, batch)
    batch.ids[empty] = 55
    batch.position[empty] = 77
    after = measured(role, batch)
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_prompt(packed: bool) -> None:
    """The first token has no predictor, so it is never scored; the rest is the model's own."""
    role = full_role(make_base("gpt2"), head=True)
    random = np.random.default_rng(5)
    ids = random.integers(3, 97, 8).astype(np.int32)
    scored = np.array([False] + [True] * 7)
    sample = Sample(np.zeros(0, np.int32), (Completion(ids, scored),), {}, "empty prompt")
    batch = collate([make_sample(random, 4, 3), sample], packed=packed)
    of = measured(role, batch)
    torch.testing.assert_close(of["logp"][3:], own_logp(role, sample, sample.completions[0]), rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(of["score"]).all())


def test_one_token_rows() -> None:
    """Prompts and completions of one token: the smallest rows that exist."""
    role = full_role(make_base("llama"), head=True)
    samples = [make_sample(np.random.default_rng(1), 1, 1), make_sample(np.random.default_rng(2), 1, 1, 1)]
    packed, padded = (measured(role, collate(samples, packed=p)) for p in (True, False))
    assert packed["logp"].shape == (3,)
    torch.testing.assert_close(packed["logp"], padded["logp"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed["score"], padded["score"], rtol=1e-5, atol=1e-5)


def test_no_square_mask() -> None:
    """The plan of a packed row holds masks of (own, parent + own) only."""
    batch = collate([make_sample(np.random.default_rng(i), 10, 3, 4) for i in range(50)], packed=True)
    assert batch.ids.shape == (1, 850)
    masks = [m for m in plan(batch).mask if m is not None]
    assert {tuple(m.shape) for m in masks} == {(3, 13), (4, 14)}
    assert bool(masks[0][:, :10].all())
    assert masks[0][:, 10:].tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_an_only_completion_continues_its_prompt_without_a_mask() -> None:
    """As one causal segment; with a second completion, also of another sample of that prompt, both have masks."""
    one, two = (make_sample(np.random.default_rng(i), 10, 3) for i in range(2))
    segments = plan(collate([one, two], packed=True))
    assert (segments.lengths, segments.parent) == ((13, 13), (None, None))
    assert all(mask is None for mask in segments.mask)
    segments = plan(collate([one, two, replace(two, completions=(one.completions[0],))], packed=True))
    assert (segments.lengths, segments.parent) == ((13, 10, 3, 3), (None, None, 1, 1))
    assert sum(mask is not None for mask in segments.mask) == 2


def test_a_packed_batch_needs_a_base_that_takes_it() -> None:
    role = full_role(make_base("llama", packed=False))
    with pytest.raises(RoleError, match="packed"), role.active():
        role.logp(collate(kinds()["pairs"], packed=True))
