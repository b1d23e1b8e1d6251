"""Process reward models on sampled text: where steps end, what is asked, in own or other tokens, what is placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_cli.data.batch import collate
from rlhf_cli.data.examples import Message, Prompt, Steps, Task
from rlhf_cli.data.template import Template, load_template
from rlhf_cli.data.tokens import Sample, ask_sample
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import frozen_role, with_head
from rlhf_cli.models.roles import Role
from rlhf_cli.models.save import save_policy, save_reward
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.normalise import Scaling
from rlhf_cli.rollouts.places import retokenise
from rlhf_cli.rollouts.rewards import Rollout, total
from rlhf_cli.rollouts.scorers import Cut, ProcessReward, in_other_tokens, in_own_tokens, tokens_of
from tests.data.conftest import sentencepiece_like
from tests.models.worlds import lora_role, write_model, write_tokenizer

LINES = Cut("\n")
SETTINGS = {"classes": "binary", "neutral": "right", "aggregation": "product"}
Infer = Any


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """Of a byte-level tokenizer."""
    return load_template(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def other() -> Template:
    """Of a tokenizer that writes a bar for each space and puts one before every text."""
    from transformers import PreTrainedTokenizerFast

    return load_template(
        PreTrainedTokenizerFast(
            tokenizer_object=sentencepiece_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


def said(template: Template, text: str, prompt: Prompt = "Q: ", *, finished: bool = True) -> tuple[Task, Sample]:
    """A task and the policy's tokens of a completion."""
    task = Task(prompt, "t:1")
    return task, retokenise(template, task, text, finished=finished)


# --- where steps end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("separator", "text", "steps", "missing"),
    [
        ("\n", "one\ntwo\n", ["one\n", "two\n"], False),
        ("\n", "one\ntwo", ["one\n", "two"], True),
        ("\n", "one\n\ntwo", ["one\n", "\ntwo"], True),
        ("\n", "\n\none\n", ["\n\none\n"], False),
        ("\n", "one\n  \n", ["one\n"], False),
        ("\n", "", [""], True),
        ("\n", "\n", ["\n"], False),
        ("\n", "  ", ["  "], True),
        (" ки", "a ки b ки", ["a ки", " b ки"], False),
        (" ки", "a ки ки b", ["a ки", " ки b"], True),
        ("++", "a+++b", ["a++", "+b"], True),
        ("\n\n", "a\nb\n\nc", ["a\nb\n\n", "c"], True),
    ],
)
def test_steps(separator: str, text: str, steps: list[str], missing: bool) -> None:
    ends, open_ = Cut(separator).ends(text)
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == steps
    assert open_ == missing


@pytest.mark.parametrize(
    ("by", "text", "segments"),
    [
        ("sentence", "One, two. Three!  Four", ["One, two.", " Three!", "  Four"]),
        ("sub_sentence", "One, two. ", ["One,", " two."]),
        ("answer", "One, two. \n", ["One, two."]),
        ("sentence", "", [""]),
        ("sentence", " \n", [""]),
    ],
)
def test_segments(by: Any, text: str, segments: list[str]) -> None:
    ends, missing = Cut("\n", by).ends(text)
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == segments
    assert not missing


# --- what the model is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Q: ", (Message("user", "two plus two?"),)])
def test_the_policys_own_tokens_are_those_of_training(template: Template, prompt: Prompt) -> None:
    """A sampled text with all its separators is asked as its labelled row was trained."""
    steps = ("two is two\n", "plus two\n", "is four\n")
    trained = template.encoder.now(ask_sample(Steps(prompt, steps, (1.0, 1.0, 1.0), "t:1"), template))
    asked = in_own_tokens(template, LINES, said(template, "".join(steps), prompt)[1], "".join(steps))
    (kept,), (whole,) = asked.sample.completions, trained.completions
    np.testing.assert_array_equal(asked.sample.prompt, trained.prompt)
    np.testing.assert_array_equal(kept.ids, whole.ids[: len(kept.ids)])
    np.testing.assert_array_equal(kept.scored, whole.scored[: len(kept.ids)])
    assert not whole.scored[len(kept.ids) :].any()
    assert asked.places == np.flatnonzero(kept.scored).tolist()


@pytest.mark.parametrize("finished", [True, False])
def test_a_last_step_without_its_separator_gets_it(template: Template, finished: bool) -> None:
    """Its label stood behind a separator in training; the reward stands on its last word, the end token is not read."""
    text = "two is two\nis four"
    _, sample = said(template, text, finished=finished)
    asked = in_own_tokens(template, LINES, sample, text)
    (kept,) = asked.sample.completions
    assert template.decode(kept.ids) == text + "\n"
    ids = sample.completions[0].ids.tolist()
    assert asked.places == [ids.index(template.encoder.literal("\n")[0]), len(ids) - 1 - finished]
    assert np.flatnonzero(kept.scored).tolist() == [asked.places[0], len(kept.ids) - 1]


