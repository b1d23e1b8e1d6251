"""sample, score, select and eval in two processes: the rows and figures of one, whoever begins and whoever ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from rlhf_cli.errors import Interrupted
from rlhf_cli.stages import product
from tests import several
from tests.rollouts.stand_in import StandIn
from tests.stages import world as w
from tests.stages.conftest import quick, train

SMALL = {
    "rlhf_cli.stages.sample.AT_ONCE": 12, "rlhf_cli.stages.score.AT_ONCE": 16, "rlhf_cli.stages.judged.AT_ONCE": 5,
    "rlhf_cli.stages.evaluated.AT_ONCE": 8, "rlhf_cli.stages.matches.AT_ONCE": 5,
}  # fmt: skip
"""So many pieces that every process has some."""
COUNTED = """
from pathlib import Path

def counted(completions, number=None):
    with Path(__file__).with_suffix(".log").open("a") as log:
        log.write(f"{len(completions)}\\n")
    return [float(len(set(text))) for text in completions]
"""
FULL = {"distributed": {"shard": "full", "timeout": 60}}


def recipes(folder: Path, base: Path, lora: Path, rm: Path, world: Path) -> dict[str, dict[str, Any]]:
    """Every kind of work that is no training, in an order in which each finds what it reads."""
    plain = {"name_or_path": str(base), "dtype": "float32"}
    prompts = [{"path": str(world / "prompts.jsonl"), "limit": 22}]
    rewards = [{"run": str(rm), "name": "rm"}, {"function": f"{folder}/counted.py:counted", "weight": 0.1}]
    judge = {"model": dict(plain), "question": "{a} or {b}?"}
    asked = {"data": {"prompts": prompts, "max_length": 48}, "seed": 3}
    principles = folder / "principles.txt"
    principles.write_text("Be brief.\nBe kind.\n")
    revise = {"principles": str(principles), "critique": "{principle}?", "revision": "again"}
    three = {"max_new_tokens": 8, "completions_per_prompt": 3, "max_batch": 16}
    found: dict[str, dict[str, Any]] = {
        "sampled": {"stage": "sample", "model": plain, "rollout": three, **asked},
        "revised": {"stage": "sample", "model": plain | {"name_or_path": str(lora)}, "revise": revise,
                    "rollout": {"max_new_tokens": 6}, **asked},
        "best": {"stage": "sample", "model": plain, "best_of": 3, "rewards": rewards,
                 "rollout": {"max_new_tokens": 8}, **asked},
        "scored": {"stage": "score", "model": plain, "data": {"completions": f"{folder}/sampled"}, "rewards": rewards},
        "judged": {"stage": "score", "judge": judge, "data": {"completions": f"{folder}/sampled"}},
        "selected": {"stage": "select", "data": {"completions": f"{folder}/scored"}, "selection": {"name": "pairs"}},
        "spoken": {"stage": "eval", "model": plain, "against": [str(lora)], "judge": judge, "reference": str(lora),
                   "rewards": rewards[:1], "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2}, "seed": 3,
                   "data": {"prompts": [dict(prompts[0])], "max_length": 64,
                            "demonstrations": [{"path": f"{world}/chat.jsonl", "limit": 20}]}},
        "benched": {"stage": "eval", "model": plain | {"name_or_path": str(rm)},
                    "data": {"pairs": str(world / "pairs-eval.jsonl"), "max_length": 64}},
    }  # fmt: skip
    return {name: content | {"output_dir": str(folder / name)} for name, content in found.items()}


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """The same constants in this process."""
    changes = [patch(name, value) for name, value in SMALL.items()]
    changes.append(patch("rlhf_cli.stages.evaluated.write_evaluation", lambda run: run / "report.html"))
    for change in changes:
        change.start()
    yield
    for change in changes:
        change.stop()


@pytest.fixture(scope="module")
def ones(
    base: Path, sft_lora: Path, rm: Path, world: Path, small: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Each by one process: their folder, and their recipes."""
    folder = tmp_path_factory.mktemp("ones")
    (folder / "counted.py").write_text(COUNTED)
    made = recipes(folder, base, sft_lora, rm, world)
    for content in made.values():
        outcome = quick(content["stage"], saved(content, Path(content["output_dir"])))
        assert outcome.code == 0, outcome.err
    return folder, made


def saved(content: dict[str, Any], out: Path) -> Path:
    """The recipe as a file, into another folder."""
    return w.save(content | {"output_dir": str(out)}, out.with_suffix(".yaml"))


def apart(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two JSON values differ, numbers by more than 1e-5."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in apart(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [place for n, (a, b) in enumerate(zip(one, other, strict=True)) for place in apart(a, b, f"{at}.{n}")]
    if isinstance(one, float) and isinstance(other, float):
        return [] if abs(one - other) <= 1e-5 * (1 + abs(one)) else [f"{at}: {one} {other}"]
    return [] if one == other else [f"{at}: {one} {other}"]


def assert_same(one: Path, other: Path) -> None:
    """Both directories hold the same files, and those of rows and figures say the same."""
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in other.iterdir()} == names
    for name in names & {"data.jsonl", "comparisons.jsonl"}:
        assert apart(w.lines(one / name), w.lines(other / name)) == [], name
    for name in names & {"summary.json", "eval.json"}:
        assert apart(*(json.loads((run / name).read_text()) for run in (one, other))) == [], name
    assert len({json.loads((run / "run.json").read_text())["digest"] for run in (one, other)}) == 1


