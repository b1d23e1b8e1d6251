"""Process and outcome reward models: labels on steps or tokens. T labelled places of a micro-batch, N completions.

A label is 1 for right, 0 for neutral and -1 for wrong. Losses are of single places; the mean is over all that count in
the optimiser step, taken by the engine, never per completion first.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.objectives.judged import Judged, full_precision

CLASSES = {"binary": ("wrong", "right"), "three": ("wrong", "neutral", "right")}
"""What the classes of a step's logits stand for, in order."""


def counted(labels: Tensor, *, classes: str, neutral: str) -> Tensor:
    """Which steps are trained on: labels (T,) -> (T,) bool. All, or with two classes all that are not neutral."""
    if classes == "binary" and neutral == "ignored":
        return labels != 0
    return torch.ones_like(labels, dtype=torch.bool)


def right(logits: Tensor, *, neutral: str) -> Tensor:
    """Probability that each step is right: (T, C) -> (T,).

    With three classes the neutral one goes where `neutral` says: to right, to wrong, or to neither.
    """
    (logits,) = full_precision(logits)
    good = logits[:, 1:] if neutral == "right" else logits[:, -1:]
    bad = logits[:, :-1] if neutral == "wrong" else logits[:, :1]
    return torch.sigmoid(good.logsumexp(dim=1) - bad.logsumexp(dim=1))


def step_labels(
    logits: Tensor,  # (T, C) at the last token of each labelled step; C = 2: wrong, right; 3: wrong, neutral, right
    labels: Tensor,  # (T,) 1 right, 0 neutral, -1 wrong
    *,
    classes: str,
    neutral: str,
    aggregation: str,
) -> Judged:
    """-log softmax(logits)[label].

    With two classes a neutral step counts as `neutral` says; an ignored one has the loss 0 and no gradient, and is not
    counted: see `counted`. The reward is the probability of right (`right`); `aggregation` makes the score of a
    solution from its steps (`aggregate`).

    Symbols: logits: of wrong and right, or wrong, neutral and right, at the last token of a step; label: its class.
    Source: Lightman et al. 2023 (arXiv:2305.20050) section 2.6; Uesato et al. 2022 (arXiv:2211.14275).
    Step 0: log C at equal logits: log 2 = 0.693147 or log 3 = 1.098612
    Traps: averaged per solution first; the label on the first token of the next step; steps after the first wrong one
    kept as wrong.
    """
    assert logits.shape[1] == len(CLASSES[classes])
    keep = counted(labels, classes=classes, neutral=neutral)
    (logits,) = full_precision(logits)
    safe = torch.where(keep[:, None], logits, torch.zeros_like(logits))
    middle = 1 if classes == "three" or neutral == "right" else 0
    target = torch.where(labels == 0, middle, torch.where(labels > 0, logits.shape[1] - 1, 0))
    loss = F.cross_entropy(safe, target, reduction="none")
    return Judged(torch.where(keep, loss, torch.zeros_like(loss)), right(logits, neutral=neutral)[:, None].detach())


def _binary(logit: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a logit against the probability target: two (T,) -> (T,)."""
    return -target * F.logsigmoid(logit) - (1 - target) * F.logsigmoid(-logit)


def two_token(
    logits: Tensor,  # (T, 2) of the good and the bad token, as what follows the last token of each step
    labels: Tensor,  # (T,) 1 right; -1 or 0 wrong; in between the probability of right
    *,
    good: str,
    bad: str,
    aggregation: str,
) -> Judged:
    """-y log sigmoid(d) - (1 - y) log sigmoid(-d), d = z_good - z_bad.

    The language model's own head, read at two tokens of the vocabulary (`good`, `bad`). Labels between 0 and 1 are
    soft: the share of continuations from a step that reach the answer. There is no neutral label here: 0 is a share of
    none.

    Symbols: z: logits of the two tokens; y: the label, -1 read as 0.
    Source: Wang et al. 2023 (arXiv:2312.08935), with hard or soft estimates of a step as labels.
    Step 0: log 2 = 0.693147 where the two logits are equal; a trained language model starts elsewhere
    Traps: a softmax over the whole vocabulary instead of the two; log(1 - sigmoid(d)), which in float32 is -inf from
    d = 17 on; the logits read one token before the end of a step.
    """
    logits, labels = full_precision(logits, labels)
    d = logits[:, 0] - logits[:, 1]
    return Judged(_binary(d, labels.clamp(min=0)), torch.sigmoid(d)[:, None].detach())


def outcome(
    logit: Tensor,  # (T,) at each token of the completions
    label: Tensor,  # (T,) 1 when the completion of this token is right, else 0
) -> Judged:
    """-y log sigmoid(z) - (1 - y) log sigmoid(-z) at every token of a completion.

    Symbols: z: logit of right at a token; y: the outcome of the whole completion.
    Source: Cobbe et al. 2021 (arXiv:2110.14168) section 4.2.
    Step 0: log 2 = 0.693147 at zero logits
    Traps: tokens of the prompt counted; averaged per completion first; read as a process reward: it predicts the end,
    not whether a step is right.
    """
    logit, label = full_precision(logit, label)
    return Judged(_binary(logit, label), torch.sigmoid(logit)[:, None].detach())


def aggregate(
    probability: Tensor,  # (T,) of right, of steps in the order they stand
    owner: Tensor,  # (T,) int64, which completion a step belongs to
    count: int,
    how: Literal["product", "min", "mean", "last"],
) -> Tensor:
    """Scores of `count` completions (N,) from their steps: product, min, mean or last. NaN for one without steps.

    A product favours short solutions. Lightman et al. 2023 (arXiv:2305.20050) multiply, Wang et al. 2023
    (arXiv:2312.08935) take the minimum.
    """
    (p,) = full_precision(probability)
    steps = torch.bincount(owner, minlength=count)
    zeros = p.new_zeros(count)
    places = torch.arange(len(p), device=p.device)
    if how == "product":
        scores = zeros.index_add(0, owner, p.log()).exp()
    elif how == "mean":
        scores = zeros.index_add(0, owner, p) / steps
    elif how == "min":
        scores = zeros.scatter_reduce(0, owner, p, "amin", include_self=False)
    else:
        ends = torch.zeros_like(steps).scatter_reduce(0, owner, places, "amax")[owner] == places  # (T,)
        scores = zeros.index_copy(0, owner[ends], p[ends])
    return torch.where(steps > 0, scores, torch.nan)
