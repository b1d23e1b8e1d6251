"""`rlhf serve-rollouts`: the command of the server that a recipe asks, and the process that runs it."""

from __future__ import annotations

import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.cli import serve
from rlhf_cli.errors import Interrupted
from tests.conftest import run_cli
from tests.stages import world as w

ASKED = {"engine": "vllm", "server": "http://127.0.0.1:8123", "max_new_tokens": 6}


@pytest.fixture
def recipe(toy: Callable[..., dict[str, Any]], world: Path, tmp_path: Path) -> Path:
    return w.save(
        toy("ppo", "prompts", "x", rollout=ASKED, lora={"r": 20},
            rewards=[{"function": f"{world / 'reward.py'}:true_reward"}]),
        tmp_path / "ppo.yaml",
    )  # fmt: skip


def test_the_command_of_a_server(recipe: Path, base: Path, sft_lora: Path, world: Path, tmp_path: Path) -> None:
    outcome = run_cli("serve-rollouts", recipe, "rollout.sleep=true", "--port", "8200", "--print")
    assert (outcome.code, outcome.err) == (0, "")
    words, source = shlex.split(outcome.out), str(base / "final")
    assert words == [
        "VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "VLLM_SERVER_DEV_MODE=1",
        "vllm", "serve", source, "--served-model-name", source, "--host", "127.0.0.1", "--port", "8200",
        "--dtype", "float32", "--max-model-len", "48", "--gpu-memory-utilization", "0.5",
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--seed", "3",
        "--enable-lora", "--max-loras", "1", "--max-lora-rank", "32", "--enable-sleep-mode",
    ]  # fmt: skip
    content = {"stage": "sample", "model": str(sft_lora), "rollout": ASKED, "output_dir": str(tmp_path / "s"),
               "data": {"prompts": str(world / "prompts.jsonl"), "max_length": 48}}  # fmt: skip
    sampled = run_cli("serve-rollouts", w.save(content, tmp_path / "s.yaml"), "--print").out
    assert f"vllm serve {source} --served-model-name {source} --host 127.0.0.1 --port 8123 --dtype bfloat16" in sampled
    assert "--max-lora-rank 8" in sampled  # that of the adapter
    hub = run_cli("serve-rollouts", w.save(content | {"model": "owner/name"}, tmp_path / "h.yaml"), "--print", "--set",
                  "model.revision=abc", "--gpu-memory-utilization", "0.3", "--vllm", "/opt/v/bin/vllm")  # fmt: skip
    assert "/opt/v/bin/vllm serve owner/name --served-model-name owner/name --revision abc" in hub.out
    assert "--gpu-memory-utilization 0.3" in hub.out
    assert "--enable-lora" not in hub.out
    more = ["--print", "seed=4", "--", "--tensor-parallel-size", "2", "--max-model-len=99"]
    several = run_cli("serve-rollouts", recipe, *more).out
    assert " --seed 4 " in several
    assert several.endswith(" --tensor-parallel-size 2 --max-model-len=99\n")  # behind ours, so that they win


