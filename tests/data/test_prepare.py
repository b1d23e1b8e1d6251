from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.catalog import Data
from rlhf_cli.data.completions import read_completions
from rlhf_cli.data.examples import Comparison, Demonstration, Steps, Task, Verdict
from rlhf_cli.data.grouping import Dropped
from rlhf_cli.data.prepare import check_data, data_needs, load_examples, prepare
from rlhf_cli.data.reading import Wanted
from rlhf_cli.data.report import spread, tally
from rlhf_cli.data.template import load_template
from rlhf_cli.data.tokenizing import tokenize
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.schema import RECIPES
from rlhf_cli.recipe.settings.data import (
    DataSettings,
    RatingSettings,
    RewardDataSettings,
    SegmentSettings,
    SFTDataSettings,
    SourceSettings,
)
from tests.data.conftest import plain

Write = Callable[..., str]


def pair(prompt: str = "q", chosen: str = "a", rejected: str = "b", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def source(path: str, **settings: Any) -> SourceSettings:
    return SourceSettings(path=path, **settings)


def recipe(stage: str, **blocks: Any) -> Any:
    base = {"stage": stage, "model": "none", "training": {"learning_rate": 1e-5}, "output_dir": "runs/x"}
    return RECIPES[stage].model_validate(base | blocks)


def test_bad_rows_stop_the_run(jsonl: Write) -> None:
    path = jsonl(pair(), pair(chosen=" "), pair(chosen="b"))
    with pytest.raises(DataError) as caught:
        load_examples([source(path)], "comparison")
    assert str(caught.value).splitlines() == [
        f"{path}:2: empty completion",
        f"{path}:3: chosen equals rejected",
        "2 bad rows in all (correct them, or set data.on_bad_row: drop to leave them out)",
    ]


def test_at_most_twenty_problems_are_listed(jsonl: Write) -> None:
    path = jsonl(pair(), *(pair(margin=-number) for number in range(1, 34)))
    with pytest.raises(DataError) as caught:
        load_examples([source(path)], "comparison")
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1].message == "and 13 more bad rows"


def test_rows_that_are_bad_for_one_reason_share_a_line(jsonl: Write) -> None:
    rows = [pair(), pair(chosen=""), pair(rejected=""), *(pair(chosen="b") for _ in range(3))]
    path = jsonl(*rows, *(pair(chosen="") for _ in range(5)))
    with pytest.raises(DataError) as caught:
        load_examples([source(path)], "comparison")
    assert str(caught.value).splitlines() == [
        f"{path}:2: empty completion; the same in 6 more rows: 3, 7, ...",
        *(f"{path}:{line}: chosen equals rejected" for line in (4, 5, 6)),
        "10 bad rows in all (correct them, or set data.on_bad_row: drop to leave them out)",
    ]


@pytest.mark.parametrize("good", [1, 20])  # more than are looked at for their columns
def test_a_line_that_is_cut_is_told_with_the_bad_rows_before_it(jsonl: Write, good: int) -> None:
    path = jsonl(*[pair()] * good, pair(chosen="b"))
    with open(path, "a") as file:
        file.write('{"prompt": "q')
    cut = (
        f"{path}:{good + 2}: not JSON: Unterminated string starting at at column 12 "
        "(each line must be one whole JSON object)"
    )
    bad = f"{path}:{good + 1}: chosen equals rejected"
    for how, lines in (("error", [bad, cut]), ("drop", [cut])):
        with pytest.raises(DataError) as caught:
            load_examples([source(path)], "comparison", how)  # type: ignore[arg-type]
        said = str(caught.value).splitlines()
        assert said[: len(lines)] == lines
        assert len(said) == 2 * len(lines) - 1
    blank = Path(path).read_text().replace('"a"', '""', 1)
    Path(path).write_text(blank)
    with pytest.raises(DataError) as caught:
        read_completions([source(path, columns={"completion": "chosen"})], "error", None, scored=False)
    assert str(caught.value).splitlines() == [
        f"{path}:1: empty completion", cut,
        "1 bad row in all (correct them, or set data.on_bad_row: drop to leave them out)",
    ]  # fmt: skip


