from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_cli.data.examples import Comparison, Demonstration, Message, Task, Verdict
from rlhf_cli.data.template import load_template
from rlhf_cli.data.tokenizing import tokenize
from rlhf_cli.data.tokens import ALIKE, CUT_ALIKE, NOTHING_LEFT, TOO_LONG, length
from rlhf_cli.errors import DataError

W = "f:1"
ASKED = (Message("user", "Hello there, how are you today?"),)
LONG = 10_000


def reasons(made: Any) -> list[tuple[int, str]]:
    return list(made.dropped)


def test_demonstration_of_plain_text(llama3: Any, qwen: Any) -> None:
    template = load_template(llama3)
    (sample,) = tokenize([Demonstration("", "Hello there", W)], template, LONG).samples
    assert sample.prompt.tolist() == [llama3.bos_token_id]
    assert sample.completions[0].ids.tolist() == [*llama3("Hello there").input_ids[1:], llama3.eos_token_id]
    assert sample.completions[0].scored.all()
    assert sample.prompt.dtype == sample.completions[0].ids.dtype == np.int32
    assert sample.completions[0].scored.dtype == bool
    # Without BOS nothing predicts the first token of the text.
    (sample,) = tokenize([Demonstration("", "Hello there", W)], load_template(qwen), LONG).samples
    ids = [*qwen("Hello there").input_ids, qwen.eos_token_id]
    assert (sample.prompt.tolist(), sample.completions[0].ids.tolist()) == (ids[:1], ids[1:])


def test_demonstration_of_a_conversation(qwen: Any) -> None:
    template = load_template(qwen)
    talk = (*ASKED, Message("assistant", "fine"), Message("user", "good"), Message("assistant", "thank you"))
    (sample,) = tokenize([Demonstration(talk, None, W)], template, LONG).samples
    ids, scored = template.conversation(talk)
    assert sample.prompt.tolist() == template.prompt_ids(ASKED)
    (completion,) = sample.completions
    assert sample.prompt.tolist() + completion.ids.tolist() == ids[:-1]  # the line end after the last turn is cut
    assert completion.scored.tolist() == scored[len(sample.prompt) : -1]
    assert completion.ids[-1] == template.end_id


def test_train_on_prompt(qwen: Any) -> None:
    template = load_template(qwen)
    example = Demonstration("Once upon a", " time", W)
    (plain,) = tokenize([example], template, LONG).samples
    (sample,) = tokenize([example], template, LONG, train_on_prompt=True).samples
    assert sample.prompt.tolist() + sample.completions[0].ids.tolist() == [*plain.prompt, *plain.completions[0].ids]
    assert len(sample.prompt) == 1
    assert sample.completions[0].scored.all()


def test_comparison_verdict_and_task(qwen: Any) -> None:
    template = load_template(qwen)
    made = tokenize(
        [
            Comparison(ASKED, "fine", "four", "f:1", margin=0.5, scores=(2.0, 1.0)),
            Comparison("Hello", " a", " b", "f:2"),
            Verdict(ASKED, "fine", True, "f:3"),
            Verdict(ASKED, "four", False, "f:4"),
            Task(ASKED, "f:5", {"answer": 4}),
        ],
        template,
        LONG,
    )
    pair, bare, good, bad, task = made.samples
    assert pair.prompt.tolist() == template.prompt_ids(ASKED)
    assert [c.ids.tolist() for c in pair.completions] == [
        template.completion_ids(ASKED, t)[0] for t in ("fine", "four")
    ]
    assert pair.numbers == {"margin": 0.5, "target": 1.0, "chosen_score": 2.0, "rejected_score": 1.0}
    assert bare.numbers == {"margin": 0.0, "target": 1.0}
    assert (good.numbers, bad.numbers) == ({"desirable": 1.0}, {"desirable": 0.0})
    assert (task.completions, task.prompt.tolist()) == ((), template.prompt_ids(ASKED))
    assert [s.where for s in made.samples] == ["f:1", "f:2", "f:3", "f:4", "f:5"]
    assert made.kept.tolist() == [0, 1, 2, 3, 4]


def test_drop(qwen: Any) -> None:
    template = load_template(qwen)
    examples = [Demonstration("Hello", " a", "f:1"), Demonstration("Hello", " a" * 30, "f:2"), Task("a" * 9, "f:3")]
    made = tokenize(examples, template, 8, "drop")
    assert made.kept.tolist() == [0]
    assert reasons(made) == [(1, TOO_LONG), (2, TOO_LONG)]
    whole = tokenize(examples[1:2], template, LONG).samples[0]
    assert len(tokenize(examples[1:2], template, length(whole)).samples) == 1
    assert len(tokenize(examples[1:2], template, length(whole) - 1).samples) == 0


