"""Make the offline demo world: a tokenizer, a tiny untrained Llama-style model and data with a known true reward.

    python scripts/make_tiny.py --out demo/world [--seed 0]

Everything comes from the word lists in recipes/tiny/reward.py, a small grammar and the seed; nothing is downloaded.

    model/                            model, tokenizer with chat template, generation_config
    pretrain[-eval].jsonl             {text}: plain reviews
    sft[-eval].jsonl                  {messages}: a request and a review, as often good as bad
    pairs[-eval].jsonl                {prompt, chosen, rejected, chosen_score, rejected_score}: chosen is truly better
    verdicts[-eval].jsonl             {prompt, completion, label}
    prompts[-eval].jsonl              {prompt, kind}: requests only
    rankings[-eval].jsonl             {prompt, completions, scores}: two to five reviews, some of them tied
    strict-rankings[-eval].jsonl      {prompt, completions, ranks}: no two of them tied
    choices[-eval].jsonl              {prompt, completions, best}: the best of four
    scored[-eval].jsonl               {prompt, completion, score}: three rows a prompt
    games[-eval].jsonl                {prompt, a, b, outcome}: which of two reviews won
    steps[-eval].jsonl                {prompt, steps, labels}: sentences, right up to the first that blames
    spans[-eval].jsonl                {prompt, completion, errors}: where the words of blame are
    safety[-eval].jsonl               {prompt, response_0, response_1, ...}: harm is the number of words of blame
    votes[-eval].jsonl                {prompt, completions, votes}: three judges who see the difference with noise
    matches[-eval].jsonl              {messages}: which of two reviews is better, A or B
    DONE                              written last

The subjects of every *-eval file but pretrain-eval occur in no training file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_grammar import LEANINGS, Subject, W, request, review, spoilt, subjects
from tiny_judged import FILES

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SIZES = (
    {"pretrain": 6000, "sft": 3600, "pairs": 2400, "verdicts": 2400, "prompts": 2400}
    | dict.fromkeys(FILES, 1500)
    | {"matches": 6000}
)
EVAL_SIZES = {"pretrain": 200, "sft": 200, "pairs": 400, "verdicts": 200, "prompts": 300} | dict.fromkeys(FILES, 240)
MIN_GAP = 0.25
"""Least difference in true reward within a pair."""
BROKEN_SHARE = 0.15
"""Share of pairs whose rejected completion is spoilt in form, whatever it says."""


# --- the files -------------------------------------------------------------------------------------------


def pair(rng: random.Random, subject: Subject) -> dict[str, Any]:
    """Two reviews of one subject, the truly better one chosen."""
    while True:
        worse, better = sorted((review(rng, subject, rng.choice(LEANINGS)) for _ in range(2)), key=W.true_reward)
        if rng.random() < BROKEN_SHARE:
            worse = spoilt(rng, worse)
        scores = W.true_reward(better), W.true_reward(worse)
        if scores[0] - scores[1] >= MIN_GAP:
            return {
                "prompt": request(rng, subject),
                "chosen": better,
                "rejected": worse,
                "chosen_score": round(scores[0], 4),
                "rejected_score": round(scores[1], 4),
            }


def verdict(rng: random.Random, subject: Subject, number: int) -> dict[str, Any]:
    """One review, wanted if its true reward is above zero; wanted and unwanted ones take turns."""
    wanted = number % 2 == 0
    while True:
        text = review(rng, subject, rng.choice(LEANINGS))
        if W.true_reward(text) != 0 and (W.true_reward(text) > 0) == wanted:
            return {"prompt": request(rng, subject), "completion": text, "label": wanted}


def rows(kind: str, rng: random.Random, pool: list[Subject], count: int) -> Iterator[dict[str, Any]]:
    """The rows of one file, or more. Subjects are drawn from `pool`, none twice before all were used."""
    order: list[Subject] = []
    for number in range(count):
        if not order:
            order = rng.sample(pool, len(pool))
        subject = order.pop()
        if kind == "pretrain":
            yield {"text": review(rng, subject, rng.choice(LEANINGS))}
        elif kind == "sft":
            answer = {"role": "assistant", "content": review(rng, subject, rng.choice(LEANINGS))}
            yield {"messages": [*request(rng, subject), answer]}
        elif kind == "pairs":
            yield pair(rng, subject)
        elif kind == "verdicts":
            yield verdict(rng, subject, number)
        elif kind in FILES:
            yield from FILES[kind](rng, subject)
        else:
            yield {"prompt": request(rng, subject), "kind": subject.kind}


def write_data(out: Path, seed: int) -> None:
    """Write every data file."""
    train, held_out = subjects(random.Random(f"{seed} subjects"))
    for suffix, sizes, pool in (("", SIZES, train), ("-eval", EVAL_SIZES, held_out)):
        for kind, count in sizes.items():
            rng = random.Random(f"{seed} {kind}{suffix}")
            with (out / f"{kind}{suffix}.jsonl").open("w", encoding="utf-8") as file:
                for row in itertools.islice(rows(kind, rng, pool, count), count):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- tokenizer and model ---------------------------------------------------------------------------------


def vocabulary() -> dict[str, int]:
    """Special tokens, the 256 bytes, punctuation and the words, each with a space before it and some without."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = sorted(W.WORLD)
    starts = ["The", "I", "We", "It", "My", "Write", "Please", "Tell", "What", "Give", "How"]
    titles = [word.capitalize() for word in [*W.TITLE_FIRST, *W.TITLE_SECOND, *W.DAYS, *W.MONTHS]]
    spaced = (f"Ġ{word}" for word in [*words, *starts, *titles])
    tokens = dict.fromkeys([*SPECIALS, *sorted(ByteLevel.alphabet()), *spaced, *starts])
    return {token: number for number, token in enumerate(tokens)}


def write_model(out: Path, seed: int) -> None:
    """Write tokenizer, model with random weights, and generation_config."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = vocabulary()
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=list(SPECIALS[4:]), model_max_length=256, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.05, tie_word_embeddings=False,
        bos_token_id=vocab["<s>"], eos_token_id=[vocab["</s>"], vocab["<|end|>"]], pad_token_id=vocab["<pad>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the weights")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    write_data(options.out, options.seed)
    write_model(options.out / "model", options.seed)
    (options.out / "DONE").write_text(f"seed {options.seed}\n", encoding="utf-8")
    print(f"{options.out}: model, tokenizer and {2 * len(SIZES)} data files", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
