"""Drawing tokens: each completion from uniforms of its own, and the book of what has been drawn.

Every completion draws its tokens from uniforms that are a function of (seed, number of the completion), through the
inverse of the cumulative distribution: so rollouts depend neither on how they were batched nor on which other rows are
still alive. B rows that are drawn for, N rows in all, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.rollouts.sampling import Completed, Sampling

BLOCK = 64
"""Columns that are summed together before the one that is drawn is looked for."""
BELOW = 1 - 2**-52


def uniforms(seed: int, rows: Sequence[int], length: int) -> np.ndarray:
    """(rows, length) float64 in [0, 1), each row a function of (seed, its number)."""
    if not rows:
        return np.zeros((0, length))
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, row])).random(length) for row in rows])


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits (B, V), uniform (B,) -> tokens (B,) and their log-probabilities (B,)."""
    scaled = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    if sampling.greedy:
        tokens = logits.argmax(-1)
        return tokens, scaled.gather(1, tokens[:, None]).squeeze(1) - scaled.logsumexp(-1)
    if sampling.truncated:
        logp = truncated(torch.log_softmax(scaled, dim=-1), sampling)
        tokens = inverse(logp.exp(), uniform)
        return tokens, logp.gather(1, tokens[:, None]).squeeze(1)
    probability = torch.softmax(scaled, dim=-1)
    tokens = inverse(probability, uniform)
    return tokens, probability.gather(1, tokens[:, None]).squeeze(1).log()


def inverse(probability: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulative sum of probability (B, V) passes uniform (B,) float64 times its total: (B,).

    Summed in float64, by blocks of columns, so that only the block in question is summed column by column.
    """
    rows, columns = probability.shape
    blocks = columns // BLOCK
    parts = [probability[:, : blocks * BLOCK].view(rows, blocks, BLOCK).sum(-1, dtype=torch.float64)] if blocks else []
    if columns % BLOCK:
        parts.append(probability[:, blocks * BLOCK :].sum(-1, keepdim=True, dtype=torch.float64))
    cumulative = torch.cat(parts, dim=1).cumsum(-1)  # (B, blocks)
    wanted = uniform[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, wanted, right=True).clamp(max=cumulative.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    places = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probability.gather(1, places.clamp(max=columns - 1)).double()
    inside = inside.masked_fill_(places >= columns, 0.0).cumsum(-1)
    wanted = torch.minimum(wanted - before, inside[:, -1:] * BELOW)  # rounding may not lead past the block
    return (block * BLOCK + torch.searchsorted(inside, wanted, right=True)).squeeze(1).clamp(max=columns - 1)


def truncated(logp: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities (B, V) of the distribution that is left by top_k, then top_p, then min_p."""
    if sampling.top_k is not None and sampling.top_k < logp.shape[1]:
        least = logp.topk(sampling.top_k).values[:, -1:]
        logp = logp.masked_fill(logp < least, -torch.inf).log_softmax(-1)
    if sampling.top_p is not None:
        values, places = logp.sort(descending=True)
        before = values.exp().cumsum(-1) - values.exp()  # the likeliest token always stays
        out = (before >= sampling.top_p).scatter(1, places, before >= sampling.top_p)
        logp = logp.masked_fill(out, -torch.inf).log_softmax(-1)
    if sampling.min_p is not None:
        least = logp.amax(-1, keepdim=True) + np.log(sampling.min_p)
        logp = logp.masked_fill(logp < least, -torch.inf).log_softmax(-1)
    return logp


class Rows:
    """The completions of a batch while they are drawn."""

    def __init__(
        self,
        prompts: Sequence[np.ndarray],  # N, of each completion
        numbers: Sequence[int],  # N, of each completion, for its uniforms
        stop_ids: Sequence[int],
        sampling: Sampling,
        seed: int,
        device: torch.device,
    ) -> None:
        count = len(prompts)
        self.prompts, self.sampling, self.limit = prompts, sampling, sampling.max_new_tokens
        self.uniforms = torch.from_numpy(uniforms(seed, numbers, self.limit).T.copy()).to(device)  # (limit, N)
        self.stop_ids = torch.tensor(sorted({*stop_ids, *sampling.stop_ids}), device=device)
        self.ids = torch.zeros(self.limit, count, dtype=torch.int64, device=device)
        self.logp = torch.zeros(self.limit, count, dtype=torch.float32, device=device)
        self.length = torch.full((count,), self.limit, device=device)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self.left = count
        """Rows that have not finished."""
        self.text: list[list[int]] = [[] for _ in prompts] if sampling.stops else []
        self.everyone = torch.arange(count, device=device)
        self.at = 0

    def draw(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The next token of each of these rows (B,), from logits (B, V). A row that has finished draws on, unseen."""
        token, logp = draw(logits, self.uniforms[self.at].index_select(0, rows), self.sampling)
        self.ids[self.at].index_copy_(0, rows, token)
        self.logp[self.at].index_copy_(0, rows, logp)
        self.at += 1
        if self.at >= self.sampling.min_new_tokens or self.sampling.stops is not None:
            self._end(token, rows)
        return token

    def _end(self, token: Tensor, rows: Tensor) -> None:
        ended = torch.isin(token, self.stop_ids)
        if self.sampling.stops is not None:
            ended |= self._text_ends(rows.tolist(), token.tolist()).to(ended.device)
        if self.at >= self.sampling.min_new_tokens and (len(self.stop_ids) or self.sampling.stops is not None):
            now = rows[ended & ~self.finished[rows]]
            self.length[now] = self.at
            self.finished[now] = True
            self.left -= len(now)

    def _text_ends(self, rows: list[int], tokens: list[int]) -> Tensor:
        assert self.sampling.stops is not None
        for row, token in zip(rows, tokens, strict=True):
            self.text[row].append(token)
        return torch.tensor([self.sampling.stops.ends(self.prompts[row], self.text[row]) for row in rows])

    def completed(self) -> list[Completed]:
        """All rows."""
        ids, logp = self.ids.T.cpu().numpy().astype(np.int32), self.logp.T.cpu().numpy()
        return [
            Completed(ids[i, :n], logp[i, :n], bool(done))
            for i, (n, done) in enumerate(zip(self.length.tolist(), self.finished.tolist(), strict=True))
        ]
