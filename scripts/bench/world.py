"""What both programs of against_trl.py train: random models from a configuration, a tokenizer, and rows.

The rows are pairs read from a file of any format that `rlhf dpo` reads (those whose every sequence has 300 to 1,000
tokens, in the order of the file), or made up; verdicts, demonstrations and prompts are made from them. The tokenizer is
a byte-level BPE trained on their text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BATCH = 4
STEPS = {"narrow": 6, "wide": 2}
"""Optimiser steps of four pairs, by world: on a vocabulary of 150k a step takes long."""
SHORTEST, LONGEST = 300, 1000
"""Tokens of a sequence, prompt and completion."""
VOCABULARY = {"narrow": 16_384, "wide": 151_936}
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
Pair = dict[str, list[dict[str, str]]]


def make_world(out: Path, pairs: Path | None, *, wide: bool) -> None:
    """Models, tokenizer, rows, and the order in which ours takes them. pairs: a file; none: made up."""
    import numpy as np

    from rlhf_cli.data.loader import Loader

    rows = made_up() if pairs is None else read(pairs)
    tokenizer = make_tokenizer(rows)
    steps = STEPS["wide" if wide else "narrow"]
    rows = fitting(rows, tokenizer, steps * BATCH)
    make_models(out, tokenizer, wide=wide)
    files = {
        "pairs": rows,
        "verdicts": [
            {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
            for i, p in enumerate(rows)
        ],
        "demonstrations": [{"prompt": p["prompt"], "completion": p["chosen"]} for p in rows],
        "prompts": [{"prompt": p["prompt"]} for p in rows],
    }
    for name, of in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of), encoding="utf-8")
    loader = Loader(np.zeros(len(rows), dtype=np.int64), [1.0], BATCH, seed=42)
    (out / "order.json").write_text(json.dumps([int(i) for _ in range(steps) for i in loader.next()]), encoding="utf-8")


def made_up() -> list[Pair]:
    """Pairs of words of no meaning."""
    rng = random.Random(0)

    def turn(role: str, low: int, high: int) -> list[dict[str, str]]:
        words = (f"w{int(8000 * rng.random() ** 3)}" for _ in range(rng.randint(low, high)))
        return [{"role": role, "content": " ".join(words)}]

    return [
        {"prompt": turn("user", 100, 400)} | {name: turn("assistant", 100, 400) for name in ("chosen", "rejected")}
        for _ in range(100)
    ]


def read(path: Path) -> list[Pair]:
    """The pairs of a file, as chat messages."""
    from rlhf_cli.data.examples import Comparison
    from rlhf_cli.data.prepare import load_examples
    from rlhf_cli.recipe.settings.data import SourceSettings

    examples, _ = load_examples([SourceSettings(path=str(path))], "comparison", "drop")
    return [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in e.prompt],
            "chosen": [{"role": "assistant", "content": e.chosen}],
            "rejected": [{"role": "assistant", "content": e.rejected}],
        }
        for e in examples.items
        if isinstance(e, Comparison) and not isinstance(e.prompt, str)
    ]


def make_tokenizer(rows: Iterable[Pair]) -> Any:
    """Byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY["narrow"], special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bare.train_from_iterator((m["content"] for row in rows for turns in row.values() for m in turns), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def fitting(rows: Iterable[Pair], tokenizer: Any, count: int) -> list[Pair]:
    """The first `count` pairs whose sequences are neither short nor long."""
    found = []
    for row in rows:
        lengths = [
            len(tokenizer(tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=False))["input_ids"])
            for name in ("chosen", "rejected")
        ]
        if min(lengths) >= SHORTEST and max(lengths) <= LONGEST:
            found.append(row)
    if len(found) < count:
        raise SystemExit(f"{len(found)} pairs of {SHORTEST} to {LONGEST} tokens; {count} are needed")
    return found[:count]


def make_models(out: Path, tokenizer: Any, *, wide: bool) -> None:
    """A policy, and a reward model of the same shape, with random weights."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
    )

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY["wide" if wide else "narrow"], "max_position_embeddings": 2048,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_attention_heads": 8,
             "num_key_value_heads": 4}  # fmt: skip
    if wide:
        body = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "tie_word_embeddings": True}
        policy, scoring = Qwen2ForCausalLM, Qwen2ForSequenceClassification
        config: Any = Qwen2Config(**shape | body)
    else:
        body = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
        policy, scoring = LlamaForCausalLM, LlamaForSequenceClassification
        config = LlamaConfig(**shape | body)
    for kind, name in ((policy, "model"), (scoring, "reward")):
        config.num_labels = 1 if name == "reward" else 2
        kind(config).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
