"""Every objective of the catalogue through its command: what the first step must say, and that held-out loss falls.

The first loss is the number that the docstring gives, or is computed here from what plain transformers says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli.catalog import OBJECTIVES, Objective
from tests.objectives.support import start
from tests.stages import world as w
from tests.stages.conftest import train

Toy = Callable[..., dict[str, Any]]
LOG2 = math.log(2)
ROWS = 16


class Said(NamedTuple):
    """A completion under the untrained model, its end token included."""

    logp: float
    length: int
    certainty: float
    """Mean over the tokens of log p - log sum p^2."""
    prompt_logp: float
    prompt_length: int
    """Tokens of the prompt but the first, which nothing predicts."""

    @property
    def mean(self) -> float:
        return self.logp / self.length


@pytest.fixture(scope="module")
def say(base: Path) -> Callable[[list[dict[str, str]], str], Said]:
    """What plain transformers says of a completion."""
    model = AutoModelForCausalLM.from_pretrained(base / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(base / "final")
    ends = model.generation_config.eos_token_id

    def measure(prompt: list[dict[str, str]], completion: str) -> Said:
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        turns = [*prompt, {"role": "assistant", "content": completion}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        first, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (head, whole))
        last = max(i for i, token in enumerate(ids) if token in ends)
        ids = ids[: last + 1]  # nothing after the end token is scored
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        logp = table[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        own, before = logp[len(first) - 1 :], logp[: len(first) - 1]
        collision = torch.logsumexp(2 * table, -1)[len(first) - 1 :]
        return Said(float(own.sum()), len(own), float((own - collision).mean()), float(before.sum()), len(before))

    return measure


Pairs = list[tuple[Said, Said, dict[str, Any]]]


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def nll(pairs: Pairs, prompt: bool = False) -> float:
    """Of the chosen completions, a mean over their tokens."""
    sums = [c.logp + prompt * c.prompt_logp for c, _, _ in pairs]
    return -sum(sums) / sum(c.length + prompt * c.prompt_length for c, _, _ in pairs)


def log_odds(m: float) -> float:
    return m - math.log(-math.expm1(m))


def odds(pairs: Pairs) -> float:
    return mean([softplus(log_odds(r.mean) - log_odds(c.mean)) for c, r, _ in pairs])


def bent(m: float) -> float:
    return -math.expm1(-0.25 * m) / 0.25


def as_the_docstring_says(entry: Objective) -> Callable[[Pairs], float]:
    number = start(entry)
    assert number is not None, f"{entry.name}: its `Step 0:` names no number, so it needs a case here"
    return lambda pairs: number


OWN: dict[str, tuple[dict[str, Any], Callable[[Pairs], float]]] = {
    "dpo": ({"label_smoothing": 0.1}, lambda p: LOG2),
    "odpo": ({"offset": "log1p"}, lambda p: mean([softplus(math.log1p(gap(row))) for _, _, row in p])),
    "r_dpo": ({"alpha": 0.1}, lambda p: mean([softplus(-0.1 * (c.length - r.length)) for c, r, _ in p])),
    "wpo": ({"clamp": False}, lambda p: LOG2 * mean([math.exp(c.certainty + r.certainty) for c, r, _ in p])),
    "f_dpo": ({"divergence": "alpha"}, lambda p: LOG2),
    "bco_pair": ({"shift": "mean"}, lambda p: 2 * LOG2),
    "sppo": ({"beta": 0.1}, lambda p: 50.0),
    "sft": ({}, nll),
    "orpo": ({"beta": 0.5}, lambda p: nll(p) + 0.5 * odds(p)),
    "simpo": ({}, lambda p: mean([softplus(0.5 - 2 * (c.mean - r.mean)) for c, r, _ in p])),
    "alphapo": ({}, lambda p: mean([softplus(2.5 * (0.1 - bent(c.mean) + bent(r.mean))) for c, r, _ in p])),
    "cpo": ({}, lambda p: mean([softplus(-0.1 * (c.logp - r.logp)) for c, r, _ in p]) + nll(p)),
    "slic": ({}, lambda p: mean([max(0.0, 1 - c.logp + r.logp) - 0.1 * c.logp for c, r, _ in p])),
}  # fmt: skip
PAIRED = {
    entry.name: OWN.get(entry.name) or ({}, as_the_docstring_says(entry))
    for entry in OBJECTIVES.values()
    if entry.data == "comparison" and entry.stage != "train-rm"
}
MIXES = {
    "spin, hinge": ({"name": "spin", "shape": "hinge"}, lambda p: 1.0),
    "mix": (
        {"terms": [{"name": "dpo"}, {"name": "bco_pair", "weight": 0.25}, {"name": "sft", "weight": 0.5}]},
        lambda p: LOG2 + 0.5 * LOG2 + 0.5 * nll(p),
    ),
    "orpo on the prompt too": ({"name": "orpo", "sft_scope": "all"}, lambda p: nll(p, True) + 0.1 * odds(p)),
    "simpo with likelihood": (
        {"name": "simpo", "sft_weight": 0.3, "gamma": 0.0},
        lambda p: mean([softplus(-2 * (c.mean - r.mean)) for c, r, _ in p]) + 0.3 * nll(p),
    ),
    "ld_dpo, policy alone": ({"name": "ld_dpo", "on_reference": False, "alpha": 1.0}, lambda p: LOG2),
}


def gap(row: dict[str, Any]) -> float:
    return float(row["chosen_score"] - row["rejected_score"])


def run(toy: Toy, stage: str, kind: str, objective: dict[str, Any], rows: int = ROWS, **more: Any) -> Path:
    """A run whose first step holds all rows; the rate is small enough for any of the losses."""
    training = {"max_steps": 6, "batch_size": rows, "learning_rate": 2e-3}
    content = toy(stage, kind, "run", rows, **w.merged({"objective": objective, "training": training}, more))
    return train(w.merged(content, {"evaluation": {"samples": 0}}))


def falls(out: Path) -> None:
    losses = w.column(out, "eval/loss")
    assert len(losses) == 2
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", [*PAIRED, *MIXES])
def test_pairs(name: str, toy: Toy, world: Path, say: Callable[..., Said]) -> None:
    settings, known = PAIRED[name] if name in PAIRED else MIXES[name]
    objective = settings if name in MIXES else {"name": name, **settings}
    first = objective.get("name") or objective["terms"][0]["name"]
    rows = w.lines(world / "pairs.jsonl")[:ROWS]
    pairs = [(say(r["prompt"], r["chosen"]), say(r["prompt"], r["rejected"]), r) for r in rows]
    out = run(toy, OBJECTIVES[first].stage, "pairs", objective)
    assert w.column(out, "loss")[0] == pytest.approx(known(pairs), rel=2e-5, abs=2e-5)
    if "reference" in OBJECTIVES[first].needs:
        assert w.column(out, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)
        assert w.column(out, "rewards/accuracies")[0] == 0
    falls(out)


@pytest.mark.parametrize(("name", "start"), [("kto", 0.5), ("bco", LOG2)])
def test_verdicts(name: str, start: float, toy: Toy) -> None:
    out = run(toy, "dpo", "verdicts", {"name": name})
    assert w.column(out, "loss")[0] == pytest.approx(start, abs=2e-5)
    falls(out)


def test_rrhf(toy: Toy, world: Path, say: Callable[..., Said]) -> None:
    rows = w.lines(world / "rankings.jsonl")[:ROWS]
    hinges, best = [], []
    for row in rows:
        said = [say(row["prompt"], c) for c in row["completions"]]
        s = row["scores"]
        n = range(len(s))
        hinges.append(sum(max(0.0, said[i].mean - said[j].mean) for i in n for j in n if s[i] < s[j]))
        best.append(said[s.index(max(s))])
    likelihood = -sum(b.logp for b in best) / sum(b.length for b in best)
    out = run(toy, "dpo", "rankings", {"name": "rrhf", "rank_weight": 2.0})
    assert w.column(out, "loss")[0] == pytest.approx(2 * mean(hinges) + likelihood, rel=2e-5)
    falls(out)


def test_stable_alignment(toy: Toy, world: Path, say: Callable[..., Said]) -> None:
    losses = []
    for row in w.lines(world / "strict.jsonl")[:ROWS]:
        said, s = [say(row["prompt"], c) for c in row["completions"]], row["scores"]
        top = s.index(max(s))
        others = [i for i in range(len(s)) if i != top]
        contrast = mean([-said[top].mean + said[i].mean + (s[top] - s[i]) / 2 for i in others])
        losses.append(-said[top].mean + 0.5 * max(0.0, contrast))
    out = run(toy, "dpo", "strict", {"name": "stable_alignment", "rating_scale": 2.0})
    assert w.column(out, "loss")[0] == pytest.approx(mean(losses), rel=2e-5)
    falls(out)


def log_factorial(rows: list[dict[str, Any]]) -> float:
    return mean([math.lgamma(len(r["completions"]) + 1) for r in rows])


SCORED: dict[str, tuple[str, dict[str, Any], Callable[[list[dict[str, Any]]], float]]] = {
    "bradley_terry": ("votes", {}, lambda rows: LOG2),
    "k_wise": ("rankings", {}, lambda rows: LOG2),
    "choice": ("choices", {}, lambda rows: mean([math.log(len(r["completions"])) for r in rows])),
    "plackett_luce": ("strict", {}, log_factorial),
    "regression": ("scored", {}, lambda rows: mean([r["score"] ** 2 for r in rows])),
    "cost": ("safety", {"l2": 0.01}, lambda rows: 3 * LOG2),
    "step_labels": ("steps", {}, lambda rows: LOG2),
    "outcome": ("verdicts", {}, lambda rows: LOG2),
}


@pytest.mark.parametrize("name", SCORED)
def test_reward_models(name: str, toy: Toy, world: Path) -> None:
    kind, settings, start = SCORED[name]
    count = 96
    out = run(toy, "train-rm", kind, {"name": name, **settings}, count, training={"learning_rate": 5e-3})
    rows = w.lines(world / f"{kind}.jsonl")[:count]
    assert w.column(out, "loss")[0] == pytest.approx(start(rows), abs=2e-5)
    falls(out)


def test_two_tokens(toy: Toy, world: Path) -> None:
    out = run(toy, "train-rm", "steps", {"name": "two_token", "good": "good", "bad": "bad"})
    falls(out)
    assert json.loads((out / "final" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_games_become_ratings(toy: Toy, world: Path) -> None:
    out = run(toy, "train-rm", "games", {"name": "regression"}, data={"ratings": {"target": "zscore"}})
    assert w.column(out, "loss")[0] == pytest.approx(1.0, abs=2e-5), "z-scores have variance 1"


def test_marked_errors_become_labels(toy: Toy, world: Path) -> None:
    out = run(toy, "train-rm", "spans", {"name": "step_labels"}, data={"segments": {"by": "sub_sentence"}})
    assert w.column(out, "loss")[0] == pytest.approx(LOG2, abs=2e-5)
    falls(out)


def test_every_objective_was_here() -> None:
    seen = {*PAIRED, *SCORED, "kto", "bco", "rrhf", "stable_alignment", "two_token", "cross_entropy"}
    assert set(OBJECTIVES) == seen
