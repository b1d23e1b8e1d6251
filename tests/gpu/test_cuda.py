"""What only a CUDA device can show. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_cli.data.batch import collate
from rlhf_cli.models.base import load_base
from rlhf_cli.models.checks import allows_packing
from rlhf_cli.objectives.logprob import token_logp
from rlhf_cli.recipe.settings.model import ModelSettings
from tests.models import worlds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(50, 32), torch.randn(1000, 32), torch.randint(0, 1000, (50,))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    ours = token_logp(hidden.cuda(), lambda h: h @ weight.cuda().T, ids.cuda(), chunk=7)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, ids[:, None]).squeeze(1)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert float((ours.logp.cpu().double() - exact).abs().max()) < tolerance


def test_the_logits_of_a_large_vocabulary_are_never_whole() -> None:
    tokens, vocabulary = 2048, 151_936
    hidden = torch.randn(tokens, 64, device="cuda", requires_grad=True)
    head = torch.nn.Linear(64, vocabulary, bias=False, device="cuda")
    ids = torch.randint(0, vocabulary, (tokens,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_logp(hidden, head, ids, vocabulary=vocabulary).logp.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < tokens * vocabulary * 4 / 2


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_in_bfloat16_loads_packs_and_steps(tmp_path: Path, quantization: str) -> None:
    folder = worlds.write_model(tmp_path / "model")
    settings = ModelSettings(name_or_path=str(folder), dtype="bfloat16", quantization=quantization)
    base = load_base(str(folder), settings, trained=False)
    assert base.device.type == "cuda"
    assert allows_packing(base)
    role = worlds.lora_role(base, "policy")
    base.packed = True
    batch = collate([worlds.make_sample(np.random.default_rng(0), 5, 4, 3)], packed=True).to(base.device)
    with role.active(train=True):
        role.backward(-role.logp(batch).logp.sum())
    assert all(bool(torch.isfinite(p.grad).all()) for _, p in role.parameters if p.grad is not None)