def test_bad_rows_dropped_and_counted(jsonl: Write) -> None:
    path = jsonl(pair(), *(pair(chosen="") for _ in range(60)), pair(chosen="b"))
    examples, report = load_examples([source(path)], "comparison", "drop")
    assert list(examples.items) == [Comparison("q", "a", "b", f"{path}:1")]
    first, second = report.sources[0].dropped
    assert (first.reason, first.count, len(first.where), first.where[:2]) == (
        "empty completion", 60, 50, (f"{path}:2", f"{path}:3"),
    )  # fmt: skip
    assert (second.reason, second.count, second.where) == ("chosen equals rejected", 1, (f"{path}:62",))
    assert (report.sources[0].rows, report.sources[0].kept) == (62, 1)


def test_all_rows_gone_is_an_error(jsonl: Write) -> None:
    path = jsonl(pair(chosen=""), pair(rejected=""))
    with pytest.raises(DataError, match="none of its 2 rows can be used: empty completion: 2"):
        load_examples([source(path)], "comparison", "drop")
    with pytest.raises(DataError, match="holds no rows"):
        load_examples([source(jsonl(name="empty.jsonl"))], "comparison", "drop")


def test_broken_json_stops_even_when_dropping(jsonl: Write) -> None:
    path = jsonl(pair())
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"rows.jsonl:2: not JSON"):
        load_examples([source(path)], "comparison", "drop")


def test_several_sources_with_weights(jsonl: Write) -> None:
    one = jsonl(pair(), pair("r"), name="one.jsonl")
    two = jsonl(pair("s"), name="two.jsonl")
    examples, report = load_examples([source(one, weight=2.0), source(two)], "comparison")
    assert examples.source.tolist() == [0, 0, 1]
    assert examples.weights == [2.0, 1.0]
    assert [(s.path, s.format, s.kept) for s in report.sources] == [(one, "preference", 2), (two, "preference", 1)]


def test_limit_and_columns(jsonl: Write) -> None:
    path = jsonl(*({"question": f"q{i}", "good": "a", "bad": "b", "idx": i} for i in range(9)))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    examples, report = load_examples([source(path, columns=columns, limit=3)], "comparison")
    assert [e.prompt for e in examples.items] == ["q0", "q1", "q2"]
    assert report.sources[0].unused == ("idx",)
    with pytest.raises(
        DataError, match=r"no column 'god' \(wanted as chosen\); found: bad, good, idx, question .*'good'"
    ):
        load_examples([source(path, columns=columns | {"chosen": "god"})], "comparison")


def test_a_format_that_is_named_is_taken(jsonl: Write) -> None:
    path = jsonl({"prompt": "q", "completion": "a", "score": 1.0, "text": "t"})
    with pytest.raises(DataError, match="several formats fit"):
        load_examples([source(path)], "demonstration")
    examples, report = load_examples([source(path, format="text")], "demonstration")
    assert list(examples.items) == [Demonstration("", "t", f"{path}:1")]
    assert not report.sources[0].detected


def test_scores_that_contradict_the_labels(jsonl: Write) -> None:
    path = jsonl(
        pair(chosen_score=2, rejected_score=1), pair(chosen_score=1, rejected_score=2), pair(), pair(score_chosen=3)
    )
    examples, _ = load_examples([source(path)], "comparison")
    assert [e.scores for e in examples.items] == [(2, 1), (1, 2), None, None]
    with pytest.raises(DataError) as caught:
        load_examples([source(path)], "comparison", wanted=Wanted(("scores",)))
    assert f"{path}:2: labels contradict scores" in str(caught.value)
    assert f"{path}:3: no scores of chosen and rejected" in str(caught.value)
    examples, _ = load_examples([source(path)], "comparison", "drop", wanted=Wanted(("scores",)))
    assert [e.where for e in examples.items] == [f"{path}:1"]


def test_scored_rows_over_the_whole_file(jsonl: Write) -> None:
    path = jsonl(
        *({"prompt": p, "completion": t, "score": s} for p, t, s in [("p", "a", 1), ("q", "x", 9), ("p", "b", 3)])
    )
    examples, report = load_examples([source(path)], "comparison")
    assert list(examples.items) == [Comparison("p", "b", "a", f"{path}:3 with 1", scores=(3.0, 1.0))]
    assert [(r.reason, r.count) for r in report.sources[0].dropped] == [("no partner to pair with", 1)]


def test_pairs_as_verdicts(jsonl: Write) -> None:
    path = jsonl(pair())
    examples, report = load_examples([source(path)], "verdict")
    assert list(examples.items) == [Verdict("q", "a", True, f"{path}:1"), Verdict("q", "b", False, f"{path}:1")]
    assert (report.sources[0].rows, report.sources[0].examples) == (1, 2)


