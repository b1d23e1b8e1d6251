"""Checks of a freshly loaded base, before anything is trained on it."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models.attention import NAME as SEGMENTS
from rlhf_cli.models.base import Base
from rlhf_cli.models.roles import Role


def _probe(base: Base, *, packed: bool) -> Batch:
    """Two prompts with two completions each, of made-up tokens."""
    random = np.random.Generator(np.random.Philox(key=[7, 7]))
    rows = int(base.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]

    def ids(n: int) -> np.ndarray:
        return random.integers(0, rows, n).astype(np.int32)

    samples = [
        Sample(ids(p), tuple(Completion(ids(n), np.ones(n, dtype=bool)) for n in lengths), {}, "probe")
        for p, lengths in ((5, (3, 6)), (9, (4, 2)))
    ]
    return collate(samples, packed=packed).to(base.device)


def _tolerance(base: Base, size: float) -> float:
    return (1e-4 if base.dtype == torch.float32 else 5e-2) * (1.0 + size)


def check_logits(base: Base) -> None:
    """ModelError when our head on our hidden states is not the model's own logits."""
    role, batch = Role("check", base), _probe(base, packed=False)
    with role.active():
        ours = base.logits(role.hidden(batch)).float()
        mask = (batch.segment >= 0).long()
        theirs = base.model(input_ids=batch.ids, attention_mask=mask, position_ids=batch.position).logits.float()
    real = (batch.segment >= 0).view(-1)
    ours, theirs = ours[real], theirs.reshape(-1, theirs.shape[-1])[real]
    gap = float((ours - theirs).abs().max())
    if not gap <= _tolerance(base, float(theirs.abs().max())):
        raise ModelError(
            f"this architecture does something to its logits that is not known here (they differ by {gap:.3g})",
            base.source, "report it with the name of the model",
        )  # fmt: skip


def allows_packing(base: Base) -> bool:
    """Whether attention by segments gives the same hidden states as padded rows, at every scored token's predictor."""
    if base.model.config._attn_implementation != SEGMENTS:
        return False
    role, base.packed = Role("check", base), True
    states = []
    try:
        for packed in (True, False):
            batch = _probe(base, packed=packed)
            with role.active():
                states.append(role.hidden(batch)[batch.predictors].float())
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        base.packed = False
    gap = float((states[0] - states[1]).abs().max())
    return gap <= _tolerance(base, float(states[1].abs().max()))
