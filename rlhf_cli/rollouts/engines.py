"""transformers' `generate` behind the same interface as the own loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf_cli.models.roles import Role
from rlhf_cli.rollouts.rows import Rows
from rlhf_cli.rollouts.sampling import Completed, Sampling


def left_padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (P, W) and mask (P, W), prompts at the right end."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """Without the generation settings a model brings along (penalties, filters, lengths): only what is asked for."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Draw(LogitsProcessor):
    """Draws the tokens of `generate`: all others are ruled out."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.rows.draw(scores, self.rows.everyone)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class _Finished(StoppingCriteria):
    """Ends `generate` when all rows have finished."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.rows.finished


@torch.no_grad()
def by_generate(
    policy: Role,
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
    count: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
) -> list[Completed]:
    """By transformers' `generate`, whose logits we draw from ourselves: the same draws as the own loop's."""
    base = policy.base
    rows = Rows([p for p in prompts for _ in range(count)], numbers, stop_ids, sampling, seed, base.device)
    ids, mask = left_padded(prompts, base.device)
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, num_return_sequences=1, do_sample=False, pad_token_id=0, use_cache=True
    )
    model: Any = base.model
    with policy.active(), plain(model):
        model.generate(
            input_ids=ids.repeat_interleave(count, 0), attention_mask=mask.repeat_interleave(count, 0),
            generation_config=settings, logits_processor=LogitsProcessorList([_Draw(rows)]),
            stopping_criteria=StoppingCriteriaList([_Finished(rows)]),
        )  # fmt: skip
    sampling.stats.row_steps += rows.at * len(numbers)
    return rows.completed()
