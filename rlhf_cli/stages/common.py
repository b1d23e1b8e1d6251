"""What every stage does around its algorithm: data before models, one directory, one way to end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from rlhf_cli.catalog import Data
from rlhf_cli.data.loader import Loader
from rlhf_cli.data.prepare import Prepared, prepare
from rlhf_cli.data.quarantine import FILE, quarantined
from rlhf_cli.data.tokens import Sample
from rlhf_cli.models import processes, sharding
from rlhf_cli.models.base import Text, check_length
from rlhf_cli.models.levers import check_levers
from rlhf_cli.models.roles import Role
from rlhf_cli.models.save import pad_id
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.report.page import write_report
from rlhf_cli.rollouts.generate import Sampling, sample
from rlhf_cli.runs import ancestry, card, opening
from rlhf_cli.runs.decide import no_whole_checkpoint
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.files import FREE, discard, disk_error, remove_quietly, sync_tree, temporary
from rlhf_cli.runs.signals import Signals
from rlhf_cli.runs.trackers import open_trackers
from rlhf_cli.stages.company import tell_shares
from rlhf_cli.stages.shelf import open_shelf
from rlhf_cli.train import checkpoint, fitting, snapshot
from rlhf_cli.train.engine import Engine


def read_data(recipe: Recipe, kind: Data, text: Text, display: Display, **options: Any) -> Prepared:
    """The rows of the recipe as samples, told about, before any model is loaded. Raises DataError, RecipeError."""
    check_length(text, recipe.data.max_length, "data.max_length")
    check_levers(recipe.model, text.source)
    prepared = prepare(recipe.data, kind, text.template, shelf=open_shelf(recipe, display), **options)
    for line in prepared.report.lines():
        warning = line.removeprefix("warning: ")
        display.note(line) if warning == line else display.warn(warning)
    return prepared


def make_loader(recipe: Recipe, prepared: Prepared, batch_size: int) -> Loader:
    """The order of the training samples."""
    return Loader(prepared.source, prepared.weights, batch_size, recipe.seed)


def total_steps(recipe: Recipe, loader: Loader) -> int:
    """Steps of the run: max_steps when given, else num_epochs over the data."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    return max(1, math.ceil(recipe.training.num_epochs * loader.steps_per_epoch))


def tell_length(recipe: Recipe, loader: Loader, display: Display, what: str = "examples") -> None:
    """How long the run will be, and a warning when a step holds fewer than it was asked to."""
    steps, size = total_steps(recipe, loader), loader.epoch_size
    each, epochs = min(loader.batch_size, size), f"{steps / loader.steps_per_epoch:.3g}"
    times, passes = "step" if steps == 1 else "steps", "epoch" if epochs == "1" else "epochs"
    display.note(f"training: {steps:,} {times} of {each:,} {what}, {epochs} {passes} of {size:,}")
    if loader.batch_size > size:
        display.warn(
            f"a step asks for {loader.batch_size:,} {what} and an epoch has {size:,}: every step takes just these "
            f"{size:,}, and is an epoch (lower training.batch_size)"
        )


def open_engine(
    recipe: Recipe, run: Run, display: Display, loader: Loader, learners: Sequence[tuple[Role, float]], *, idle: int = 0
) -> Engine:
    """An engine that trains these roles, each with its learning rate, and keeps the loader's cursor. How much is in
    memory at once is decided here, before anything is computed. idle: steps at the start in which the first role, the
    policy, is not trained."""
    policy = learners[0][0]
    engine = Engine(recipe, run, display, total_steps(recipe, loader), policy.base.packed)
    for role, learning_rate in learners:
        engine.add(role, learning_rate, idle=idle if role is policy else 0)
    engine.kept["loader"] = loader
    fitting.settle(engine)
    tell_shares(recipe.distributed, policy.base, display)
    return engine


def begin(engine: Engine, prepared: Prepared, lineage: dict[str, Any]) -> None:
    """Everything was accepted: create or reopen the run directory, and go on from its newest whole checkpoint."""
    run = engine.run
    processes.first(lambda: _begin(engine, lineage), "setting up the run directory")
    engine.display.attach(run.path / "run.log")
    run.write_data_report(prepared.report.to_json(), quarantined(prepared.bad))
    if prepared.report.bad_rows:
        engine.display.note(f"bad rows dropped: {prepared.report.bad_rows}, written to {run.path / FILE}")
    if processes.rank() == 0:
        for keep in prepared.shelved:
            keep()
        settings = engine.recipe.model_dump(mode="json")
        engine.trackers = open_trackers(engine.recipe.logging.report_to, run.path, settings)
    snapshot.seed_generators(engine.recipe.seed)
    saved = resume_point(run, engine.display)
    processes.same(None if saved is None else saved.path.name, "looking for the newest checkpoint")
    if saved is not None:
        with Signals(engine.display.warn, "reading the checkpoint") as signals:  # what reads would call it an error
            snapshot.restore(engine, saved)
        if signals.caught is not None:
            raise signals.interrupted("reading the checkpoint")
    elif run.status == "resume":
        raise no_whole_checkpoint(run.checkpoints)


