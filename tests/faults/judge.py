"""What must hold of a run directory: after a death, and in the end."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from rlhf_cli.report.page import write_report
from rlhf_cli.runs import manifest
from tests.faults.scenes import EVERY
from tests.stages import world as w

CLOCK = {"started", "finished", "command", "resumed", "output_dir"}


def whole_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that are whole, by their manifests and plain SHA-256. Every one that has its name
    must be: a death may leave hidden drafts, and nothing else."""
    steps = []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        said = json.loads((folder / "manifest.json").read_text())["files"]
        found = {p.name: _digest(p) for p in folder.iterdir() if p.name != "manifest.json"}
        assert found == {name: entry["sha256"] for name, entry in said.items()}, f"{folder} is not whole"
        assert manifest.fault(folder) == ""
        steps.append(manifest.step_of(folder.name) or 0)
    return steps


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_line(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def survived(run: Path, before: int, rolls_back: bool = False) -> int:
    """After a death: nothing that was reported is lost. before: the newest whole step earlier; returns today's, -1 for
    none. rolls_back: the run itself may give up later checkpoints.

    The line of a step is written once the checkpoint that was due before it has its name.
    """
    newest = max(whole_steps(run), default=-1)
    if rolls_back:
        assert newest >= min(before, 0), "no whole checkpoint is left"
        return newest
    due = max(last_line(run) - 1, 0) // EVERY * EVERY
    assert newest >= before, f"the checkpoint of step {before} was whole and is gone; now: {newest}"
    assert newest >= due or not due, f"step {last_line(run)} is logged, and the newest whole checkpoint is {newest}"
    return newest


def same(run: Path, whole: Path, strict: bool = True, locked: bool = False) -> None:
    """Everything a finished run left for its user equals what the undisturbed run left. strict: the same checkpoints
    lie there (a stop by a signal writes one more). locked: death came after DONE, and the lock's file may have stayed.
    """
    found, known = _names(run), _names(whole)
    found -= {".lock"} if locked else set()
    assert not strict or found == known, f"files: {sorted(found ^ known)}"
    assert not any(name.startswith(".") for name in found), "something hidden stays"
    for path in whole.rglob("*.jsonl"):
        name = str(path.relative_to(whole))
        assert _rows(run / name) == _rows(path), f"{name} differs"
    assert (run / "data-report.json").read_bytes() == (whole / "data-report.json").read_bytes()
    assert _differing(run / "final", whole / "final") == []
    steps = [sorted((r / "checkpoints").iterdir()) for r in (run, whole)]
    assert steps[0][-1].name == steps[1][-1].name
    for name in {p.name for p in steps[0]} & {p.name for p in steps[1]}:
        _same_checkpoint(run / "checkpoints" / name, whole / "checkpoints" / name)
    for name in ("run.json", "DONE"):
        assert _timeless(_json(run / name)) == _timeless(_json(whole / name)), f"{name} differs"
    recipes = [(r / "recipe.yaml").read_text().replace(str(r), "RUN") for r in (run, whole)]
    assert recipes[0] == recipes[1]
    assert "Traceback" not in (run / "run.log").read_text()


def fresh_report(run: Path) -> None:
    """report.html says what the files of the run say."""
    copy = run.parent / "reported" / run.name
    shutil.copytree(run, copy)
    assert write_report(copy).read_bytes() == (run / "report.html").read_bytes(), "report.html is stale"
    shutil.rmtree(copy.parent)


def _names(run: Path) -> set[str]:
    return {str(p.relative_to(run)) for p in run.rglob("*")}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not w.clocked(k)} for row in w.lines(path)]


def _differing(one: Path, other: Path) -> list[str]:
    found, known = w.contents(one), w.contents(other)
    return sorted(name for name in found.keys() | known.keys() if found.get(name) != known.get(name))


def _same_checkpoint(one: Path, other: Path) -> None:
    """Tensors to the bit, and the state but for the sizes of files that hold clock figures."""
    differing = _differing(one, other)
    assert set(differing) <= {"state.json", "manifest.json"}, f"{one.name}: {differing}"
    states = [_json(folder / "state.json") | {"sizes": None} for folder in (one, other)]
    assert states[0] == states[1], f"{one.name}: state.json differs"


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _timeless(value: Any) -> Any:
    """Without what depends on the clock, on how often the run was started, or on where it lies."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in CLOCK and not w.clocked(k)}
    return value
