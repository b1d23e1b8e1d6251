"""Preference tuning: the objectives of dpo, orpo and simpo.

1. Tokenise each prompt with its completions; the prompt is computed once for all of them.
2. For each micro-batch: log-probabilities of the frozen reference, if the objective needs one and no earlier visit or
   run is remembered; the reference goes when all is known;
3. log-probabilities of the policy, summed over each completion;
4. the objective, a loss for each example; divided once by the examples of the whole step;
5. one optimiser step.
6. Held-out: the same figures, and a few completions.
"""

from __future__ import annotations

import numpy as np

from rlhf_cli.errors import counted
from rlhf_cli.models.base import load_text
from rlhf_cli.models.build import lineage, load_policy
from rlhf_cli.models.save import save_policy
from rlhf_cli.recipe.schema import DPORecipe, ORPORecipe, SimPORecipe
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common, judging
from rlhf_cli.stages import preference_setup as setup
from rlhf_cli.stages.remembered import Reference


def run(recipe: DPORecipe | ORPORecipe | SimPORecipe, run: Run, display: Display, options: Options) -> None:
    """Tune a language model on preferences. Raises RlhfError."""
    text = load_text(recipe.model)
    terms = judging.terms(recipe)
    data = common.read_data(recipe, terms[0].entry.data, text, display, needs=setup.needs(terms))
    setup.check_step(terms, recipe, data)
    setup.check_scores(terms, data.train)
    if data.eval:
        setup.check_scores(terms, data.eval)
    setup.check_scale(terms, data.train)
    named = setup.named_reference(recipe, text)
    loader = common.make_loader(recipe, data, recipe.training.batch_size)
    common.tell_length(recipe, loader, display)
    if options.dry_run:
        display.note(f"dry run: {len(data.train)} examples, {counted(common.total_steps(recipe, loader), 'step')}")
        return
    policy = load_policy(recipe, text, display)
    engine = common.open_engine(recipe, run, display, loader, [(policy, recipe.training.learning_rate)])
    strangers = setup.open_strangers(terms, recipe, data)
    memory = setup.open_memory(terms, recipe, engine, policy, text, named, data, loader, strangers)
    reference = Reference(engine, memory, strangers)
    reference.role = setup.open_reference(terms, recipe, policy, text, named, engine, data.train, memory)
    judge = judging.Judge(engine, terms, policy, reference)

    def step() -> dict[str, float]:
        chosen = loader.next()
        samples = common.select(data.train, chosen)
        also = judge.likelihood(samples)
        metrics = engine.update(policy, samples, *judge.arguments("train", samples, chosen), also=also)
        return judge.settle(metrics, samples, trained=True) | {"epoch": loader.position}

    def evaluate() -> dict[str, float]:
        common.show_samples(engine, policy, text, data.eval or data.train)
        if not data.eval:
            return {}
        everything = np.arange(len(data.eval))
        metrics = engine.measure(policy, data.eval, *judge.arguments("eval", data.eval, everything))
        if (also := judge.likelihood(data.eval)) is not None:
            more = engine.measure(policy, also.samples, also.loss, also.counts)
            metrics |= more | {"loss": metrics["loss"] + more["loss"]}
        return {f"eval/{k}": v for k, v in judge.settle(metrics, data.eval, trained=False).items()}

    engine.evaluate = evaluate
    common.begin(engine, data, lineage(policy, text, role="policy"))
    reference.recall()
    try:
        engine.fit(step)
    finally:
        reference.share()
    common.finish(engine, text, lambda folder: save_policy(policy, text, folder))