def test_what_serves_nobody(recipe: Path, toy: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    tuned = w.save(toy("sft", "chat"), tmp_path / "sft.yaml")
    bad = [
        ((tuned, "--print"), "rlhf sft samples no completions"),
        (
            (recipe, "rollout.engine=own", "rollout.server=null", "--print"),
            "rollout.engine is own, which asks no server",
        ),
        ((recipe, "rollout.server=https://127.0.0.1:1", "--print"), "a server with certificates is started by hand"),
        ((recipe, "--gpu-memory-utilization", "1.5"), "1.5 is no share of a card's memory"),
        ((recipe, "--vllm", tmp_path / "none"), "none is no program (pip install 'rlhf-cli[vllm]'"),
        ((recipe, "rollout.maxtokens=3"), "did you mean"),
    ]
    for arguments, words in bad:
        outcome = run_cli("serve-rollouts", *arguments)
        assert (outcome.code, len(outcome.errors)) == (2, 1), outcome.err
        assert words in outcome.errors[0]


def test_a_server_with_a_key(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is handed over by the environment, and shown by the name of its variable."""
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\nimport os, sys\nprint(os.environ['VLLM_API_KEY'][::-1], *sys.argv)\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("OUR_KEY", "sk-12345678")
    line = [sys.executable, "-m", "rlhf_cli", "serve-rollouts", str(recipe), "rollout.api_key_env=OUR_KEY"]
    shown = run_cli(*line[3:], "--print")
    assert shown.out.startswith('VLLM_API_KEY="$OUR_KEY" VLLM_NO_USAGE_STATS=1')
    done = subprocess.run([*line, "--vllm", str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("87654321-ks "), done.stderr
    assert "sk-12345678" not in shown.out + shown.err + done.stdout + done.stderr
    monkeypatch.delenv("OUR_KEY")
    outcome = run_cli(*line[3:], "--vllm", str(program))
    assert outcome.code == 2
    assert outcome.errors == [
        "error: rollout.api_key_env: the environment variable OUR_KEY is not set (export OUR_KEY=...)"
    ]


def test_vllm_is_not_installed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    outcome = run_cli("serve-rollouts", recipe)
    assert outcome.code == 2
    assert outcome.errors == ["error: rlhf serve-rollouts: vLLM is not installed (pip install 'rlhf-cli[vllm]', or "
                              "--vllm PATH for that of another environment)"]  # fmt: skip


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_server_that_ends(recipe: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    good = program(tmp_path / "good", f'echo "$VLLM_ALLOW_RUNTIME_LORA_UPDATING $@" > {told}')
    outcome = run_cli("serve-rollouts", recipe, "--vllm", good)
    assert outcome.code == 0, outcome.err
    assert told.read_text().startswith("1 serve /")
    assert "for recipes with rollout.server: http://127.0.0.1:8123" in outcome.err
    outcome = run_cli("serve-rollouts", recipe, "--vllm", program(tmp_path / "bad", "exit 3"))
    assert outcome.code == 4
    assert outcome.errors == ["error: vllm serve: ended with exit code 3 (its own words stand above)"]


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(recipe: Path, tmp_path: Path) -> None:
    never = program(tmp_path / "never", f"touch {tmp_path / 'begun'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run_cli("serve-rollouts", recipe, f"rollout.server=http://127.0.0.1:{port}", "--vllm", never)
    where = f"http://127.0.0.1:{port}: something listens on port {port} already"
    assert (outcome.code, outcome.errors) == (4, [f"error: {where} (end it, or take another port in rollout.server)"])
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "])
def test_nothing_of_a_server_that_was_killed_stays(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    """vLLM's engines are processes of their own, which outlive it and hold the card's memory. One may not listen."""
    monkeypatch.setattr(serve, "GRACE", 0.5)
    told = tmp_path / "told"
    killed = program(tmp_path / "killed", f"{trap}sleep 300 & echo $! > {told}; kill -9 $$")
    outcome = run_cli("serve-rollouts", recipe, "--vllm", killed)
    assert outcome.errors == ["error: vllm serve: ended with exit code -9 (its own words stand above)"]
    engine = Path("/proc", told.read_text().strip(), "stat")
    assert not engine.exists() or engine.read_text().split()[2] == "Z"


def test_a_signal_that_comes_while_the_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end this process alone, and leave the server with the card."""
    begun = []

    def start(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        begun.append(popen(*arguments, **more))
        signal.raise_signal(signal.SIGTERM)
        return begun[0]

    popen = subprocess.Popen
    monkeypatch.setattr(serve.subprocess, "Popen", start)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(Interrupted, match="the server was ended"):
            serve.serve(
                str(program(tmp_path / "long", "sleep 20")), serve.Served(["vllm"], {}, "http://127.0.0.1:8123", None)
            )
        assert begun[0].returncode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nohup_keeps_the_server() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in serve._heard()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in serve._heard()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_server_first(recipe: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    told = tmp_path / "told"
    text = f"trap 'echo ended > {told}; exit 0' TERM; echo there > {told}; while :; do sleep 0.05; done"
    slow = program(tmp_path / "slow", text)
    command = [sys.executable, "-m", "rlhf_cli", "serve-rollouts", str(recipe), "--vllm", str(slow)]
    heard = ["env", "--default-signal=HUP", *command]  # whatever started the tests may have it ignored
    with subprocess.Popen(heard, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while not told.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(number)
        _, words = child.communicate(timeout=60)
    assert child.returncode == code, words
    assert told.read_text() == "ended\n"
    assert words.splitlines()[-1] == "error: the server was ended"
