"""SECURITY.md, sentence by sentence: what the sources may not hold, and what a run may not do."""

from __future__ import annotations

import ast
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_cli
from tests.stages import world as w

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "rlhf_cli").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
IMPORTS = {
    "pickle": {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"},
    "network": {"socket", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "xmlrpc",
                "websockets", "paramiko"},
    "telemetry": {"posthog", "sentry_sdk", "segment", "analytics", "mixpanel", "statsd", "opentelemetry", "telemetry"},
    "code": {"code", "codeop", "pty", "commands"},
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
CALLS = {
    "pickle": {"torch.load", "torch.save", "np.load", "numpy.load", "pickle.load", "pd.read_pickle"},
    "yaml": {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader",
             "yaml.FullLoader"},
    "shell": {"os.system", "os.popen", "os.spawnl", "os.spawnv", "os.execv", "os.execvp", "subprocess.getoutput",
              "subprocess.getstatusoutput", "subprocess.call", "subprocess.check_output", "subprocess.run"},
    "network": {"socket.socket", "urllib.request.urlopen", "torch.hub.load", "torch.hub.download_url_to_file"},
}  # fmt: skip
STARTS = {"rlhf_cli/rollouts/foreign.py", "rlhf_cli/cli/serve.py"}
"""Where a process is started: the rehearsal of a reward function, the server of `rlhf serve-rollouts`."""
CLIENT = "rlhf_cli/rollouts/server.py"
"""What talks to the server that a recipe names; tests/rollouts/test_vllm.py holds that it talks to no other."""
HUB = "rlhf_cli/recipe/hub.py"
"""What looks whether the hub answers before its libraries ask it for minutes: one connection, nothing sent."""
NAMES = {
    "socket": {"rlhf_cli/runs/lock.py", "rlhf_cli/cli/serve.py", HUB},
    "urllib": {"rlhf_cli/report/page.py", CLIENT, HUB},
    "http": {CLIENT},
}
"""Imports that are not what they look like: the lock asks for the host's name, a server to be started for a free
port, a page quotes a path in a link; and those of the client."""


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def unsafe(tree: ast.AST, name: str = "") -> list[str]:
    """What SECURITY.md says is not there."""
    found = []
    for kind, modules in IMPORTS.items():
        for module in {full.split(".")[0] for full in imported(tree)} & modules:
            if name not in NAMES.get(module, ()):
                found.append(f"{kind}: import {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            found += [f"{kind}: {dotted}" for kind, calls in CALLS.items() if dotted in calls]
            if dotted == "subprocess.Popen" and name not in STARTS:
                found.append("shell: subprocess.Popen")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            found.append(f"code: {node.func.id}")
        elif isinstance(node, ast.keyword):
            said = getattr(node.value, "value", node.value)
            safe = {"trust_remote_code": False, "shell": False, "weights_only": True, "allow_pickle": False,
                    "use_safetensors": True}  # fmt: skip
            if node.arg in safe and said is not safe[node.arg]:
                found.append(f"keyword: {node.arg}={ast.unparse(node.value)}")
        elif isinstance(node, ast.Dict):
            keys = [getattr(key, "value", None) for key in node.keys]
            for key, value in zip(keys, node.values, strict=True):
                if key == "trust_remote_code" and getattr(value, "value", value) is not False:
                    found.append("keyword: trust_remote_code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_in_the_sources(path: Path) -> None:
    assert unsafe(TREES[path], str(path.relative_to(ROOT))) == []


BAD = {
    "import pickle": "pickle: import pickle",
    "from urllib.request import urlopen": "network: import urllib",
    "import sentry_sdk": "telemetry: import sentry_sdk",
    "torch.load(path)": "pickle: torch.load",
    "yaml.load(text, yaml.Loader)": "yaml: yaml.load",
    "eval(text)": "code: eval",
    "exec(text)": "code: exec",
    "input()": "code: input",
    "os.system(line)": "shell: os.system",
    "subprocess.Popen(line)": "shell: subprocess.Popen",
    "start(line, shell=True)": "keyword: shell=True",
    "load(name, trust_remote_code=flag)": "keyword: trust_remote_code=flag",
    "settings = {'trust_remote_code': True}": "keyword: trust_remote_code",
    "read(path, allow_pickle=True)": "keyword: allow_pickle=True",
    "model.from_pretrained(name, use_safetensors=False)": "keyword: use_safetensors=False",
}


@pytest.mark.parametrize("code", BAD)
def test_the_walk_finds_it(code: str) -> None:
    assert BAD[code] in unsafe(ast.parse(code))


def test_every_model_is_asked_for_as_safetensors() -> None:
    """No `from_pretrained` of weights is without `use_safetensors`, here or in the settings it is given."""
    calls = 0
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and called in ("auto.from_pretrained", "kind.from_pretrained"):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                own = given.get("use_safetensors") == "True" or '"use_safetensors": True' in path.read_text()
                assert own, f"{path}: {ast.unparse(node)}"
                calls += 1
    assert calls >= 3


# --- a run -----------------------------------------------------------------------------------------------

_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind", "urllib.Request"):
        _watched.append(f"{event} {arguments[1:]}")
    if event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn", "subprocess.Popen"):
        _watched.append(event)
    if event == "pickle.find_class":
        _watched.append(f"{event} {arguments}")


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """Connections, processes and pickles of this process, from here to the end of the test."""
    global _watched
    if not getattr(sys, "_rlhf_watched", False):
        sys.addaudithook(_hook)
        sys._rlhf_watched = True  # type: ignore[attr-defined]
    _watched = []
    yield _watched
    _watched = None


def test_a_local_run_opens_no_connection(
    tiny_model: Path, tmp_path: Path, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the hub may be asked: a model, an adapter on it, and data in folders."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    w.write_rows(tmp_path / "chat.jsonl", w.rows("chat", 8, 1))
    w.write_rows(tmp_path / "pairs.jsonl", w.rows("pairs", 8, 1))
    start: Path = tiny_model
    for stage, kind in (("sft", "chat"), ("dpo", "pairs")):
        more: dict[str, Any] = {"training": {"max_steps": 1, "batch_size": 4}, "data": {"eval": None}}
        more |= {"objective": {"name": "dpo"}} if stage == "dpo" else {}
        lora: dict[str, Any] = {"lora": {"r": 4}}
        made = w.recipe(stage, start, tmp_path, kind, tmp_path / stage, **more, **lora)
        outcome = run_cli(stage, w.save(made, tmp_path / f"{stage}.yaml"))
        assert outcome.code == 0, outcome.err
        start = tmp_path / stage
    assert watched == []
    assert set(json.loads((start / "run.json").read_text())["hardware"]) <= {
        "system",
        "machine",
        "cpus",
        "memory",
        "gpus",
    }


def test_a_connection_is_seen(watched: list[str]) -> None:
    with socket.socket() as one, pytest.raises(OSError):
        one.connect(("127.0.0.1", 9))
    assert len(watched) == 1


def test_the_page_names_what_is_tested() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for promise in ("No pickle", "No remote code", "`eval`", "`exec`", "no shell", "`yaml.load`", "No telemetry",
                    "No network unless a hub id is named", "How to report"):  # fmt: skip
        assert promise in text, promise
