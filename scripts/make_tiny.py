"""Make the offline demo world: a tokenizer, a tiny untrained Llama-style model and data with a known true reward.

    python scripts/make_tiny.py --out demo/world [--seed 0]

Everything comes from the word lists in recipes/tiny/reward.py, a small grammar and the seed; nothing is downloaded.

    model/                            model, tokenizer with chat template, generation_config
    pretrain[-eval].jsonl             {text}: plain reviews
    sft[-eval].jsonl                  {messages}: a request and a review, as often good as bad
    pairs[-eval].jsonl                {prompt, chosen, rejected, chosen_score, rejected_score}: chosen is truly better
    verdicts[-eval].jsonl             {prompt, completion, label}
    prompts[-eval].jsonl              {prompt, kind}: requests only
    DONE                              written last

The subjects of every *-eval file but pretrain-eval occur in no training file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

REWARD_FILE = Path(__file__).resolve().parent.parent / "recipes" / "tiny" / "reward.py"
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
REQUESTS = (
    "Write a review of the {kind} {title}.",
    "Please write a short review of the {kind} {title}.",
    "Tell us about the {kind} {title}.",
    "What do you think of the {kind} {title}?",
    "Give me your opinion of the {kind} {title}.",
    "How was the {kind} {title}?",
)
SIZES = {"pretrain": 6000, "sft": 3600, "pairs": 2400, "verdicts": 2400, "prompts": 2400}
EVAL_SIZES = {"pretrain": 200, "sft": 200, "pairs": 400, "verdicts": 200, "prompts": 300}
LEANINGS = (0.05, 0.05, 0.5, 0.95, 0.95)
"""Chance that one opinion in a review is praise; each review draws one of them."""
MIN_GAP = 0.25
"""Least difference in true reward within a pair."""
BROKEN_SHARE = 0.15
"""Share of pairs whose rejected completion is spoilt in form, whatever it says."""


def load_words(path: Path = REWARD_FILE) -> ModuleType:
    """The module with the word lists and the true reward."""
    spec = importlib.util.spec_from_file_location("tiny_reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


W = load_words()


@dataclass(frozen=True)
class Subject:
    """What a review is about."""

    kind: str
    title: str


# --- the grammar -----------------------------------------------------------------------------------------


def article(word: str) -> str:
    """The word with a or an before it."""
    return f"{'an' if word[0] in 'aeiou' or word == 'honest' else 'a'} {word}"


def opinion(rng: random.Random, kind: str, leaning: float) -> str:
    """One sentence with one to three words of sentiment, each praise with chance `leaning`."""

    def adjective() -> str:
        return rng.choice(W.POSITIVE_ADJECTIVES if rng.random() < leaning else W.NEGATIVE_ADJECTIVES)

    def verb() -> str:
        return rng.choice(W.POSITIVE_VERBS if rng.random() < leaning else W.NEGATIVE_VERBS)

    one, two = rng.sample(W.ASPECTS[kind], 2)
    link, adverb, who = rng.choice(W.LINKS), rng.choice(W.ADVERBS), rng.choice(("I", "We"))
    forms = (
        lambda: f"The {one} {link} {adverb} {adjective()}.",
        lambda: f"The {one} {link} {adjective()} and {adjective()}.",
        lambda: f"The {one} {link} {adjective()} but the {two} {link} {adjective()}.",
        lambda: f"{who} {verb()} the {one}.",
        lambda: f"{who} {verb()} the {one} and the {two}.",
        lambda: f"{who} found the {one} {adverb} {adjective()} and {verb()} the {two}.",
        lambda: f"It has {article(adjective())} {one} and {article(adjective())} {two}.",
    )
    return rng.choice(forms)()


def scene(rng: random.Random, subject: Subject) -> str:
    """One sentence without sentiment."""
    person, day, month = rng.choice(W.PEOPLE), rng.choice(W.DAYS).capitalize(), rng.choice(W.MONTHS).capitalize()
    if subject.kind == "restaurant":
        return rng.choice((f"We went to {subject.title} on {day}.", f"I went there in {month} with my {person}."))
    if subject.kind == "film":
        return rng.choice((f"We saw {subject.title} on {day}.", f"I saw it in {month} with my {person}."))
    return rng.choice((f"I had {subject.title} from my {person}.", f"My {person} had it for all of {month}."))


def review(rng: random.Random, subject: Subject, leaning: float) -> str:
    """Two to four sentences about the subject."""
    word = rng.choice(W.POSITIVE_ADJECTIVES if rng.random() < leaning else W.NEGATIVE_ADJECTIVES)
    opening = f"{subject.title} {rng.choice(('is', 'was'))} {article(word)} {subject.kind}."
    sentences = [opening if rng.random() < 0.5 else scene(rng, subject)]
    sentences += [opinion(rng, subject.kind, leaning) for _ in range(rng.randint(1, 3))]
    return " ".join(sentences)


def spoilt(rng: random.Random, text: str) -> str:
    """The text with its end cut off, its words in disorder, or one word said over and over."""
    words = text.split()
    way = rng.randrange(3)
    if way == 0:
        return " ".join(words[: max(2, len(words) // 2)]).rstrip(".,")
    if way == 1:
        return " ".join(rng.sample(words, len(words))).rstrip(".,")
    return " ".join([rng.choice(W.POSITIVE_ADJECTIVES)] * rng.randint(8, 16))


def request(rng: random.Random, subject: Subject) -> list[dict[str, str]]:
    """The conversation up to the assistant's turn."""
    text = rng.choice(REQUESTS).format(kind=subject.kind, title=subject.title)
    return [{"role": "user", "content": text}]


def subjects(rng: random.Random) -> tuple[list[Subject], list[Subject]]:
    """All subjects, split into those of the training files and the held-out fifth."""
    titles = [f"The {a} {b}".title() for a in W.TITLE_FIRST for b in W.TITLE_SECOND]
    everything = [Subject(kind, title) for kind in W.ASPECTS for title in titles]
    rng.shuffle(everything)
    cut = len(everything) // 5
    return everything[cut:], everything[:cut]


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
    """The rows of one file. Subjects are drawn from `pool`, none twice before all were used."""
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
        else:
            yield {"prompt": request(rng, subject), "kind": subject.kind}


def write_data(out: Path, seed: int) -> None:
    """Write every data file."""
    train, held_out = subjects(random.Random(f"{seed} subjects"))
    for suffix, sizes, pool in (("", SIZES, train), ("-eval", EVAL_SIZES, held_out)):
        for kind, count in sizes.items():
            rng = random.Random(f"{seed} {kind}{suffix}")
            with (out / f"{kind}{suffix}.jsonl").open("w", encoding="utf-8") as file:
                for row in rows(kind, rng, pool, count):
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
