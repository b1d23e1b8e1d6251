"""How the cost of the real commands grows: with length, batch, vocabulary, completions of a prompt, rows, new tokens.

    python scripts/bench/growth.py                     every axis
    python scripts/bench/growth.py length vocabulary   some

Each axis doubles one size three times and leaves the rest. A figure is a process of its own with one thread, a Llama of
4 layers (H = 256, random weights) and rows of random words, a word a token. Steps are those of `rlhf dpo` (several
completions: its objective rrhf), full fine-tuning in float32; the reference's numbers are known from the step before.
CPU seconds: the least of --repeats turns after one to warm up. MiB: the peak of all turns over the process before them.
With a GPU: seconds by the clock, and the peak of its memory.

Exponent: slope of the straight line through log cost against log size; 1 is proportional, 0 constant. In brackets the
exponent of the floating-point operations that the model's formula needs.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from alone import command, leave, process, repeated

LAYERS, HIDDEN, INNER, HEADS = 4, 256, 704, 8
SPECIAL = ("<pad>", "</s>", "<unk>", ":", "user", "assistant")
ROWS_TOGETHER = 16
"""Completions of a rollout, four of each prompt."""


@dataclass(frozen=True)
class Case:
    """What a process does."""

    size: int
    examples: int = 4
    prompt: int = 128
    completion: int = 64
    completions: int = 2
    vocabulary: int = 4096
    budget: int = 512
    """Tokens of a micro-batch."""


@dataclass(frozen=True)
class Axis:
    """A size that grows."""

    title: str
    cases: tuple[Case, ...]
    theory: str
    run: str = "steps"
    """What is run: steps, data or rollout."""
    lines: tuple[str, ...] = ("",)
    """What each line of the table is called beside the title; a named one is a process with a cache."""


def _by_length(size: int, examples: int) -> Case:
    return Case(size, examples, prompt=size // 2, completion=size // 4, budget=2048)


LENGTHS, SMALL = (256, 512, 1024, 2048), (2, 4, 8, 16)
AXES = {
    "length": Axis("tokens of an example, 2,048 in all", tuple(_by_length(n, 2048 // n) for n in LENGTHS),
                   "only attention grows; memory constant"),
    "longer": Axis("tokens of an example, 2 examples", tuple(_by_length(n, 2) for n in LENGTHS),
                   "linear layers linear, attention quadratic; memory linear up to the micro-batch (2,048)"),
    "batch": Axis("examples in a batch, of 256 tokens", tuple(Case(n, examples=n) for n in SMALL),
                  "linear; memory constant (micro-batches of 512)"),
    "vocabulary": Axis("vocabulary", tuple(Case(n, vocabulary=n) for n in (4096, 8192, 16384, 32768)),
                       "head and optimiser linear, layers constant; memory: gradient and two moments, no logits"),
    "completions": Axis("completions of a prompt of 256 tokens, 64 tokens each",
                        tuple(Case(n, completions=n, prompt=256, budget=2048) for n in (2, 4, 8, 16)),
                        "below linear: the prompt is computed once; memory up to the micro-batch (2,048)"),
    "rows": Axis("rows of 64 tokens", tuple(Case(n, n, 32, 16) for n in (1000, 2000, 4000, 8000)), "linear", "data",
                 ("read and tokenised", "read, their tokens found in the cache")),
    "new": Axis(f"new tokens, {ROWS_TOGETHER} completions at once",
                tuple(Case(n, ROWS_TOGETHER // 4, prompt=64) for n in (32, 64, 128, 256)),
                "linear, attention quadratic; memory linear (the cache)", "rollout"),
}  # fmt: skip


# --- models and rows -------------------------------------------------------------------------------------------------


def make_world(world: Path, case: Case) -> None:
    """Model, tokenizer and rows."""
    import torch
    from startup import TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rlhf_cli.models.base import quiet

    quiet()
    words = [*SPECIAL, *(f"w{i}" for i in range(case.vocabulary - len(SPECIAL)))]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=4096, pad_token_id=0,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(world / "model")
    tokenizer.save_pretrained(world / "model")
    with (world / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(case, words[len(SPECIAL) :]))


def rows(case: Case, words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows whose prompts and completions have the lengths of the case, with what the template adds."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    for _ in range(case.examples):
        prompt = [{"role": "user", "content": text(case.prompt - 5)}]
        answers = [text(case.completion - 1) for _ in range(case.completions)]
        if case.completions == 2:
            turns = ([{"role": "assistant", "content": answer}] for answer in answers)
            yield {"prompt": prompt} | dict(zip(("chosen", "rejected"), turns, strict=True))
        else:
            yield {"prompt": prompt, "completions": answers, "scores": list(range(case.completions))}


def recipe(world: Path, case: Case, out: Path) -> dict[str, Any]:
    """Of one step on all rows."""
    return {
        "stage": "dpo",
        "objective": {"name": "dpo" if case.completions == 2 else "rrhf"},
        "model": {"name_or_path": str(world / "model"), "dtype": "float32", "gradient_checkpointing": False},
        "lora": None,
        "data": {"train": str(world / "rows.jsonl"), "max_length": case.prompt + case.completion},
        "training": {"learning_rate": 1e-5, "batch_size": case.examples, "micro_batch_tokens": case.budget,
                     "max_steps": 1},
        "evaluation": {"samples": 0},
        "output_dir": str(out / "run"),
    }  # fmt: skip


def operations(case: Case, run: str) -> float:
    """Floating-point operations of the formula: of a step forward and backward, of a rollout forward; of data none."""
    body, head = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER), HIDDEN * case.vocabulary
    if run == "rollout":
        tokens, scored, passes = case.prompt + 4 * case.size, 4 * case.size, 1
        seen = case.prompt**2 / 2 + 4 * (case.size * case.prompt + case.size**2 / 2)
    else:
        scored, passes = case.completions * case.completion, 3
        tokens = case.prompt + scored
        seen = case.prompt**2 / 2 + scored * (case.prompt + case.completion / 2)
    return passes * case.examples * (2 * body * tokens + 2 * head * scored + 4 * LAYERS * HIDDEN * seen)


# --- what a process of its own does ----------------------------------------------------------------------------------


def run_steps(world: Path, case: Case, out: Path, turns: int) -> None:
    """Steps of the stage, in place of its loop."""
    from rlhf_cli.train.engine import Engine

    Engine.fit = lambda self, step: leave(out, repeated(step, turns))  # type: ignore[method-assign]
    command(recipe(world, case, out), out)


def run_data(world: Path, case: Case, out: Path, turns: int) -> None:
    """The rows of the recipe as samples; left in the cache in the end."""
    from rlhf_cli.stages import common

    plain = common.read_data

    def read_data(*arguments: Any, **options: Any) -> NoReturn:
        found = repeated(lambda: plain(*arguments, **options), turns)
        for keep in plain(*arguments, **options).shelved:
            keep()
        leave(out, found)

    common.read_data = read_data
    command(recipe(world, case, out), out, "--dry-run")


def run_rollout(world: Path, case: Case, out: Path, turns: int) -> None:
    """Completions that do not end by themselves."""
    import numpy as np
    from rollouts import as_role
    from transformers import LlamaForCausalLM

    from rlhf_cli.rollouts.generate import sample
    from rlhf_cli.rollouts.sampling import Sampling

    role = as_role(LlamaForCausalLM.from_pretrained(world / "model"), "growth", "full")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(len(SPECIAL), case.vocabulary, case.prompt, dtype=np.int32) for _ in range(case.examples)]
    sample(role, prompts, 4, (), Sampling(2, max_batch=ROWS_TOGETHER), 0)
    leave(out, repeated(lambda: sample(role, prompts, 4, (), Sampling(case.size, max_batch=ROWS_TOGETHER), 0), turns))


RUNS = {"steps": run_steps, "data": run_data, "rollout": run_rollout}


# --- the table -------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost against log size."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(np.maximum(costs, 1e-9)), 1)[0])


def study(name: str, out: Path, repeats: int) -> None:
    """The lines of an axis."""
    axis = AXES[name]
    found: dict[str, list[dict[str, Any]]] = {words: [] for words in axis.lines}
    for case in axis.cases:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            world = Path(folder)
            make_world(world, case)
            asked = [name, "--one", json.dumps(asdict(case)), "--repeats", str(repeats)]
            for words, those in found.items():
                those.append(process(__file__, world, asked, str(world / "cache") if words else ""))
    sizes = [case.size for case in axis.cases]
    formula = f" ({exponent(sizes, [operations(c, axis.run) for c in axis.cases]):.2f})" if axis.run != "data" else ""
    for words, those in found.items():
        seconds, memory = ([one[key] for one in those] for key in ("seconds", "memory"))
        print(f"| {axis.title}{words and ': '}{words} | {', '.join(f'{n:,}' for n in sizes)} | "
              f"{', '.join(f'{s:.2f}' for s in seconds)} | {exponent(sizes, seconds):.2f}{formula} | "
              f"{', '.join(f'{m:.0f}' for m in memory)} | {exponent(sizes, memory):.2f} | {axis.theory} |",
              flush=True)  # fmt: skip


def main() -> None:
    """Parse the arguments; study, or be one process of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", help=f"of {', '.join(AXES)}; none: all")
    parser.add_argument("--out", type=Path, help="a folder for models and rows; none: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := sorted(set(asked.axes) - set(AXES)):
        parser.error(f"no axis {unknown[0]}; there are {', '.join(AXES)}")
    if asked.one:
        RUNS[AXES[asked.axes[0]].run](asked.out, Case(**json.loads(asked.one)), asked.out, asked.repeats)
        return
    print("| what grows | sizes | CPU s | exponent (formula) | MiB over idle | exponent | theory |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        for name in asked.axes or AXES:
            study(name, Path(folder), asked.repeats)


if __name__ == "__main__":
    main()
