"""Rankings of the completions of one prompt: reward models and policies. B prompts, K completions of each, padded.

All pairs of a prompt are in one element, so a prompt counts once however many completions it has. Slots that are not
present are taken out first and reach neither a value nor a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.judged import Judged, Ranked, full_precision


def better(gold: Tensor, present: Tensor) -> Tensor:
    """Pairs that are ordered: two (B, K) -> (B, K, K) bool, [b, i, j] where i is known to be better than j."""
    there = present[:, :, None] & present[:, None, :]
    return there & (gold[:, :, None] > gold[:, None, :])


def informative(gold: Tensor, present: Tensor) -> Tensor:
    """Prompts with an ordered pair: two (B, K) -> (B,) bool. The others say nothing and must not be counted."""
    return better(gold, present).any(dim=2).any(dim=1)


def best_of(gold: Tensor, present: Tensor) -> Tensor:
    """Which completion is known best, the first of equals: two (B, K) -> (B,) int64."""
    seen = torch.where(present, gold, -torch.inf)
    top = present & (seen == seen.amax(dim=1, keepdim=True))
    return top.to(torch.int8).argmax(dim=1)


def _values(ranked: Ranked) -> Tensor:
    """(B, K) in full precision, 0 where nothing is present."""
    if bool((ranked.present.sum(dim=1) < 2).any()):
        raise ValueError("a ranking needs at least two completions")
    (values,) = full_precision(ranked.values)
    return torch.where(ranked.present, values, torch.zeros_like(values))


def _averages(policy: Ranked) -> Tensor:
    """Mean log-probability a token of each completion, (B, K); 0 where nothing is present."""
    return _values(policy) / torch.where(policy.present, policy.length, 1).clamp(min=1)


def _centring(scores: Tensor, present: Tensor) -> Tensor:
    """Squared mean score of each prompt: (B, K) -> (B,)."""
    return (scores.sum(dim=1) / present.sum(dim=1)).square()


def _at(x: Tensor, index: Tensor) -> Tensor:
    """x (B, K) at index (B,) -> (B,)."""
    return x.gather(1, index[:, None])[:, 0]


def k_wise(ranked: Ranked, *, centring: float) -> Judged:
    """1/|P| sum over (i, j) in P of -log sigmoid(r_i - r_j), + centring mean(r)^2.

    Ties make no pair. A prompt of ties only has the loss 0 and no gradient, and is not counted: see `informative`.

    Symbols: r: scores of the present completions; P: pairs (i, j) of one prompt with i known better than j.
    Source: Ouyang et al. 2022 (arXiv:2203.02155) eq. 1; centring: Eisenstein et al. 2023 (arXiv:2312.09244) eq. 2.
    Step 0: log 2 = 0.693147 at equal scores
    Traps: a sum over pairs, or pairs of all prompts pooled, so that long rankings rule; prompts of ties only counted in
    the mean; ties or padding taken as pairs.
    """
    r = _values(ranked)
    pairs = better(ranked.gold, ranked.present)
    count = pairs.sum(dim=(1, 2))
    losses = -F.logsigmoid(r[:, :, None] - r[:, None, :])  # (B, K, K)
    losses = torch.where(pairs, losses, torch.zeros_like(losses)).sum(dim=(1, 2)) / count.clamp(min=1)
    losses = losses + centring * _centring(r, ranked.present)
    return Judged(torch.where(count > 0, losses, torch.zeros_like(losses)), r.detach())


def choice(ranked: Ranked, *, centring: float) -> Judged:
    """logsumexp_k r_k - r_best + centring mean(r)^2.

    Cross-entropy of which completion was chosen. Raises ValueError unless one stands alone at the top.

    Symbols: r: scores of the present completions; best: the one known best.
    Source: Ziegler et al. 2019 (arXiv:1909.08593) eq. 1; centring: Eisenstein et al. 2023 (arXiv:2312.09244) eq. 2.
    Step 0: log n at equal scores of n completions: log 4 = 1.386294
    Traps: padding left in the sum; a best picked among equals; the order below the best is not learned.
    """
    r, present = _values(ranked), ranked.present
    best = best_of(ranked.gold, present)
    tops = present & (ranked.gold == _at(ranked.gold, best)[:, None])
    if bool((tops.sum(dim=1) > 1).any()):
        raise ValueError("no single best completion: two share the top of a ranking")
    loss = torch.where(present, r, -torch.inf).logsumexp(dim=1) - _at(r, best)
    return Judged(loss + centring * _centring(r, present), r.detach())


def plackett_luce(ranked: Ranked, *, centring: float) -> Judged:
    """sum_k logsumexp(r_j of all j not better than k) - r_k, + centring mean(r)^2.

    The ranking as a chain of choices: the best of all, the best of the rest, and so on; the last choice costs nothing.
    Raises ValueError on ties: the ranking has to be strict.

    Symbols: r: scores of the present completions.
    Source: Luce 1959, Plackett 1975; for reward models Zhu et al. 2023 (arXiv:2301.11270); centring: Eisenstein et al.
    2023 (arXiv:2312.09244) eq. 2.
    Step 0: log K! at equal scores: log 2 for 2 completions, log 24 = 3.178054 for 4
    Traps: ranked worst first; ties broken by the order of the file; long rankings have larger losses.
    """
    r, present = _values(ranked), ranked.present
    above = better(ranked.gold, present)
    there = present[:, :, None] & present[:, None, :]
    itself = torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    if bool((there & ~itself & ~above & ~above.mT).any()):
        raise ValueError("a ranking with ties: its completions have to be ordered strictly")
    left = above | itself  # (B, K, K) [b, k, j]: j is still to be chosen from when k is
    chain = torch.where(left, r[:, None, :], -torch.inf).logsumexp(dim=2) - r
    return Judged(chain.sum(dim=1) + centring * _centring(r, present), r.detach())


def rrhf(policy: Ranked, *, rank_weight: float, sft_reduction: str) -> Judged:
    """rank_weight (sum over gold_i < gold_j of max(0, p_i - p_j)) + NLL(best), p = S / length.

    No margin, and a sum over pairs; ties make no pair. With token_mean the likelihood of the best completion is a mean
    over the tokens of the step (`Judged.likelihood`); with sum it is in the loss.

    Symbols: S: summed log-probability of a completion; p: its average; best: the first of those known best.
    Source: Yuan et al. 2023 (arXiv:2304.05302), who sum the likelihood; their code weighs the ranking by 100.
    Step 0: no fixed value; the ranking term is 0 when the average log-probabilities are ordered as the ranking is
    Traps: sums compared instead of averages; the hinge turned round; likelihood divided by the padded length, as the
    authors' code does.
    """
    p = _averages(policy)
    pairs = better(policy.gold, policy.present)  # (B, K, K) [b, j, i]: j is better than i
    hinges = F.relu(p[:, None, :] - p[:, :, None])
    loss = rank_weight * torch.where(pairs, hinges, torch.zeros_like(hinges)).sum(dim=(1, 2))
    if sft_reduction == "token_mean":
        return Judged(loss, p.detach(), likelihood=1.0)
    return Judged(loss - _at(_values(policy), best_of(policy.gold, policy.present)), p.detach())


def stable_alignment(policy: Ranked, *, margin: float, rating_scale: float, ratio: float, reduction: str) -> Judged:
    """n_best + ratio h; t_i = n_best - n_i + margin (gold_best - gold_i) / rating_scale for every i but the best.

    h is max(0, mean t_i), max(0, max t_i) or the sum of max(0, t_i), by `reduction`. The likelihood n_best is averaged
    over the tokens of each completion, then over the prompts.

    Symbols: n: negative log-likelihood, a mean over the tokens of a completion; gold: its rating; best: the first of
    the top-rated.
    Source: Liu et al. 2023 (arXiv:2305.16960) and their code, but with each completion's own rating in its margin.
    Step 0: no fixed value; with equal n: n_best + ratio x margin x mean gap / rating_scale
    Traps: ratings sorted but not the completions, so margins get another's rating (the authors' code); the best
    compared with itself; taken for another method that is called CPO.
    """
    n = -_averages(policy)
    best = best_of(policy.gold, policy.present)
    others = policy.present & (torch.arange(n.shape[1], device=n.device) != best[:, None])
    gold = policy.gold.to(n.dtype)
    t = _at(n, best)[:, None] - n + margin * (_at(gold, best)[:, None] - gold) / rating_scale
    t = torch.where(others, t, torch.zeros_like(t))  # (B, K)
    contrast = {
        "mean": F.relu(t.sum(dim=1) / others.sum(dim=1)),
        "max": F.relu(t).amax(dim=1),
        "sum": F.relu(t).sum(dim=1),
    }[reduction]
    return Judged(_at(n, best) + ratio * contrast, -n.detach())
