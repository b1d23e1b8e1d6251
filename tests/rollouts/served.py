"""What the tests of the engine vllm share: prompts, a policy with an adapter, sampling by the server that stands in."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_cli.models import adapters
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.settings.model import LoraSettings
from rlhf_cli.recipe.settings.rollout import SamplingSettings
from rlhf_cli.rollouts.sampling import Completed, Sampling, Stats
from rlhf_cli.rollouts.vllm import Server, serving
from tests.rollouts.stand_in import StandIn

PROMPTS = [np.array([1, 40 + n, 50 + n, 60][: 2 + n % 3], np.int32) for n in range(5)]
NEW = Sampling(6)


def settings(stand_in: StandIn, **more: Any) -> SamplingSettings:
    """The block `rollout` of a recipe."""
    return SamplingSettings(**{"engine": "vllm", "server": stand_in.address, "server_timeout": 20.0, **more})


def asked(stand_in: StandIn, run: Path, sampling: Sampling = NEW, **more: Any) -> Sampling:
    """The same sampling, by the server."""
    server = serving(settings(stand_in, **more), stand_in.root, 64, run)
    return replace(sampling, engine="vllm", server=server, stats=Stats())


def server_of(sampling: Sampling) -> Server:
    """The one it asks."""
    assert sampling.server is not None
    return sampling.server


def policy(stand_in: StandIn, rank: int = 4) -> Role:
    """A model of our own with an adapter that says something else than the base."""
    own = replace(stand_in.base, model=copy.deepcopy(stand_in.base.model), peft=None, active=None, source=stand_in.root)
    name = f"policy{rank}"
    adapters.add_adapter(own, name, adapters.lora_config(LoraSettings(r=rank, alpha=2.0 * rank)))
    torch.manual_seed(rank)
    role = Role("policy", own, name, trained=True)
    for _, parameter in role.parameters:
        parameter.data.normal_(0.0, 0.1)
    return role


def said(drawn: list[list[Completed]]) -> list[tuple[list[int], bool]]:
    """Tokens, and whether they ended, of all completions."""
    return [(c.ids.tolist(), c.finished) for group in drawn for c in group]