def test_digest_is_of_the_content(jsonl: Write) -> None:
    digests = [
        load_examples([source(jsonl(*rows, name=name))], "comparison")[1].sources[0].digest
        for name, rows in {"a.jsonl": [pair()], "b.jsonl": [pair()], "c.jsonl": [pair(chosen="c")]}.items()
    ]
    assert digests[0] == digests[1] != digests[2]


def test_prepare(jsonl: Write, qwen: Any) -> None:
    template = load_template(qwen)
    train = [jsonl(pair("Hello"), pair("there", "a" * 99), name="one.jsonl"), jsonl(pair("two"), name="two.jsonl")]
    held_out = jsonl(pair("two", "fine"), pair("plus"), name="eval.jsonl")
    data = DataSettings.model_validate({"train": train, "eval": held_out, "max_length": 20})
    made = prepare(data, "comparison", template)
    assert [s.where for s in made.train] == [f"{train[0]}:1", f"{train[1]}:1"]
    assert made.source.tolist() == [0, 1]
    assert made.eval is not None
    assert [s.where for s in made.eval] == [f"{held_out}:1", f"{held_out}:2"]
    assert made.tasks_train == made.tasks_eval == []
    report = json.loads(json.dumps(made.report.to_json()))
    assert [s["split"] for s in report["sources"]] == ["train", "train", "eval"]
    assert report["sources"][0]["dropped"] == [
        {"reason": "longer than max_length", "count": 1, "where": [f"{train[0]}:2"]}
    ]
    assert [s["kept"] for s in report["sources"]] == [1, 1, 2]
    assert (report["duplicates"]["count"], report["duplicates"]["where"]) == (1, [f"{held_out}:1"])
    tokens = report["tokens"][0]
    assert tokens["samples"] == 2
    assert tokens["total"] == sum(len(s.prompt) + sum(len(c.ids) for c in s.completions) for s in made.train)
    assert tokens["scored"] == sum(int(c.scored.sum()) for s in made.train for c in s.completions)
    assert tokens["ended"] == 1.0
    assert any("eval prompts that are also train prompts" in line for line in made.report.lines())


def test_nothing_left_after_truncation(jsonl: Write, qwen: Any) -> None:
    data = DataSettings.model_validate({"train": jsonl(pair("Hello " * 30)), "max_length": 8})
    with pytest.raises(DataError, match="no train example is left: longer than max_length: 1"):
        prepare(data, "comparison", load_template(qwen))


def test_tasks_take_the_length_they_are_given(jsonl: Write, qwen: Any) -> None:
    path = jsonl({"prompt": "Hello there", "answer": 4}, {"prompt": "Hello " * 20, "answer": 5})
    data = DataSettings.model_validate({"train": path, "max_length": 500})
    made = prepare(data, "task", load_template(qwen), max_length=9)
    assert made.tasks_train == [Task("Hello there", f"{path}:1", {"answer": 4})]
    assert made.eval is None
    assert made.tasks_eval == []
    assert made.report.tokens[0].completion is None


def test_train_on_prompt_comes_from_the_settings(jsonl: Write, qwen: Any) -> None:
    path = jsonl({"prompt": "Hello there, how", "completion": " are you"})
    for on, least in ((False, 2), (True, 1)):
        data = SFTDataSettings.model_validate({"train": path, "train_on_prompt": on})
        made = prepare(data, "demonstration", load_template(qwen))
        assert (len(made.train[0].prompt) == 1) is on
        assert len(made.train[0].prompt) >= least


def test_warnings(jsonl: Write, qwen: Any) -> None:
    path = jsonl({"prompt": "Hello the", "completion": "re " * 30})
    data = DataSettings.model_validate({"train": path, "max_length": 12, "truncation": "right"})
    lines = prepare(data, "demonstration", load_template(qwen)).report.lines()
    assert "1 cut to max_length" in lines[1]
    assert "1 of 1 completions begin right at the last letter of their prompt" in lines[2]
    assert "the end token is scored in only 0.0 %" in lines[3]


def test_spread_and_tally() -> None:
    assert str(spread(range(1, 101))) == "1/50.5/95/100"
    assert str(spread([7])) == "7/7.0/7/7"
    reasons = tally([Dropped("a", "f:1"), Dropped("b", "f:2"), Dropped("b", "f:3")])
    assert [(r.reason, r.count, r.where) for r in reasons] == [("b", 2, ("f:2", "f:3")), ("a", 1, ("f:1",))]


