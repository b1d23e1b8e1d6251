"""transformers' continuous batching behind the same interface as the own loop.

Keys and values lie in pages, and waiting rows take the places of finished ones. All requests are handed in before the
first step, so that its draws are a function of the seed and the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from rlhf_cli.errors import ModelError
from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.roles import Role
from rlhf_cli.rollouts.engines import plain
from rlhf_cli.rollouts.sampling import Completed, Sampling

PAGE = 256
"""Tokens of a page of the cache."""


@torch.no_grad()
def by_continuous(
    policy: Role,
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> list[Completed]:
    """`count` completions of each prompt, prompt by prompt, with its own log-probabilities; those of greedy completions
    are at temperature 1. Raises ModelError for a model or settings it does not take."""
    model: Any = policy.base.model
    stops = sorted({*stop_ids, *sampling.stop_ids})
    # Of a single token nothing is left to read after a fork, and transformers fails: such prompts are asked n times.
    forks = count if min(len(p) for p in prompts) > 1 else 1
    asked = [p for p in prompts for _ in range(count // forks)]
    settings = _settings(forks, stops, sampling)
    batching = _batching(prompts, numbers, sampling.max_new_tokens, seed)
    with ExitStack() as stack:
        for context in (policy.active(), plain(model), _paged(model), _silent(), _own_random(policy.base.device)):
            stack.enter_context(context)
        try:
            manager = model.init_continuous_batching(settings, batching)
        except (ValueError, NotImplementedError, ImportError, AttributeError) as error:
            raise _unable(error, policy.base.source) from error
        results = _results(manager, [p.tolist() for p in asked], forks, policy.base.source)
    return [_completed(result, asked[i], set(stops), sampling) for i, result in results]


def _settings(count: int, stops: list[int], sampling: Sampling) -> GenerationConfig:
    drawn: dict[str, Any] = {"do_sample": False}
    if not sampling.greedy:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0}
        drawn |= {"top_p": sampling.top_p, "min_p": sampling.min_p}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, num_return_sequences=count, eos_token_id=stops or -1, pad_token_id=0,
        **drawn,
    )  # fmt: skip


def _batching(prompts: Sequence[np.ndarray], numbers: Sequence[int], new: int, seed: int) -> ContinuousBatchingConfig:
    longest = max(len(p) for p in prompts)
    own = np.random.SeedSequence([seed, *numbers]).generate_state(1)[0]
    return ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=len(numbers) * (-(-(longest + new) // PAGE) + 1),
        max_batch_tokens=max(PAGE, longest, len(numbers)), return_logprobs=True, seed=int(own),
        auto_switch_to_flash=False, drop_unsupported_processors=False, use_cuda_graph=False, use_async_batching=False,
    )  # fmt: skip


def _results(manager: Any, prompts: list[list[int]], count: int, source: str) -> list[tuple[int, Any]]:
    """(number of the prompt, result) of all completions that came back, in the order of the prompts."""
    ids = manager.add_requests(prompts)
    wanted = {i: p for p, name in enumerate(ids) for i in [name, *(f"{name}__child#{k}" for k in range(count - 1))]}
    found: dict[str, Any] = {}
    manager.start()
    try:
        while len(found) < len(wanted):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                break
    finally:
        manager.stop(block=True)
        manager.destroy()
    fatal = manager.background_thread_status.fatal_error
    if isinstance(fatal, torch.OutOfMemoryError):
        raise fatal
    failed = [fatal, *(r.error for r in found.values())]
    if any(error is not None for error in failed):
        raise _unable(next(error for error in failed if error is not None), source)
    return [(p, found[name]) for name, p in wanted.items() if name in found]


def _completed(result: Any, prompt: np.ndarray, stops: set[int], sampling: Sampling) -> Completed:
    """Up to the first stop; tokens that were sampled after a stop string are left out."""
    ids = list(result.generated_tokens)
    length, finished = len(ids), ids[-1] in stops
    if sampling.stops is not None:
        text = sampling.stops
        length = next((n for n in range(1, len(ids) + 1) if text.ends(prompt, ids[:n])), length)
        finished = finished or length < len(ids) or text.ends(prompt, ids)
    return Completed(np.array(ids[:length], np.int32), np.array(result.logprobs[:length], np.float32), finished)


def _unable(why: object, source: str) -> ModelError:
    first = (str(why).strip() or type(why).__name__).split("\n")[0][:200]
    return ModelError(f"continuous batching cannot sample from this model: {first}", source,
                      "use rollout.engine: own or generate")  # fmt: skip


@contextmanager
def _paged(model: Any) -> Iterator[None]:
    """Attention that continuous batching can use in place of ours."""
    own = model.config._attn_implementation
    if own == SEGMENTS:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' log of a failure, which we report ourselves."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _own_random(device: torch.device) -> Iterator[None]:
    """torch's global generators, which continuous batching seeds and draws from, as they were before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
