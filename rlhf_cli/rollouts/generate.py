"""Sampling completions from a role: an own decode loop over a key-value cache.

Each prompt is read once for all its completions; finished rows leave the batch. Every completion draws its tokens from
uniforms of its own, a function of (seed, number of the completion), through the inverse of the cumulative distribution:
so rollouts depend neither on how they were batched nor on which other rows are still alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_cli.errors import ModelError
from rlhf_cli.models.base import Base
from rlhf_cli.models.roles import Role


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    max_batch: int = 64
    """Completions at once."""


@dataclass(frozen=True)
class Completed:
    """One sampled completion."""

    ids: np.ndarray  # (L,) int32, L >= 1, the stop token included
    logp: np.ndarray  # (L,) float32 log-probabilities under the sampling distribution
    finished: bool
    """Whether it ended by a stop token (else it was cut by the length limit)."""


def sample(
    policy: Role,
    prompts: Sequence[np.ndarray],  # (P,) int32 each
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> list[list[Completed]]:
    """`count` completions of each prompt. Raises ModelError when a single prompt does not fit the memory."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out: list[list[Completed]] = [[] for _ in prompts]
    room, start, done = sampling.max_batch, 0, 0  # done: completions of the prompt at `start`
    while start < len(order):
        each = min(count - done, room)
        group = order[start : start + max(1, room // each)] if each == count else [order[start]]
        rows = [i * count + done + k for i in group for k in range(each)]
        try:
            completed = _decode(policy, [prompts[i] for i in group], rows, each, stop_ids, sampling, seed)
        except torch.OutOfMemoryError as error:
            if room == 1:
                raise ModelError("out of memory while sampling a single completion", policy.base.source,
                                 "lower the number of new tokens") from error  # fmt: skip
            room = max(1, min(room, len(rows)) // 2)
            torch.cuda.empty_cache()
            continue
        for place, i in enumerate(group):
            out[i] += completed[place * each : (place + 1) * each]
        done += each
        if done == count:
            start, done = start + len(group), 0
    return out


def mixed(seed: int, step: int) -> int:
    """A seed for one step of a run: runs of neighbouring seeds share no draws."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def _uniforms(seed: int, rows: Sequence[int], length: int) -> np.ndarray:
    """(rows, length) float64 in [0, 1), each row a function of (seed, its number)."""
    if not rows:
        return np.zeros((0, length))
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, row])).random(length) for row in rows])


def _left_padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (P, W) and mask (P, W), prompts at the right end."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits (B, V), uniforms (B,) -> tokens (B,) and their log-probabilities (B,)."""
    logp = torch.log_softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.greedy:
        tokens = logits.argmax(-1)
    else:
        cumulative = logp.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


class _Cache:
    """Keys and values of the rows so far. Where an architecture keeps something else (a state of a recurrence or a
    convolution), whose rows cannot be repeated and dropped, there is none, and every step reads the rows anew."""

    def __init__(self, base: Base) -> None:
        cache = DynamicCache(config=base.model.config)
        wanted = ("batch_repeat_interleave", "batch_select_indices")
        whole = all(hasattr(layer, name) for layer in cache.layers for name in wanted)
        self.keys: DynamicCache | None = cache if whole else None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a forward."""
        return {"use_cache": False} if self.keys is None else {"past_key_values": self.keys, "use_cache": True}

    def repeat(self, count: int) -> None:
        """Each row `count` times."""
        if self.keys is not None:
            self.keys.batch_repeat_interleave(count)

    def select(self, rows: Tensor) -> None:
        """Only these rows."""
        if self.keys is not None:
            self.keys.batch_select_indices(rows)

    def next(self, before: Tensor, new: Tensor) -> Tensor:
        """What the next forward reads: the new column (B, 1), or all columns."""
        return new if self.keys is not None else torch.cat([before, new], dim=1)


@torch.no_grad()
def _decode(
    policy: Role,
    prompts: Sequence[np.ndarray],
    rows: Sequence[int],
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> list[Completed]:
    """`count` completions of each prompt, prompt by prompt; rows: the number of each completion, for its uniforms."""
    base, device = policy.base, policy.base.device
    drawn = torch.from_numpy(_uniforms(seed, rows, sampling.max_new_tokens)).to(device)  # (B, T)
    stops = torch.tensor(sorted(stop_ids), device=device)
    ids = torch.zeros(len(rows), sampling.max_new_tokens, dtype=torch.int64, device=device)
    logps = torch.zeros(len(rows), sampling.max_new_tokens, dtype=torch.float32, device=device)
    length = torch.full((len(rows),), sampling.max_new_tokens, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    tokens, mask = _left_padded(prompts, device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    alive = torch.arange(len(rows), device=device)  # rows still in the cache
    cache = _Cache(base)
    with policy.active():
        for t in range(sampling.max_new_tokens):
            states = base.model.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=position, **cache.arguments()
            ).last_hidden_state[:, -1]  # (B, H)
            if t == 0 and count > 1:
                cache.repeat(count)
                states, mask, tokens, position = (
                    x.repeat_interleave(count, 0) for x in (states, mask, tokens, position)
                )
            token, logp = _draw(base.logits(states), drawn[alive, t], sampling)
            ids[alive, t], logps[alive, t] = token, logp
            ended = torch.isin(token, stops)
            length[alive[ended]] = t + 1
            finished[alive[ended]] = True
            going = (~ended).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) < len(alive):
                cache.select(going)
                alive, mask, position = alive[going], mask[going], position[going]
                tokens, token = tokens[going], token[going]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            tokens = cache.next(tokens, token[:, None])
            position = cache.next(position, position[:, -1:] + 1)
    table, logp_table = ids.cpu().numpy().astype(np.int32), logps.cpu().numpy()
    return [
        Completed(table[i, :n], logp_table[i, :n], bool(done))
        for i, (n, done) in enumerate(zip(length.tolist(), finished.tolist(), strict=True))
    ]
