"""ppo, sample and eval by a vLLM server (tests/rollouts/stand_in.py), and the recipes that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.rollouts.generate import mixed
from tests.conftest import run_cli
from tests.rollouts.stand_in import StandIn
from tests.stages import world as w
from tests.stages.conftest import quick, train
from tests.stages.test_shared_work import apart


def ppo(toy: Callable[..., dict[str, Any]], world: Path, name: str, **more: Any) -> dict[str, Any]:
    """A recipe of 3 rollouts of 8 completions, 2 to a prompt."""
    content = toy("ppo", "prompts", name, rows=24, **w.merged({
        "rewards": [{"function": f"{world / 'reward.py'}:true_reward"}], "lora": {"r": 4},
        "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2}, "ppo": {"mini_batches": 2, "epochs": 1},
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 5e-3}, "checkpoint": {"every": 1},
        "logging": {"every": 1},
    }, more))  # fmt: skip
    content["data"]["eval"] = None
    return content


def by(stand_in: StandIn, **more: Any) -> dict[str, Any]:
    return {"rollout": {"engine": "vllm", "server": stand_in.address, **more}}


def same_draws(stand_in: StandIn, steps: int = 3) -> None:
    for step in range(1, steps + 1):
        stand_in.knows(mixed(3, step), range(0, 8))
    stand_in.knows(mixed(3, 0), range(0, 8))  # what is shown beside


@pytest.fixture(scope="module")
def fresh(base: Path) -> Iterator[Callable[..., StandIn]]:
    """Servers of `base`."""
    made: list[StandIn] = []

    def make() -> StandIn:
        made.append(StandIn(base / "final"))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def figures_of() -> Callable[[Path], list[dict[str, Any]]]:
    drop = (
        "rollout/logprob_gap",
        "rollout/halvings",
        "rollout/useful_share",
        "rollout/importance",
        "rollout/tokens_per",
    )
    return lambda run: [{k: v for k, v in row.items() if not k.startswith(drop)} for row in w.metrics(run)]


def test_ppo_by_a_server_learns_what_ppo_here_learns(
    fresh: Callable[..., StandIn], toy: Callable[..., dict[str, Any]], world: Path,
    figures_of: Callable[[Path], list[dict[str, Any]]], tmp_path: Path,
) -> None:  # fmt: skip
    """Bit for bit, when the server draws the same; so does a run that the server's death broke off."""
    here = train(ppo(toy, world, "here"))
    stand_in = fresh()
    same_draws(stand_in)
    there = train(ppo(toy, world, "there", **by(stand_in)))
    assert figures_of(there) == figures_of(here)
    assert w.column(there, "rollout/logprob_gap_max") != []
    assert max(w.column(there, "rollout/logprob_gap_max")) < 1e-4
    weights = [w.contents(run / "final")["adapter_model.safetensors"] for run in (here, there)]
    assert weights[0] == weights[1]
    assert stand_in.calls.count("/v1/load_lora_adapter") == 4  # of each policy that sampled: 3 rollouts, what is shown
    assert stand_in.loaded == {}
    assert not (there / "rollout-adapter").exists()
    assert "ppo.importance_correction: {} weighs what is learned by that" in (there / "run.log").read_text()

    broken, deadly = ppo(toy, world, "broken", **by(stand_in)), len(stand_in.bodies) + 9
    stand_in.change = lambda a: a if len(stand_in.bodies) < deadly else None
    path = w.save(broken, tmp_path / "broken.yaml")
    outcome = quick("ppo", path)
    assert outcome.code == 4
    (line,) = outcome.errors
    assert f"rollout.server {stand_in.address}: broke off" in line
    assert "the same command goes on from the newest whole checkpoint" in line
    assert len(w.lines(tmp_path / "broken" / "metrics.jsonl")) == 1
    stand_in.change = lambda a: a
    moved = stand_in.address.replace("127.0.0.1", "localhost")  # the address is no part of what a run means
    outcome = quick("ppo", path, f"rollout.server={moved}")
    assert outcome.code == 0, outcome.err
    assert figures_of(tmp_path / "broken") == figures_of(there)
    assert w.contents(tmp_path / "broken" / "final")["adapter_model.safetensors"] == weights[1]


