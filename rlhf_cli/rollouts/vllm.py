"""Completions of a vLLM server, by its OpenAI-compatible interface; vLLM itself is never imported.

Before each rollout the server is handed the policy's adapter if it is another than the last one: written as a peft
folder, loaded under a name made of its content, the one before unloaded. Tokens and log-probabilities come back as they
were drawn; what is drawn is the server's affair, seeded for each prompt.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.errors import ModelError
from rlhf_cli.models import adapters, processes
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.model_path import fingerprint
from rlhf_cli.recipe.settings.rollout import SamplingSettings
from rlhf_cli.rollouts.sampling import Completed, Sampling
from rlhf_cli.rollouts.server import FORBIDDEN, Http, Refused, key_of
from rlhf_cli.rollouts.vllm_answers import completions

FOLDER = "rollout-adapter"
"""In the run directory: the adapter that the server reads."""
STOPS = 4
"""Stop strings that a server takes by default; of more, completions end here alone."""


@dataclass
class Server:
    """A vLLM server, and what it holds of this run."""

    http: Http
    folder: Path
    """Where this run puts adapters for it."""
    mark: str
    """What the names of this run's adapters begin with."""
    sleeps: bool
    base: str = ""
    """What it calls the base."""
    model: str = ""
    """What it calls that which is sampled from."""
    at_temperature: set[float] = field(default_factory=set)
    """Temperatures at which its log-probabilities are known to be meant."""

    def check(self, source: str, context: int) -> None:
        """ModelError unless it is there, holds this base and takes sequences of so many tokens."""
        base = next((card for card in self._cards() if not card.get("parent")), None)
        name, root = (base or {}).get("id"), (base or {}).get("root")
        longest = (base or {}).get("max_model_len")
        if base is None or not isinstance(name, str) or not isinstance(longest, int):
            raise self.http.odd("/v1/models", "no base model and its max_model_len")
        if source not in (name, root) and not _same_folder(source, root):
            raise ModelError(
                f"holds {root or name}, and the base of the recipe is {source}", self.http.where,
                f"{self.http.start}; one that knows the base by another name is given --served-model-name {source}",
            )  # fmt: skip
        if longest < context:
            raise ModelError(f"takes sequences of {longest} tokens (max_model_len), and the recipe has {context}",
                             self.http.where, self.http.start)  # fmt: skip
        self.base = name

    @contextmanager
    def holding(self, policy: Role) -> Iterator[None]:
        """Within it the server is awake and holds what the policy is now. With several processes the first one sees to
        that. Raises ModelError."""
        self.model = processes.first(lambda: self._take(policy), "handing the adapter to the server")
        yield
        if self.sleeps:
            processes.first(lambda: self._asked("/sleep?level=1"), "putting the server to sleep")

    def close(self, warn: Callable[[str], None]) -> None:
        """Leave nothing of this run with the server; warns where that fails, since the work itself is done."""

        def leave() -> None:
            try:
                self._unload()
            except ModelError as error:
                warn(f"an adapter of this run stays with the server: {error}")
            shutil.rmtree(self.folder, ignore_errors=True)

        processes.first(leave, "taking the adapter from the server")

    def _take(self, policy: Role) -> str:
        if self.sleeps:
            self._asked("/wake_up")
        if policy.adapter is None:
            return self.base
        name = self.mark + _digest(policy)
        if name == self.model:
            return name
        self._unload()
        shutil.rmtree(self.folder, ignore_errors=True)
        adapters.write_adapter(policy.base, policy.adapter, self.folder / name)
        self._load(name, (self.folder / name).absolute())
        return name

    def lend(self, folder: Path) -> str:
        """Have it load the adapter in a folder as it is: what it calls that. Raises ModelError."""
        name = self.mark + fingerprint(folder)[-16:]
        self._unload()
        self._load(name, folder)
        return name

    def _load(self, name: str, folder: Path) -> None:
        self._asked("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, "was it started for this "
                    "recipe by rlhf serve-rollouts, and can it read that folder (rollout.adapter_folder)?")  # fmt: skip

    def _unload(self) -> None:
        """Every adapter of this run, those of one that was killed too."""
        for card in self._cards():
            name = str(card.get("id"))
            if name.startswith(self.mark):
                self._asked("/v1/unload_lora_adapter", {"lora_name": name})

    def _cards(self) -> list[dict[str, Any]]:
        said = self.http.get("/v1/models")
        cards = said.get("data") if isinstance(said, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise self.http.odd("/v1/models", "no list of models")
        return cards

    def _asked(self, path: str, body: Any = None, hint: str = "see the server's own log") -> None:
        """Post what only a server knows that was started for it."""
        try:
            self.http.tell(path, body)
        except Refused as error:
            if error.status in FORBIDDEN:
                raise
            hint = f"it was not started for this; {self.http.start}" if error.unknown else hint
            raise Refused(error.status, error.said, path, self.http.where, hint) from error


def _digest(policy: Role) -> str:
    """Of an adapter's content."""
    assert policy.adapter is not None
    total = hashlib.sha256()
    for name, tensor in sorted(adapters.adapter_tensors(policy.base, policy.adapter).items()):
        total.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _same_folder(source: str, root: Any) -> bool:
    return isinstance(root, str) and Path(source).is_dir() and Path(source).resolve() == Path(root).resolve()


def serving(settings: SamplingSettings, source: str, context: int, run: Path) -> Server | None:
    """The server of a recipe, checked, for the run in that directory; None for the other engines. source: the base of
    the model that samples; context: tokens of the longest prompt with its completion. Raises ModelError."""
    if settings.engine != "vllm":
        return None
    assert settings.server is not None, "a rule of the recipe"
    mark = f"rlhf-{hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:8]}-"
    folder = run / FOLDER if settings.adapter_folder is None else Path(settings.adapter_folder) / mark.rstrip("-")
    key = key_of(settings.api_key_env, "rollout.api_key_env")
    server = Server(Http(settings.server.rstrip("/"), settings.server_timeout, key), folder, mark, settings.sleep)
    server.check(source, context)
    return server


def served(sampling: Sampling, server: Server | None) -> Sampling:
    """The same sampling, by that server."""
    return sampling if server is None else replace(sampling, server=server)


def by_vllm(
    policy: Role,
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> list[Completed]:
    """`count` completions of each prompt, prompt by prompt. Raises ModelError: no server, another answer than asked."""
    server = sampling.server
    assert server is not None, "the engine vllm has a server"
    stops = sorted({*stop_ids, *sampling.stop_ids})
    _check_temperature(server, sampling, prompts[0])
    bodies = [
        _request(server.model, prompt, count, stops, sampling, _seed(seed, numbers[i * count]))
        for i, prompt in enumerate(prompts)
    ]

    def asked(i: int) -> list[Completed]:
        said = server.http.post("/v1/completions", bodies[i])
        return completions(said, server.http, prompts[i], count, stops, sampling, policy.base.vocabulary)

    with ThreadPoolExecutor(min(len(prompts), max(1, sampling.max_batch // count))) as pool:
        waiting = [pool.submit(asked, i) for i in range(len(prompts))]
        try:
            for done, one in enumerate(as_completed(waiting), 1):
                one.result()
                sampling.stats.tell(done * count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [completed for one in waiting for completed in one.result()]


def _seed(seed: int, number: int) -> int:
    """Of a prompt, a function of the seed and the number of its first completion; vLLM's are int64."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _request(
    model: str, prompt: np.ndarray, count: int, stops: list[int], sampling: Sampling, seed: int
) -> dict[str, Any]:
    """All that decides what is drawn, so that no default of the server or of the model's generation_config does."""
    return {
        "model": model, "prompt": prompt.tolist(), "n": count, "seed": seed, "stream": False, "echo": False,
        "max_tokens": sampling.max_new_tokens, "min_tokens": 0,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p or 1.0, "top_k": sampling.top_k or 0, "min_p": sampling.min_p or 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "ignore_eos": True, "stop_token_ids": stops, "include_stop_str_in_output": True,
        "stop": list(sampling.stops.strings[:STOPS]) if sampling.stops else [], "skip_special_tokens": True,
        "add_special_tokens": False, "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip


def _check_temperature(server: Server, sampling: Sampling, prompt: np.ndarray) -> None:
    """ModelError for a server whose log-probabilities are those at temperature 1 whatever the temperature is: of the
    likeliest token, they must not be the same at this temperature and at twice that."""
    heat = sampling.temperature
    if heat == 1 or sampling.greedy or heat in server.at_temperature:
        return
    found = []
    for temperature in (heat, 2 * heat):
        asked = replace(sampling, temperature=temperature, max_new_tokens=1, top_k=None, top_p=None, min_p=None)
        said = server.http.post("/v1/completions", _request(server.model, prompt, 1, [], asked, 0) | {"logprobs": 1})
        try:
            found.append(max(float(x) for x in said["choices"][0]["logprobs"]["top_logprobs"][0].values()))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise server.http.odd("/v1/completions", "no log-probability of the likeliest token") from error
    if found[0] == found[1] and found[0] < -1e-6:
        raise ModelError("gives log-probabilities that know nothing of rollout.temperature", server.http.where,
                         "start it with --logprobs-mode processed_logprobs (rlhf serve-rollouts does)")  # fmt: skip
    server.at_temperature.add(heat)
