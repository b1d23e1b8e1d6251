"""Bad rows that a run drops: counted, named, and set aside in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.stages import world as w
from tests.stages.conftest import quick

Toy = Callable[..., dict[str, Any]]


def test_bad_rows_are_set_aside_in_the_run_directory(toy: Toy, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = w.rows("pairs", 20, 5)
    rows[6]["rejected"] = rows[6]["chosen"]
    rows[11]["chosen"] = " "
    path = w.write_rows(tmp_path / "bad.jsonl", rows)
    data = {"train": str(path), "eval": None, "on_bad_row": "drop", "max_bad_rows": 0.1}
    content = toy("dpo", "pairs", objective={"name": "dpo"}, data=data, training={"max_steps": 1})
    run, recipe = Path(content["output_dir"]), tmp_path / "r.yaml"
    outcome = quick("dpo", w.save(content, recipe))
    assert outcome.code == 0, outcome.err
    assert f"bad rows dropped: 2, written to {run}/bad-rows.jsonl" in outcome.err
    assert w.lines(run / "bad-rows.jsonl") == [
        {"where": f"{path}:7", "reason": "chosen equals rejected", "row": rows[6]},
        {"where": f"{path}:12", "reason": "empty completion", "row": rows[11]},
    ]
    report = json.loads((run / "data-report.json").read_text())
    assert (report["bad_rows"], report["bad_rows_file"]) == (2, "bad-rows.jsonl")
    assert [(d["reason"], d["where"]) for d in report["sources"][0]["dropped"]] == [
        ("chosen equals rejected", [f"{path}:7"]), ("empty completion", [f"{path}:12"]),
    ]  # fmt: skip
    again = quick("dpo", recipe, "--set", "data.max_bad_rows=2")
    assert (again.code, "up to date" in again.err) == (0, True), again.err
    outcome = quick("dpo", recipe, "--set", "data.max_bad_rows=1", "-o", tmp_path / "other")
    assert (outcome.code, outcome.errors[-1].partition("error: ")[2]) == (
        3, "2 bad rows in all, of 20 rows: more than data.max_bad_rows 1 allows (correct them, or raise it)",
    )  # fmt: skip
    assert not (tmp_path / "other").exists()
