"""distributed.shard: full, when something fails: one line that names the process, and whole checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import several
from tests.stages import world as w
from tests.stages.conftest import quick

SMALL = {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 5, "micro_batch_tokens": 64}


def sharded(model: Path, folder: Path, name: str) -> dict[str, Any]:
    """Full fine-tuning in five steps, a checkpoint after each."""
    for suffix, count in (("", 20), ("-eval", 3)):
        w.write_rows(folder / f"chat{suffix}.jsonl", w.rows("chat", count, 1))
    distributed = {"shard": "full", "timeout": 60}
    return w.recipe("sft", model, folder, "chat", folder / name, lora=None, training=SMALL, checkpoint={"every": 1},
                    evaluation={"samples": 0}, distributed=distributed)  # fmt: skip


@pytest.mark.slow
def test_memory_that_runs_out_on_one_process_is_one_line_and_the_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    paths = {}
    for name in ("whole", "short"):
        paths[name] = w.save(sharded(tiny_model, tmp_path, name), tmp_path / f"{name}.yaml")
    kill = {"process": 1, "step": 2, "how": "memory"}
    codes, said = several.launch(tmp_path, [["sft", paths["short"], "--quiet"]], 2, kill)
    assert codes == [4], said[-3000:]
    (line,) = (text for text in said.splitlines() if text.startswith("error: "))
    assert line.startswith("error: process 1: training.micro_batch_tokens: out of memory while computing step 3, and ")
    assert line.endswith("(lower it, or set model.gradient_checkpointing: true)")
    kept = sorted(path.name for path in (tmp_path / "short" / "checkpoints").iterdir())
    assert kept[-1] == "step-000002"
    for path in paths.values():  # by one process, which goes on where two have stopped
        assert quick("sft", path).code == 0
    for one, other in zip(*(w.metrics(tmp_path / name) for name in paths), strict=True):
        assert several.close(one, other) == []
