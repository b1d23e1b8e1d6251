"""Rollouts: tokens per second of the own decode loop against transformers' `generate`, with the same batch.

    python scripts/bench/rollouts.py                    two Llamas with random weights, 0.3M and 20M parameters
    python scripts/bench/rollouts.py --model FOLDER     a model of your own, prompted with its own text
    python scripts/bench/rollouts.py --kinds full lora nf4      weights as they are, with LoRA (r 16, every linear
                                                                layer), in 4 bits with LoRA; both programs alike

Each of --prompts prompts gets --each completions, all in one batch, of at most --new tokens. "some end": a stop token
ends a completion, after --new / 2 tokens on average for random weights (a model of your own has its own end tokens);
"none ends": all run to the limit. The two programs take turns; the median of --repeats turns after one to warm up is
shown. First both decode greedily: other ids, and the script fails. Tokens count up to their completion's stop token.
Peak memory (Linux): of one more turn of each in a process of its own, over what the process held before it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf_cli.models.adapters import adapter_parameters, add_adapter, lora_config
from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.base import Base, load_base, quiet
from rlhf_cli.models.device import pick_device
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings
from rlhf_cli.rollouts.generate import sample
from rlhf_cli.rollouts.sampling import Sampling

Ids = list[list[int]]
SIZES: dict[str, dict[str, Any]] = {
    "random 0.3M": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
                    "num_attention_heads": 8, "num_key_value_heads": 4},
    "random 20M": {"vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
                   "num_attention_heads": 6, "num_key_value_heads": 6},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is sampled."""

    name: str
    role: Role
    prompts: Sequence[np.ndarray]
    each: int
    stops: tuple[int, ...]
    sampling: Sampling


def random_model(name: str) -> LlamaForCausalLM:
    """A Llama with random weights, its distributions not flat."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **SIZES[name]))
    with torch.no_grad():
        model.lm_head.weight *= 5
    return model


def as_role(model: Any, name: str, kind: str) -> Role:
    """A role around a model, with the attention of training; kind: full, lora, nf4."""
    if kind == "nf4":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            base = load_base(folder, ModelSettings(name_or_path=folder, quantization="nf4"), trained=False)
    else:
        device = pick_device()
        model = model.to(device).eval()
        model.requires_grad_(False)
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(SEGMENTS)
        base = Base(model, name, "bench", device, model.dtype)
    if kind == "full":
        return Role("policy", base)
    add_adapter(base, "policy", lora_config(LoraSettings(r=16, alpha=32.0)))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(base, "policy"):
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    return Role("policy", base, "policy")


def own_text(role: Role, lengths: Sequence[int]) -> list[np.ndarray]:
    """Prompts of these lengths that the model writes itself, from its first token on."""
    first = role.base.model.config.bos_token_id
    start = [np.array([first if first is not None else 1], np.int32)] * len(lengths)
    drawn = sample(role, start, 1, [], Sampling(max(lengths)), 1)
    return [np.concatenate([start[0], c.ids[: n - 1]]) for (c,), n in zip(drawn, lengths, strict=True)]


def by_us(case: Case, seed: int) -> Ids:
    """The own loop."""
    drawn = sample(case.role, case.prompts, case.each, case.stops, case.sampling, seed)
    return [c.ids.tolist() for group in drawn for c in group]


def by_generate(case: Case, seed: int) -> Ids:
    """transformers alone: `num_return_sequences` of one batch."""
    model: Any = case.role.base.model
    width = max(len(p) for p in case.prompts)
    ids = torch.zeros(len(case.prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(case.prompts):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    model.generation_config = GenerationConfig(
        max_new_tokens=case.sampling.max_new_tokens, do_sample=not case.sampling.greedy, top_k=0, pad_token_id=0,
        eos_token_id=list(case.stops) or None,
        num_return_sequences=1 if case.sampling.greedy else case.each,
    )  # fmt: skip
    if case.sampling.greedy:  # it returns several greedy completions of a prompt only for a prompt that is repeated
        ids, mask = ids.repeat_interleave(case.each, 0), mask.repeat_interleave(case.each, 0)
    torch.manual_seed(seed)
    with torch.no_grad(), case.role.active():
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return [cut(row, case.stops) for row in out[:, width:].tolist()]


def cut(row: list[int], stops: Sequence[int]) -> list[int]:
    """Up to the first stop token."""
    return row[: next((i for i, token in enumerate(row, 1) if token in stops), None)]


def rate(program: Callable[[Case, int], Ids], case: Case, seed: int) -> float:
    """Tokens per second: of CPU time where one thread does all, so that other work on the machine counts less."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = clock()
    tokens = sum(len(row) for row in program(case, seed))
    return tokens / (clock() - began)


