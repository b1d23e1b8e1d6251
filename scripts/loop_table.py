"""What the models of a loop are worth: the scores of their completions of held-out prompts, as a table.

    python scripts/loop_table.py loops/raft --out loops/raft/table.md

Reads LOOP/N/judged for N = 0, 1, ...: runs of `rlhf score` on one completion of each held-out prompt, 0 those of the
model that the loop started from. Gains are paired by prompt. Exit code 1 when the last model is not three standard
errors above the first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

STANDARD_ERRORS = 3.0


def scores_of(run: Path) -> dict[str, float]:
    """The score of each prompt's completion."""
    with (run / "data.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {json.dumps(row["prompt"]): row["score"] for row in rows if row["score"] is not None}


def mean_and_error(numbers: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))


def main() -> int:
    """Parse the arguments, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    folders = sorted(asked.loop.glob("[0-9]*/judged"), key=lambda path: int(path.parent.name))
    found = [scores_of(folder) for folder in folders]
    lines = ["| iteration | score | standard error | gain over 0 | in its standard errors |", "|---|---|---|---|---|"]
    sure = 0.0
    for folder, scores in zip(folders, found, strict=True):
        mean, error = mean_and_error(list(scores.values()))
        line = f"| {folder.parent.name} | {mean:+.3f} | {error:.3f} |"
        shared = [key for key in scores if key in found[0]]
        if scores is not found[0]:
            gain, spread = mean_and_error([scores[key] - found[0][key] for key in shared])
            sure = gain / spread if spread else 0.0
            line += f" {gain:+.3f} | {sure:+.1f} |"
        else:
            line += " | |"
        lines.append(line)
    asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if sure < STANDARD_ERRORS:
        print(f"the last model is not {STANDARD_ERRORS:g} standard errors above the first", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
