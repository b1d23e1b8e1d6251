"""Real files in their formats, where this machine has them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.examples import Comparison, Steps
from rlhf_cli.data.prepare import load_examples
from rlhf_cli.data.reading import Wanted
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.settings.data import SegmentSettings
from tests.data.test_prepare import source

SCORES = {"completion": "text", "score": "reward"}
GSM = {"prompt": "question",
       "completions": ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]}  # fmt: skip
PREDICTIONS = [f"prediction {i}" for i in (1, 2, 3, 4)]
QA = {"prompt": "question", "completions": PREDICTIONS, "preferences": "preference"}
QA_SPANS = {"prompt": "question", "completion": "prediction 1", "errors": "feedback.errors"}
PANDA = {"completions": ["response1", "response2"], "votes": ["annotator1", "annotator2", "annotator3"]}
REAL: list[tuple[str, Any, dict[str, Any], str, int]] = [
    ("imdb_scored.jsonl", "comparison", SCORES, "scored", 693),
    ("imdb_scored.jsonl", "demonstration", {"completion": "text"}, "prompt_completion", 1392),
    ("gsm8k_train.jsonl", "demonstration", {"prompt": "question", "completion": "answer"}, "prompt_completion", 2000),
    ("gsm8k_train.jsonl", "task", {"prompt": "question"}, "prompt", 2000),
    ("alpaca_en_demo.json", "demonstration", {}, "alpaca", 849),
    ("dpo_en_demo.json", "comparison", {}, "sharegpt_preference", 201),
    ("dpo_zh_demo.json", "verdict", {}, "sharegpt_preference", 390),
    ("kto_en_demo.json", "verdict", {}, "verdict", 194),
    ("glaive_toolcall_en_demo.json", "demonstration", {}, "sharegpt", 150),
    ("imdb_scored.jsonl", "ranking", SCORES, "scored", 137),
    ("imdb_scored.jsonl", "rated", SCORES, "scored", 1392),
    ("gsm8k_four_solutions.jsonl", "ranking", GSM, "ranking", 390),
    ("gsm8k_four_solutions.jsonl", "verdict", GSM, "ranking", 2800),
    ("gsm8k_four_solutions.jsonl", "comparison", GSM, "ranking", 390),
    ("qa_feedback_4way.json", "ranking", QA, "ranking", 327),
    ("qa_feedback_4way.json", "steps", QA_SPANS, "spans", 337),
    ("pandalm_pairs.json", "comparison", PANDA, "votes", 592),
    ("mistake_multistep_arithmetic.jsonl", "steps", {}, "first_mistake", 200),
    ("mistake_tracking_shuffled_objects.jsonl", "steps", {}, "first_mistake", 188),
    ("mistake_word_sorting.jsonl", "steps", {}, "first_mistake", 120),
]


@pytest.mark.parametrize(("name", "kind", "columns", "format_", "kept"), REAL)
def test_real_data(shared: Path, name: str, kind: Any, columns: dict[str, Any], format_: str, kept: int) -> None:
    settings = source(str(shared / "data" / name), columns=columns)
    wanted = Wanted(("scores",) if columns == SCORES else (), segments=SegmentSettings(by="sentence"))
    examples, report = load_examples([settings], kind, "drop", wanted)
    assert len(examples.items) == kept
    assert report.sources[0].format == format_


def test_real_rankings_for_every_need(shared: Path) -> None:
    def kept(needs: Any, **columns: Any) -> tuple[int, dict[str, int]]:
        settings = source(str(shared / "data" / "gsm8k_four_solutions.jsonl"), columns=columns or GSM)
        examples, report = load_examples([settings], "ranking", wanted=Wanted(needs))
        return len(examples.items), {r.reason: r.count for r in report.sources[0].dropped}

    # Right solutions of four: 230 prompts with none, 155 one, 127 two, 108 three, 80 all.
    tied = {"all completions have the same score": 310}
    assert kept(()) == (390, tied)
    assert kept(("best",)) == (155, tied | {"several completions share the best score": 235})
    with pytest.raises(
        DataError, match=r"none of its 700 rows can be used: .*two completions have the same score: 390"
    ):
        kept(("strict",))
    with pytest.raises(DataError, match=r":1: a ranking needs two completions; the same in 699 more rows: 2, 3, ...\n"):
        kept((), prompt="question", completions=["6b_finetuning"])


def test_real_spans_by_category(shared: Path) -> None:
    def wrong(*categories: str) -> int:
        segments = SegmentSettings(by="sub_sentence", categories=list(categories) or None)
        settings = source(str(shared / "data" / "qa_feedback_4way.json"), columns=QA_SPANS)
        examples, report = load_examples([settings], "steps", wanted=Wanted(segments=segments))
        assert report.warnings == ()
        found = [item for item in examples.items if isinstance(item, Steps)]
        return sum(label == -1 for item in found for label in item.labels)

    assert 0 < wrong("Redundant") < wrong("Irrelevant") < wrong("Irrelevant", "Redundant") < wrong()


def test_real_votes_are_shares_of_three(shared: Path) -> None:
    settings = source(str(shared / "data" / "pandalm_pairs.json"), columns=PANDA)
    examples, _ = load_examples([settings], "comparison", "drop", Wanted(("target",)))
    shares = Counter(round(6 * item.target) for item in examples.items if isinstance(item, Comparison))
    assert set(shares) == {3, 4, 5, 6}
    assert sum(shares.values()) == 592 + 66