def test_what_the_server_samples_otherwise_is_weighed(
    fresh: Callable[..., StandIn],
    toy: Callable[..., dict[str, Any]],
    world: Path,
) -> None:
    stand_in = fresh()
    same_draws(stand_in)
    one = {"training": {"max_steps": 1}}
    plain = train(ppo(toy, world, "plain", **w.merged(by(stand_in), one)))
    weighed = {"ppo": {"importance_correction": {"cap": 1.2}}}
    stand_in.shift = -0.25  # as if the server had found each token less likely
    corrected = train(ppo(toy, world, "corrected", **w.merged(by(stand_in), one, weighed)))
    (row,) = w.lines(corrected / "metrics.jsonl")
    assert row["rollout/logprob_gap_mean"] == pytest.approx(0.25, abs=1e-3)
    assert row["rollout/importance_max"] == pytest.approx(np.exp(0.25), rel=1e-3)
    assert row["rollout/importance_mean"] == pytest.approx(1.2)
    assert row["rollout/importance_truncated"] == 1.0
    before, after = (w.lines(run / "metrics.jsonl")[0] for run in (plain, corrected))
    assert after["loss/policy"] == pytest.approx(1.2 * before["loss/policy"], rel=0.05)
    stand_in.shift = -0.75
    content = ppo(toy, world, "strange", **w.merged(by(stand_in), one))
    outcome = quick("ppo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert outcome.code == 4
    assert "by 0.75 nats a token) (does the server hold the weights of the recipe's base?)" in outcome.errors[0]


def test_no_server_is_told_before_models_are_read(
    toy: Callable[..., dict[str, Any]], world: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("rlhf_cli.stages.ppo.load_roles", lambda *_: pytest.fail("a model was read"))
    content = ppo(toy, world, "early", rollout={"engine": "vllm", "server": "http://127.0.0.1:9"})
    outcome = quick("ppo", w.save(content, tmp_path / "early.yaml"))
    assert (outcome.code, len(outcome.errors)) == (4, 1)
    assert "rlhf serve-rollouts RECIPE" in outcome.errors[0]
    assert not (tmp_path / "early").exists()
    assert quick("ppo", tmp_path / "early.yaml", "--dry-run").code == 0  # which asks nobody


def test_sample_and_eval_by_a_server(
    fresh: Callable[..., StandIn],
    sft_lora: Path,
    base: Path,
    world: Path,
    tmp_path: Path,
) -> None:
    stand_in = fresh()
    common = {
        "model": {"name_or_path": str(sft_lora), "dtype": "float32"}, "seed": 3,
        "rollout": {"max_new_tokens": 5, "completions_per_prompt": 2},
    }  # fmt: skip
    prompts = [{"path": str(world / "prompts.jsonl"), "limit": 6}]
    rewards = [{"function": f"{world / 'reward.py'}:true_reward"}]
    sampled = common | {"stage": "sample", "data": {"prompts": prompts, "max_length": 48}}
    judged = common | {"stage": "eval", "data": {"prompts": prompts, "max_length": 48}, "rewards": rewards,
                       "against": [str(base)]}  # fmt: skip
    for number in (0, 1):
        stand_in.knows(mixed(3, number), range(0, 12))
    for stage, content in (("sample", sampled), ("eval", judged)):
        rows = []
        for name, more in (("here", {}), ("there", by(stand_in))):
            out = tmp_path / f"{stage}-{name}"
            made = w.merged(content, more, {"output_dir": str(out)})
            outcome = run_cli(stage, w.save(made, out.with_suffix(".yaml")))
            assert outcome.code == 0, outcome.err
            rows.append([{k: v for k, v in row.items() if k != "by"} for row in w.lines(out / "data.jsonl")])
        assert rows[0] == rows[1]
        assert len(rows[0]) == (12 if stage == "sample" else 24)
        assert stand_in.loaded == {}
    assert "server" not in json.dumps(w.lines(tmp_path / "sample-there" / "data.jsonl"))
    assert {b["model"] == stand_in.root for b in stand_in.bodies} == {True, False}  # the base, and the adapter on it


def test_judges_by_a_server(
    fresh: Callable[..., StandIn], sft_lora: Path, base: Path, world: Path, tmp_path: Path
) -> None:
    """The scores and matches of a judge whose weights are here; each question is asked once."""
    stand_in = fresh()
    prompts = [f"tell of {thing}" for thing in ("a book", "a film", "the sea", "snow")]
    rows = [{"prompt": prompt, "completions": ["good", "bad", "dull"]} for prompt in prompts]
    asked = {"stage": "score", "data": {"completions": str(w.write_rows(tmp_path / "c.jsonl", rows))}}
    spoken = {"stage": "eval", "seed": 3, "model": {"name_or_path": str(base), "dtype": "float32"},
              "against": [str(sft_lora)], "rollout": {"max_new_tokens": 5},
              "data": {"prompts": [{"path": str(world / "prompts.jsonl"), "limit": 6}], "max_length": 64}}  # fmt: skip
    server = {"engine": "vllm", "server": stand_in.address, "max_batch": 3}
    for name, content, model in (("full", asked, base), ("lora", asked, sft_lora), ("eval", spoken, sft_lora)):
        judge: dict[str, Any] = {"model": {"name_or_path": str(model), "dtype": "float32"}}
        judge["question"] = "{prompt}: {a} or {b}?"
        found = []
        stand_in.bodies.clear()
        for where, more in (("here", {}), ("there", server)):
            out = tmp_path / f"{name}-{where}"
            path = w.save(content | {"judge": judge | more, "output_dir": str(out)}, out.with_suffix(".yaml"))
            outcome = run_cli(content["stage"], path)
            assert outcome.code == 0, outcome.err
            file = out / ("eval.json" if name == "eval" else "comparisons.jsonl")
            found.append(
                [json.loads(line) for line in file.read_text().split("\n" if name != "eval" else "\0") if line]
            )
        assert apart(*found) == [], name
        questions = [(b["model"], *b["prompt"]) for b in stand_in.bodies]
        assert len(set(questions)) == len(questions) > 8
        assert stand_in.loaded == {}
        assert {b["model"] == stand_in.root for b in stand_in.bodies} == {name == "full"}


def test_a_server_is_asked_before_data_is_read(
    toy: Callable[..., dict[str, Any]], world: Path, base: Path, tmp_path: Path
) -> None:
    """Reading may take long; --dry-run reads, and asks nobody."""
    (tmp_path / "bad.jsonl").write_text("no row\n")
    server = {"engine": "vllm", "server": "http://127.0.0.1:9"}
    trained = ppo(toy, world, "x", rollout=server)
    trained["data"]["train"] = str(tmp_path / "bad.jsonl")
    data = {"prompts": str(tmp_path / "bad.jsonl"), "max_length": 48}
    sampled = {"stage": "sample", "model": {"name_or_path": str(base), "dtype": "float32"}, "data": data,
               "rollout": server | {"max_new_tokens": 8}, "output_dir": str(tmp_path / "s")}  # fmt: skip
    for content in (trained, sampled):
        path = w.save(content, tmp_path / "r.yaml")
        outcome = run_cli(content["stage"], path)
        assert (outcome.code, len(outcome.errors)) == (4, 1), outcome.err
        assert "no server answers there" in outcome.errors[0]
        assert run_cli(content["stage"], path, "--dry-run").code == 3


@pytest.mark.parametrize(
    ("judge", "change", "code", "words"),
    [
        ({}, lambda a: {"choices": []}, 4, "with no log-probabilities of what comes next (is this a vLLM server?)"),
        ({}, lambda a: a["choices"][0].update(logprobs=None) or a, 4, "no log-probabilities of what comes next"),
        ({}, lambda a: a["choices"][0]["logprobs"]["top_logprobs"][0].clear() or a, 4,
         "no log-probability of a label (vLLM 0.27 and newer"),
        ({}, lambda a: a["choices"][0]["logprobs"]["top_logprobs"].append(dict.fromkeys(
            a["choices"][0]["logprobs"]["top_logprobs"].pop(), 2.5)) or a, 4, "2.5 as a log-probability"),
        ({}, lambda a: a["choices"][0].update(prompt_token_ids=[1]) or a, 4, "the completion of another prompt"),
        ({}, lambda a: None, 4, "broke off while it answered /v1/completions"),
        ({"server": "http://127.0.0.1:9"}, None, 4, "no server answers there: Connection refused (start it: vllm "),
        ({"server": None}, None, 2, "engine: vllm asks a server, and judge.server is not given"),
        ({"engine": "own"}, None, 2, "server is only read with engine: vllm, and engine is own"),
        ({"api_key_env": "sk-0123456789abcdef"}, None, 2, "the key itself never stands here"),
        ({"api_key_env": "RLHF_NO_SUCH_KEY"}, None, 2, "the environment variable RLHF_NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_judges_of_servers_that_cannot_be(
    judge: dict[str, Any], change: Any, code: int, words: str, fresh: Callable[..., StandIn], base: Path, tmp_path: Path
) -> None:
    stand_in = fresh()
    if change is not None:
        stand_in.change = change
    model = {"name_or_path": str(base), "dtype": "float32"}
    asked = {"model": model, "question": "{a} or {b}?", "engine": "vllm", "server": stand_in.address, **judge}
    rows = [{"prompt": "tell", "completions": ["good", "bad"]}]
    content = {"stage": "score", "data": {"completions": str(w.write_rows(tmp_path / "c.jsonl", rows))},
               "judge": asked, "output_dir": str(tmp_path / "x")}  # fmt: skip
    if "RLHF_NO_SUCH_KEY" in words:
        (tmp_path / "c.jsonl").write_text("no row")
        checked = run_cli("check", w.save(content, tmp_path / "x.yaml"))
        assert (checked.code, sum(words in line for line in checked.errors)) == (3, 1), "beside the bad rows"
    outcome = run_cli("score", w.save(content, tmp_path / "x.yaml"))
    assert outcome.code == code, outcome.err
    (line,) = outcome.errors
    assert words in line
    assert "0123456789" not in outcome.err
    if code == 4 and change is None:
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rollout": {"server": None}}, "rollout.server is not given"),
        ({"rollout": {"server": "127.0.0.1:8000"}}, "this is no address of a server"),
        ({"rollout": {"server": "http://127.0.0.1:65536"}}, "this is no address of a server"),
        ({"rollout": {"server": "http://me:secret@host:1/v1"}}, "this is no address of a server"),
        ({"rollout": {"min_new_tokens": 2}}, "rollout.min_new_tokens must not: use own or generate"),
        ({"rollout": {"engine": "own"}}, "server is only read with engine: vllm, and engine is own"),
        ({"rollout": {"engine": "own", "server": None, "sleep": True}}, "sleep is only read with engine: vllm"),
        ({"lora": None}, "lora is null: add `lora: {}`, or use engine own"),
        ({"lora": {"use_dora": True}}, "knows no lora.use_dora"),
        ({"lora": {"r": 513}}, "lora.r = 513 is more than rollout.engine vllm takes, 512"),
        ({"ppo": {"importance_correction": {"cap": 0.5}}}, "ppo.importance_correction.cap"),
    ],
)
def test_recipes_that_cannot_be(
    toy: Callable[..., dict[str, Any]],
    world: Path,
    tmp_path: Path,
    more: dict[str, Any],
    words: str,
) -> None:
    content = w.merged(ppo(toy, world, "x", rollout={"engine": "vllm", "server": "http://127.0.0.1:9"}), more)
    if more.get("lora", 0) is None:
        content["lora"] = None
    outcome = run_cli("ppo", w.save(content, tmp_path / "r.yaml"))
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
    assert words in outcome.errors[0]
    assert "r.yaml:" in outcome.errors[0]


def test_keys_that_are_missing_are_found_before_data_is_read(base: Path, sft_lora: Path, tmp_path: Path) -> None:
    """All of them at once, by the command and by check; a finished run needs none."""
    (tmp_path / "p.jsonl").write_text("no row")
    server = {"engine": "vllm", "server": "http://127.0.0.1:9"}
    judge = {"model": str(base), "question": "{a} or {b}?", **server, "api_key_env": "RLHF_NO_JUDGE"}
    content = {
        "stage": "eval", "model": str(base), "against": [str(sft_lora)], "data": {"prompts": str(tmp_path / "p.jsonl")},
        "rollout": {**server, "api_key_env": "RLHF_NO_ROLLOUT"}, "judge": judge, "output_dir": str(tmp_path / "x"),
    }  # fmt: skip
    path = w.save(content, tmp_path / "r.yaml")
    keys = [
        f"{block}.api_key_env: the environment variable {name} is not set (export {name}=...)"
        for block, name in (("rollout", "RLHF_NO_ROLLOUT"), ("judge", "RLHF_NO_JUDGE"))
    ]
    outcome = run_cli("eval", path)
    assert (outcome.code, outcome.errors) == (2, [f"error: {key}" for key in keys])
    checked = run_cli("check", path)
    assert [line for line in checked.errors if "api_key_env" in line] == [f"error: {path}: {key}" for key in keys]
    assert (checked.code, any("p.jsonl:1" in line for line in checked.errors)) == (3, True), "beside the bad row"
    assert not (tmp_path / "x").exists()
