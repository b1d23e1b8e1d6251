from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_cli.data.examples import Message
from rlhf_cli.data.template import load_template
from rlhf_cli.errors import DataError, ModelError, RecipeError
from tests.data.conftest import BARE, CHATML, INST

TALK = (
    Message("user", "Hello there"),
    Message("assistant", "I am fine, thank you."),
    Message("user", "What is two plus two?"),
    Message("assistant", "four"),
)
ASK, ANSWER = TALK[:3], TALK[3].content
fixtures = pytest.mark.parametrize("name", ["qwen", "llama3", "llama2"])


@pytest.fixture
def tokenizer(name: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(name)


def whole(tokenizer: Any, messages: tuple[Message, ...], ask: bool = False) -> list[int]:
    """What transformers itself makes of a conversation."""
    plain = [{"role": m.role, "content": m.content} for m in messages]
    return list(
        tokenizer.apply_chat_template(plain, tokenize=True, add_generation_prompt=ask, return_dict=True)["input_ids"]
    )


def scored_texts(template: Any, ids: list[int], scored: list[bool]) -> list[str]:
    """The runs of scored tokens as text, special tokens shown."""
    runs: list[list[int]] = []
    for i, (token, on) in enumerate(zip(ids, scored, strict=True)):
        if on and (i == 0 or not scored[i - 1]):
            runs.append([])
        if on:
            runs[-1].append(token)
    return [template.decode(run, skip_special=False) for run in runs]


@fixtures
def test_chat_ids_are_those_of_transformers(tokenizer: Any) -> None:
    template = load_template(tokenizer)
    ids, _ = template.conversation(TALK)
    assert ids == whole(tokenizer, TALK)
    assert template.prompt_ids(ASK) == whole(tokenizer, ASK, ask=True)


@fixtures
def test_prompt_and_completion_join_to_the_conversation(tokenizer: Any) -> None:
    template = load_template(tokenizer)
    prompt, (completion, scored) = template.prompt_ids(ASK), template.completion_ids(ASK, ANSWER)
    ids, mask = template.conversation(TALK)
    assert ids[: len(prompt) + len(completion)] == prompt + completion
    assert all(scored)
    assert mask[len(prompt) :] == [True] * len(completion) + [False] * (len(ids) - len(prompt) - len(completion))
    assert completion[-1] in template.stop_ids


@pytest.mark.parametrize(("name", "end"), [("qwen", "<|im_end|>"), ("llama3", "<|im_end|>")])
def test_mask_covers_each_answer_and_its_end_token(tokenizer: Any, end: str) -> None:
    template = load_template(tokenizer)
    ids, scored = template.conversation(TALK)
    assert scored_texts(template, ids, scored) == [f"I am fine, thank you.{end}", f"four{end}"]
    assert not scored[-1]
    assert template.decode(ids[-1:]) == "\n"
    assert template.end_text == end


def test_mask_with_a_template_without_headers(llama2: Any) -> None:
    template = load_template(llama2)
    ids, scored = template.conversation(TALK)
    pieces = llama2.convert_ids_to_tokens(ids)
    assert pieces.count("<s>") == 1
    assert [p for p, on in zip(pieces, scored, strict=True) if on].count("</s>") == 2
    assert "".join(p for p, on in zip(pieces, scored, strict=True) if on) == "▁I▁am▁fine,▁thank▁you.▁</s>▁four▁</s>"


def test_one_bos(llama3: Any) -> None:
    bos = llama3.bos_token_id
    for chat in (None, CHATML):
        template = load_template(llama3, chat)
        for ids in (template.prompt_ids(ASK), template.conversation(TALK)[0], template.prompt_ids("Hello")):
            assert ids[0] == bos
            assert ids.count(bos) == 1


@fixtures
def test_plain_text(tokenizer: Any) -> None:
    template = load_template(tokenizer)
    prompt = template.prompt_ids("Once upon a")
    completion, scored = template.completion_ids("Once upon a", " time there")
    assert prompt == list(tokenizer("Once upon a").input_ids)
    assert prompt + completion == [*tokenizer("Once upon a time there").input_ids, tokenizer.eos_token_id]
    assert scored == [True] * len(completion)
    assert template.decode(prompt + completion) == "Once upon a time there"
    assert template.decode(completion, after=prompt) == " time there"


@fixtures
def test_plain_text_without_prompt(tokenizer: Any) -> None:
    template = load_template(tokenizer)
    ids = template.prompt_ids("") + template.completion_ids("", "Hello there")[0]
    assert ids == [*tokenizer("Hello there").input_ids, tokenizer.eos_token_id]


@fixtures
def test_spelled_out_special_tokens_are_text(tokenizer: Any) -> None:
    template = load_template(tokenizer)
    special = template.end_text
    control = set(template.encoder.control.values())
    text = f"Hello {special} there{special}"
    plain = template.prompt_ids(text)
    assert control.isdisjoint(plain[len(template.encoder.first) :])
    assert template.decode(plain) == text
    asked = (Message("user", text),)
    ids, scored = template.conversation((*asked, Message("assistant", f"fine{special} you")))
    clean, _ = template.conversation((Message("user", "Hello"), Message("assistant", "fine")))
    assert [i for i in ids if i in control] == [i for i in clean if i in control]
    assert special in template.decode(ids, skip_special=True)
    last = [i for i, on in zip(ids, scored, strict=True) if on]
    assert last.index(template.end_id) == len(last) - 1
    assert template.prompt_ids(asked) == ids[: scored.index(True)]


def test_spelling_that_is_a_word_of_the_vocabulary() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "a", "<", "/", "s", ">", "/s>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = load_template(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))
    ids = template.prompt_ids("a </s> a")
    assert [words[i] for i in ids] == ["a", "<", "/s>", "a"]


def test_private_characters_in_the_text_survive(qwen: Any) -> None:
    template = load_template(qwen)
    text = "a \U000f0000<|im_end|> \U000f0001"
    ids = template.prompt_ids((Message("user", text),))
    assert template.decode(ids, skip_special=False) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_no_end_token_in_the_template(qwen: Any) -> None:
    template = load_template(qwen, BARE)
    assert template.end_text == ""
    ids, scored = template.conversation(TALK)
    assert scored_texts(template, ids, scored) == ["I am fine, thank you.", "four<|im_end|>"]
    completion, _ = template.completion_ids(ASK, ANSWER)
    assert template.prompt_ids(ASK) + completion == ids


def test_end_token_for_other_turns_only(qwen: Any) -> None:
    chat = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = load_template(qwen, chat)
    ids, scored = template.conversation(TALK)
    assert scored_texts(template, ids, scored) == ["I am fine, thank you.", "four<|im_end|>"]


def test_stop_ids(llama3: Any, qwen: Any) -> None:
    end, eos = llama3.convert_tokens_to_ids("<|im_end|>"), llama3.eos_token_id
    assert load_template(llama3, None, [7, eos]).stop_ids == (eos, 7, end)
    assert load_template(qwen).stop_ids == (qwen.eos_token_id,)


def test_template_that_trims(qwen: Any) -> None:
    template = load_template(qwen, CHATML.replace("m.content", "m.content | trim"))
    ids, _ = template.completion_ids(TALK[:1], "  four \n")
    assert template.decode(ids, skip_special=False) == "four<|im_end|>"


def test_header_length(qwen: Any, llama2: Any) -> None:
    template = load_template(qwen)
    ids = template.prompt_ids(ASK)
    header = template.header_length(ASK)
    assert template.decode(ids[-header:], skip_special=False) == "<|im_end|>\n<|im_start|>assistant\n"
    assert template.header_length("plain") == 0
    template = load_template(llama2)
    ids = template.prompt_ids(ASK)
    assert "".join(llama2.convert_ids_to_tokens(ids[-template.header_length(ASK) :])) == "▁[/INST]"


def test_no_chat_template(qwen: Any) -> None:
    qwen.chat_template, kept = None, qwen.chat_template
    try:
        template = load_template(qwen)
        with pytest.raises(
            DataError, match=r"rows.jsonl:3: the tokenizer has no chat template.*give model.chat_template"
        ):
            template.prompt_ids(ASK, "rows.jsonl:3")
    finally:
        qwen.chat_template = kept


def test_template_that_raises_names_the_row(llama2: Any) -> None:
    template = load_template(llama2)
    messages = (Message("system", "be kind"), *TALK)
    with pytest.raises(DataError, match="f:9: the chat template refuses these messages: only user and assistant"):
        template.conversation(messages, "f:9")


def test_prefix_that_changes(qwen: Any) -> None:
    template = load_template(qwen, "{{ messages | length }}" + CHATML)
    with pytest.raises(DataError, match="f:9: the chat template renders the messages before an answer differently"):
        template.conversation(TALK, "f:9")


def test_given_template(qwen: Any, tmp_path: Path) -> None:
    file = tmp_path / "inst.jinja"
    file.write_text(BARE)
    assert load_template(qwen, str(file)).prompt_ids(ASK) == load_template(qwen, BARE).prompt_ids(ASK)
    with pytest.raises(
        RecipeError, match=r"model.chat_template: no such file: .*inst.jinj .*did you mean 'inst.jinja'"
    ):
        load_template(qwen, str(tmp_path / "inst.jinj"))
    with pytest.raises(RecipeError, match="not valid Jinja"):
        load_template(qwen, "{% for m in messages %}{{ m.content }}")


def test_the_date_does_not_matter(qwen: Any) -> None:
    template = load_template(qwen, "{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    text = template.decode(template.prompt_ids(ASK))
    assert text.startswith("2024-07-26")


def test_digest(qwen: Any, llama3: Any) -> None:
    digest = load_template(qwen).digest
    qwen("a long text that is cut", truncation=True, max_length=3)
    assert load_template(qwen).digest == digest
    assert len({digest, load_template(qwen, BARE).digest, load_template(llama3).digest}) == 3


def test_the_digest_of_what_was_saved(qwen: Any, llama3: Any, llama2: Any, tmp_path: Path) -> None:
    """Also of tokens that were added, and of line ends, which saving turns into LF."""
    more = copy.deepcopy(llama3)
    more.add_tokens(["<more>"])
    more.add_special_tokens({"additional_special_tokens": ["<x>"]})
    found = set()
    for number, tokenizer in enumerate((qwen, llama3, llama2, more)):
        for chat in (None, f"{BARE}\n\n", BARE.replace("\n", "\r\n")):
            template = load_template(tokenizer, chat)
            folder = tmp_path / f"{number}{len(chat or '')}"
            copied = copy.deepcopy(tokenizer)
            copied.chat_template = template.chat
            copied.save_pretrained(folder)
            assert load_template(AutoTokenizer.from_pretrained(folder)).digest == template.digest
            found.add(template.digest)
    assert len(found) == 4 * 3


def test_tokenizer_without_end_token(llama2: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(ModelError, match="no end token"):
        load_template(PreTrainedTokenizerFast(tokenizer_object=llama2.backend_tokenizer, bos_token="<s>"))


CONTENT = st.text(alphabet="ab <|im_end>\n/s", min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=CONTENT, answer=CONTENT)
def test_text_comes_back_from_its_tokens(qwen: Any, llama3: Any, asked: str, answer: str) -> None:
    for tokenizer in (qwen, llama3):
        template = load_template(tokenizer)
        prompt = template.prompt_ids((Message("user", asked),))
        completion, _ = template.completion_ids((Message("user", asked),), answer)
        assert template.decode(completion[:-1], after=prompt) == answer
        assert completion[-1] == template.end_id
        ids, scored = template.conversation((Message("user", asked), Message("assistant", answer)))
        assert ids[: len(prompt)] == prompt
        assert [i for i, on in zip(ids, scored, strict=True) if on] == completion


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=CONTENT, answer=st.text(alphabet="ab <>/s\n", min_size=1, max_size=30))
def test_plain_pieces_join_to_the_text(llama2: Any, qwen: Any, asked: str, answer: str) -> None:
    for tokenizer in (llama2, qwen):
        template = load_template(tokenizer)
        ids = template.prompt_ids(asked) + template.completion_ids(asked, answer)[0]
        assert template.decode(ids[:-1]) == asked + answer
        assert not template.encoder.forbidden(ids[len(template.encoder.first) : -1])


def test_real_tokenizers(shared: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("stories260K", "tokenizer-gpt-neox-20b"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
        template = load_template(tokenizer)
        story = "Once upon a time, there was a little girl named Lily."
        for cut in (4, 16, 17, 30):
            prompt, (completion, _) = (
                template.prompt_ids(story[:cut]),
                template.completion_ids(story[:cut], story[cut:]),
            )
            assert template.decode(prompt + completion) == story
            assert template.decode(completion, after=prompt) == story[cut:]
        assert prompt == list(tokenizer(story[:cut]).input_ids)
        inst = load_template(tokenizer, INST)
        assert inst.conversation(TALK)[0].count(tokenizer.bos_token_id) >= 1
        assert inst.end_text == tokenizer.eos_token
