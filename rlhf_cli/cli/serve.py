"""`rlhf serve-rollouts`: the command line of the vLLM server that a recipe samples with, and the process that runs it.

vLLM is never imported; its program may lie in an environment of its own.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rlhf_cli.errors import Interrupted, ModelError, RecipeError

if TYPE_CHECKING:
    from rlhf_cli.recipe.model_path import ModelPath

SHARE, SHARED = 0.9, 0.5
"""Of a card's memory for the server: when it has the card for itself, and when it sleeps while others use it."""
HTTP = 80
GRACE = 10.0
"""Seconds that what a server left behind may take to end by itself."""
KEY = "VLLM_API_KEY"
"""Where vLLM looks for its key."""


@dataclass(frozen=True)
class Served:
    """A server to be started."""

    arguments: list[str]
    """The program first."""
    environment: dict[str, str]
    """What is added to that of this process."""
    address: str

    key: str | None = None
    """The environment variable that holds the API key it is to ask for."""

    @property
    def line(self) -> str:
        """The command as a shell takes it, the key by the name of its variable."""
        key = [] if self.key is None else [f'{KEY}="${self.key}"']
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*key, *variables, shlex.join(self.arguments)])


def server_of(
    path: str,
    overrides: Sequence[str],
    port: int | None,
    share: float | None,
    program: str | None,
    own: Sequence[str] = (),
) -> Served:
    """The server that a recipe asks; `own` are options of vLLM's that go last, so that they win. Raises RecipeError:
    the recipe asks none; ModelError: no such model."""
    from rlhf_cli.recipe.inherit import inherit_adapter
    from rlhf_cli.recipe.model_path import resolve_model
    from rlhf_cli.recipe.reader import read_recipe

    recipe = inherit_adapter(read_recipe(path, overrides, None))
    rollout: Any = getattr(recipe, "rollout", None)
    if rollout is None:
        raise RecipeError(f"rlhf {recipe.stage} samples no completions", f"{path} stage",
                          "give a recipe of ppo, sample or eval")  # fmt: skip
    if rollout.engine != "vllm":
        raise RecipeError(f"rollout.engine is {rollout.engine}, which asks no server", path,
                          "set engine: vllm and server: http://127.0.0.1:8000")  # fmt: skip
    if share is not None and not 0 < share < 1:
        raise RecipeError(f"{share:g} is no share of a card's memory", "--gpu-memory-utilization",
                          "give a number between 0 and 1")  # fmt: skip
    host, wanted = _place(rollout.server)
    models = [resolve_model(name) for name in (recipe.model.name_or_path, *getattr(recipe, "against", []))]
    source = _base(models[0])
    there, revision, port = Path(source).is_dir(), _revision(recipe, models[0]), port or wanted
    share = share or (SHARED if rollout.sleep else SHARE)
    arguments = [
        program or "vllm", "serve", str(Path(source).absolute()) if there else source, "--served-model-name", source,
        *(["--revision", revision] if revision else []), "--host", host, "--port", str(port),
        "--dtype", "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype,
        *([] if getattr(recipe, "revise", None) else ["--max-model-len", str(recipe.data.max_length)]),
        "--gpu-memory-utilization", f"{share:g}", "--logprobs-mode", "processed_logprobs",
        "--generation-config", "vllm", "--seed", str(recipe.seed % 2**32),
    ]  # fmt: skip
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    ranks = list(_ranks(recipe, models))
    if ranks:
        arguments += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(_room(max(ranks)))]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if rollout.sleep:
        arguments.append("--enable-sleep-mode")
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    arguments += own
    address = f"http://{host if ':' not in host else f'[{host}]'}:{port}"
    return Served(arguments, environment, address, rollout.api_key_env)


def _place(address: str) -> tuple[str, int]:
    """Host and port of the recipe's server."""
    found = re.fullmatch(r"(https?)://(\[.+\]|[^:/]+)(?::(\d+))?/?", address)
    assert found is not None, "a rule of the recipe"
    if found[1] == "https":
        raise RecipeError("a server with certificates is started by hand", f"rollout.server {address}",
                          "--print shows the command for http")  # fmt: skip
    return found[2].strip("[]"), int(found[3] or HTTP)


