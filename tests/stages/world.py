"""A toy task with a known true reward, recipes over it as plain dicts, and readers of what a run leaves behind.

A prompt asks for a word of praise or blame about a thing; a completion is three of these words. Its true reward is the
share of praise minus the share of blame.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import yaml

GOOD = ("good", "fine", "great", "sweet")
BAD = ("bad", "poor", "awful", "sour")
THINGS = ("red", "blue", "green", "tall", "small", "old", "new", "quick", "slow", "round")
REWARD = f'''
GOOD, BAD = {GOOD!r}, {BAD!r}


def true_reward(completions, **columns):
    """Praise minus blame, over the words."""
    said = [c.split() for c in completions]
    return [(sum(w in GOOD for w in s) - sum(w in BAD for w in s)) / max(len(s), 1) for s in said]
'''
FAST: dict[str, Any] = {
    "model": {"dtype": "float32", "gradient_checkpointing": False},
    "data": {"max_length": 48},
    "training": {"learning_rate": 1e-2, "batch_size": 16, "num_epochs": 1, "lr_scheduler": "constant"},
    "logging": {"every": 100},
    "checkpoint": {"every": None},
    "evaluation": {"every": None, "samples": 2, "max_new_tokens": 8},
    "seed": 3,
}
LORA = {"r": 8, "alpha": 16}


def true_reward(text: str) -> float:
    """Praise minus blame, over the words."""
    words = text.split()
    return (sum(w in GOOD for w in words) - sum(w in BAD for w in words)) / max(len(words), 1)


def ask(rng: random.Random) -> list[dict[str, str]]:
    """A prompt."""
    return [{"role": "user", "content": f"tell of {rng.choice(THINGS)} {rng.choice(THINGS)}"}]


def say(rng: random.Random, praise: int, length: int = 3) -> str:
    """A completion with so many words of praise."""
    words = [rng.choice(GOOD if n < praise else BAD) for n in range(length)]
    rng.shuffle(words)
    return " ".join(words)


def rows(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of chat, completion, text, pairs, verdicts, prompts or questions, or of what `judged` makes."""
    rng, out = random.Random(f"{kind} {seed}"), []
    for number in range(count):
        prompt = ask(rng)
        high, low = rng.choice([(3, 0), (3, 1), (2, 0), (2, 1)])
        chosen, rejected = say(rng, high), say(rng, low, rng.choice([3, 5]))
        free = say(rng, rng.randint(0, 3))
        row: dict[str, Any] = {
            "chat": {"messages": [*prompt, {"role": "assistant", "content": free}]},
            "completion": {"prompt": prompt[0]["content"], "completion": f" {free}"},
            "text": {"text": f"{prompt[0]['content']} {free}"},
            "pairs": {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": float(high - low) / 3,
                      "chosen_score": true_reward(chosen), "rejected_score": true_reward(rejected)},
            "verdicts": {"prompt": prompt, "completion": (chosen, rejected)[number % 2], "label": number % 2 == 0},
            "prompts": {"prompt": prompt, "number": number},
            "questions": {"question": prompt[0]["content"], "answer": f"so it is\n#### {number}"},
        }.get(kind) or judged(kind, rng, prompt, chosen, rejected)  # fmt: skip
        out.append(row)
    return out