def test_segments_are_asked_at_their_last_character(template: Template) -> None:
    text = "Hello there, how are you. Fine. "
    _, sample = said(template, text)
    asked = in_own_tokens(template, Cut("\n", "sentence"), sample, text)
    (kept,) = asked.sample.completions
    for count, end in zip(asked.places, ["you.", "Fine."], strict=True):
        assert template.decode(kept.ids[: count + 1]).endswith(end)
    assert np.flatnonzero(kept.scored).tolist() == asked.places


@pytest.mark.parametrize("cut", [LINES, Cut("\n", "sub_sentence"), Cut("\n", "answer")])
@pytest.mark.parametrize(
    "text", ["two is two\nplus, two\nis four", "naïve, 😀 café.\nyes", " \n", "", "one", "a\n\nb ", "😀\n😀\n"]
)
def test_other_tokens_are_mapped_back_by_characters(template: Template, other: Template, cut: Cut, text: str) -> None:
    """The same steps as in the policy's own tokens, at the same places of these."""
    task, sample = said(template, text)
    own, mapped = in_own_tokens(template, cut, sample, text), in_other_tokens(other, template, cut, task, sample, text)
    if mapped is None:
        assert not text.strip()
        return
    assert mapped.places == own.places
    (kept,) = mapped.sample.completions
    assert kept.scored.sum() == len(own.places)
    assert kept.scored[-1], "nothing behind the last step is read"
    steps = Steps(task.prompt, tuple(pieces_of(cut, text)), (1.0,) * len(pieces_of(cut, text)), "t:1")
    trained = other.encoder.now(ask_sample(steps, other))
    np.testing.assert_array_equal(mapped.sample.prompt, trained.prompt)
    np.testing.assert_array_equal(kept.ids, trained.completions[0].ids[: len(kept.ids)])
    np.testing.assert_array_equal(kept.scored, trained.completions[0].scored[: len(kept.ids)])


def pieces_of(cut: Cut, text: str) -> list[str]:
    """The steps as a row of data has them, with their separators."""
    ends, missing = cut.ends(text)
    pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return [*pieces[:-1], pieces[-1] + cut.separator * missing]


# --- what it says -------------------------------------------------------------------------------------------


def numbers_of(wanted: dict[int, list[float]]) -> Infer:
    """An `Engine.infer` that says these probabilities of the completions, and checks how many it was asked for."""

    def infer(role: Any, samples: list[Sample], function: Any, unit: str) -> list[torch.Tensor]:
        assert unit == "token"
        for sample, values in zip(samples, wanted.values(), strict=True):
            assert int(sample.completions[0].scored.sum()) == len(values)
        return [torch.tensor(values) for values in wanted.values()]

    return infer


def reward(
    template: Template,
    *,
    place: Literal["end", "steps"] = "steps",
    value: Literal["probability", "sign"] = "probability",
    baseline: float = 0.5,
    own: Template | None = None,
    cut: Cut = LINES,
    role: Any = None,
    scaling: Scaling | None = None,
    answers: tuple[int, ...] = (),
    **settings: Any,
) -> ProcessReward:
    """A process reward model of which only the answers count."""
    return ProcessReward(
        "prm", 1.0, "reward", scaling or Scaling(), role, SETTINGS | settings, answers, cut, template, own, place,
        value, baseline,
    )  # fmt: skip


def rolled(template: Template, *texts: str) -> Rollout:
    tasks, samples = zip(*(said(template, text) for text in texts), strict=True)
    return Rollout(tasks, texts, samples, [True] * len(texts))


def test_each_step_is_rewarded_at_its_last_token(template: Template) -> None:
    rollout = rolled(template, "two\nfour\n", "one")
    infer = numbers_of({0: [0.9, 0.25], 1: [0.5]})
    scores = reward(template)(rollout, infer)
    assert scores.tokens is not None
    assert scores.sequence.tolist() == [0.0, 0.0]
    ids = rollout.samples[0].completions[0].ids
    newline = template.encoder.literal("\n")[0]
    np.testing.assert_allclose(scores.tokens[0], np.select([ids == newline], [1.0]) * 0 + placed(ids, newline))
    np.testing.assert_allclose(scores.totals, [0.4 - 0.25, 0.0], atol=1e-7)
    plain = reward(template, baseline=0.0)(rollout, infer)
    np.testing.assert_allclose(plain.totals, [1.15, 0.5], atol=1e-7)
    signs = reward(template, value="sign")(rollout, infer)
    np.testing.assert_allclose(signs.totals, [0.0, -1.0])
    assert sorted(signs.tokens[0].tolist())[0] == -1.0  # type: ignore[index]


def placed(ids: np.ndarray, newline: int) -> np.ndarray:
    """0.4 and -0.25 at the first and second line end."""
    out = np.zeros(len(ids))
    out[np.flatnonzero(ids == newline)] = [0.4, -0.25]
    return out


@pytest.mark.parametrize(
    ("how", "wanted"), [("product", 0.9 * 0.25), ("min", 0.25), ("mean", 0.575), ("last", 0.25)]
)  # fmt: skip
def test_the_end_gets_the_aggregate(template: Template, how: str, wanted: float) -> None:
    rollout = rolled(template, "two\nfour\n", "one")
    scores = reward(template, place="end", aggregation=how)(rollout, numbers_of({0: [0.9, 0.25], 1: [0.5]}))
    assert scores.tokens is None
    np.testing.assert_allclose(scores.sequence, [wanted, 0.5], atol=1e-7)


