"""Reward models from preference pairs.

1. The language model gets a scalar head (zero, float32) that is read at the last token of prompt + completion.
2. For each step: scores of chosen and rejected,
3. -log sigmoid(chosen - rejected - margin), with centring; the mean over the pairs of the step;
4. one optimiser step.
5. Held-out: accuracy (strictly greater), margin. At the end mean and deviation of held-out scores are stored.
6. The saved model is opened as a plain sequence classifier and scores a few rows again, to prove that it is the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.prepare import Prepared
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.build import lineage, load_policy, with_scalar_head
from rlhf_cli.models.checks import rounds
from rlhf_cli.models.roles import Role
from rlhf_cli.models.save import open_reward, pad_id, save_reward
from rlhf_cli.recipe.schema import RewardRecipe
from rlhf_cli.rollouts.rewards import STATISTICS
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common
from rlhf_cli.train.engine import Engine, Losses

STATISTICS_ROWS = 1024
"""Held-out pairs behind the stored mean and deviation, at most."""


def run(recipe: RewardRecipe, run: Run, display: Display, options: Options) -> None:
    """Train a reward model on pairs. Raises RlhfError."""
    text = load_text(recipe.model)
    data = common.read_data(recipe, "comparison", text, display)
    loader = common.make_loader(recipe, data, recipe.training.batch_size)
    if options.dry_run:
        display.note(f"dry run: {len(data.train)} pairs, {common.total_steps(recipe, loader)} steps")
        return
    policy = load_policy(recipe, text, display)
    reward = with_scalar_head(policy, "reward")
    engine = common.open_engine(recipe, run, display, loader, [(reward, recipe.training.learning_rate)])
    objective = OBJECTIVES[recipe.objective.name].load()
    settings = common.settings_of(recipe.objective)

    def loss(batch: Batch, group: list[int]) -> Losses:
        chosen, rejected = reward.score(batch).view(-1, 2).unbind(1)  # (B,)
        margin = batch.numbers["margin"].float() if "margin" in batch.numbers else torch.zeros_like(chosen)
        judged = objective(chosen, rejected, margin, **settings)
        gap = (chosen - rejected).detach()
        pairs = float(len(gap))
        return Losses({"example": judged.loss.sum()}, {
            "rewards/chosen": (chosen.detach().sum(), pairs),
            "rewards/rejected": (rejected.detach().sum(), pairs),
            "rewards/margins": (gap.sum(), pairs),
            "rewards/accuracies": ((gap > 0).sum(), pairs),
        })  # fmt: skip

    def step() -> dict[str, float]:
        samples = common.select(data.train, loader.next())
        return engine.update(reward, samples, loss, {"example": len(samples)}) | {"epoch": loader.position}

    def evaluate() -> dict[str, float]:
        if not data.eval:
            return {}
        metrics = engine.measure(reward, data.eval, loss, {"example": len(data.eval)})
        return {f"eval/{k}": v for k, v in metrics.items()}

    engine.evaluate = evaluate
    common.begin(engine, data, lineage(reward, text, role="reward"))
    engine.fit(step)
    common.finish(
        engine,
        lambda folder: save(engine, reward, text, data, folder),
        lambda folder: prove(engine, reward, text, (data.eval or data.train)[:4], folder),
    )


def save(engine: Engine, reward: Role, text: Text, data: Prepared, folder: Path) -> None:
    """The model and the statistics of its scores."""
    save_reward(reward, text, folder)
    pairs = (data.eval or data.train)[:STATISTICS_ROWS]
    parts = engine.infer(reward, pairs, reward.score, "sequence")
    scores = torch.cat(parts).double().cpu().numpy()
    mean, std = float(scores.mean()), float(scores.std())
    statistics = {"mean": mean, "std": max(std, 1e-6), "completions": len(scores), "held_out": bool(data.eval)}
    (folder / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n")


def prove(engine: Engine, reward: Role, text: Text, pairs: list[Sample], folder: Path) -> None:
    """ModelError when the saved folder, opened as a sequence classifier, scores a few rows otherwise."""
    parts = engine.infer(reward, pairs, reward.score, "sequence")
    try:
        worst = largest_gap(reward, text, pairs, parts, folder, reward.base.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        worst = largest_gap(reward, text, pairs, parts, folder, torch.device("cpu"))
    if not worst < (5e-2 if rounds(reward.base) else 1e-4):
        raise ModelError(f"the saved reward model scores otherwise than the trained one (by {worst:.3g})", str(folder))
    engine.display.note(f"round trip: the saved reward model scores equally (largest relative gap {worst:.1e})")
    if reward.adapter is not None and reward.base.model.config.pad_token_id in text.template.stop_ids:
        engine.display.note(
            f"elsewhere, open it with pad_token_id={pad_id(text)}: its base pads with an end token, before which "
            "transformers would read the score"
        )


def largest_gap(
    reward: Role, text: Text, pairs: list[Sample], parts: list[torch.Tensor], folder: Path, device: torch.device
) -> float:
    """Largest difference, relative to the size of the score, between the opened folder's scores and ours."""
    opened = open_reward(folder, text, reward, device)
    gaps = []
    for pair, known in zip(pairs, parts, strict=True):
        for completion, score in zip(pair.completions, known, strict=True):
            ids = torch.from_numpy(np.concatenate([pair.prompt, completion.ids]).astype(np.int64))[None]
            with torch.no_grad(), reward.base.autocast():
                again = opened(input_ids=ids.to(device)).logits[0, 0]
            gaps.append(abs(float(again) - float(score)) / (1 + abs(float(score))))
    return max(gaps)
