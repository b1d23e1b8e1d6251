"""Checks of a freshly loaded base, before anything is trained on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models import sequence
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


def rounds(base: Base) -> bool:
    """Whether numbers depend visibly on how a batch is laid out: half precision, or int8, which rounds activations by
    what else is in the batch."""
    return base.dtype != torch.float32 or bool(getattr(base.model, "is_loaded_in_8bit", False))


def _tolerance(base: Base, size: float) -> float:
    return (5e-2 if rounds(base) else 1e-4) * (1.0 + size)


def check_logits(base: Base) -> None:
    """ModelError when our head on our hidden states is not the model's own logits."""
    role, batch = Role("check", base), _probe(base, packed=False)
    mask = (batch.segment >= 0).long()
    try:
        with role.active():
            ours = base.logits(role.hidden(batch)).float()
            theirs = base.model(input_ids=batch.ids, attention_mask=mask, position_ids=batch.position).logits.float()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"this architecture ({type(base.model).__name__}) cannot be run here: {error}", base.source,
            "report it with the name of the model",
        ) from error  # fmt: skip
    real = (batch.segment >= 0).view(-1)
    ours, theirs = ours[real], theirs.reshape(-1, theirs.shape[-1])[real]
    gap = float((ours - theirs).abs().max())
    if not gap <= _tolerance(base, float(theirs.abs().max())):
        raise ModelError(
            f"this architecture does something to its logits that is not known here (they differ by {gap:.3g})",
            base.source, "report it with the name of the model",
        )  # fmt: skip


def allows_packing(base: Base) -> bool:
    """Whether attention by segments gives the same hidden states as padded rows, at every scored token's predictor,
    and whatever the neighbours in the row are; also where several processes share a row, who ask this together."""
    if base.model.config._attn_implementation != SEGMENTS:
        return False
    role, base.packed = Role("check", base), True
    states = []
    try:
        for packed in (True, False):
            batch = _probe(base, packed=packed)
            with role.active():
                states.append(role.hidden(batch)[batch.predictors].float())
        leak = _leak(role)
        if sequence.size() > 1:
            states[0] = _dealt(role)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, IndexError):
        return False
    finally:
        base.packed = False
    gap, limit = float((states[0] - states[1]).abs().max()), _tolerance(base, float(states[1].abs().max()))
    return gap <= limit and leak <= limit / 10


def _dealt(role: Role) -> torch.Tensor:
    """The same states, each process of a group computing a part of the row."""
    batch = replace(_probe(role.base, packed=True), dealt=True)
    with role.active():
        return role.read(role.hidden(batch), batch, batch.predictors, lambda states, _: states.float())


def _leak(role: Role) -> float:
    """How far the states of the last completion in a packed row move when the tokens of all but its prompt change."""
    batch = _probe(role.base, packed=True)
    last, rows = len(batch.spans) - 1, int(role.base.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    own = (batch.segment == last) | (batch.segment == batch.spans[last].parent)
    other = replace(batch, ids=torch.where(own, batch.ids, (batch.ids + 1) % rows))
    at = batch.predictors[batch.owners == batch.sequences - 1]
    with role.active():
        return float((role.hidden(batch)[at].float() - role.hidden(other)[at].float()).abs().max())
