"""Judge the demo's runs by the true reward, and print the table that `make demo` ends with.

    python scripts/demo_table.py --demo demo --out demo/table.md

Every run's final folder is opened with plain transformers and peft and sampled with their `generate`, so that the
figures do not rest on the code that trained the model. Held-out prompts, temperature 1, the same seed for each model.
Exit code 1 when a method is not at least three standard errors above the SFT model.

N completions, L tokens of a padded row, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_grammar import load_words

METHODS = ("ppo", "dpo", "orpo", "simpo")
STANDARD_ERRORS = 3.0
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Sampled:
    """Completions of the held-out prompts by one model, in the order of the prompts."""

    name: str
    ids: Tensor  # (N, L) prompt, left-padded, and completion, right-padded
    real: Tensor  # (N, L) bool, not padding
    written: Tensor  # (N, L) bool, tokens of the completion, its end token included
    logp: Tensor  # (N,) under the model that wrote it
    rewards: list[float]
    ended: list[bool]


@dataclass(frozen=True)
class Judged:
    """One line of the table."""

    name: str
    reward: float
    error: float
    gain: float
    """Mean difference to the SFT model, prompt by prompt, in its standard errors; 0 for the SFT model itself."""
    kl: float
    """Nats per completion to the SFT model, on the model's own completions."""
    ended: float
    length: float
    report: Path


def load_run(run: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run's final folder, full or adapter, in float32."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import torch
    import transformers
    from peft import AutoPeftModelForCausalLM

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    final = run / "final"
    adapter = (final / "adapter_config.json").exists()
    loader = AutoPeftModelForCausalLM if adapter else transformers.AutoModelForCausalLM
    model = loader.from_pretrained(final, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(final, padding_side="left")


def sequence_logp(model: Any, ids: Tensor, real: Tensor, written: Tensor) -> Tensor:
    """Summed log-probability of the written tokens: (N,)."""
    import torch

    position = (real.long().cumsum(1) - 1).clamp(min=0)  # (N, L)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=real.long(), position_ids=position).logits  # (N, L, V)
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # (N, L - 1)
    return torch.where(written[:, 1:], logp, 0.0).sum(1)


def sample(run: Path, prompts: list[Any], seed: int) -> Sampled:
    """Complete every prompt once with the run's model."""
    import torch

    model, tokenizer = load_run(run)
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    start = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])
    torch.manual_seed(seed)
    ids = model.generate(
        input_ids=start["input_ids"], attention_mask=start["attention_mask"], do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=ends.tolist(), pad_token_id=tokenizer.pad_token_id,
    )  # (N, L)  # fmt: skip
    asked = start["input_ids"].shape[1]
    new = ids[:, asked:]
    is_end = torch.isin(new, ends)
    kept = is_end.long().cumsum(1) - is_end.long() == 0  # up to and with the first end token
    written = torch.cat([torch.zeros_like(ids[:, :asked], dtype=torch.bool), kept], 1)
    real = torch.cat([start["attention_mask"].bool(), kept], 1)
    texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(new, kept, strict=True)]
    rewards = load_words().sentiment(prompts, [text.strip() for text in texts])
    logp = sequence_logp(model, ids, real, written)
    return Sampled(run.name, ids, real, written, logp, rewards, is_end.any(1).tolist())


def mean_and_error(numbers: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))


def judge(sampled: Sampled, sft: Sampled, reference: Any, run: Path) -> Judged:
    """The figures of one run against the SFT model's completions of the same prompts."""
    reward, error = mean_and_error(sampled.rewards)
    gain, gain_error = mean_and_error([a - b for a, b in zip(sampled.rewards, sft.rewards, strict=True)])
    reference_logp = sequence_logp(reference, sampled.ids, sampled.real, sampled.written)
    return Judged(
        sampled.name, reward, error,
        gain / gain_error if gain_error else 0.0,
        float((sampled.logp - reference_logp).mean()),
        statistics.fmean(sampled.ended),
        float(sampled.written.sum(1).float().mean()),
        run / "report.html",
    )  # fmt: skip


def held_out_accuracy(run: Path) -> float:
    """The reward model's last accuracy on held-out pairs, from its metrics.jsonl."""
    key = "eval/rewards/accuracies"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row[key] for row in map(json.loads, lines) if key in row]
    if not found:
        raise SystemExit(f"{run / 'metrics.jsonl'}: no line has {key}")
    return float(found[-1])


def table(judged: list[Judged], accuracy: float, prompts: int) -> str:
    """Markdown."""
    head = "| model | true reward | over SFT, s.e. | KL to SFT, nats | ended | tokens | report |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---|"]
    for j in judged:
        over = "" if j.name == "sft" else f"{j.gain:+.1f}"
        lines.append(
            f"| {j.name:<5} | {j.reward:+.3f} ± {j.error:.3f} | {over} | {j.kl:.2f} "
            f"| {j.ended:.0%} | {j.length:.1f} | {j.report} |"
        )
    notes = (
        f"\nOne completion for each of {prompts} held-out prompts, temperature 1. True reward: mean and standard "
        f"error, from -1 to 1.\nReward model: {accuracy:.1%} of the held-out pairs in the right order.\n"
    )
    return "\n".join(lines) + "\n" + notes


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of the demo's runs")
    parser.add_argument("--out", type=Path, default=Path("demo/table.md"), help="where the table is saved")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    options = parser.parse_args(argv)
    rows = (options.demo / "world" / "prompts-eval.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    accuracy = held_out_accuracy(options.demo / "rm")
    reference, _ = load_run(options.demo / "sft")
    sft = sample(options.demo / "sft", prompts, options.seed)
    judged = [judge(sft, sft, reference, options.demo / "sft")]
    for name in METHODS:
        run = options.demo / name
        judged.append(judge(sample(run, prompts, options.seed), sft, reference, run))
    text = table(judged, accuracy, len(prompts))
    print(text)
    weak = [j.name for j in judged[1:] if not j.gain >= STANDARD_ERRORS]
    if weak:
        print(f"not {STANDARD_ERRORS:g} standard errors above SFT: {', '.join(weak)}", file=sys.stderr)
        return 1
    options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