def test_check_data_of_each_kind_of_recipe(jsonl: Write) -> None:
    pairs = jsonl(pair(chosen_score=1, rejected_score=2))
    lines = check_data(recipe("dpo", data={"train": pairs}, objective={"name": "dpo"}))
    read = f"train {pairs}: format preference (detected), 1 rows, 1 examples kept"
    assert lines[0] == f"{read}, columns not used: chosen_score, rejected_score"
    assert "lengths not checked" in lines[-1]
    with pytest.raises(DataError, match="labels contradict scores"):
        check_data(recipe("dpo", data={"train": pairs}, objective={"name": "odpo"}))
    lines = check_data(recipe("dpo", data={"train": pairs}, objective={"name": "kto"}))
    assert "1 rows, 2 examples kept" in lines[0]
    lines = check_data(recipe("ppo", data={"train": pairs}, rewards=[{"function": "f.py:f"}]))
    assert "format preference" in lines[0]
    with pytest.raises(DataError, match="no format that gives a demonstration"):
        check_data(recipe("sft", data={"train": pairs}))


def test_what_a_recipe_needs(jsonl: Write) -> None:
    path = jsonl(pair())

    def needed(stage: str, objective: Any) -> Any:
        return data_needs(recipe(stage, data={"train": path}, objective=objective))

    assert needed("dpo", {"name": "odpo"}) == ("comparison", ("reference", "scores"))
    assert needed("dpo", {"name": "rrhf"}) == ("ranking", ())
    assert needed("train-rm", {"name": "bradley_terry"}) == ("comparison", ("target",))
    assert needed("train-rm", {"name": "cost"}) == ("comparison", ("safety",))
    assert needed("train-rm", {"name": "choice"}) == ("ranking", ("best",))
    assert needed("train-rm", {"name": "step_labels"}) == ("steps", ("hard",))
    mix = {"terms": [{"name": "dpo"}, {"name": "sft"}, {"name": "odpo"}]}
    assert needed("dpo", mix) == ("comparison", ("reference", "scores"))
    assert data_needs(recipe("ppo", data={"train": path}, rewards=[{"function": "f.py:f"}])) == ("task", ())


def test_settings_reach_the_formats(jsonl: Write, qwen: Any) -> None:
    template = load_template(qwen)
    steps = jsonl({"prompt": "q ", "steps": ["a", "b"], "labels": [True, False]}, name="steps.jsonl")
    (sample,) = prepare(RewardDataSettings(train=[source(steps)], step_separator=" ki"), "steps", template).train
    wanted = tokenize([Steps("q ", ("a ki", "b ki"), (1.0, -1.0), f"{steps}:1")], template, 99).samples[0]
    assert plain(sample) == plain(wanted)
    spans = jsonl({"prompt": "q ", "completion": "a. b", "errors": []}, name="spans.jsonl")
    cut = RewardDataSettings(train=[source(spans)], segments=SegmentSettings(by="sentence"))
    wanted = tokenize([Steps("q ", ("a.", " b"), (1.0, 1.0), f"{spans}:1")], template, 99).samples[0]
    assert plain(prepare(cut, "steps", template).train[0]) == plain(wanted)
    games = jsonl(
        *({"prompt": p, "a": "x", "b": "y", "outcome": o} for p, o in (("q ", 1), ("r ", 1))), name="games.jsonl"
    )
    rated = RewardDataSettings(train=[source(games)], ratings=RatingSettings(target="minmax"))
    made = prepare(rated, "rated", template)
    assert [c.gold for s in made.train for c in s.completions] == pytest.approx([1, 0, 1, 0])
    (warning,) = made.report.warnings
    assert warning.startswith(f"train {games}: the games fall into 2 groups of completions that never met")


def test_split_votes_are_only_for_objectives_that_read_the_target(jsonl: Write, qwen: Any) -> None:
    rows = [{"prompt": "q ", "completions": ["a", "b"], "votes": v} for v in ([1, 2], [2, 2, 1], [0, 0])]
    data = DataSettings(train=[source(jsonl(*rows))])
    hard = prepare(data, "comparison", load_template(qwen))
    assert [s.numbers["target"] for s in hard.train] == [pytest.approx(2 / 3)]
    assert [str(r).split(" (")[0] for r in hard.report.sources[0].dropped] == ["neither completion is the better one"]
    soft = prepare(data, "comparison", load_template(qwen), ("target",))
    assert [s.numbers["target"] for s in soft.train] == pytest.approx([0.5, 2 / 3, 0.5])