def _begin(engine: Engine, lineage: dict[str, Any]) -> None:
    recipe, run = engine.recipe, engine.run
    if run.status == "fresh":
        model = recipe.model
        run.about = ancestry.about(model.name_or_path, model.revision, recipe.license, recipe.data_read())
    run.begin(lineage)


def resume_point(run: Run, display: Display) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from: the one asked for, or the newest whole one."""
    if run.resume_from is not None:  # for all but the first of several processes, which compares hashes for them
        return checkpoint.read(run.resume_from, content=processes.rank() == 0)
    return checkpoint.newest(run.checkpoints, display) if run.status == "resume" else None


def finish(
    engine: Engine, text: Text, save: Callable[[Path], None], prove: Callable[[Path], None] | None = None
) -> None:
    """final/ with its card, whole or absent, its proof, report.html, and DONE last: all of it by the first process."""
    sharding.collect(next(iter(engine.learners.values())).role)
    processes.first(lambda: _finish(engine, text, save, prove), "writing the trained model")


def _finish(engine: Engine, text: Text, save: Callable[[Path], None], prove: Callable[[Path], None] | None) -> None:
    run = engine.run
    snapshot.tidy(engine)
    draft = temporary(run.path / "final-new")  # not the name under which `discard` removes an old final/
    try:
        draft.mkdir()
        save(draft)
        write_card(run, text, draft)
        usual_modes(draft)
        sync_tree(draft)
        if run.final.exists():
            discard(run.final)
        os.rename(draft, run.final)
    except (OSError, SafetensorError) as error:
        cause = error if isinstance(error, OSError) else OSError(0, str(error))
        raise disk_error(cause, "the trained model cannot be written", run.final, FREE) from error
    finally:
        remove_quietly(draft)
    if prove is not None:
        prove(run.final)
    metrics = last_metrics(run.path / "metrics.jsonl")
    with Signals(engine.display.warn, "report.html") as signals:  # what draws would take the signal for its own error
        page = write_report(run.path)
    if signals.caught is not None:
        raise signals.interrupted("report.html")
    engine.display.note(f"report: {page}")
    run.finish(metrics)
    engine.display.note(f"done: {run.path}")


def write_card(run: Run, text: Text, folder: Path) -> None:
    """README.md of the model in `folder`, which is to become the run's final/. Raises ModelError and OSError."""
    head = read_json(run.path / "run.json")
    end = text.template.end_text or str(text.tokenizer.eos_token)
    model = opening.of_folder(folder, str(run.final), head, end, pad_id(text))
    recipe, report = (run.path / "recipe.yaml").read_text(encoding="utf-8"), read_json(run.path / "data-report.json")
    content = card.of_run(str(run.path), head, model, recipe, report, last_metrics(run.path / "metrics.jsonl"))
    (folder / card.FILE).write_text(content, encoding="utf-8", errors="replace")


def usual_modes(folder: Path) -> None:
    """Give every file the mode the umask asks for: some writers keep theirs to the owner."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def last_metrics(path: Path) -> dict[str, Any]:
    """The newest value of every metric in metrics.jsonl."""
    merged: dict[str, Any] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            merged |= json.loads(line)
    return merged


def show_samples(engine: Engine, policy: Role, text: Text, samples: Sequence[Sample]) -> None:
    """Complete a few held-out prompts, greedily, into samples.jsonl."""
    settings = engine.recipe.evaluation
    few = [s for s in samples if len(s.prompt)][: settings.samples]
    context = getattr(text.config.get_text_config(), "max_position_embeddings", None) or 10**9
    room = min(settings.max_new_tokens, context - max((len(s.prompt) for s in few), default=0))
    if not few or room < 1:
        return
    completed = sample(policy, [s.prompt for s in few], 1, text.template.stop_ids, Sampling(room, greedy=True), 0)
    for s, (c,) in zip(few, completed, strict=True):
        prompt = text.template.decode(s.prompt)
        completion = text.template.decode(c.ids, after=s.prompt)
        engine.run.sample({"step": engine.step, "prompt": prompt, "completion": completion, "finished": c.finished})


def select(samples: Sequence[Sample], indices: np.ndarray) -> list[Sample]:
    """The samples of one step."""
    return [samples[int(i)] for i in indices]


def settings_of(block: Any) -> dict[str, Any]:
    """The settings of a catalogue block, as keyword arguments."""
    return block.model_dump(exclude={"name"})
