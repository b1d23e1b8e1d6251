"""Supervised fine-tuning.

1. Render each demonstration with the model's own template; score the completion and its end token.
2. For each step: log-probabilities of the scored tokens,
3. cross-entropy, summed; divided once by the scored tokens of the whole step;
4. one optimiser step.
5. Held-out: the same loss, its exponential, and a few completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import counted
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import lineage, load_policy
from rlhf_cli.models.save import save_policy
from rlhf_cli.objectives.logprob import Statistics
from rlhf_cli.recipe.schema import SFTRecipe
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common
from rlhf_cli.train.engine import Losses


def run(recipe: SFTRecipe, run: Run, display: Display, options: Options) -> None:
    """Fine-tune a language model on demonstrations or plain text. Raises RlhfError."""
    text = load_text(recipe.model)
    data = common.read_data(recipe, "demonstration", text, display)
    loader = common.make_loader(recipe, data, recipe.training.batch_size)
    common.tell_length(recipe, loader, display)
    if options.dry_run:
        display.note(f"dry run: {len(data.train)} examples, {counted(common.total_steps(recipe, loader), 'step')}")
        return
    policy = load_policy(recipe, text, display, dropout=True)
    engine = common.open_engine(recipe, run, display, loader, [(policy, recipe.training.learning_rate)])
    objective = OBJECTIVES[recipe.objective.name].load()
    settings = common.settings_of(recipe.objective)

    smooth, scaled = recipe.objective.label_smoothing > 0, engine.learners[policy.name].scaler.is_enabled()
    statistics: Statistics = "usual" if smooth else "entropy"

    def loss(batch: Batch, group: list[int], count: float) -> Losses:
        of = policy.logp(batch, statistics=statistics, upstream=None if smooth or scaled else -1.0 / count)
        total = objective(of.logp, of.mean, **settings).sum()
        tokens = float(len(of.logp))
        nll = -of.logp.detach().sum()
        return Losses({"token": total}, {"entropy": (of.entropy.detach().sum(), tokens), "nll": (nll, tokens)})

    def step() -> dict[str, float]:
        samples = common.select(data.train, loader.next())
        count = scored(samples)
        metrics = engine.update(policy, samples, partial(loss, count=count), {"token": count})
        return metrics | {"epoch": loader.position}

    def scored(samples: Sequence[Sample]) -> float:
        return float(sum(c.scored.sum() for s in samples for c in s.completions))

    def evaluate() -> dict[str, float]:
        held_out = data.eval or []
        common.show_samples(engine, policy, text, held_out or data.train)
        if not held_out:
            return {}
        count = scored(held_out)
        metrics = engine.measure(policy, held_out, partial(loss, count=count), {"token": count})
        return {"eval/loss": metrics["loss"], "eval/perplexity": math.exp(min(metrics["nll"], 80.0))}

    engine.evaluate = evaluate
    common.begin(engine, data, lineage(policy, text, role="policy"))
    engine.fit(step)
    common.finish(engine, text, lambda folder: save_policy(policy, text, folder))
