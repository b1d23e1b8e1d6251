"""Log-probabilities of tokens from hidden states, in chunks, so that (tokens x vocabulary) never exists whole.

T tokens, H hidden size, V vocabulary. Whatever the dtype of the model, the log-softmax is taken in float32: in bfloat16
it is wrong by up to 0.04 nats a token, as much as an early KL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_cli.objectives.head import Head, head_logp
from rlhf_cli.objectives.head_known import known_logp

Statistics = Literal["none", "entropy", "bonus", "collision", "usual"]
CHUNK_ELEMENTS = 2**24
"""Logits in memory at once (64 MiB in float32)."""


class TokenLogp(NamedTuple):
    """What the vocabulary says of T tokens."""

    logp: Tensor  # (T,) log-probability of the token
    entropy: Tensor  # (T,) entropy of the distribution, nats
    mean: Tensor  # (T,) mean over the vocabulary of the log-probabilities
    collision: Tensor  # (T,) log of the sum over the vocabulary of the squared probabilities, no gradient


def _chunk(
    hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float, statistics: Statistics
) -> Tensor:
    """One chunk: hidden (C, H), ids (C,) -> (1, C) logp, and below it the statistics asked for."""
    logits = head(hidden).float() / temperature  # (C, V)
    total = torch.logsumexp(logits, dim=-1)  # (C,)
    rows = [logits.gather(1, ids[:, None]).squeeze(1) - total]
    if statistics == "entropy":
        known = logits.detach()
        rows.append(total.detach() - (torch.softmax(known, dim=-1) * known).sum(-1))
    elif statistics in ("usual", "bonus"):
        rows += [total - (torch.softmax(logits, dim=-1) * logits).sum(-1), logits.mean(-1) - total]
    elif statistics == "collision":
        known = logits.detach()
        rows.append(torch.logsumexp(2.0 * known, dim=-1) - 2.0 * total.detach())
    return torch.stack(rows)


def _columns(hidden: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """hidden (C, H), tokens (K,) -> their logits (C, K)."""
    return head(hidden)[:, tokens].float()


def token_logits(
    hidden: Tensor,  # (T, H)
    head: Callable[[Tensor], Tensor],  # (C, H) -> (C, V)
    tokens: Tensor,  # (K,)
    vocabulary: int,
) -> Tensor:
    """Logits of a few tokens: (T, K), float32, in the chunks of `token_logp`."""
    parts = [
        checkpoint(_columns, h, tokens, head, use_reentrant=False, preserve_rng_state=False)
        for h in hidden.split(max(1, CHUNK_ELEMENTS // vocabulary))
    ]
    return torch.cat(parts)


def token_logp(
    hidden: Tensor,  # (T, H)
    head: Head | Callable[[Tensor], Tensor],  # (C, H) -> (C, V)
    ids: Tensor,  # (T,)
    temperature: float = 1.0,
    chunk: int | None = None,
    vocabulary: int | None = None,
    statistics: Statistics = "usual",
    upstream: float | None = None,
) -> TokenLogp:
    """Log-probability, entropy and mean log-probability of `ids` under softmax(head(hidden) / temperature), float32.

    A `Head` goes through the kernel (objectives/head.py). Of any other function, which includes whatever the
    architecture does to logits (bias, scale, soft-capping), at most `chunk` rows of logits (default: as many as make
    64 MiB for `vocabulary` columns) are alive at a time, in the forward and, through recomputation, in the backward
    pass. The result does not depend on the chunk. Statistics that are not asked for are empty: `usual` are entropy and
    mean, and `bonus` is entropy, with gradient; `entropy` and `collision`, what WPO weights with (arXiv:2406.11827),
    have none. upstream: the gradient that every log-probability will be given, where it is known: the kernel then needs
    no second pass over a trained head (objectives/head_known.py; statistics `none` and `entropy`).
    """
    if isinstance(head, Head) and statistics != "usual" and len(ids):
        ahead = upstream is not None and head.trained and torch.is_grad_enabled() and temperature == 1.0
        if upstream is not None and ahead and statistics in ("none", "entropy"):
            logp, watched = known_logp(hidden, head, ids, upstream)
        else:
            logp, watched = head_logp(hidden, head, ids, temperature, statistics)
        nothing = watched[:0]
        return TokenLogp(
            logp, watched if statistics in ("entropy", "bonus") else nothing, nothing,
            watched if statistics == "collision" else nothing,
        )  # fmt: skip
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // vocabulary) if vocabulary else 512
    if len(ids) == 0:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
        return TokenLogp(empty, empty.detach(), empty, empty.detach())
    parts = []
    for h, i in zip(hidden.split(chunk), ids.split(chunk), strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(
                _chunk, h, i, head, temperature, statistics, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part = _chunk(h, i, head, temperature, statistics)
        parts.append(part)
    whole = torch.cat(parts, dim=1)
    none = whole[0, :0]
    if statistics == "usual":
        return TokenLogp(whole[0], whole[1], whole[2], none)
    if statistics == "bonus":
        return TokenLogp(whole[0], whole[1], none, none)
    if statistics == "entropy":
        return TokenLogp(whole[0], whole[1].detach(), none, none)
    return TokenLogp(whole[0], none, none, whole[1].detach() if statistics == "collision" else none)
