"""How completions are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_cli.catalog import NonNegative, Positive
from rlhf_cli.recipe.settings.blocks import Checked, Count

MOST = 4096
"""Completions of a prompt: they are sampled together."""


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
    engine: Literal["own", "generate", "continuous"] = "own"
    """own: reads each prompt once for all its completions and drops finished ones; generate: transformers' `generate`,
    for models that the own loop cannot take, with the same draws; continuous: transformers' continuous batching, with
    draws of its own."""
    max_batch: Count = 64
    """Completions sampled at once. Never changes the result (of continuous: it does); halved by itself when memory runs
    out."""

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
