"""Sampling completions from a role, by an own decode loop or by one of transformers'.

The own loop reads each prompt once for all its completions, and finished rows leave the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.errors import ModelError
from rlhf_cli.models import processes, sharding
from rlhf_cli.models.roles import Role
from rlhf_cli.rollouts.continuous import by_continuous
from rlhf_cli.rollouts.engines import by_generate, left_padded
from rlhf_cli.rollouts.forward import Forward
from rlhf_cli.rollouts.rows import Rows
from rlhf_cli.rollouts.sampling import Completed, Sampling, Stats
from rlhf_cli.rollouts.vllm import by_vllm

CARRIED = 1 / 16
"""Finished rows are dropped when they are more than this share of the rows."""


def sample(
    policy: Role,
    prompts: Sequence[np.ndarray],  # (P,) int32 each
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> list[list[Completed]]:
    """`count` completions of each prompt. What is drawn depends on the seed, the number of the prompt (its place unless
    `numbers` says otherwise) and that of the completion. Several processes share the prompts, and all get everything.

    Raises ModelError when a single prompt does not fit the memory, or the engine returns another number of completions.
    """
    of = range(len(prompts)) if numbers is None else numbers
    with nullcontext() if sampling.server is None else sampling.server.holding(policy):
        return _shared(policy, prompts, count, stop_ids, sampling, seed, of)


def _shared(
    policy: Role,
    prompts: Sequence[np.ndarray],
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
    of: Sequence[int],
) -> list[list[Completed]]:
    """As `sample`; of: the numbers of the prompts."""
    if processes.count() == 1:
        return _sampled(policy, prompts, count, stop_ids, sampling, seed, of)
    mine = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))[processes.rank() :: processes.count()]
    own = replace(sampling, stats=Stats(heard=sampling.stats.heard))
    found: dict[int, list[Completed]] = {}

    def work() -> None:
        with sharding.gathered(policy.base) if sampling.server is None else nullcontext():
            drawn = _sampled(policy, [prompts[i] for i in mine], count, stop_ids, own, seed, [of[i] for i in mine])
        found.update(zip(mine, drawn, strict=True))

    processes.together(work, "sampling")
    told = torch.tensor([own.stats.told()], dtype=torch.float64)  # as many bytes, whatever the clock said
    for rows in processes.gather_rows(told, "telling of what was sampled"):
        sampling.stats.add(rows[0].tolist())
    return _everyones(found)


def _everyones(found: Mapping[int, Sequence[Completed]]) -> list[list[Completed]]:
    """What all processes have sampled, by the prompt's place."""
    doing, own = "exchanging completions", [c for drawn in found.values() for c in drawn]
    places = processes.gather([[i, [[len(c.ids), c.finished] for c in drawn]] for i, drawn in found.items()], doing)
    ids = processes.gather_rows(torch.from_numpy(np.concatenate([c.ids for c in own])) if own else None, doing)
    logp = processes.gather_rows(torch.from_numpy(np.concatenate([c.logp for c in own])) if own else None, doing)
    every: dict[int, list[Completed]] = {}
    for marks, tokens, numbers in zip(places, ids, logp, strict=True):
        start = 0
        for i, drawn in marks:
            every[i] = []
            for length, finished in drawn:
                at, start = slice(start, start + length), start + length
                every[i].append(Completed(tokens[at].numpy(), numbers[at].numpy(), finished))
    return [every[i] for i in range(len(every))]


def _sampled(
    policy: Role,
    prompts: Sequence[np.ndarray],
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
    of: Sequence[int],
) -> list[list[Completed]]:
    """As `sample`, by this process; of: the numbers of the prompts."""
    engine, stats, began = ENGINES[sampling.engine], sampling.stats, time.perf_counter()
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out: list[list[Completed]] = [[] for _ in prompts]
    room = sampling.max_batch if sampling.server is None else max(1, len(prompts) * count)  # which it shares out itself
    start, done = 0, 0  # done: completions of the prompt at `start`
    while start < len(order):
        each = min(count - done, room)
        group = order[start : start + max(1, room // each)] if each == count else [order[start]]
        rows = [of[i] * count + done + k for i in group for k in range(each)]
        stats.begin()
        try:
            completed = engine(policy, [prompts[i] for i in group], rows, each, stop_ids, sampling, seed)
        except torch.OutOfMemoryError as error:
            if room == 1:
                raise ModelError("out of memory while sampling a single completion", policy.base.source,
                                 "lower the number of new tokens") from error  # fmt: skip
            room = max(1, min(room, len(rows)) // 2)
            stats.halvings += 1
            torch.cuda.empty_cache()
            continue
        if len(completed) != len(rows):
            raise ModelError(f"the engine '{sampling.engine}' returned {len(completed)} completions of {len(rows)}",
                             "rollout.engine", "use another engine")  # fmt: skip
        stats.tell(len(rows))
        for place, i in enumerate(group):
            out[i] += completed[place * each : (place + 1) * each]
        done += each
        if done == count:
            start, done = start + len(group), 0
    stats.completions += len(prompts) * count
    stats.tokens += sum(len(c.ids) for group in out for c in group)
    stats.seconds += time.perf_counter() - began
    return out


def mixed(seed: int, step: int) -> int:
    """A seed for one step of a run: runs of neighbouring seeds share no draws."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


@torch.no_grad()
def by_own_loop(
    policy: Role,
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> list[Completed]:
    """`count` completions of each prompt, prompt by prompt; numbers: of each completion, for its uniforms."""
    base, new = policy.base, sampling.max_new_tokens
    rows = Rows([p for p in prompts for _ in range(count)], numbers, stop_ids, sampling, seed, base.device)
    tokens, mask = left_padded(prompts, base.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)
    alive = rows.everyone  # rows in the cache; a few of them may have finished
    with policy.active():
        forward = Forward(base, mask)
        for t in range(new):
            states = forward(tokens, position)  # (B, H)
            if t == 0 and count > 1:
                forward.repeat(count)
                states, tokens, position = (x.repeat_interleave(count, 0) for x in (states, tokens, position))
            sampling.stats.row_steps += len(alive)
            token = rows.draw(base.logits(states), alive)
            sampling.stats.tell(len(numbers) - rows.left)
            if rows.left == 0 or t + 1 == new:
                break
            if len(alive) - rows.left > CARRIED * len(alive):
                source, target, order = _moves(~rows.finished[alive], rows.left)
                forward.move(source, target, order)
                alive, position, tokens, token = (x[order] for x in (alive, position, tokens, token))
            tokens, position = forward.next(tokens, token[:, None]), forward.next(position, position[:, -1:] + 1)
    return rows.completed()


def _moves(going: Tensor, left: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows (source) take the places (target) of finished ones, so that the first `left` places hold those that go
    on; and the row that each of these places then holds (left,)."""
    source, target = going[left:].nonzero().squeeze(1) + left, (~going[:left]).nonzero().squeeze(1)
    order = torch.arange(left, device=going.device)
    order[target] = source
    return source, target, order


Engine = Callable[[Role, Sequence[np.ndarray], Sequence[int], int, Sequence[int], Sampling, int], list[Completed]]

ENGINES: dict[str, Engine] = {
    "own": by_own_loop, "generate": by_generate, "continuous": by_continuous, "vllm": by_vllm,
}  # fmt: skip