@pytest.mark.parametrize("place", ["end", "steps"])
def test_a_text_that_leaves_no_token_is_not_valid(template: Template, other: Template, place: Any) -> None:
    rollout = rolled(template, "two\n", "")
    cut = Cut("\n", "sentence")
    scores = reward(template, own=other, place=place, cut=cut)(rollout, numbers_of({0: [0.75]}))
    assert scores.valid.tolist() == [True, False]
    np.testing.assert_allclose(scores.totals, [0.75 if place == "end" else 0.25, 0.0])


def test_steps_are_clipped_one_by_one_and_weighted(template: Template) -> None:
    rollout = rolled(template, "two\nfour\n", "one")
    one = reward(template, scaling=Scaling(clip=0.3))
    totals = total([one], rollout, numbers_of({0: [0.9, 0.25], 1: [0.5]}), learn=True)
    np.testing.assert_allclose(totals.reward.totals, [0.3 - 0.25, 0.0], atol=1e-7)
    assert totals.metrics["rewards/prm/clipped"] == 1.0


# --- trained models, saved and opened -----------------------------------------------------------------------


def ask(role: Role, samples: list[Sample], function: Any, unit: str) -> list[torch.Tensor]:
    """`Engine.infer` in its simplest form."""
    batch = collate(samples, packed=False)
    with role.active():
        out = function(batch)
    owner = batch.example if unit == "sequence" else batch.example[batch.owners]
    return [out[owner == n] for n in range(len(samples))]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_saved_process_model_says_the_same_as_a_frozen_role(tmp_path: Path, lora: bool, classes: int) -> None:
    """Weights, and a head of several outputs with its bias, come back; a shared base is used where it fits."""
    folder = write_model(tmp_path / "base")
    made = ModelSettings(name_or_path=str(folder), dtype="float32")
    text, base = load_text(made), open_base(folder)
    trained = lora_role(base, "policy") if lora else Role("policy", base, trained=True)
    role = with_head(trained, "reward", classes)
    assert role.head is not None
    torch.manual_seed(4)
    nn.init.normal_(role.head.weight)
    nn.init.normal_(role.head.bias)
    save_reward(role, text, tmp_path / "prm", ["wrong", "neutral", "right"][-classes:])
    steps = Steps("Q: ", ("two\n", "is four\n"), (1.0, 1.0), "t:1")
    samples = [text.template.encoder.now(ask_sample(steps, text.template))]
    settings = made.model_copy(update={"name_or_path": str(tmp_path / "prm")})
    shared = lora_role(open_base(folder), "other").base
    again = frozen_role("reward-0", settings, load_text(settings, "process"), shared)
    assert (again.base is shared) == lora
    (before,), (after,) = ask(role, samples, role.classes, "token"), ask(again, samples, again.classes, "token")
    assert before.shape == (2, classes)
    torch.testing.assert_close(after, before)
    prm = reward(text.template, role=again, neutral="wrong", baseline=0.0)
    scores = prm(rolled(text.template, "two\nis four\n"), ask)
    good = before.softmax(1)[:, -1]
    np.testing.assert_allclose(scores.totals[0], float(good.sum()), rtol=1e-5)


def test_two_tokens_of_a_language_model(tmp_path: Path) -> None:
    """The probability of the good token against the bad one, right behind each step."""
    folder = write_model(tmp_path / "base")
    made = ModelSettings(name_or_path=str(folder), dtype="float32")
    text, base = load_text(made), open_base(folder)
    role = lora_role(base, "policy")
    save_policy(role, text, tmp_path / "prm")
    settings = made.model_copy(update={"name_or_path": str(tmp_path / "prm")})
    again = frozen_role("reward-0", settings, load_text(settings), lora_role(open_base(folder), "other").base)
    template = text.template
    good, bad = tokens_of(template, ["+", "-"])
    assert (template.decode([good]), template.decode([bad])) == ("+", "-")
    prm = reward(template, role=again, answers=(good, bad), baseline=0.0, aggregation="min")
    rollout = rolled(template, "two\nfour\n", "one")
    scores = prm(rollout, ask)
    wanted = []
    for text_ in ("two\n", "two\nfour\n"):
        ids = [*rollout.samples[0].prompt, *template.encoder.literal(text_, [1])]
        with again.active():
            logits = again.base.model(input_ids=torch.tensor([ids])).logits[0, -1]
        wanted.append(float(torch.softmax(logits[[good, bad]], 0)[0]))
    assert scores.tokens is not None
    np.testing.assert_allclose(scores.tokens[0][scores.tokens[0] != 0], wanted, rtol=1e-5)


def open_base(folder: Path) -> Any:
    """The weights of a folder."""
    from rlhf_cli.models.base import load_base

    return load_base(str(folder), ModelSettings(name_or_path=str(folder), dtype="float32"), trained=False)