def begun(content: dict[str, Any], out: Path) -> Path:
    """The recipe of a run that was stopped after its first piece."""
    path = saved(content, out)

    def stop(signals: Any, doing: str) -> None:
        if doing == "ending piece 1":
            raise Interrupted(15, "stopped")

    with patch.object(product, "_hear", stop):
        assert quick("sample", path).code == 143
    assert len((out / "data.pieces").read_bytes().splitlines()) == 1
    return path


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        ("sample", {"model": {"quantization": "int8"}}, "cannot share out model.quantization int8: use nf4"),
        ("sample", {"rollout": {"engine": "continuous"}}, "cannot go with rollout.engine continuous: use own or"),
        ("score", {"judge": {"model": {"name_or_path": "m", "quantization": "int8"}}}, "out judge.model.quantization"),
        ("eval", {"model": {"quantization": "int8"}}, "cannot share out model.quantization int8: use nf4"),
        ("eval", {"distributed": {"shard": "none", "sequence_parallel": 2}}, "only read by the commands that train"),
        ("eval", {"distributed": {"shard": "none", "cpu_offload": True}}, "in main memory, and shard is none: set"),
        ("select", {}, "distributed.shard is only read where models are, and rlhf select loads none"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(stage: str, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    key = "prompts" if stage in ("sample", "eval") else "completions"
    content: dict[str, Any] = {"stage": stage, "data": {key: "x.jsonl"}, "output_dir": str(tmp_path / "x"), **FULL}
    content |= {"select": {"selection": {"name": "best"}}, "score": {}}.get(stage, {"model": {"name_or_path": "m"}})
    outcome = quick(stage, w.save(w.merged(content, more), tmp_path / "x.yaml"))
    assert outcome.code == 2
    (line,) = outcome.errors
    assert words in line


def test_a_single_process_says_that_it_has_nothing_to_share_out(base: Path, world: Path, tmp_path: Path) -> None:
    content = {"stage": "sample", "model": {"name_or_path": str(base)}, "output_dir": str(tmp_path / "x"), **FULL,
               "data": {"prompts": {"path": f"{world}/prompts.jsonl", "limit": 2}, "max_length": 48},
               "rollout": {"max_new_tokens": 2}}  # fmt: skip
    outcome = quick("sample", w.save(content, tmp_path / "x.yaml"))
    assert outcome.code == 0
    assert "distributed.shard full: a single process has nothing to share out" in outcome.err


@pytest.mark.slow
def test_two_processes_make_the_rows_of_one_and_a_killed_one_costs_nothing(
    ones: tuple[Path, dict[str, dict[str, Any]]], base: Path, world: Path, tmp_path: Path
) -> None:
    folder, made = ones
    dora, short = w.LORA | {"use_dora": True}, {"max_steps": 1}
    train(w.recipe("sft", base, world, "chat", tmp_path / "dora", training=short, lora=dora))
    whole = {"model": {"name_or_path": str(tmp_path / "dora")}}
    log = folder / "counted.log"
    calls = sorted(line for line in log.read_text().split() if line != "2")
    log.write_text("")
    lines: list[list[object]] = [
        [content["stage"], saved(content, tmp_path / name), "--quiet"] for name, content in made.items()
    ]
    sharded = ("best", "scored", "spoken")
    lines += [[made[n]["stage"], saved(w.merged(made[n], FULL), tmp_path / f"{n}-full"), "--quiet"] for n in sharded]
    stand_in = StandIn(base / "final")
    server = {"judge": {"engine": "vllm", "server": stand_in.address}}
    lines.append(["score", saved(w.merged(made["judged"], server), tmp_path / "served"), "--quiet"])
    lines.append(["eval", saved(made["spoken"], tmp_path / "spoken"), "--json"])
    lines.append(["sample", begun(made["revised"], tmp_path / "half"), "--quiet"])
    lines.append(["sample", saved(w.merged(made["revised"], whole, FULL), tmp_path / "refused"), "--quiet"])
    # the first is killed; all others come once the processes have started anew
    lines.insert(0, ["eval", saved(made["spoken"], tmp_path / "killed"), "--quiet"])
    codes, said = several.launch(tmp_path, lines, 2, {"process": 1, "piece": 5}, SMALL)
    assert codes == [0] * (len(lines) - 1) + [2], said[-3000:]
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert len(errors) == 2, errors
    assert errors[1] == (
        f"error: distributed.shard: layers in parts cannot go with {tmp_path}/dora, a DoRA adapter, which reads whole "
        f"weights (set none, or merge it first: rlhf merge {tmp_path}/dora)"
    )
    assert "process 1 (last seen: ending piece 5) is gone" in errors[0]
    assert "goes on after the last whole piece" in errors[0]
    assert_same(folder / "spoken", tmp_path / "killed")
    assert len(json.loads((tmp_path / "killed" / "run.json").read_text())["resumed"]) == 1
    for name in made:
        assert_same(folder / name, tmp_path / name)
    for name in sharded:
        assert_same(folder / name, tmp_path / f"{name}-full")
    stand_in.close()
    assert apart(*(w.lines(run / "comparisons.jsonl") for run in (folder / "judged", tmp_path / "served"))) == []
    questions = [tuple(body["prompt"]) for body in stand_in.bodies]
    matches = json.loads((folder / "judged" / "summary.json").read_text())["matches"]
    assert len(questions) == 2 * matches  # two orders, both labels at once: never twice by two processes
    assert_same(folder / "revised", tmp_path / "half")
    assert said.count('"kind": "language"') == 1  # told by one process
    assert said.count("up to date") == 1
    asked = sorted(line for line in log.read_text().split() if line != "2")
    assert asked == sorted(calls * 2)  # a function is called by one process, as often and with as much as by one alone
