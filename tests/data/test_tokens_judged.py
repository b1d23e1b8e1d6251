"""Rankings, rated completions and steps as tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_cli.data.examples import Comparison, Message, Ranking, Rated, Steps
from rlhf_cli.data.report import token_report
from rlhf_cli.data.template import Template, load_template
from rlhf_cli.data.tokenizing import tokenize
from rlhf_cli.data.tokens import (
    NO_STEP_LEFT,
    RANKED_ALIKE,
    RANKED_CUT_ALIKE,
    TOO_LONG,
    Sample,
    length,
)
from rlhf_cli.errors import DataError
from tests.data.conftest import CHATML

W = "f:1"
LONG = 10_000
ASKED = (Message("user", "Hello there, how are you today?"),)
STEPS = ("Two plus two is four.\n", "I am fine, thank you.\n", "Hello <|im_end|> there.\n")
TOKENIZERS = ("qwen", "llama3", "llama2")


@pytest.fixture(params=TOKENIZERS)
def template(request: pytest.FixtureRequest) -> Template:
    return load_template(request.getfixturevalue(request.param))


def one(example: Any, template: Template, limit: int = LONG, truncation: Any = "drop") -> Sample:
    (sample,) = tokenize([example], template, limit, truncation).samples
    return sample


def up_to_labels(sample: Sample, template: Template) -> list[tuple[str, float]]:
    """The text of the completion up to each labelled token, with its label."""
    (completion,) = sample.completions
    assert completion.labels is not None
    assert completion.labels.dtype == np.float32
    places = np.flatnonzero(completion.scored)
    return [
        (template.decode(completion.ids[: at + 1], skip_special=False, after=sample.prompt), float(label))
        for at, label in zip(places, completion.labels, strict=True)
    ]


def test_the_numbers_of_a_comparison(qwen: Any) -> None:
    example = Comparison("Hello", " a", " b", W, target=0.75, safety=(True, False))
    assert one(example, load_template(qwen)).numbers == {
        "margin": 0.0, "target": 0.75, "chosen_safe": 1.0, "rejected_safe": 0.0
    }  # fmt: skip


def test_ranking_and_rated_carry_their_scores(qwen: Any) -> None:
    template = load_template(qwen)
    texts = ("fine", "four", "thank you")
    sample = one(Ranking(ASKED, texts, (1.0, 3.0, 1.0), W), template)
    assert [c.gold for c in sample.completions] == [1.0, 3.0, 1.0]
    assert [c.ids.tolist() for c in sample.completions] == [template.completion_ids(ASKED, t)[0] for t in texts]
    assert sample.numbers == {}
    rated = one(Rated(ASKED, "four", -0.5, W), template)
    assert [c.gold for c in rated.completions] == [-0.5]
    assert rated.completions[0].ids.tolist() == sample.completions[1].ids.tolist()
    assert rated.completions[0].scored.all()
    pair = one(Comparison(ASKED, "fine", "four", W), template)
    assert all(np.isnan(c.gold) and c.labels is None for c in pair.completions)


def test_the_longest_completion_of_a_ranking_decides(qwen: Any) -> None:
    template = load_template(qwen)
    example = Ranking("Hello", (" a", " one two three", " b"), (1.0, 2.0, 3.0), W)
    whole = one(example, template)
    assert length(whole) == len(whole.prompt) + len(whole.completions[1].ids)
    assert tokenize([example], template, length(whole) - 1).dropped == [(0, TOO_LONG)]
    cut = one(example, template, len(whole.prompt) + 2, "right")
    assert [len(c.ids) for c in cut.completions] == [2, 2, 2]
    assert [c.gold for c in cut.completions] == [1.0, 2.0, 3.0]


def test_ranked_completions_that_look_the_same(llama2: Any, qwen: Any) -> None:
    made = tokenize([Ranking(ASKED, ("fine", "fine ", "a"), (1.0, 2.0, 0.0), W)], load_template(llama2), LONG)
    assert made.dropped == [(0, RANKED_ALIKE)]
    tied = tokenize([Ranking(ASKED, ("fine", "fine ", "a"), (1.0, 1.0, 0.0), W)], load_template(llama2), LONG)
    assert len(tied.samples) == 1
    alike = Ranking("Hello", (" a b c d e f g h i j", " a b c d e f g h i k"), (1.0, 2.0), W)
    assert tokenize([alike], load_template(qwen), 9, "right").dropped == [(0, RANKED_CUT_ALIKE)]


# --- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["What is two plus two?\n", ASKED])
def test_labels_sit_on_the_last_token_of_each_step(template: Template, prompt: Any) -> None:
    sample = one(Steps(prompt, STEPS, (1.0, None, -1.0), W), template)
    (completion,) = sample.completions
    stripped = prompt is ASKED and template.chat is not None and "trim" in template.chat
    lead = " " if stripped else ""
    assert up_to_labels(sample, template) == [
        (lead + STEPS[0], 1.0),
        (lead + ("".join(STEPS).rstrip() if stripped else "".join(STEPS)), -1.0),
    ]
    assert sample.prompt.tolist() == template.prompt_ids(prompt)
    assert int(completion.ids[-1]) in template.stop_ids
    assert not completion.scored[-1]
    # A special token that is spelled out in a step stays text.
    assert [i for i in completion.ids[:-1].tolist() if i in template.stop_ids] == []


def test_steps_end_as_completions_do(template: Template) -> None:
    for prompt in ("Hello", ASKED):
        ids, ends = template.pieces_ids(prompt, ["Two plus two is four."])
        assert ids == template.completion_ids(prompt, "Two plus two is four.")[0]
        assert len(ends) == 1
        assert ends[0] < len(ids)


def test_a_template_without_an_end_token_gets_eos(qwen: Any) -> None:
    from tests.data.conftest import BARE

    template = load_template(qwen, BARE)
    sample = one(Steps(ASKED, ("Two.", " Four."), (1.0, -1.0), W), template)
    assert up_to_labels(sample, template) == [("Two.", 1.0), ("Two. Four.", -1.0)]
    assert sample.completions[0].ids[-1] == template.eos_id


def test_a_template_that_changes_the_text(qwen: Any) -> None:
    template = load_template(qwen, CHATML.replace("m.content", "m.content | upper"))
    with pytest.raises(DataError, match="f:1: the chat template changes the text of an assistant turn"):
        tokenize([Steps(ASKED, ("a", "b"), (1.0, 1.0), W)], template, LONG)


def test_a_labelled_step_that_the_template_strips_away(llama2: Any) -> None:
    template = load_template(llama2)
    sample = one(Steps(ASKED, ("four", "\n"), (-1.0, 1.0), W), template)
    assert up_to_labels(sample, template) == [(" four", -1.0)]
    with pytest.raises(DataError, match="f:1: no labelled step has a token"):
        tokenize([Steps(ASKED, ("four", "\n"), (None, 1.0), W)], template, LONG)


def test_right_cuts_labels_off_and_counts_them(qwen: Any) -> None:
    template = load_template(qwen)
    example = Steps("Hello", STEPS, (1.0, 0.0, -1.0), W)
    whole = one(example, template)
    places = np.flatnonzero(whole.completions[0].scored)
    made = tokenize([example], template, len(whole.prompt) + int(places[2]), "right")
    assert up_to_labels(made.samples[0], template) == [(STEPS[0], 1.0), (STEPS[0] + STEPS[1], 0.0)]
    assert (made.labels_cut, made.shortened) == (1, 1)
    assert len(made.samples[0].completions[0].ids) == places[2]
    made = tokenize([example], template, len(whole.prompt) + int(places[0]), "right")
    assert (made.dropped, made.labels_cut) == ([(0, NO_STEP_LEFT)], 0)


def test_left_keeps_all_labels(qwen: Any) -> None:
    template = load_template(qwen)
    example = Steps("Hello there, how are you today?", STEPS, (1.0, 0.0, -1.0), W)
    whole = one(example, template)
    cut = one(example, template, length(whole) - 3, "left")
    assert cut.prompt.tolist() == whole.prompt[3:].tolist()
    assert up_to_labels(cut, template) == up_to_labels(whole, template)


def test_the_report_says_what_was_cut(qwen: Any) -> None:
    template = load_template(qwen)
    example = Steps("Hello", STEPS, (1.0, 0.0, -1.0), W)
    whole = one(example, template)
    made = tokenize([example], template, length(whole) - 3, "right")
    report = token_report("train", made, template.stop_ids)
    assert (report.scored, report.ended, report.labels_cut) == (2, None, 1)
    assert report.line().endswith("2 scored, 1 cut to max_length, 1 step labels cut off")


PIECES = st.lists(
    st.tuples(st.text("ab é\n.", max_size=6).map(lambda t: t + "x"), st.sampled_from([None, 1.0, -1.0, 0.5])),
    max_size=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES, chat=st.booleans())
def test_positions_by_decoding(template: Template, pieces: list[tuple[str, float | None]], chat: bool) -> None:
    pieces = [*pieces, ("fine.", 1.0)]
    if template.chat is not None and "trim" in template.chat:
        pieces = [("x", None), *pieces]
    texts, labels = zip(*pieces, strict=True)
    sample = one(Steps(ASKED if chat else "Hello there", texts, labels, W), template)
    found = up_to_labels(sample, template)
    wanted = [("".join(texts[: i + 1]), label) for i, label in enumerate(labels) if label is not None]
    assert [label for _, label in found] == [label for _, label in wanted]
    if template.tokenizer.unk_token_id is None:
        assert [text for text, _ in found] == [text for text, _ in wanted]
