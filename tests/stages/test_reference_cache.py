"""The reference's numbers, shared between runs: a run that finds them equals, bit for bit, one that computes them."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_cli.errors import ModelError
from rlhf_cli.models import build
from rlhf_cli.models.roles import Role
from rlhf_cli.runs.cache import code_digest
from rlhf_cli.stages import preference_setup
from rlhf_cli.train.engine import Engine
from tests.conftest import Outcome
from tests.stages import world as w
from tests.stages.conftest import quick
from tests.stages.test_interrupted import assert_same, interrupted, stop_at

Toy = Callable[..., dict[str, Any]]
DPO: dict[str, Any] = {"objective": {"name": "dpo"}, "evaluation": {"every": 2, "samples": 0}}
FULL: dict[str, Any] = {**DPO, "lora": None, "training": {"num_epochs": 2, "learning_rate": 1e-3}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "reference").rglob("*.safetensors"))


def go(content: dict[str, Any], *options: object) -> Outcome:
    outcome = quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")), *options)
    assert outcome.code == 0, outcome.err
    return outcome


def found(outcome: Outcome) -> str:
    """The one line about the reference."""
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("reference: "))
    return line


def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a reference that is made is an error."""

    def never(*_: object) -> None:
        raise AssertionError("a reference was loaded")

    monkeypatch.setattr(preference_setup, "load_reference", never)
    monkeypatch.setattr(preference_setup, "frozen_role", never)


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "full": ("pairs", FULL, 64),
    "lora-padded": ("pairs", {**DPO, "training": {"num_epochs": 1, "layout": "padded"}}, 64),
    "aot-ld": ("pairs", {**DPO, "objective": {"terms": [{"name": "aot"}, {"name": "ld_dpo"}]}}, 64),
    "bco": ("verdicts", {**DPO, "objective": {"name": "bco"}}, 64),
    "twice-in-a-step": ("pairs", {**DPO, "training": {"batch_size": 48, "max_steps": 3}}, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_a_warm_run_equals_a_cold_one(
    toy: Toy, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, more, rows = CASES[case]
    cold = toy("dpo", kind, "cold", rows, **more)
    assert "known from" not in found(go(cold))
    assert len(entries(cache)) == 2, "train and eval"
    before = w.contents(cache)
    no_reference(monkeypatch)
    line = found(go(cold | {"output_dir": str(tmp_path / "warm")}))
    assert (
        f"{rows + 16} of {rows + 16} {kind} known from an earlier run ({tmp_path / 'cold'}); it is not loaded" in line
    )
    assert "equal to the policy at step 0" in line
    assert_same(tmp_path / "warm", tmp_path / "cold")
    assert w.contents(cache) == before


def test_kto_also_remembers_what_its_reference_says_of_strangers(
    toy: Toy, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = toy("dpo", "verdicts", "cold", 48, **DPO | {"objective": {"name": "kto"}})
    go(cold)
    assert len(entries(cache)) == 4, "train and eval, and the strangers of both"
    no_reference(monkeypatch)
    line = found(go(cold | {"output_dir": str(tmp_path / "warm")}))
    assert f"64 of 64 verdicts known from an earlier run ({tmp_path / 'cold'}); it is not loaded" in line
    assert_same(tmp_path / "warm", tmp_path / "cold")


def test_an_adapter_and_a_named_reference(
    toy: Toy, tmp_path: Path, sft_lora: Path, tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_adapter = {"model": {"name_or_path": str(sft_lora)}}
    contents = {
        "copy": toy("dpo", "pairs", "copy", 48, **w.merged(DPO, on_adapter)),
        "named": toy("dpo", "pairs", "named", 48, reference=str(tiny_model), **DPO),
        "adapter": toy("dpo", "pairs", "adapter", 48, reference=str(sft_lora), **DPO),
    }
    for number, content in enumerate(contents.values(), start=1):
        go(content)
        assert len(entries(cache)) == 2 * number, "none takes another's numbers"
    no_reference(monkeypatch)
    for name, content in contents.items():
        line = found(go(content | {"output_dir": str(tmp_path / f"{name}-again")}))
        assert "64 of 64 pairs known from an earlier run" in line
        assert_same(tmp_path / f"{name}-again", tmp_path / name)


def keys(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Under which names a run would look for its numbers: of train and eval."""
    names: list[str] = []

    def stop(*arguments: Any) -> None:
        names.extend(memory.key for memory in arguments[-1].values())
        raise ModelError("seen enough")

    with monkeypatch.context() as patched:
        patched.setattr(preference_setup, "open_reference", stop)
        outcome = quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert "seen enough" in outcome.err, outcome.err
    return names


SAME: tuple[dict[str, Any], ...] = (
    {"output_dir": "elsewhere"}, {"objective": {"name": "dpo", "beta": 0.4}}, {"objective": {"name": "ipo"}},
    {"training": {"learning_rate": 1e-3, "max_steps": 2, "optimizer": "sgd"}}, {"lora": {"r": 4, "alpha": 4}},
    {"model": {"gradient_checkpointing": True}}, {"evaluation": {"every": None}},
)  # fmt: skip
OTHER: tuple[tuple[dict[str, Any], bool], ...] = (
    ({"data": {"train": {"limit": 15}}}, True), ({"data": {"max_length": 13, "truncation": "right"}}, False),
    ({"model": {"attn_implementation": "eager"}}, False), ({"model": {"kernels": "reference"}}, False),
    ({"model": {"dtype": "bfloat16"}}, False), ({"lora": None}, False), ({"lora": {"use_dora": True}}, False),
    ({"seed": 4}, True), ({"training": {"batch_size": 8}}, True), ({"training": {"micro_batch_tokens": 64}}, False),
    ({"training": {"layout": "padded"}}, False), ({"objective": {"name": "ld_dpo"}}, False),
)  # fmt: skip
"""What changes, and whether the numbers of the held-out data stay the same."""


def test_numbers_belong_to_what_decides_them(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = toy("dpo", "pairs", "run", 16, objective={"name": "dpo"})
    plain = keys(content, monkeypatch)
    for other in SAME:
        out = {"output_dir": str(tmp_path / other.get("output_dir", "run"))}
        assert keys(w.merged(content, {"objective": {}}, other, out), monkeypatch) == plain, other
    seen = {plain[0]}
    for other, as_before in OTHER:
        train, held_out = keys(w.merged(content, other), monkeypatch)
        assert (held_out == plain[1]) is as_before, other
        assert train not in seen, other
        seen.add(train)


def test_numbers_belong_to_weights_tokens_and_machine(
    toy: Toy, tmp_path: Path, sft_lora: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = toy("dpo", "pairs", "run", 16, objective={"name": "dpo"})
    template = (tiny_model / "chat_template.jinja").read_text()
    (tmp_path / "other.jinja").write_text(template.replace("{{ bos_token }}", "{{ bos_token }}tell"))
    copied = Path(shutil.copytree(Path(content["model"]["name_or_path"]) / "final", tmp_path / "model"))
    start = {"model": {"name_or_path": str(copied)}}
    plain = keys(w.merged(content, start), monkeypatch)
    assert keys(content, monkeypatch) == plain, "the same weights under another name"
    others = (
        {"model": {"name_or_path": str(sft_lora)}}, {"reference": str(tiny_model)}, {"reference": str(sft_lora)},
        {"model": {"chat_template": str(tmp_path / "other.jinja")}},
    )  # fmt: skip
    found = [keys(w.merged(content, start, other), monkeypatch) for other in others]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 64)
        found.append(keys(content, monkeypatch))
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    found.append(keys(w.merged(content, start), monkeypatch))
    assert len({key for pair in [plain, *found] for key in pair}) == 2 * (len(others) + 3)


def test_a_change_of_data_is_seen(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = toy("dpo", "pairs", "first", 16, **DPO)
    go(content)
    rows = w.lines(Path(content["data"]["train"]["path"]))[:16]
    rows[5] |= {"chosen": rows[5]["chosen"] + " good"}
    data = {"train": {"path": str(w.write_rows(tmp_path / "changed.jsonl", rows))}}
    lines = go(w.merged(content, {"output_dir": str(tmp_path / "second"), "data": data})).err.splitlines()
    assert any("16 of 32 pairs known from an earlier run" in line for line in lines), "those of the held-out data"
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "empty"))
    go(w.merged(content, {"output_dir": str(tmp_path / "plain"), "data": data}))
    assert_same(tmp_path / "second", tmp_path / "plain")


def test_a_longer_run_asks_for_the_rest(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an epoch, then two: as if there had been no cache."""
    content = toy("dpo", "pairs", "half", 48, **DPO | {"training": {"num_epochs": 2}})
    whole = w.merged(content, {"output_dir": str(tmp_path / "whole")})
    go(w.merged(content, {"training": {"max_steps": 2}}))
    line = next(line for line in go(whole).err.splitlines() if "known from" in line)
    assert "48 of 64 pairs known from an earlier run" in line
    assert "not loaded" not in line
    assert "64 of 64 pairs" in found(go(whole | {"output_dir": str(tmp_path / "again")}))
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "empty"))
    go(w.merged(whole, {"output_dir": str(tmp_path / "plain")}))
    assert_same(tmp_path / "whole", tmp_path / "plain")


def test_a_damaged_entry_is_made_anew(toy: Toy, tmp_path: Path, cache: Path) -> None:
    content = toy("dpo", "pairs", "first", 48, **DPO)
    go(content)
    whole = w.contents(cache)
    for number, path in enumerate(entries(cache)):
        path.write_bytes(path.read_bytes()[:-4] if number else b"\x80\x04 no safetensors file at all")
    outcome = go(content | {"output_dir": str(tmp_path / "second")})
    assert outcome.err.count("damaged cache file (") == 4, "when it starts and when it ends"
    assert "known from" not in outcome.err
    assert_same(tmp_path / "second", tmp_path / "first")
    again = w.contents(cache)
    assert list(again) == list(whole)
    assert "64 of 64 pairs" in found(go(content | {"output_dir": str(tmp_path / "third")}))


def test_numbers_of_another_model_are_put_aside(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a fingerprint ever miss a change, the check at step 0 does not."""
    content = toy("dpo", "pairs", "first", 48, **DPO)
    go(content)
    real = build.load_base

    def other(*arguments: Any, **options: Any) -> Any:
        base = real(*arguments, **options)
        with torch.no_grad():
            base.model.get_output_embeddings().weight.mul_(1.01)
        return base

    monkeypatch.setattr(build, "load_base", other)
    outcome = go(content | {"output_dir": str(tmp_path / "second")})
    assert "nats a token off: made anew" in outcome.err
    assert "with adapters off" in found(outcome)


@pytest.mark.parametrize("state", ["warm", "deleted", "half"])
def test_a_resumed_run_equals_a_whole_one(
    toy: Toy, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """The run stops in its first epoch: with a full cache; with one that is deleted meanwhile; with one that appears
    only meanwhile."""
    whole = toy("dpo", "pairs", "whole", 64, **FULL)
    go(whole)
    full = tmp_path / "full"
    if state == "half":
        cache.rename(full)
    stopped = whole | {"output_dir": str(tmp_path / "stopped")}
    with monkeypatch.context() as patched:
        real = Engine.save

        def saved(self: Engine) -> None:
            real(self)
            if state == "deleted" and cache.exists():
                shutil.rmtree(cache)
            if state == "half" and full.exists():
                shutil.rmtree(cache, ignore_errors=True)
                full.rename(cache)

        patched.setattr(Engine, "save", saved)
        run = interrupted(stopped, 2, patched, signal.SIGINT)
    assert_same(run, tmp_path / "whole")


def test_numbers_of_other_micro_batches_are_not_shared(
    toy: Toy, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on with other micro-batches shares nothing that was computed before."""
    content = toy("dpo", "pairs", "run", 64, **DPO | {"reference_cache": "off"})
    with monkeypatch.context() as patched:
        stop = w.merged(content, {"training": {"micro_batch_tokens": 128}})
        kill(stop, 2, patched)
    assert entries(cache) == []
    go(w.merged(content, {"training": {"micro_batch_tokens": 64}, "reference_cache": "auto"}))
    train, held_out = known(tmp_path / "run")
    assert sorted(set(train)) == [1, 2]
    assert set(held_out) == {2}
    assert len(entries(cache)) == 1
    fresh = w.merged(content, {"training": {"micro_batch_tokens": 64}, "reference_cache": "auto"})
    line = next(
        line for line in go(fresh | {"output_dir": str(tmp_path / "new")}).err.splitlines() if "known from" in line
    )
    assert f"{train.count(1)} of 80 pairs" in line


def known(run: Path) -> list[list[int]]:
    last = max((run / "checkpoints").iterdir())
    return [load_file(last / f"reference-{split}.safetensors")["known"].tolist() for split in ("train", "eval")]


def kill(content: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(step, signal.SIGINT, monkeypatch)
    outcome = quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")))
    assert outcome.code == 130, outcome.err


def test_the_reference_is_freed_when_all_is_known(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full fine-tuning over two epochs: in the second one there is one model."""
    models: list[Any] = []
    alive: list[int] = []
    real, tick = build.load_reference, Engine.tick

    def watched(*arguments: Any) -> tuple[Role, str]:
        role, words = real(*arguments)
        models.append(weakref.ref(role.base.model))
        return role, words

    def counted(self: Engine, metrics: dict[str, float]) -> None:
        tick(self, metrics)
        alive.append(sum(model() is not None for model in models))

    monkeypatch.setattr(preference_setup, "load_reference", watched)
    monkeypatch.setattr(Engine, "tick", counted)
    gc.disable()
    try:
        go(toy("dpo", "pairs", "run", 64, **FULL))
    finally:
        gc.enable()
    assert alive == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_dry_run_leaves_the_cache_alone(toy: Toy, cache: Path) -> None:
    content = toy("dpo", "pairs", "run", 48, **DPO)
    quick("dpo", w.save(content, Path(content["output_dir"]).with_suffix(".yaml")), "--dry-run")
    assert not cache.exists()
    go(w.merged(content, {"reference_cache": "off", "data": {"cache": "off"}}))
    assert not cache.exists()


def about_data(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith(("train", "eval", "warning"))]


def test_samples_are_found_by_later_runs(toy: Toy, tmp_path: Path, cache: Path) -> None:
    content = toy("dpo", "pairs", "run", 48, **DPO | {"reference_cache": "off"})
    first = go(content)
    found = sorted((cache / "samples").iterdir())
    assert (len(found), entries(cache)) == (2, []), "train and eval"
    for path in found:
        os.utime(path, (1, 1))
    quick("dpo", w.save(content, tmp_path / "dry.yaml"), "--dry-run")
    assert [path.stat().st_mtime for path in found] == [1, 1]
    second = content | {"output_dir": str(tmp_path / "again")}
    again = go(second)
    assert about_data(again) == about_data(first)
    assert sorted((cache / "samples").iterdir()) == found
    assert min(path.stat().st_mtime for path in found) > 1, "read, so they stay"
    assert_same(tmp_path / "again", Path(content["output_dir"]))


def test_two_runs_at_once(toy: Toy, tmp_path: Path, cache: Path) -> None:
    contents = [toy("dpo", "pairs", name, 16, **DPO) for name in ("one", "two")]
    files = [str(w.save(content, tmp_path / f"{n}.yaml")) for n, content in enumerate(contents)]
    running = [
        subprocess.Popen([sys.executable, "-m", "rlhf_cli", "dpo", file], stderr=subprocess.PIPE, text=True)
        for file in files
    ]
    for one in running:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
        assert "cache" not in errors.replace(str(tmp_path), "")
    assert_same(tmp_path / "two", tmp_path / "one")
    assert len(entries(cache)) == 2
    code_digest.cache_clear()
    assert "32 of 32 pairs" in found(go(contents[0] | {"output_dir": str(tmp_path / "three")}))
    assert_same(tmp_path / "three", tmp_path / "one")
