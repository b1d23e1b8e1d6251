"""Optimisers and schedules, by the names a recipe uses. All are libraries': torch, bitsandbytes, transformers."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_cli.models.adapters import load_peft
from rlhf_cli.recipe.settings.training import TrainingSettings


def make_optimizer(
    parameters: list[tuple[str, torch.nn.Parameter]], settings: TrainingSettings, learning_rate: float
) -> Optimizer:
    """The optimiser over named parameters; weight decay only on matrices."""
    groups = [
        {"params": [p for _, p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    adam = {"lr": learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, fused=True, **adam)  # type: ignore[arg-type]
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=learning_rate)
        case "sgd":
            return torch.optim.SGD(groups, lr=learning_rate)
        case "adamw_8bit" | "paged_adamw" | "paged_adamw_8bit":
            import bitsandbytes.optim

            kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
            return getattr(bitsandbytes.optim, kinds[settings.optimizer])(groups, **adam)


def state_bytes(parameter: torch.Tensor, training: TrainingSettings) -> int:
    """What the optimiser will keep of a parameter: two moments, in 8 bits where bitsandbytes does so; Adafactor's row
    and column means."""
    n = parameter.numel()
    match training.optimizer:
        case "sgd":
            return 0
        case "adafactor":
            rows = n // max(parameter.shape[-1], 1) if parameter.ndim > 1 else n
            return 4 * (rows + (n // parameter.shape[-2] if parameter.ndim > 1 else 0))
        case "adamw_8bit" | "paged_adamw_8bit" if n >= 4096:
            return 2 * n + 8 * (n // 256)
        case _:
            return 8 * n


def make_scheduler(optimizer: Optimizer, settings: TrainingSettings, steps: int) -> LRScheduler:
    """The learning-rate schedule over `steps` steps."""
    load_peft()  # transformers' schedules bring it along, and this way it comes without torch's compiler
    from transformers import get_scheduler

    warmup = settings.warmup_steps if settings.warmup_steps is not None else math.ceil(settings.warmup_ratio * steps)
    specific = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "polynomial": {"lr_end": 0.0}}.get(settings.lr_scheduler)
    return get_scheduler(settings.lr_scheduler, optimizer, warmup, steps, scheduler_specific_kwargs=specific)
