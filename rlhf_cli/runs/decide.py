"""What to do with a run directory that may exist: start, go on, or nothing. Reads only."""

from __future__ import annotations

import math
import os
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_cli.errors import ModelError, Problem, RecipeError
from rlhf_cli.recipe.lineage import differences, digest_of, inputs, semantic
from rlhf_cli.recipe.model_path import read_json
from rlhf_cli.recipe.work import Work
from rlhf_cli.runs import lock, manifest, trackers
from rlhf_cli.runs.files import ELSEWHERE, TEMPORARY, writable
from rlhf_cli.runs.metrics import number, read_lines

PIECES = "data.pieces"
"""What a command that makes data has made so far, in its run directory."""
ARCHIVE = "--resume never archives the old run and starts anew; or choose another output_dir"


@dataclass(frozen=True)
class Identity:
    """What a recipe asks for."""

    meaning: dict[str, Any]
    """`lineage.semantic`."""
    sources: dict[str, str]
    """`lineage.inputs`."""
    digest: str
    max_steps: int | None


@dataclass(frozen=True)
class Decision:
    """What opening a run directory came to."""

    status: Literal["fresh", "resume", "done"]
    archive: bool = False
    """The old run is to be set aside first."""
    resume_from: Path | None = None
    """Checkpoint the user named; None: the newest whole one."""


def check_place(recipe: Work) -> None:
    """Whether a run can be where the recipe wants it. Raises RecipeError: inside another run, a file in the way, no
    right to write there; a tracker that is not installed. Writes nothing, and reads none of the inputs."""
    path = Path(recipe.output_dir)
    trackers.require(recipe.trackers)
    for above in path.absolute().parents:
        if os.path.isfile(above / "run.json"):
            raise RecipeError(f"lies inside the run {above}", f"output_dir {path}", "choose a place of its own")
    if not os.path.isfile(path / "DONE"):
        writable(path)  # a finished run may lie where nobody writes


def check_ahead(recipe: Work, made: Container[str]) -> None:
    """The same, and its inputs, where some of those (`made`) are still to be made. Raises as `Run.open` does."""
    check_place(recipe)
    _state(Path(recipe.output_dir))
    inputs(recipe, made)


def identify(recipe: Work) -> Identity:
    """Read everything the recipe depends on. Raises as `lineage.inputs` does."""
    meaning, sources = semantic(recipe), inputs(recipe)
    return Identity(meaning, sources, digest_of(meaning, sources), recipe.max_steps)


def decide(path: Path, wanted: Identity, resume: str) -> Decision:
    """Decide between fresh, resume and done.

    Args:
        path: the run directory.
        wanted: what the recipe asks for.
        resume: auto, never, or the path of a checkpoint.

    A run that never came to the end of a step is started over, whatever its recipe. Raises RecipeError for a directory
    of another recipe or of a stranger, ModelError for a broken one.
    """
    started = _state(path) == "run"
    if resume == "never":
        return Decision("fresh", archive=started)
    if started and resume == "auto" and _never_trained(path):
        return Decision("fresh")
    if started:
        _same(path, read_json(path / "run.json"), wanted, ARCHIVE)
    if resume != "auto":
        return Decision("resume", resume_from=_named(path, Path(resume), wanted))
    if not started:
        return Decision("fresh")
    if (path / "DONE").is_file():
        return _finished(path, wanted)
    listed = manifest.listed(path / "checkpoints")
    if listed and all(manifest.fault(checkpoint, content=False) for checkpoint in listed):
        raise no_whole_checkpoint(path / "checkpoints")
    return Decision("resume" if listed or (path / PIECES).is_file() else "fresh")


def no_whole_checkpoint(folder: Path) -> ModelError:
    """What to say of checkpoints of which none can be gone on from: nothing of them is overwritten."""
    first = manifest.listed(folder)[0]
    return ModelError(f"no checkpoint there is whole: {first.name}: {manifest.fault(first)}", str(folder),
                      f"restore one; {ARCHIVE}")  # fmt: skip


def refuse_inputs_inside(path: Path, wanted: Identity) -> None:
    """Raise a RecipeError when the recipe reads from the directory that it writes."""
    here = path.resolve()
    for name in wanted.sources:
        place = Path(name.removesuffix(" tokenizer")).expanduser()
        if place.exists() and (place.resolve() == here or here in place.resolve().parents):
            raise RecipeError(f"the recipe reads {place} from there", f"output_dir {path}", "choose another output_dir")


