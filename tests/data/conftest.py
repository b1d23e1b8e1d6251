"""Small tokenizers made on the spot, one for each habit that matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data.tokens import Sample

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_BOS = "{{ bos_token }}" + CHATML
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
CORPUS = [
    "Hello there, how are you today? I am fine, thank you.",
    "Once upon a time there was a little girl named Lily.",
    "What is two plus two? Two plus two is four.",
    "user assistant system [INST] hello [/INST] User: Assistant: ",
]


def byte_level(specials: list[str], bos: str | None = None) -> Any:
    """A byte-level BPE tokenizer; with `bos` it puts that before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def sentencepiece_like() -> Any:
    """A BPE tokenizer that writes spaces as a bar and puts one before every text, as Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    bar = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.normalizer = bar
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = sorted({c for line in CORPUS for c in line} | set("ab▁<>/s|_\n.:!"))
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([w for line in CORPUS for w in line.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _wrap(backend: Any, **names: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def plain(sample: Sample) -> Any:
    """A sample as values that can be compared, types included."""
    completions = [(_values(c.ids), _values(c.scored), repr(c.gold), _values(c.labels)) for c in sample.completions]
    return _values(sample.prompt), completions, sample.numbers, sample.where


def _values(array: np.ndarray | None) -> Any:
    return None if array is None else (str(array.dtype), array.tolist())


@pytest.fixture(scope="session")
def qwen() -> Any:
    """No BOS; the end of a turn is the end token."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _wrap(byte_level(specials), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def llama3() -> Any:
    """BOS before every text and in the template; the end of a turn is not the end token."""
    specials = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _wrap(byte_level(specials, "<|bos|>"), bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.chat_template = CHATML_BOS
    return tokenizer


@pytest.fixture(scope="session")
def llama2() -> Any:
    """A space before every text, BOS, and a template without headers."""
    tokenizer = _wrap(sentencepiece_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = INST
    return tokenizer


@pytest.fixture
def shared() -> Path:
    """Real data and models, where this machine has them."""
    folder = Path(__file__).parents[2].parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no real data here")
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a file and gives its path."""

    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