def measure(case: Case, repeats: int) -> tuple[float, float, float, float, float]:
    """Median tokens per second of both, and the median, least and largest ratio. SystemExit when greedy ids differ."""
    greedy = replace(case, sampling=replace(case.sampling, greedy=True))
    if by_us(greedy, 0) != by_generate(greedy, 0):
        sys.exit(f"{case.name}: greedy ids differ")
    turns = [(rate(by_us, case, seed), rate(by_generate, case, seed)) for seed in range(repeats + 1)][1:]
    ratios = [a / b for a, b in turns]
    ours, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
    return ours, theirs, statistics.median(ratios), min(ratios), max(ratios)


def peak(program: Callable[[Case, int], Ids], case: Case) -> float:
    """MB of memory that one turn takes over what the process holds, once both have been warmed up by a short turn."""
    short = replace(case, prompts=case.prompts[:1], each=1, sampling=replace(case.sampling, max_new_tokens=2))
    program(short, 0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    program(case, 0)
    return memory("VmHWM") - before


def memory(field: str) -> float:
    """MB, from what Linux tells of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peaks(number: int) -> str:
    """Peak memory of both programs on a case, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return "-"
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", str(number), "--program"]
    ours, theirs = (
        float(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout.split()[-1])
        for name in PROGRAMS
    )
    return f"{ours:.0f} / {theirs:.0f}"


PROGRAMS: dict[str, Callable[[Case, int], Ids]] = {"own": by_us, "generate": by_generate}


def cases(options: argparse.Namespace) -> Iterator[Callable[[], Case]]:
    """Each model in each kind, with and without stop tokens; made when wanted."""
    for name in [options.model] if options.model else options.sizes:
        for kind in options.kinds:
            for ends in options.ends:
                yield partial(make, options, name, kind, ends)


def make(options: argparse.Namespace, name: str, kind: str, ends: str) -> Case:
    """One case."""
    random = np.random.default_rng(0)
    lengths = [int(n) for n in random.integers(8, 64, options.prompts)]
    sampling = Sampling(options.new, max_batch=options.prompts * options.each)
    if options.model:
        role = as_role(AutoModelForCausalLM.from_pretrained(name, dtype="auto"), name, kind)
        own = transformers.GenerationConfig.from_pretrained(name).eos_token_id
        stops = tuple(own) if isinstance(own, list) else (own,)
        prompts = own_text(role, lengths)
    else:
        role = as_role(random_model(name), name, kind)
        stops = tuple(range(max(1, 2 * role.base.vocabulary // options.new)))
        prompts = [random.integers(3, role.base.vocabulary, n).astype(np.int32) for n in lengths]
    title = name.rstrip("/").rpartition("/")[2]
    return Case(f"{title}, {kind}, {ends}", role, prompts, options.each, stops if ends == "some" else (), sampling)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a language model; default: random ones")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="random models")
    parser.add_argument("--kinds", nargs="+", choices=["full", "lora", "nf4"], default=["full", "lora"])
    parser.add_argument("--ends", nargs="+", choices=["some", "none"], default=["some", "none"], help="that end early")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--each", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--new", type=int, default=128, help="most new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--program", choices=list(PROGRAMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.peak_of is not None:
        print(peak(PROGRAMS[options.program], list(cases(options))[options.peak_of]()))
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
          f"{options.prompts} prompts x {options.each}, {options.new} new tokens")  # fmt: skip
    print("| model, weights, ending early | own, tokens/s | generate, tokens/s | ratio | least to largest "
          "| peak MB, own / generate |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    for number, case_of in enumerate(cases(options)):
        case = case_of()
        ours, theirs, ratio, least, largest = measure(case, options.repeats)
        print(f"| {case.name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} | {least:.2f} to {largest:.2f} "
              f"| {peaks(number)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