def judged(kind: str, rng: random.Random, prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    """A row of rankings, strict rankings, choices, scored, games, steps, spans, safety or votes."""
    row: dict[str, Any] = {"prompt": prompt}
    texts = [say(rng, praise) for praise in rng.sample(range(4), rng.choice([3, 4]))]
    scores = [true_reward(text) for text in texts]
    if kind in ("rankings", "strict", "choices"):
        tied = [*texts, *([say(rng, 1)] if kind == "rankings" and 1 / 3 not in scores else [])]
        row["completions"] = tied
        return row | (
            {"best": scores.index(max(scores))} if kind == "choices" else {"scores": list(map(true_reward, tied))}
        )
    if kind == "scored":
        return row | {"completion": texts[0], "score": scores[0]}
    if kind == "games":
        return (
            row | {"a": chosen, "b": rejected, "outcome": 1}
            if rng.random() < 0.5
            else row | {"a": rejected, "b": chosen, "outcome": 0}
        )
    words = texts[0].split()
    if kind == "steps":
        return row | {"steps": words, "labels": [word in GOOD for word in words]}
    if kind == "spans":
        wrong = [word for word in words if word in BAD]
        text = ", ".join(words)
        spans = [{"start": text.find(w), "end": text.find(w) + len(w), "type": "blame"} for w in wrong]
        return row | {"completion": text, "errors": spans}
    if kind == "safety":
        return row | {
            "response_0": rejected,
            "response_1": chosen,
            "safer_response_id": 1,
            "is_response_0_safe": true_reward(rejected) > 0,
            "is_response_1_safe": true_reward(chosen) > 0,
        }
    assert kind == "votes"
    return row | {"completions": [rejected, chosen], "votes": rng.choices([2, 2, 2, 0, 1], k=3)}


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


KINDS = ("chat", "completion", "text", "pairs", "verdicts", "prompts", "questions")
JUDGED = ("rankings", "strict", "choices", "scored", "games", "steps", "spans", "safety", "votes")


def write_world(folder: Path) -> Path:
    """All data files, each with its -eval twin, and reward.py."""
    for kind, (suffix, count, seed) in itertools.product(KINDS + JUDGED, (("", 240, 1), ("-eval", 48, 2))):
        write_rows(folder / f"{kind}{suffix}.jsonl", rows(kind, count, seed))
    (folder / "reward.py").write_text(REWARD)
    return folder


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, the later ones on top."""
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = out.get(key)
            both = isinstance(old, dict) and isinstance(value, dict)
            out[key] = merged(old, value) if both else copy.deepcopy(value)
    return out


def recipe(stage: str, start: Path | str, world: Path, kind: str, out: Path, **more: Any) -> dict[str, Any]:
    """A fast recipe on the toy task: `start` is the model, `more` lies on top."""
    head = {"stage": stage, "model": {"name_or_path": str(start)}, "output_dir": str(out)}
    data = {"data": {"train": str(world / f"{kind}.jsonl"), "eval": str(world / f"{kind}-eval.jsonl")}}
    made = merged(FAST, head, data, more)
    if stage == "ppo":  # which samples with rollout.max_new_tokens
        made["evaluation"].pop("max_new_tokens", None)
    return made


def save(content: dict[str, Any], path: Path) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


# --- what a run leaves behind ----------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    found = lines(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not clocked(k)} for row in found]


def clocked(name: str) -> bool:
    """Whether a metric depends on how fast the machine is, or on what else its process holds."""
    return name.endswith(("tokens_per_second", "/seconds")) or name.startswith(("time/", "mem/"))


def column(run: Path, name: str) -> list[float]:
    """All values of a metric, in the order of the steps."""
    return [row[name] for row in lines(run / "metrics.jsonl") if name in row]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; of a card, what it says of any run that trains the same."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    if folder.name == "final" and "README.md" in found:
        found["README.md"] = said(found["README.md"].decode())
    return found


def said(card: str) -> bytes:
    """A card without the settings that do not matter and the name that its run had when it was written."""
    named = re.search(r'^path = "(.*)/final"$', card, re.MULTILINE)
    assert named is not None, card
    run = Path(named[1])
    plain = card.replace(str(run), "RUN").replace(f"# {run.name}\n", "# RUN\n").partition("## Recipe")[0]
    return plain.encode()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below a folder with its size and time of change."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def sampled_reward(final: Path, prompts: Path) -> float:
    """Mean true reward of a completion of each prompt, sampled with plain transformers and peft."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = (final / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final, padding_side="left")
    asked = [row["prompt"] for row in lines(prompts)]
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in asked]
    start = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(
        input_ids=start["input_ids"], attention_mask=start["attention_mask"], do_sample=True, top_k=0, max_new_tokens=8
    )
    said = tokenizer.batch_decode(ids[:, start["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(map(true_reward, said)) / len(said)
