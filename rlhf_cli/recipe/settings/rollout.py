"""How completions are sampled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rlhf_cli.catalog import NonNegative, Positive
from rlhf_cli.recipe.settings.blocks import Checked, Count, Name

MOST = 4096
"""Completions of a prompt: they are sampled together."""
_ADDRESS = re.compile(r"https?://([\w-]{1,63}(\.[\w-]{1,63})*|\[[0-9A-Fa-f:.]+\])(:([0-9]{1,5}))?/?", re.ASCII)


def _an_address(value: str) -> str:
    found = _ADDRESS.fullmatch(value)
    if found is None or int(found[4] or 1) not in range(1, 2**16):
        raise ValueError("this is no address of a server: write scheme, host and port alone, http://127.0.0.1:8000")
    return value


Address = Annotated[str, AfterValidator(_an_address)]
"""Of a server: nothing but scheme, host and port."""
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*", re.ASCII)


def _a_variable(value: str) -> str:
    if _VARIABLE.fullmatch(value) is None:
        raise ValueError("this is no name of an environment variable, in capitals; the key itself never stands here")
    return value


Variable = Annotated[str, AfterValidator(_a_variable)]
"""Name of an environment variable."""
LONGEST = 7 * 24 * 3600.0
"""Seconds that a server can be waited for."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Highest ranks of adapters that a vLLM server can be told (its --max-lora-rank)."""
HIGHEST_RANK = RANKS[-1]
OF_A_SERVER = ("server", "server_timeout", "api_key_env", "adapter_folder", "sleep")
"""Keys that say where completions are sampled, and nothing of what they are."""


class SamplingSettings(Checked):
    max_new_tokens: Count = 128
    """Length limit of a completion."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0: always the likeliest token."""
    completions_per_prompt: Annotated[int, Field(ge=1, le=MOST)] = 1
    """Completions sampled for each prompt."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion, besides the model's end tokens. They are found in its text, wherever the borders
    of the tokens fall: the token that completes one is the last, and stays whole. One that spells a token added to the
    vocabulary (`<|end|>`) is that token."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """A stop that comes earlier is read over. Its probability is not touched, so that what is sampled stays the
    policy's own distribution."""
    top_k: Count | None = None
    """Sample from the k likeliest tokens only. In ppo biased, see allow_biased_sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the fewest tokens that together have this probability. In ppo biased."""
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample only tokens with at least this share of the likeliest token's probability. In ppo biased."""
    engine: Literal["own", "generate", "continuous", "vllm"] = "own"
    """own: reads each prompt once for all its completions and drops finished ones; generate: transformers' `generate`,
    for models that the own loop cannot take, with the same draws; continuous: transformers' continuous batching, with
    draws of its own; vllm: a vLLM server, which is handed the adapter whenever it has changed and draws by itself."""
    max_batch: Count = 64
    """Completions sampled at once, or asked of the server at once. Never changes the result (of continuous: it does);
    halved by itself when memory runs out."""
    server: Address | None = None
    """Address of the vLLM server, `http://127.0.0.1:8000`. `rlhf serve-rollouts RECIPE` starts it."""
    server_timeout: Annotated[float, Field(gt=0, le=LONGEST)] = 600.0
    """Seconds that the server may take for all completions of one prompt, waiting in its queue included."""
    api_key_env: Variable | None = None
    """The environment variable that holds the server's API key. The key itself stands in no recipe, log or run."""
    adapter_folder: Name | None = None
    """A folder that this machine writes and the server reads under the same name, for the adapter; null: the run
    directory."""
    sleep: bool = False
    """Put the server to sleep between rollouts: its weights go to the main memory and its cache is dropped, so that it
    can share a card with the training."""

    def contradictions(self) -> Iterator[str]:
        if self.temperature == 0 and self.completions_per_prompt > 1:
            yield "completions_per_prompt is more than 1, and at temperature 0 all of them are the same"
        if self.min_new_tokens > self.max_new_tokens:
            yield (
                f"rollout.min_new_tokens = {self.min_new_tokens} is more than rollout.max_new_tokens = "
                f"{self.max_new_tokens}"
            )
        if self.engine == "continuous" and self.min_new_tokens:
            yield "rollout.engine: continuous knows no rollout.min_new_tokens: use own or generate"
        if self.engine == "vllm" and self.min_new_tokens:
            yield (
                "rollout.engine: vllm keeps early stops away by changing their probability, which "
                "rollout.min_new_tokens must not: use own or generate"
            )
        if self.engine == "vllm" and self.server is None:
            yield (
                "rollout.engine: vllm asks a server, and rollout.server is not given: "
                "`server: http://127.0.0.1:8000`, which `rlhf serve-rollouts` starts"
            )
        yield from self.unread(OF_A_SERVER, "engine", "vllm")


class RolloutSettings(SamplingSettings):
    temperature: Positive = 1.0
    """Sampling temperature; it is part of the policy, so all log-probabilities use it too."""
    allow_biased_sampling: bool = False
    """Let top_k, top_p and min_p be set. Learning reads the log-probabilities of the whole distribution, which is then
    not the one that was sampled: KL and ratios are biased, and the KL may be negative."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        wanted = {"top_k": self.top_k, "top_p": None if self.top_p == 1 else self.top_p, "min_p": self.min_p}
        biased = [f"rollout.{name}" for name, value in wanted.items() if value is not None]
        if biased and not self.allow_biased_sampling:
            yield (
                f"{', '.join(biased)} would sample from another distribution than the policy whose log-probabilities "
                f"are learned from: remove it, or set rollout.allow_biased_sampling: true"
            )
