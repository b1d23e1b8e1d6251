"""A reward model on completions that are judged already: how often it agrees, and what it goes by.

1. Read the data by the kinds that the recipe names;
2. piece by piece: the scores of each example, or the probability that each of its steps is right;
3. the figures (data/bench.py). A cost model's scores are taken with their sign changed: the higher the better.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.catalog import Need
from rlhf_cli.data import bench as figures
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.prepare import Prepared
from rlhf_cli.data.tokens import Sample
from rlhf_cli.models.base import Text
from rlhf_cli.models.build import frozen_role
from rlhf_cli.models.device import micro_batch_range
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.process import aggregate, right
from rlhf_cli.recipe.evaluation import EvalRecipe
from rlhf_cli.recipe.model_path import Kept
from rlhf_cli.rollouts.rewards import Infer
from rlhf_cli.rollouts.scorers import tokens_of
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import evaluated, product
from rlhf_cli.stages.company import tell_shares
from rlhf_cli.stages.evaluated import finite
from rlhf_cli.stages.product import Piece
from rlhf_cli.train.passes import Frozen

NEEDS: dict[str, tuple[Need, ...]] = {"pairs": ("target",), "rankings": (), "scored": (), "steps": ()}
"""What is read of the examples under each key of `data`, besides the completions."""


class Item(NamedTuple):
    """An example that is to be scored."""

    kind: str
    source: str
    sample: Sample


def run(
    recipe: EvalRecipe, text: Text, kind: Kept, trained: dict[str, Any], run: Run, display: Display, options: Options
) -> None:
    """Measure a reward model. trained: the recipe that a process reward model was trained with. Raises RlhfError."""
    read = read_judged(recipe, text)
    report, bad = evaluated.together(list(read.values()))
    product.tell(report, display)
    items = [
        Item(key, getattr(recipe.data, key)[int(found.source[n])].path, sample)
        for key, found in read.items()
        for n, sample in enumerate(found.train)
    ]
    if options.dry_run:
        display.note(f"dry run: {len(items)} examples")
        return
    model = frozen_role("reward", recipe.model, text, None)
    display.note(f"model: {text.path.name}, {str(model.base.dtype)[6:]}, on {model.base.device}")
    tell_shares(recipe.distributed, model.base, display)
    asked = Frozen(display, micro_batch_range(model.base.device).usual)
    score = partial(by_steps, text, trained["objective"]) if kind == "process" else partial(by_score, kind == "cost")
    lineage = {"role": "data", "base": {"name": model.base.source, "fingerprint": model.base.fingerprint},
               "template": text.template.digest, "model": text.path.name}  # fmt: skip
    product.begin(run, display, lineage, report, bad)
    starts = range(0, len(items), evaluated.AT_ONCE)

    def pieces(numbers: range) -> Piece:
        part = items[starts[numbers.start] : numbers.stop * evaluated.AT_ONCE]
        rows = score(part, model, asked.infer)
        return Piece(rows, {"examples": float(len(rows))})

    product.make(run, display, len(starts), pieces)
    evaluated.finish(run, display, lambda: {
        "kind": kind, "model": text.path.name, **figures.figures(list(product.made_rows(run)), recipe.seed)
    })  # fmt: skip


def read_judged(recipe: EvalRecipe, text: Text) -> dict[str, Prepared]:
    """The examples by the key of `data` they stand under; steps are cut as in the training of the model."""
    given = recipe.data.given()
    return {
        key: evaluated.read(recipe, key, text, needs=needs, **(recipe.cut() if key == "steps" else {}))
        for key, needs in NEEDS.items()
        if key in given
    }


def by_score(cost: bool, items: list[Item], model: Role, infer: Infer) -> list[dict[str, Any]]:
    """Rows with a score for each completion."""
    sign = -1.0 if cost else 1.0
    parts = infer(model, [item.sample for item in items], model.score, "sequence")
    rows = []
    for item, part in zip(items, parts, strict=True):
        sample, completions = item.sample, item.sample.completions
        rows.append({
            "kind": item.kind, "source": item.source, "where": sample.where,
            "prompt": hashlib.sha256(sample.prompt.tobytes()).hexdigest()[:16],
            "scores": [sign * finite(float(score), sample.where, "the score") for score in part],
            "lengths": [len(c.ids) for c in completions],
            **({"target": sample.numbers["target"]} if item.kind == "pairs" else {}),
            **({"gold": [c.gold for c in completions]} if item.kind != "pairs" else {}),
        })  # fmt: skip
    return rows


def by_steps(
    text: Text, objective: dict[str, Any], items: list[Item], model: Role, infer: Infer
) -> list[dict[str, Any]]:
    """Rows with the probability that each step is right."""
    soft = objective["name"] == "two_token"
    parts = infer(model, [item.sample for item in items], probability(text, objective, model), "token")
    rows = []
    for item, part in zip(items, parts, strict=True):
        where, labels, p = item.sample.where, item.sample.completions[0].labels, part.double().cpu()
        assert labels is not None
        whole = aggregate(p, torch.zeros(len(p), dtype=torch.int64), 1, objective["aggregation"])
        rows.append({
            "kind": item.kind, "source": item.source, "where": where,
            "probabilities": [finite(q, where, "the probability of a step") for q in p.tolist()],
            "right": [None if label == 0 and not soft else bool(label > 0.5) for label in labels],
            "score": float(whole),
        })  # fmt: skip
    return rows


def probability(text: Text, objective: dict[str, Any], model: Role) -> Callable[[Batch], Tensor]:
    """What says how likely each step is right: (T,)."""
    if objective["name"] != "two_token":
        return lambda batch: right(model.classes(batch), neutral=objective["neutral"])
    answers = tokens_of(text.template, [objective["good"], objective["bad"]])

    def said(batch: Batch) -> Tensor:
        good, bad = model.followed_by(batch, answers).unbind(1)
        return torch.sigmoid(good - bad)

    return said