def test_checking_data_does_not_import_torch(jsonl: Write) -> None:
    path = jsonl(pair())
    code = (
        "import sys; from rlhf_cli.data import prepare, tokens, template, report\n"
        "from rlhf_cli.recipe.settings.data import SourceSettings\n"
        f"prepare.load_examples([SourceSettings(path={path!r})], 'comparison')\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_neutral_steps_where_only_firm_ones_count(jsonl: Write) -> None:
    steps = {"prompt": "q", "steps": ["x", "y", "z"], "labels": [1, 0, -1]}
    path = jsonl(steps, steps | {"steps": ["x"], "labels": [0]})
    examples, report = load_examples([source(path)], "steps", wanted=Wanted(("firm",)))
    (kept,) = examples.items
    assert isinstance(kept, Steps)
    assert kept.labels == (1.0, None, -1.0)
    dropped = {reason.reason: reason.count for reason in report.sources[0].dropped}
    assert dropped == {"neutral steps of a solution": 2, "no step with a label": 1}
    whole, _ = load_examples([source(path)], "steps")
    assert [item.labels for item in whole.items if isinstance(item, Steps)] == [(1.0, 0.0, -1.0), (0.0,)]


@pytest.mark.parametrize(
    ("kind", "need", "row", "said"),
    [
        ("steps", "hard", {"prompt": "q", "steps": ["x", "y"], "labels": [0.3, 1]}, "a label is 0.3, a probability"),
        ("ranking", "grades", {"prompt": "q", "completions": ["x", "y"], "ranks": [1, 2]}, "only an order is given"),
        ("comparison", "target", pair(margin=-1), "'margin' is -1, below 0"),
        ("comparison", "scores", pair(chosen_score=1e300, rejected_score=0), "'chosen_score' is 1e+300: too large"),
        ("ranking", "grades", {"prompt": "q", "completions": ["x", "y"], "scores": [1e20, 2]}, "a score is 1e+20: too"),
    ],
)
def test_rows_an_objective_cannot_take(jsonl: Write, kind: Any, need: Any, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        load_examples([source(jsonl(row))], kind, wanted=Wanted((need,)))


def test_a_mapped_column_that_is_missing_is_not_replaced_by_ours(jsonl: Write) -> None:
    path = jsonl(pair() | {"good_answer": "c"})
    with pytest.raises(DataError, match=r"no column 'good_anwser' .wanted as chosen.*did you mean 'good_answer'"):
        load_examples([source(path, columns={"chosen": "good_anwser"})], "comparison")


def test_columns_are_used_only_where_the_objective_reads_them(jsonl: Write) -> None:
    path = jsonl(pair(margin=1, target=0.9, chosen_score=2, rejected_score=1))
    for needs, unused in (
        ((), {"margin", "target", "chosen_score", "rejected_score"}),
        (("target",), {"chosen_score", "rejected_score"}),
        (("scores",), {"margin", "target"}),
    ):
        _, report = load_examples([source(path)], "comparison", wanted=Wanted(needs))
        assert set(report.sources[0].unused) == unused


def test_bad_answers_that_would_be_imitated_are_warned_of(jsonl: Write) -> None:
    row = {"prompt": "q", "completion": "a", "label": True}

    def told(kind: Data, *labels: Any) -> list[str]:
        path = jsonl(*(row | {"completion": f"a{i}", "label": label} for i, label in enumerate(labels)))
        report = load_examples([source(path)], kind)[1]
        return [line for line in report.lines() if "labelled false" in line]

    (line,) = told("demonstration", True, False, 0, 1, None)
    assert re.search(r"2 of 5 rows are labelled false \(\S+:2, \S+:3\) and imitated like the others; .*: kto$", line)
    assert told("demonstration", True, 1) == []
    assert told("demonstration", False, 3) == [] == told("demonstration", False, "sad")  # no verdicts
    assert told("verdict", True, False) == [] == told("task", True, False)


def test_data_that_teach_nothing_are_warned_of(jsonl: Write) -> None:
    wanted = {"prompt": "q", "completion": "a", "label": True}
    _, report = load_examples([source(jsonl(wanted, wanted | {"completion": "b"}))], "verdict")
    assert any("every label is the same" in line for line in report.lines())
    _, report = load_examples([source(jsonl(wanted, wanted | {"completion": "b", "label": False}))], "verdict")
    assert not any("every label is the same" in line for line in report.lines())
