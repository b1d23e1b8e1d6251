"""A server that speaks vLLM's interface (0.33) and samples by our own loop: from the base or an adapter it was handed.

It takes the fields of vLLM's requests and no others, and answers errors in its form. Draws come from the seed of the
request; `draws_of` maps such a seed to (seed, number) of our own sampling, so that both engines say the same.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.errors import RlhfError
from rlhf_cli.models import adapters
from rlhf_cli.models.base import load_base
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.rollouts.generate import by_own_loop
from rlhf_cli.rollouts.sampling import Sampling
from rlhf_cli.rollouts.vllm import _seed

FIELDS = {
    "model", "prompt", "n", "seed", "stream", "echo", "max_tokens", "min_tokens", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos", "stop_token_ids", "stop",
    "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens", "logprobs", "return_token_ids",
}  # fmt: skip
NEXT = {
    "model", "prompt", "n", "stream", "echo", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "add_special_tokens", "logprobs",
    "logprob_token_ids", "return_tokens_as_token_ids", "return_token_ids",
}  # fmt: skip
"""Of a request that asks how probable some tokens are as the next one."""
Change = Callable[[dict[str, Any]], Any]


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    """Connections that wait: several processes ask many things at once."""


class StandIn:
    """The server, while it is open."""

    def __init__(
        self, folder: Path, *, rank: int = 16, context: int = 128, sleeps: bool = False, tls: Path | None = None
    ) -> None:
        """tls: a file with its certificate and the private key of that."""
        settings = ModelSettings(name_or_path=str(folder), dtype="float32")
        self.base = load_base(str(folder), settings, trained=False)
        self.root, self.rank, self.context, self.sleeps = str(folder.absolute()), rank, context, sleeps
        self.runtime_lora, self.raw, self.awake = True, False, True
        self.loaded: dict[str, str] = {}
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.draws_of: dict[int, tuple[int, int]] = {}
        self.change: Change = lambda answer: answer
        """What becomes of an answer to a request for completions: another object, bytes as they are sent, None for a
        connection that is cut, or an exception."""
        self.shift = 0.0
        """Added to the log-probabilities."""
        self.key: str | None = None
        """What it wants to be told, as vLLM's --api-key."""
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.handle(self)

            def do_POST(self) -> None:
                outer.handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = _Server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        if tls is not None:
            context_ = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context_.load_cert_chain(tls)
            self.http.socket = context_.wrap_socket(self.http.socket, server_side=True)
            self.address = self.address.replace("http", "https")
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Gone."""
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def knows(self, seed: int, numbers: range) -> None:
        """Draw for these completions as our own engine does."""
        self.draws_of |= {_seed(seed, number): (seed, number) for number in numbers}

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length") or 0)) or "null")
        status, answer = 200, None
        with self.lock:
            self.calls.append(request.path)
            try:
                if self.key and request.path.startswith("/v1"):
                    self.allow(request.headers.get("Authorization"))
                answer = self.answer(request.command, request.path, body)
            except Refusal as refusal:
                status = refusal.status
                kind = {"message": str(refusal), "type": "BadRequestError", "param": None, "code": status}
                answer = {"detail": "Not Found"} if str(refusal) == "Not Found" else {"error": kind}
                answer = {"error": str(refusal)} if status == 401 else answer
        if answer is None:
            request.connection.close()
            return
        said = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with suppress(OSError):  # who asked has not waited
            request.send_response(status)
            request.send_header("Content-Length", str(len(said)))
            request.end_headers()
            request.wfile.write(said)

    def allow(self, said: str | None) -> None:
        if said != f"Bearer {self.key}":
            raise Refusal(401, "Unauthorized")

    def answer(self, method: str, path: str, body: Any) -> Any:
        if (method, path) == ("GET", "/v1/models"):
            cards = [{"id": self.root, "root": self.root, "parent": None, "max_model_len": self.context}]
            return {"object": "list", "data": cards + [
                {"id": name, "root": at, "parent": self.root, "max_model_len": None} for name, at in self.loaded.items()
            ]}  # fmt: skip
        if path in ("/wake_up", "/sleep?level=1") and self.sleeps:
            self.awake = path == "/wake_up"
            return {"status": "done"}
        if path == "/v1/load_lora_adapter" and self.runtime_lora:
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter" and self.runtime_lora:
            if body["lora_name"] not in self.loaded:
                raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            del self.loaded[body["lora_name"]]
            return b"Success"
        if path == "/v1/completions":
            self.bodies.append(body)
            return self.change(self.complete(body))
        raise Refusal(404, "Not Found")

    def load(self, name: str, path: str) -> bytes:
        if name in self.loaded:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        try:
            config, tensors = adapters.read_adapter(path)
        except (RlhfError, OSError) as error:
            raise Refusal(404, f"No adapter found for {path}") from error
        if config.r > self.rank:
            raise Refusal(500, f"LoRA rank {config.r} is greater than max_lora_rank {self.rank}.")
        if self.base.peft is None or name not in self.base.peft.peft_config:
            adapters.add_adapter(self.base, name, config, tensors)
        self.loaded[name] = path
        return b"Success: LoRA adapter added successfully."

    def next(self, body: dict[str, Any]) -> dict[str, Any]:
        """What some tokens are given behind the prompt, and the likeliest one, which is what is drawn."""
        role = Role("served", self.base, body["model"] if body["model"] in self.loaded else None)
        with torch.no_grad(), role.active():
            logp = self.base.model(torch.tensor([body["prompt"]])).logits[0, -1].double().log_softmax(-1)
        drawn = int(logp.argmax())
        top = {f"token_id:{i}": float(logp[i]) for i in [drawn, *body["logprob_token_ids"]]}
        told = {"tokens": [f"token_id:{drawn}"], "token_logprobs": [float(logp[drawn])], "top_logprobs": [top]}
        choice = {"index": 0, "text": "", "finish_reason": "length", "stop_reason": None, "token_ids": [drawn],
                  "logprobs": told, "prompt_token_ids": body["prompt"]}  # fmt: skip
        return {"object": "text_completion", "choices": [choice], "usage": {}}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if set(body) not in (FIELDS, NEXT):
            raise Refusal(400, f"fields: {sorted(set(body) ^ FIELDS)}")
        if body["model"] not in (self.root, *self.loaded):
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        if not self.awake or len(body["prompt"]) + body["max_tokens"] > self.context:
            raise Refusal(400, "asleep, or longer than the maximum context length")
        if set(body) == NEXT:
            return self.next(body)
        prompt, count, heat = np.array(body["prompt"], np.int32), body["n"], body["temperature"]
        sampling = Sampling(
            body["max_tokens"], heat or 1.0, greedy=heat == 0, top_k=body["top_k"] or None, min_p=body["min_p"] or None,
            top_p=None if body["top_p"] == 1 else body["top_p"],
        )  # fmt: skip
        role = Role("served", self.base, body["model"] if body["model"] in self.loaded else None)
        seed, first = self.draws_of.get(body["seed"], (body["seed"], 0))
        made = by_own_loop(role, [prompt], range(first, first + count), count, body["stop_token_ids"], sampling, seed)
        choices = []
        for index, one in enumerate(made):
            logp = (one.logp.astype(float) * (heat if self.raw and heat else 1.0) + self.shift).tolist()
            top = [{"token": -0.5 if self.raw or not heat else -0.5 / heat}] * len(logp)
            choices.append({
                "index": index, "text": "", "finish_reason": "stop" if one.finished else "length",
                "stop_reason": int(one.ids[-1]) if one.finished else None, "token_ids": one.ids.tolist(),
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": logp, "top_logprobs": top if body["logprobs"] else [], "tokens": []},
            })  # fmt: skip
        return {"object": "text_completion", "choices": choices, "usage": {}}


def late(seconds: float) -> Change:
    """An answer that takes its time."""

    def change(answer: dict[str, Any]) -> Any:
        time.sleep(seconds)
        return answer

    return change