def test_left_keeps_bos_and_header(llama3: Any) -> None:
    template = load_template(llama3)
    example = Verdict(ASKED, "fine", True, W)
    (whole,) = tokenize([example], template, LONG).samples
    header = template.header_length(ASKED)
    least = 1 + header + len(whole.completions[0].ids)
    made = tokenize([example], template, least, "left")
    (cut,) = made.samples
    assert cut.prompt.tolist() == [llama3.bos_token_id, *whole.prompt[-header:].tolist()]
    assert template.decode(cut.prompt, skip_special=False) == "<|bos|><|im_end|>\n<|im_start|>assistant\n"
    assert cut.completions[0].ids.tolist() == whole.completions[0].ids.tolist()
    assert made.shortened == 1
    assert reasons(tokenize([example], template, least - 1, "left")) == [(0, TOO_LONG)]


def test_left_keeps_a_bos_that_only_the_template_writes(llama3: Any) -> None:
    from tests.data.conftest import CHATML

    template = load_template(llama3, "<|eos|>" + CHATML)
    sample = tokenize([Verdict(ASKED, "fine", True, W)], template, LONG).samples[0]
    assert template.first_length(sample.prompt) == 1


def test_left_of_plain_text_keeps_a_token(qwen: Any) -> None:
    template = load_template(qwen)
    example = Comparison("Once upon a time", " a", " b", W)
    (whole,) = tokenize([example], template, LONG).samples
    size = max(len(c.ids) for c in whole.completions)
    (cut,) = tokenize([example], template, size + 1, "left").samples
    assert cut.prompt.tolist() == whole.prompt[-1:].tolist()
    assert reasons(tokenize([example], template, size, "left")) == [(0, TOO_LONG)]


def test_right_cuts_each_completion(qwen: Any) -> None:
    template = load_template(qwen)
    example = Comparison("Hello", " one two three", " a", W)
    (whole,) = tokenize([example], template, LONG).samples
    size = len(whole.prompt) + 2
    made = tokenize([example], template, size, "right")
    (cut,) = made.samples
    assert [c.ids.tolist() for c in cut.completions] == [c.ids[:2].tolist() for c in whole.completions]
    assert cut.completions[0].ids[-1] not in template.stop_ids
    assert cut.completions[1].ids[-1] in template.stop_ids
    assert made.shortened == 1


def test_right_that_leaves_nothing(qwen: Any) -> None:
    template = load_template(qwen)
    alike = Comparison("Hello", " a b c d e f g h i j", " a b c d e f g h i k", W)
    made = tokenize([alike, Verdict("Hello there " * 9, " a", True, W), Task("Hello " * 30, W)], template, 9, "right")
    assert reasons(made) == [(0, CUT_ALIKE), (1, NOTHING_LEFT), (2, TOO_LONG)]


def test_pair_with_equal_tokens(llama2: Any) -> None:
    made = tokenize([Comparison(ASKED, "fine", "fine ", W)], load_template(llama2), LONG)
    assert reasons(made) == [(0, ALIKE)]


def test_template_errors_name_the_row(llama2: Any) -> None:
    template = load_template(llama2)
    with pytest.raises(DataError, match="f:7: the chat template refuses"):
        tokenize([Task((Message("system", "s"), *ASKED), "f:7")], template, LONG)


WORDS = st.lists(st.sampled_from(["Hello", "there", "two", "plus", "is", "fine"]), min_size=1, max_size=25).map(
    " ".join
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=WORDS, chosen=WORDS, rejected=WORDS, limit=st.integers(8, 60), chat=st.booleans(), how=st.data())
def test_truncation_keeps_its_word(
    llama3: Any, asked: str, chosen: str, rejected: str, limit: int, chat: bool, how: Any
) -> None:
    template = load_template(llama3)
    truncation = how.draw(st.sampled_from(["drop", "left", "right"]))
    prompt = (Message("user", asked),) if chat else asked
    example = Comparison(prompt, chosen, rejected, W)
    (whole,) = tokenize([example], template, LONG).samples or (None,)
    if whole is None:
        assert chosen == rejected
        return
    made = tokenize([example], template, limit, truncation)
    assert len(made.samples) + len(made.dropped) == 1
    for cut in made.samples:
        assert length(cut) <= limit
        assert cut.prompt[0] == llama3.bos_token_id
        header = template.header_length(prompt)
        assert cut.prompt[len(cut.prompt) - header :].tolist() == whole.prompt[len(whole.prompt) - header :].tolist()
        assert all(c.scored.any() for c in cut.completions)
        if truncation != "right":
            assert [c.ids.tolist() for c in cut.completions] == [c.ids.tolist() for c in whole.completions]
        if truncation != "left":
            assert cut.prompt.tolist() == whole.prompt.tolist()
