"""What every folder of tests may use: the command line in this process, and a tiny model with its tokenizer."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import rlhf_cli.recipe.schema  # noqa: F401  early: pydantic reads docstrings ten times slower once torch is imported

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RLHF_CACHE"] = ""  # no test finds what another one left


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` everything runs on the CPU, where runs repeat bit for bit."""
    if "gpu" not in (config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = (
    "good", "fine", "great", "sweet", "bad", "poor", "awful", "sour", "tell", "of",
    "red", "blue", "green", "tall", "small", "old", "new", "quick", "slow", "round",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that report an error."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def run_cli(*arguments: object) -> Outcome:
    """`rlhf ARGUMENTS` in this process."""
    from rlhf_cli.cli.app import run_command_line

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_command_line([str(a) for a in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """`cli("sft", recipe, ...)` -> exit code, stdout and stderr."""
    return run_cli


def make_tokenizer() -> Any:
    """A byte-level tokenizer whose tokens are special tokens, bytes and a few words. It has a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*SPECIALS, *letters, *WORDS, *(f"Ġ{word}" for word in WORDS)])
    core = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=list(SPECIALS[4:]), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_model(folder: Path, *, tied: bool = False, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """A Llama with random weights and the tokenizer of `make_tokenizer`, in the standard layout."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("</s>", "<|end|>")]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
        initializer_range=0.08, bos_token_id=1, eos_token_id=ends, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    if not tied:
        with torch.no_grad():
            model.lm_head.weight *= 5  # distributions that are not flat
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=ends, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained tiny Llama (untied) with tokenizer, chat template and generation settings."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one matrix for embedding and head."""
    return write_model(tmp_path_factory.mktemp("tiny") / "tied", tied=True)


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where torch.compile cannot make a kernel for the CPU."""
    import torch

    from rlhf_cli.objectives import fused

    why = fused.attempt(torch.device("cpu"))
    if why is not None:
        pytest.skip(f"nothing can be compiled here: {why}")
