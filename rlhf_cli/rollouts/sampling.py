"""How to sample, what comes out, and what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cli.data.template import Template
from rlhf_cli.recipe.settings.rollout import SamplingSettings
from rlhf_cli.rollouts.stops import TextStops, split

if TYPE_CHECKING:
    from rlhf_cli.rollouts.vllm import Server


@dataclass
class Stats:
    """What sampling took since the last `take`."""

    completions: int = 0
    tokens: int = 0
    """Tokens of the completions."""
    row_steps: int = 0
    """Rows x forward steps that were computed for them; more than the tokens where finished rows are carried along."""
    halvings: int = 0
    """Times the batch was halved because memory ran out."""
    seconds: float = 0.0
    heard: Callable[[float], None] | None = None
    """Is told of so many more completions when they are there."""
    _told: int = 0

    def begin(self) -> None:
        """Of the next batch none is there."""
        self._told = 0

    def tell(self, done: int) -> None:
        """So many completions of the batch under way are there."""
        if self.heard is not None and done > self._told:
            self.heard(done - self._told)
            self._told = done

    def told(self) -> list[float]:
        """All counts, for `add`."""
        return [self.completions, self.tokens, self.row_steps, self.halvings, self.seconds]

    def add(self, told: list[float]) -> None:
        """What another process took at the same time."""
        completions, tokens, row_steps, halvings, seconds = told
        self.completions += int(completions)
        self.tokens += int(tokens)
        self.row_steps += int(row_steps)
        self.halvings += int(halvings)
        self.seconds = max(self.seconds, seconds)

    def take(self) -> dict[str, float]:
        """Metrics, and start anew; none when nothing was sampled."""
        found: dict[str, float] = {}
        if self.completions:
            found = {
                "rollout/tokens": float(self.tokens), "rollout/seconds": self.seconds,
                "rollout/tokens_per_second": self.tokens / max(self.seconds, 1e-9),
                "rollout/halvings": float(self.halvings),
            }  # fmt: skip
            if self.row_steps:
                found["rollout/useful_share"] = self.tokens / self.row_steps
        self.completions = self.tokens = self.row_steps = self.halvings = 0
        self.seconds = 0.0
        return found


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    max_batch: int = 64
    """Completions at once."""
    min_new_tokens: int = 0
    """A stop that comes earlier does not end the completion; no probability is touched."""
    stop_ids: tuple[int, ...] = ()
    """Stop tokens besides those that `sample` is given."""
    stops: TextStops | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    engine: str = "own"
    stats: Stats = field(default_factory=Stats, repr=False, compare=False)
    """Shared by all that is made from this by `replace`."""
    server: Server | None = field(default=None, repr=False, compare=False)
    """Of the engine vllm; None for those that sample here."""

    @classmethod
    def of(cls, settings: SamplingSettings, template: Template) -> Sampling:
        """From the block `rollout` of a recipe."""
        ids, strings = split(settings.stop, template)
        return cls(
            settings.max_new_tokens,
            settings.temperature or 1.0,
            greedy=settings.temperature == 0,
            max_batch=settings.max_batch,
            min_new_tokens=settings.min_new_tokens,
            stop_ids=ids,
            stops=strings,
            top_k=settings.top_k,
            top_p=None if settings.top_p == 1 else settings.top_p,
            min_p=settings.min_p,
            engine=settings.engine,
        )

    @property
    def truncated(self) -> list[str]:
        """The settings that leave tokens out, so that the sampled distribution is not the policy's."""
        return [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]

    @property
    def warning(self) -> str | None:
        """What sampling from another distribution than the policy's means, in a line; None when it is the policy's."""
        if not self.truncated:
            return None
        return (
            f"rollout.{', rollout.'.join(self.truncated)}: completions come from a truncated distribution, but their "
            "log-probabilities, the KL and the ratios are those of the whole one: the estimates are biased and the KL "
            "may be negative (rollout/logprob_gap_mean shows by how much)"
        )


@dataclass(frozen=True)
class Completed:
    """One sampled completion."""

    ids: np.ndarray  # (L,) int32, L >= 1, the stop token included
    logp: np.ndarray  # (L,) float32 log-probabilities under the sampling distribution, truncated where that is
    finished: bool
    """Whether it ended by a stop token or a stop string (else it was cut by the length limit)."""
