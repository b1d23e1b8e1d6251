"""What a card says of its memory. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.models import checkpointing, memory
from tests.models import worlds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def test_room_and_peak_are_those_of_the_allocator() -> None:
    card, size = torch.device("cuda", 0), 2**28
    before = memory.room(card)
    held = torch.empty(size, dtype=torch.uint8, device=card)
    assert size <= before - memory.room(card) < 2 * size
    del held
    assert memory.room(card) == pytest.approx(before, rel=0.01), "what is only cached can be had"
    peak = memory.peak(card, lambda: torch.empty(size, dtype=torch.uint8, device=card))
    assert peak is not None
    assert size <= peak < 1.1 * size


def test_the_peak_of_a_step_grows_as_the_footprint_says() -> None:
    base = worlds.make_base("llama")
    base.model, base.device = base.model.cuda(), torch.device("cuda", 0)
    role = worlds.full_role(base)
    checkpointing.enable(base.model, "auto")

    def step(count: int) -> None:
        for _, parameter in role.parameters:
            parameter.grad = None
        with role.active(train=True):
            role.backward(checkpointing.passed(role, checkpointing.made_up(role, 256, count)))

    each = []
    for layers in (0, 2):
        checkpointing.recompute(base.model, layers)
        step(8)
        peaks = [memory.peak(base.device, lambda count=count: step(count)) for count in (8, 16)]  # type: ignore[misc]
        assert peaks[0] is not None
        assert peaks[1] is not None
        each.append((peaks[1] - peaks[0]) / (8 * 256))
        assert 0.3 < each[-1] / checkpointing.footprint(role, 256).each(layers) < 3.0
    assert each[1] < each[0]
