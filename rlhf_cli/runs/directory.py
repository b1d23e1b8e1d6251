"""The run directory: what one training leaves behind, whole at every moment, held by one process at a time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rlhf_cli.catalog import STAGES
from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.recipe.data_path import PRODUCT
from rlhf_cli.recipe.work import Work
from rlhf_cli.runs import head, lock, manifest, provenance
from rlhf_cli.runs.decide import PIECES, Decision, Identity, check_place, decide, identify, refuse_inputs_inside, stands
from rlhf_cli.runs.files import (
    discard,
    disk_error,
    remove_quietly,
    remove_temporaries,
    sync_folder,
    sync_tree,
    writable,
)
from rlhf_cli.runs.files import write_atomic as write
from rlhf_cli.runs.metrics import HINT, Lines, plain, read_lines

_ATTEMPT = (
    "DONE", "metrics.jsonl", "samples.jsonl", "data-report.json", "bad-rows.jsonl", "report.html", "final",
    "doctor.jsonl", "rollbacks", "postmortem.html", PIECES, PRODUCT, "summary.json", "again.jsonl",
    "comparisons.jsonl", "eval.json",
)  # fmt: skip
"""What an attempt without any checkpoint leaves behind, removed when the run starts over."""


class Run:
    """A run directory. `open` decides and writes nothing; `begin` writes; `finish` writes DONE; `close` unlocks."""

    def __init__(self, recipe: Work, command: str, resume: str, identity: Identity, decision: Decision) -> None:
        self.recipe = recipe
        self.path = Path(recipe.output_dir)
        self.identity = identity
        self.about: dict[str, Any] = {}
        """What run.json shall say besides; a resumed run keeps what it says."""
        self._command = command
        self._resume = resume
        self._decision = decision
        self._lock = -1
        self._made: list[Path] = []
        self._lines = {name: Lines(self.path / name) for name in ("metrics.jsonl", "samples.jsonl")}

    @classmethod
    def open(cls, recipe: Work, command: str, resume: str) -> Run:
        """Decide what is to be done for a recipe. Writes nothing.

        Args:
            recipe: the resolved recipe.
            command: the command line, for run.json.
            resume: auto, never (the old run is archived by `begin`), or the path of a checkpoint.

        Raises RecipeError, DataError or ModelError: inputs missing, a tracker not installed, another recipe's run or a
        stranger's files in the directory, no right to write there.
        """
        path = Path(recipe.output_dir)
        check_place(recipe)
        if resume not in ("auto", "never") and not STAGES[recipe.stage].trains:
            raise RecipeError(f"a run of rlhf {recipe.stage} has no checkpoints", f"--resume {resume}", "auto or never")
        identity = identify(recipe)
        refuse_inputs_inside(path, identity)
        decision = decide(path, identity, resume)
        if decision.archive:
            writable(path.parent)
        return cls(recipe, command, resume, identity, decision)

    @property
    def status(self) -> Literal["fresh", "resume", "done"]:
        """fresh: start at step 0; resume: go on from a checkpoint; done: up to date."""
        return self._decision.status

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint the user named; None: take the newest whole one."""
        return self._decision.resume_from

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Folder of the trained model."""
        return self.path / "final"

    def begin(self, lineage: dict[str, Any]) -> None:
        """Create or take over the directory, lock it, write recipe.yaml and run.json.

        Args:
            lineage: what the stage knows of its models, as JSON: base {name, fingerprint}, adapter, template, parents.
                Its entry `role` (policy or reward) replaces the stage's usual one.

        Raises ModelError: locked by another process, changed since `open`, disk refuses, lineage of a resumed run
        differs. When it raises, nothing half-made stays and an archived run has its name back.
        """
        archived: Path | None = None
        try:
            archived = self._archive() if self._decision.archive else None
            self._take()
            self._clean()
            self._write_head(plain(lineage))
            if self._decision.status == "resume":
                self._abandon_later()
            if (self.path / "DONE").exists():
                discard(self.path / "DONE")
                sync_folder(self.path)
        except BaseException as error:
            self._undo(archived)
            if isinstance(error, OSError):
                raise disk_error(error, "cannot set up the run directory", self.path, HINT) from error
            raise

    def log(self, metrics: dict[str, Any]) -> None:
        """Append the metrics of a step, `step` among them, to metrics.jsonl. Raises ModelError when it cannot."""
        self._lines["metrics.jsonl"].append({"step": metrics["step"], **metrics})

    def sample(self, record: dict[str, Any]) -> None:
        """Append {step, prompt, completion, score?} to samples.jsonl. Raises ModelError when the disk refuses."""
        self._lines["samples.jsonl"].append(record)

    def write_data_report(self, report: dict[str, Any], bad_rows: bytes = b"") -> None:
        """Write data-report.json, and bad-rows.jsonl where there are some. Raises ModelError when the disk refuses."""
        if bad_rows:
            self._put("bad-rows.jsonl", bad_rows)
        self._put("data-report.json", report)

    def put(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file into the directory, whole or absent. Raises ModelError when the disk refuses."""
        self._put(name, value)

    def sizes(self) -> dict[str, int]:
        """Bytes of metrics.jsonl and samples.jsonl, brought to the disk; a checkpoint stores them for `rewind`."""
        return {name: lines.size() for name, lines in self._lines.items()}

    def rewind(self, lines: dict[str, int]) -> list[str]:
        """Cut metrics.jsonl and samples.jsonl back to the sizes a checkpoint stored; `{}` empties them.

        Returns:
            A warning for each file that is shorter than the checkpoint says, to be shown to the user.
        """
        source = self.resume_from.resolve().parent.parent if self.resume_from else self.path.resolve()
        if source != self.path.resolve():
            self._adopt(source, lines)
        warnings = [part.cut(lines.get(name, 0)) for name, part in self._lines.items()]
        return [warning for warning in warnings if warning]

    def finish(self, metrics: dict[str, Any]) -> None:
        """Bring everything to the disk, then write DONE: digest, last step, last metrics. Raises ModelError."""
        try:
            self.sizes()
            if self.final.is_dir():
                sync_tree(self.final)
        except OSError as error:
            raise disk_error(error, "cannot be brought to the disk", self.final, HINT) from error
        done = {
            "digest": self.identity.digest,
            "step": metrics["step"] if "step" in metrics else self._last_step(),
            "max_steps": self.identity.max_steps,
            "finished": provenance.now(),
            "metrics": metrics,
        }
        self._put("DONE", done)

    def close(self) -> None:
        """Close the files and free the lock. May be called twice."""
        for lines in self._lines.values():
            lines.close()
        if self._lock >= 0:
            lock.free(self._lock, self.path)
            self._lock = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last_step(self) -> int:
        rows = read_lines(self.path / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def _put(self, name: str, value: dict[str, Any] | bytes) -> None:
        try:
            write(self.path / name, value if isinstance(value, bytes) else _pretty(value))
        except OSError as error:
            raise disk_error(error, "cannot be written", self.path / name, HINT) from error

    def _archive(self) -> Path | None:
        """Give the old run another name, unless someone works in it."""
        handle = lock.take(self.path)
        try:
            stem = f"{self.path.name}.{datetime.now():%Y%m%d-%H%M%S}"
            target, number = self.path.with_name(stem), 1
            while target.exists():
                number += 1
                target = self.path.with_name(f"{stem}-{number}")
            os.rename(self.path, target)
        except BaseException:
            lock.free(handle, self.path)
            raise
        lock.free(handle, target)
        return target

    def _take(self) -> None:
        """Create the directory, lock it, and make sure that the decision still stands."""
        missing = [place for place in (self.path, *self.path.parents) if not place.exists()]
        for place in reversed(missing):
            try:
                place.mkdir()
                self._made.insert(0, place)
            except FileExistsError:
                continue
        self._lock = lock.take(self.path)
        if not stands(self._decision, decide(self.path, self.identity, self._resume)):
            raise ModelError("another process has changed this run meanwhile", str(self.path), "give the command again")

    def _clean(self) -> None:
        """Remove what crashed processes left, and a former attempt that never reached a checkpoint."""
        remove_temporaries(self.path, *self.path.glob("rollbacks/**"))
        manifest.tidy(self.checkpoints)
        if self._decision.status == "fresh":
            for name in _ATTEMPT:
                if (self.path / name).exists():
                    discard(self.path / name)

    def _write_head(self, lineage: dict[str, Any]) -> None:
        from rlhf_cli.recipe.reader import dump_recipe

        entry = head.entry(self._command)
        if self._decision.status == "resume" and (self.path / "run.json").exists():
            about = head.resumed(self.path, lineage, entry)
        else:
            about = head.started(self.recipe.stage, self.identity, lineage, self.about, entry)
        files = {"run.json": _pretty(about), "recipe.yaml": dump_recipe(self.recipe).encode()}
        for name, content in files.items():
            if not (self.path / name).exists():
                self._made.insert(0, self.path / name)
            write(self.path / name, content)

    def _abandon_later(self) -> None:
        """Going on from a checkpoint the user named means giving up the later ones."""
        chosen = self.resume_from
        if chosen is None or chosen.resolve().parent != self.checkpoints.resolve():
            return
        step = manifest.step_of(chosen.name) or 0
        for path in manifest.listed(self.checkpoints):
            if (manifest.step_of(path.name) or 0) > step:
                discard(path)

    def _adopt(self, source: Path, lines: dict[str, int]) -> None:
        """Copy the lines that another run wrote up to the checkpoint this one goes on from."""
        for name in self._lines:
            if (source / name).is_file():
                with (source / name).open("rb") as file:
                    write(self.path / name, file.read(lines.get(name, 0)))

    def _undo(self, archived: Path | None) -> None:
        """Take back what `begin` made before it failed."""
        for path in self._made:
            if path.name in {"run.json", "recipe.yaml"} and path.parent == self.path:
                remove_quietly(path)
        self.close()
        for path in self._made:
            with suppress(OSError):
                path.rmdir()
        self._made.clear()
        if archived is not None and not self.path.exists():
            os.rename(archived, self.path)


def _pretty(value: dict[str, Any]) -> bytes:
    return (json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
