"""Settings of the sampler: stop strings across token borders, shortest lengths, truncated distributions, recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_cli.data.template import Template, load_template
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.rollout import RolloutSettings
from rlhf_cli.rollouts.generate import sample
from rlhf_cli.rollouts.rows import draw, truncated
from rlhf_cli.rollouts.sampling import Sampling
from rlhf_cli.rollouts.stops import TextStops, split
from tests.data.conftest import sentencepiece_like
from tests.models.worlds import EOS, full_role, make_base, write_tokenizer
from tests.rollouts.test_generate import everything, ids_of, prompts, recomputed


@pytest.fixture(scope="module")
def byte_template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return load_template(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), None, [])


@pytest.fixture(scope="module")
def bar_template() -> Template:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like(), bos_token="<s>", eos_token="</s>")
    return load_template(tokenizer, None, [])


def letters(template: Template, text: str) -> list[int]:
    """One token for each byte, or for each character where the vocabulary has no bytes."""
    whole = template.encoder.whole
    ids = [i for c in text for i in whole.encode(c, add_special_tokens=False).ids]
    assert template.decode(ids) == text
    return ids


def talker(template: Template, text: str) -> Role:
    """A role that says little else than the tokens of these letters."""
    base = make_base("llama")
    base.model.resize_token_embeddings(len(template.tokenizer))
    role = full_role(base)
    liked = letters(template, text)

    def add(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        out = logits.clone()
        out[..., liked] += 9.0
        return out

    base.model.get_output_embeddings().register_forward_hook(add)
    return role


# --- stop strings ------------------------------------------------------------------------------------------


STOPS = ("abc", "ba", "é", "c\n\nb")


@pytest.mark.parametrize("engine", ["own", "generate", "continuous"])
def test_the_first_token_that_completes_a_stop_string_is_the_last(byte_template: Template, engine: str) -> None:
    """Against the whole text of each prefix of the run to the limit."""
    role = talker(byte_template, "abc é\n")
    stops = TextStops(byte_template, STOPS)
    if engine == "continuous":
        drawn = sample(role, prompts(), 6, [EOS], Sampling(30, stops=stops, engine=engine), 3)
        for prompt, group in zip(prompts(), drawn, strict=True):
            for c in group:
                whole = byte_template.decode(c.ids, after=prompt)
                before = byte_template.decode(c.ids[:-1], after=prompt)
                assert c.finished == (any(s in whole for s in STOPS) or c.ids[-1] == EOS)
                assert not any(s in before for s in STOPS)
                assert len(c.logp) == len(c.ids)
        return
    free = sample(role, prompts(), 6, [EOS], Sampling(30, engine=engine), 3)
    drawn = sample(role, prompts(), 6, [EOS], Sampling(30, stops=stops, engine=engine), 3)
    ends = set()
    for prompt, whole_group, group in zip(prompts(), free, drawn, strict=True):
        for whole, c in zip(whole_group, group, strict=True):
            texts = [byte_template.decode(whole.ids[:n], after=prompt) for n in range(1, len(whole.ids) + 1)]
            hits = [n for n, text in enumerate(texts, 1) if any(s in text for s in STOPS)]
            assert c.ids.tolist() == whole.ids[: hits[0] if hits else None].tolist()
            assert c.finished == (bool(hits) or whole.finished)
            ends |= {s for s in STOPS if byte_template.decode(c.ids, after=prompt).endswith(s)}
    assert ends >= {"abc", "ba", "é"}


def test_a_stop_string_inside_a_token(byte_template: Template) -> None:
    """The rest of the text of the token that completes it stays."""
    ids = byte_template.encoder.whole.encode("Once upon", add_special_tokens=False).ids
    assert [byte_template.decode([i]) for i in ids] == ["Once", " upon"]
    stops, none = TextStops(byte_template, ("ce u",)), np.array([5], np.int32)
    assert [stops.ends(none, ids[:n]) for n in (1, 2)] == [False, True]


def test_a_stop_string_does_not_begin_in_the_prompt(byte_template: Template) -> None:
    prompt, ids = np.array(letters(byte_template, "xab"), np.int32), letters(byte_template, "cab")
    assert not TextStops(byte_template, ("abc",)).ends(prompt, ids[:1])
    assert TextStops(byte_template, ("cab",)).ends(prompt, ids)


def test_a_long_stop_string_and_a_long_completion(byte_template: Template) -> None:
    stop = "the end — of it all"
    ids = letters(byte_template, "ab " * 40 + stop + "\n")
    stops, none = TextStops(byte_template, (stop, "zzz")), np.array([5], np.int32)
    assert [n for n in range(1, len(ids) + 1) if stops.ends(none, ids[:n])] == [len(ids) - 1]


def test_spaces_of_a_tokenizer_that_drops_the_first(bar_template: Template) -> None:
    bar, a, b, o = (bar_template.encoder.whole.token_to_id(c) for c in "▁abo")
    stops, prompt = TextStops(bar_template, (" b", "a ")), np.array([1, o], np.int32)
    assert stops.ends(prompt, [bar, b]), "a space at the start of a completion counts"
    assert [stops.ends(prompt, [a, bar, b][:n]) for n in (1, 2)] == [False, True]
    assert not stops.ends(prompt, [a, b])


def test_special_tokens_are_ids_and_other_strings_text(byte_template: Template) -> None:
    ids, text = split(["<|im_end|>", "a", "stop here", "</s>", "a"], byte_template)
    assert ids == (byte_template.encoder.whole.token_to_id("<|im_end|>"), EOS)
    assert text is not None
    assert text.strings == ("a", "stop here")
    assert split(["</s>"], byte_template) == ((EOS,), None)
    assert split([], byte_template) == ((), None)


def test_further_stop_tokens() -> None:
    """Those of the settings end a row as those given do."""
    role = full_role(make_base("llama"))
    one = sample(role, prompts(), 3, [EOS, 5, 9], Sampling(12), 1)
    other = sample(role, prompts(), 3, [EOS], Sampling(12, stop_ids=(9, 5)), 1)
    assert ids_of(one) == ids_of(other)
    assert [c.finished for c in everything(one)] == [c.finished for c in everything(other)]


@pytest.mark.parametrize("engine", ["own", "generate"])
def test_stops_before_the_shortest_length_are_read_over(engine: str) -> None:
    """Nothing else changes: the same draws, and log-probabilities that are recomputed ones."""
    role, stops = full_role(make_base("llama")), [EOS, 5, 9, 30, 31, 32]
    free = ids_of(sample(role, prompts(), 4, [], Sampling(16), 8))
    drawn = sample(role, prompts(), 4, stops, Sampling(16, min_new_tokens=7, engine=engine), 8)
    over = 0
    for a, b in zip(free, drawn, strict=True):
        for whole, c in zip(a, b, strict=True):
            hits = [n for n, token in enumerate(whole, 1) if token in stops and n >= 7]
            assert c.ids.tolist() == whole[: hits[0] if hits else None]
            assert c.finished == bool(hits)
            over += any(token in stops for token in whole[:6])
    assert over > 0
    sampled = torch.from_numpy(np.concatenate([c.logp for c in everything(drawn)]))
    torch.testing.assert_close(sampled, recomputed(role, prompts(), drawn, 1.0), rtol=1e-5, atol=1e-5)


# --- truncated distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": 500}, []),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"top_k": 20, "top_p": 0.7, "min_p": 0.1},
         [TopKLogitsWarper(20), TopPLogitsWarper(0.7), MinPLogitsWarper(0.1)]),
    ],
)  # fmt: skip
def test_what_is_left_is_what_transformers_leaves(settings: dict[str, Any], warpers: list[Any]) -> None:
    logits = torch.randn(64, 97, generator=torch.Generator().manual_seed(2)) * 2
    found, wanted = truncated(logits.log_softmax(-1), Sampling(1, **settings)), logits
    for warp in warpers:
        wanted = warp(None, wanted)
    torch.testing.assert_close(found, wanted.log_softmax(-1))


def test_the_log_probability_is_that_of_the_truncated_distribution() -> None:
    role = full_role(make_base("llama"))
    drawn = sample(role, prompts(), 8, [EOS], Sampling(12, top_k=3), 4)
    sampled = torch.from_numpy(np.concatenate([c.logp for c in everything(drawn)]))
    whole = recomputed(role, prompts(), drawn, 1.0)
    assert bool((sampled >= whole - 1e-5).all())
    assert float((sampled - whole).mean()) > 0.1
    assert float(sampled.exp().min()) >= 1e-4


def test_only_tokens_that_are_left_are_drawn() -> None:
    logits = torch.randn(1, 97, generator=torch.Generator().manual_seed(3)).repeat(4000, 1)
    at = torch.rand(4000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens, logp = draw(logits, at, Sampling(1, top_k=5))
    assert set(tokens.tolist()) == set(logits[0].topk(5).indices.tolist())
    share = torch.bincount(tokens, minlength=97)[tokens] / 4000
    assert float((share - logp.exp()).abs().max()) < 0.04


# --- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 0.9}, ["rollout.top_p", "rollout.allow_biased_sampling: true"]),
        ({"top_k": 5, "min_p": 0.1}, ["rollout.top_k, rollout.min_p", "rollout.allow_biased_sampling: true"]),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, ["rollout.min_new_tokens = 9", "rollout.max_new_tokens = 8"]),
        ({"engine": "continuous", "min_new_tokens": 1}, ["rollout.engine: continuous", "rollout.min_new_tokens"]),
        ({"engine": "vllm"}, ["engine"]),
        ({"stop": [""]}, ["stop"]),
        ({"top_p": 0.0, "allow_biased_sampling": True}, ["top_p"]),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        RolloutSettings(**settings)
    (error,) = caught.value.errors()
    text = f"{error['loc']} {error['msg']}"
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_from_a_recipe(byte_template: Template) -> None:
    plain = Sampling.of(RolloutSettings(), byte_template)
    assert plain == Sampling(128)
    assert plain.warning is None
    assert Sampling.of(RolloutSettings(top_p=1.0), byte_template).warning is None
    settings = RolloutSettings(
        max_new_tokens=9, temperature=0.7, stop=["<|im_end|>", "."], min_new_tokens=2, top_k=4, top_p=0.5, min_p=0.1,
        allow_biased_sampling=True, engine="generate", max_batch=3,
    )  # fmt: skip
    found = Sampling.of(settings, byte_template)
    end = byte_template.encoder.whole.token_to_id("<|im_end|>")
    assert found == Sampling(
        9, 0.7, max_batch=3, min_new_tokens=2, stop_ids=(end,), stops=TextStops(byte_template, (".",)), top_k=4,
        top_p=0.5, min_p=0.1, engine="generate",
    )  # fmt: skip
    assert found.warning is not None
    assert "\n" not in found.warning
    for word in ("rollout.top_k, rollout.top_p, rollout.min_p", "KL may be negative", "rollout/logprob_gap"):
        assert word in found.warning


def test_stats_are_shared_by_what_is_made_from_settings_and_by_nothing_else() -> None:
    one, other = Sampling(3), Sampling(3)
    assert replace(one, greedy=True).stats is one.stats
    assert other.stats is not one.stats
    assert one == other
