"""Reward models: from pairs, rankings, scores, verdicts and labelled steps.

1. The language model gets a head (zero, float32), read at the last token of a completion, or at the end of each step.
2. For each step: what the head says of the completions, or of the steps;
3. the objective; the mean over the pairs, prompts, completions or steps of the optimiser step;
4. one optimiser step.
5. Held-out: the same figures. At the end mean and deviation of held-out scores are stored.
6. The saved model is opened as a plain classifier and asked again, to prove that it is the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.catalog import OBJECTIVES
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError, counted
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.build import lineage, load_policy
from rlhf_cli.models.checks import rounds
from rlhf_cli.models.save import check_classifier, open_reward, pad_id, save_policy, save_reward
from rlhf_cli.recipe.schema import RewardRecipe
from rlhf_cli.rollouts.rewards import STATISTICS
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common
from rlhf_cli.stages.scoring import Scoring, answers, labels_of, open_scoring
from rlhf_cli.train.engine import Engine

STATISTICS_ROWS = 1024
"""Held-out examples behind the stored mean and deviation, at most."""


def run(recipe: RewardRecipe, run: Run, display: Display, options: Options) -> None:
    """Train a reward model. Raises RlhfError."""
    text = load_text(recipe.model)
    entry, settings = OBJECTIVES[recipe.objective.name], common.settings_of(recipe.objective)
    tokens = answers(entry, settings, text)
    if entry.head != "language":
        check_classifier(text, labels_of(settings))
    data = common.read_data(recipe, entry.data, text, display, needs=entry.needs)
    loader = common.make_loader(recipe, data, recipe.training.batch_size)
    common.tell_length(recipe, loader, display)
    if options.dry_run:
        display.note(f"dry run: {len(data.train)} examples, {counted(common.total_steps(recipe, loader), 'step')}")
        return
    policy = load_policy(recipe, text, display)
    scoring = open_scoring(entry, settings, policy, tokens)
    engine = common.open_engine(recipe, run, display, loader, [(scoring.role, recipe.training.learning_rate)])

    def step() -> dict[str, float]:
        samples = common.select(data.train, loader.next())
        return engine.update(scoring.role, samples, *scoring.arguments(samples)) | {"epoch": loader.position}

    def evaluate() -> dict[str, float]:
        if not data.eval:
            return {}
        metrics = engine.measure(scoring.role, data.eval, *scoring.arguments(data.eval))
        return {f"eval/{k}": v for k, v in metrics.items()}

    engine.evaluate = evaluate
    common.begin(engine, data, lineage(scoring.role, text, role=scoring.kept_as))
    engine.fit(step)
    held_out = data.eval or data.train
    said, known = scores_of(engine, scoring, held_out[:STATISTICS_ROWS]), outputs_of(engine, scoring, held_out[:4])
    common.finish(
        engine,
        text,
        lambda folder: save(scoring, text, said, folder, held_out=bool(data.eval)),
        lambda folder: prove(engine, scoring, text, held_out[:4], known, folder),
    )


def scores_of(engine: Engine, scoring: Scoring, rows: Sequence[Sample]) -> np.ndarray:
    """Scores of the completions of some rows: (N,)."""
    scores: np.ndarray = torch.cat(engine.infer(scoring.role, rows, scoring.scores, "sequence")).double().cpu().numpy()
    return scores


def outputs_of(engine: Engine, scoring: Scoring, rows: Sequence[Sample]) -> list[torch.Tensor]:
    """What the head says of some rows; nothing where a classifier's head is not what is trained."""
    if scoring.tokens:
        return []
    if scoring.labels:
        return engine.infer(scoring.role, rows, scoring.role.classes, "token")
    return engine.infer(scoring.role, rows, scoring.role.score, "sequence")


def save(scoring: Scoring, text: Text, scores: np.ndarray, folder: Path, *, held_out: bool) -> None:
    """The model and the statistics of its scores."""
    if scoring.tokens:
        save_policy(scoring.role, text, folder)
    else:
        save_reward(scoring.role, text, folder, scoring.labels)
    mean, std = float(scores.mean()), float(scores.std())
    statistics: dict[str, Any] = {
        "mean": mean,
        "std": max(std, 1e-6),
        "completions": len(scores),
        "held_out": held_out,
    }
    if scoring.labels:
        statistics["classes"] = list(scoring.labels)
    (folder / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n")


def prove(
    engine: Engine,
    scoring: Scoring,
    text: Text,
    rows: Sequence[Sample],
    parts: Sequence[torch.Tensor],
    folder: Path,
) -> None:
    """ModelError when the saved folder, opened as a classifier, says other things of a few rows."""
    if scoring.tokens:
        return
    role = scoring.role
    try:
        worst = largest_gap(scoring, text, rows, parts, folder, role.base.device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        worst = largest_gap(scoring, text, rows, parts, folder, torch.device("cpu"))
    if not worst < (5e-2 if rounds(role.base) else 1e-4):
        raise ModelError(f"the saved reward model scores otherwise than the trained one (by {worst:.3g})", str(folder))
    engine.display.note(f"round trip: the saved reward model scores equally (largest relative gap {worst:.1e})")
    if (
        not scoring.labels
        and role.adapter is not None
        and role.base.model.config.pad_token_id in text.template.stop_ids
    ):
        engine.display.note(
            f"elsewhere, open it with pad_token_id={pad_id(text)}: its base pads with an end token, before which "
            "transformers would read the score"
        )


def largest_gap(
    scoring: Scoring,
    text: Text,
    rows: Sequence[Sample],
    parts: Sequence[torch.Tensor],
    folder: Path,
    device: torch.device,
) -> float:
    """Largest difference, relative to the size of the number, between the opened folder's outputs and ours."""
    opened = open_reward(folder, text, scoring.role, device, scoring.labels)
    gaps = []
    for row, known in zip(rows, parts, strict=True):
        ours = known if scoring.labels else known[:, None]
        theirs = torch.cat([outputs(opened, row, i, scoring, device) for i in range(len(row.completions))])
        gaps.append(float(((theirs.cpu() - ours.cpu()).abs() / (1 + ours.cpu().abs())).max()))
    return max(gaps)


def outputs(opened: torch.nn.Module, row: Sample, which: int, scoring: Scoring, device: torch.device) -> torch.Tensor:
    """What an opened classifier says of one completion: (1, 1), or (T, C) at its labelled tokens."""
    completion = row.completions[which]
    ids = torch.from_numpy(np.concatenate([row.prompt, completion.ids]).astype(np.int64))[None]
    with torch.no_grad(), scoring.role.base.autocast():
        logits = opened(input_ids=ids.to(device)).logits.float()
    return logits[0, len(row.prompt) :][torch.from_numpy(completion.scored).to(device)] if scoring.labels else logits