def _base(model: ModelPath) -> str:
    """Folder or hub id of the base weights, as they are named to the server."""
    return model.base if model.kind == "adapter" and model.base else str(model.weights or model.name)


def _revision(recipe: Any, model: ModelPath) -> str | None:
    from rlhf_cli.recipe.model_path import read_json

    given: str | None = recipe.model.revision
    if given is None and model.kind == "adapter" and model.weights is not None:
        given = read_json(model.weights / "adapter_config.json").get("revision")
    return given


def _ranks(recipe: Any, models: Sequence[ModelPath]) -> Iterator[int]:
    """Of all adapters that the server is handed."""
    from rlhf_cli.recipe.model_path import read_json

    if getattr(recipe, "lora", None) is not None:
        yield recipe.lora.r
    for model in models:
        if model.kind == "adapter" and model.weights is not None:
            yield int(read_json(model.weights / "adapter_config.json").get("r") or 1)


def _room(rank: int) -> int:
    """The least that the server can be told for a rank. Raises RecipeError."""
    from rlhf_cli.recipe.settings.rollout import HIGHEST_RANK, RANKS

    if rank > HIGHEST_RANK:
        raise RecipeError(f"an adapter of rank {rank} is more than vLLM takes, {HIGHEST_RANK}", "rollout.engine",
                          "use engine own")  # fmt: skip
    return next(known for known in RANKS if known >= rank)


def installed(program: str | None) -> str:
    """Where the program lies. Raises RecipeError when it is nowhere."""
    beside = shutil.which("vllm", path=str(Path(sys.executable).parent)) if program is None else None
    found = beside or shutil.which(program or "vllm")
    if found is None:
        raise RecipeError("vLLM is not installed" if program is None else f"{program} is no program",
                          "rlhf serve-rollouts",
                          "pip install 'rlhf-cli[vllm]', or --vllm PATH for that of another environment")  # fmt: skip
    return found


def serve(program: str, served: Served) -> None:
    """Run it until it ends, by that program. Raises RecipeError when there is no key, ModelError when its port is taken
    or it fails, Interrupted when a signal ended it."""
    from rlhf_cli.rollouts.server import key_of

    _check_port(served.address)
    key = key_of(served.key, "rollout.api_key_env")
    command = [program, *served.arguments[1:]]
    environment = {**os.environ, **served.environment, **({KEY: key} if key else {})}
    came: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if child is not None:
            child.send_signal(_told(number))

    before = {number: signal.signal(number, pass_on) for number in _heard()}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        for number in came:  # before there was one to hear it
            child.send_signal(_told(number))
        code = child.wait()
    except OSError as error:
        raise ModelError(f"cannot be started: {error.strerror}", program) from error
    finally:
        if child is not None:
            _end_group(child.pid)
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise Interrupted(came[0], "the server was ended")
    if code:
        raise ModelError(f"ended with exit code {code}", "vllm serve", "its own words stand above")


def _check_port(address: str) -> None:
    """ModelError when something listens there: vLLM would say so only when it has loaded the model."""
    host, port = _place(address)
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ModelError(f"something listens on port {port} already", address,
                             "end it, or take another port in rollout.server") from error  # fmt: skip


def _heard() -> tuple[signal.Signals, ...]:
    """The signals that end the server. A closed terminal is one, unless nohup says otherwise: the server has a session
    of its own, and would stay with the card."""
    asked = (signal.SIGINT, signal.SIGTERM)
    return asked if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*asked, signal.SIGHUP)


def _told(number: int) -> int:
    """What the server is sent for it: of a closed terminal it would die without a word to its engines."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _end_group(group: int) -> None:
    """End what is left of a server: its engines outlive it where it was killed, and hold the card's memory."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + GRACE
        try:
            os.killpg(group, number)
            while time.monotonic() < until:
                time.sleep(0.05)
                with suppress(ChildProcessError):  # as process 1 of a container we inherit what is left
                    os.waitpid(-group, os.WNOHANG)
                os.killpg(group, 0)
        except ProcessLookupError:
            return