def _state(path: Path) -> Literal["empty", "run"]:
    """Whether a run lives there. Raises RecipeError when something else does."""
    try:
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except NotADirectoryError as error:
        raise RecipeError("is a file", f"output_dir {path}", "choose another output_dir") from error
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", f"output_dir {path}", ELSEWHERE) from error
    if "run.json" in names:
        return "run"
    strange = sorted(name for name in names if name != lock.NAME and TEMPORARY.fullmatch(name) is None)
    if strange:
        raise RecipeError(
            f"is not empty and not a run (it holds {strange[0]})", f"output_dir {path}", "choose another output_dir"
        )
    return "empty"


def _never_trained(path: Path) -> bool:
    """Whether the run there ended before its first step was over: nothing is lost when another takes its place."""
    if any((path / name).exists() for name in ("DONE", "checkpoints", "rollbacks", "final", PIECES)):
        return False
    try:
        rows = [row for row in read_lines(path / "metrics.jsonl") if row.get("step") != 0]
    except ModelError:
        return False
    numbers = [number(value) for row in rows for name, value in row.items() if name != "step"]
    return not any(x is None or math.isfinite(x) for x in numbers)  # one of a step that was not applied is not finite


def _same(path: Path, run: dict[str, Any], wanted: Identity, hint: str) -> None:
    """Raise a RecipeError listing what differs between a stored run and the recipe."""
    if run.get("digest") == wanted.digest:
        return
    changed = differences(run.get("recipe", {}), wanted.meaning)
    problems = [Problem(f"differs from the run there: {line}", f"output_dir {path}", hint) for line in changed]
    for name in sorted(run.get("inputs", {}).keys() | wanted.sources.keys()):
        old, new = run.get("inputs", {}).get(name), wanted.sources.get(name)
        if old is not None and new is not None and old != new:
            problems.append(Problem(f"{name} has changed since the run there started", f"output_dir {path}", hint))
        elif old != new and not changed:
            verb = "is read now and was not" if old is None else "was read and is not now"
            problems.append(Problem(f"{name} {verb} by the run there", f"output_dir {path}", hint))
    raise RecipeError(problems or [Problem("its run.json is damaged", f"output_dir {path}", hint)])


def _finished(path: Path, wanted: Identity) -> Decision:
    """Done, unless the recipe now asks for more steps than the finished run made."""
    done = read_json(path / "DONE")
    step, before = int(done.get("step", 0)), done.get("max_steps")
    if wanted.max_steps == before or (wanted.max_steps is not None and wanted.max_steps <= step):
        return Decision("done")
    if not manifest.listed(path / "checkpoints"):
        raise RecipeError(
            f"the run is finished at step {step} and has no checkpoint to go on from", f"output_dir {path}", ARCHIVE
        )
    return Decision("resume")


def up_to_date(path: Path, max_steps: int | None) -> str:
    """What to say of a finished run: also its steps, when other ones are asked for. Raises ModelError."""
    done = read_json(path / "DONE") if max_steps is not None else {}
    if max_steps is None or done.get("max_steps") == max_steps:
        return "up to date"
    return f"up to date: it has {done.get('step', 0)} steps, and training.max_steps asks for {max_steps}"


def _named(path: Path, checkpoint: Path, wanted: Identity) -> Path:
    """The checkpoint the user named, if it belongs to a run of this very recipe."""
    if manifest.step_of(checkpoint.name) is None or not checkpoint.is_dir():
        raise RecipeError(
            "no such checkpoint", f"--resume {checkpoint}", "give RUN/checkpoints/step-NNNNNN, or auto, or never"
        )
    if reason := manifest.fault(checkpoint):
        raise ModelError(f"the checkpoint is not whole: {reason}", str(checkpoint), "give another one, or auto")
    owner = checkpoint.resolve().parent.parent
    if owner == path.resolve():
        return checkpoint
    if not (owner / "run.json").is_file():
        raise RecipeError("does not lie in a run directory", f"--resume {checkpoint}", "RUN/checkpoints/step-NNNNNN")
    _same(owner, read_json(owner / "run.json"), wanted, "resume from a run of the same recipe and data")
    if manifest.listed(path / "checkpoints"):
        raise RecipeError(
            "the run in output_dir has checkpoints of its own", f"--resume {checkpoint}",
            "choose another output_dir, or --resume auto",
        )  # fmt: skip
    return checkpoint


def stands(before: Decision, now: Decision) -> bool:
    """Whether a decision still holds once the lock is taken and, if it said so, the old run is archived."""
    return replace(before, archive=False) == now
