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


def uniforms(seed: int, rows: Sequence[int], length: int) -> np.ndarray:
    """(rows, length) float64 in [0, 1), each row a function of (seed, its number)."""
    if not rows:
        return np.zeros((0, length))
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, row])).random(length) for row in rows])


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits (B, V), uniform (B,) -> tokens (B,) and their log-probabilities (B,)."""
    scaled = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    logp = torch.log_softmax(scaled, dim=-1)
    if sampling.greedy:
        tokens = logits.argmax(-1)
    else:
        logp = truncated(logp, sampling) if sampling.truncated else logp
        cumulative = logp.double().exp_().cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


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
        size = (len(prompts), sampling.max_new_tokens)
        self.prompts, self.sampling, self.limit = prompts, sampling, sampling.max_new_tokens
        self.uniforms = torch.from_numpy(uniforms(seed, numbers, self.limit)).to(device)
        self.stop_ids = torch.tensor(sorted({*stop_ids, *sampling.stop_ids}), device=device)
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.logp = torch.zeros(size, dtype=torch.float32, device=device)
        self.length = torch.full((len(prompts),), self.limit, device=device)
        self.finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.text: list[list[int]] = [[] for _ in prompts] if sampling.stops else []
        self.everyone = torch.arange(len(prompts), device=device)
        self.at = 0

    def draw(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The next token of each of these rows (B,), from logits (B, V). A row that has finished draws on, unseen."""
        token, logp = draw(logits, self.uniforms[rows, self.at], self.sampling)
        self.ids[rows, self.at], self.logp[rows, self.at] = token, logp
        self.at += 1
        ended = torch.isin(token, self.stop_ids)
        if self.sampling.stops is not None:
            ended |= self._text_ends(rows.tolist(), token.tolist()).to(ended.device)
        if self.at >= self.sampling.min_new_tokens:
            now = rows[ended & ~self.finished[rows]]
            self.length[now] = self.at
            self.finished[now] = True
        return token

    def _text_ends(self, rows: list[int], tokens: list[int]) -> Tensor:
        assert self.sampling.stops is not None
        for row, token in zip(rows, tokens, strict=True):
            self.text[row].append(token)
        return torch.tensor([self.sampling.stops.ends(self.prompts[row], self.text[row]) for row in rows])

    def completed(self) -> list[Completed]:
        """All rows."""
        ids, logp = self.ids.cpu().numpy().astype(np.int32), self.logp.cpu().numpy()
        return [
            Completed(ids[i, :n], logp[i, :n], bool(done))
            for i, (n, done) in enumerate(zip(self.length.tolist(), self.finished.tolist(), strict=True))
        ]
