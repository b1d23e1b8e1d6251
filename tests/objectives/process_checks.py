"""Process and outcome reward models. T places, N completions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.objectives import process
from tests.objectives.preference_support import LOG2, holds, sigma, softplus
from tests.objectives.support import INF, NAN, Check, checks_of, close, differentiates, doubles, gradients, leaf

BINARY: dict[str, Any] = {"classes": "binary", "neutral": "right", "aggregation": "product"}
THREE: dict[str, Any] = BINARY | {"classes": "three"}
TOKENS: dict[str, Any] = {"good": "+", "bad": "-", "aggregation": "min"}
LABELS = doubles(1, -1, 0)


# --- classes of steps ----------------------------------------------------------------------------------


def check_step_labels_by_hand(m: Any) -> None:
    # Logits of wrong and right 0 and 2, three times: log(1 + e^-2) = 0.1269280 for right, 2.1269280 for wrong.
    z = leaf(doubles(0, 2).repeat(3, 1))
    judged = m.step_labels(z, LABELS, **BINARY)
    close(judged.loss, [0.1269280, 2.1269280, 0.1269280], 1e-7)
    close(judged.rewards, [[sigma(2)]] * 3)
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0
    p = sigma(2)
    close(gradients(judged.loss, z)[0], [[1 - p, p - 1], [-p, p], [1 - p, p - 1]])  # p - [the label]
    wrong = m.step_labels(z, LABELS, **(BINARY | {"neutral": "wrong"}))
    close(wrong.loss, [0.1269280, 2.1269280, 2.1269280], 1e-7)
    for neutral in ("right", "wrong", "ignored"):
        settings = BINARY | {"neutral": neutral}
        assert differentiates(
            lambda x, s=settings: m.step_labels(x, LABELS, **s).loss,
            torch.stack([doubles(0, 2, 1), doubles(1, 1, -1)]).mT,
        )


def check_step_labels_ignored(m: Any) -> None:
    ignored = BINARY | {"neutral": "ignored"}
    for junk in (2.0, NAN, INF):
        z = leaf(torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, junk]], dtype=torch.float64))
        judged = m.step_labels(z, LABELS, **ignored)
        close(judged.loss, [softplus(-2), softplus(2), 0.0])
        assert gradients(judged.loss, z)[0][2].tolist() == [0.0, 0.0]
    assert m.counted(LABELS, classes="binary", neutral="ignored").tolist() == [True, True, False]
    for classes, neutral in (("binary", "right"), ("binary", "wrong"), ("three", "ignored"), ("three", "right")):
        assert m.counted(LABELS, classes=classes, neutral=neutral).tolist() == [True] * 3
    assert m.counted(LABELS, classes="binary", neutral="right").dtype == torch.bool


def check_step_labels_three_classes(m: Any) -> None:
    # Logits of wrong, neutral and right log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    assert m.CLASSES["three"] == ("wrong", "neutral", "right")
    assert m.CLASSES["binary"] == ("wrong", "right")
    z = leaf(torch.log(doubles(1, 2, 5)).repeat(3, 1))
    judged = m.step_labels(z, LABELS, **THREE)
    close(judged.loss, [math.log(8 / 5), math.log(8), math.log(4)])
    close(judged.rewards, [[7 / 8]] * 3)  # neutral counts as right in a score
    p = torch.softmax(z.detach(), 1)
    one_hot = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    close(gradients(judged.loss, z)[0], p - one_hot)
    close(m.step_labels(z, LABELS, **(THREE | {"neutral": "wrong"})).rewards, [[5 / 8]] * 3)
    ignored = m.step_labels(z, LABELS, **(THREE | {"neutral": "ignored"}))
    close(ignored.rewards, [[5 / 6]] * 3)
    close(ignored.loss, judged.loss)
    for classes, width in (("three", 2), ("binary", 3)):
        try:
            m.step_labels(torch.zeros(3, width), LABELS, **(BINARY | {"classes": classes}))
        except AssertionError:
            continue
        raise AssertionError("the logits of other classes are taken")


def check_right(m: Any) -> None:
    z = torch.log(torch.stack([doubles(1, 2, 5), doubles(4, 4, 2)]))
    close(m.right(z, neutral="right"), [7 / 8, 0.6])
    close(m.right(z, neutral="wrong"), [5 / 8, 0.2])
    close(m.right(z, neutral="ignored"), [5 / 6, 1 / 3])
    for neutral in ("right", "wrong", "ignored"):
        close(m.right(z[:, :2], neutral=neutral), [2 / 3, 0.5])
        far = m.right(torch.tensor([[-1e4, 1e4], [1e4, -1e4]]), neutral=neutral)
        close(far, [1.0, 0.0])


def check_step_labels_limits(m: Any) -> None:
    close(m.step_labels(torch.ones(3, 2), LABELS, **BINARY).loss, [LOG2] * 3)
    close(m.step_labels(torch.ones(3, 3), LABELS, **THREE).loss, [math.log(3)] * 3)
    for settings, width in ((BINARY, 2), (THREE, 3)):
        empty = leaf(torch.zeros(0, width))
        nothing = m.step_labels(empty, torch.zeros(0), **settings)
        assert nothing.loss.shape == (0,)
        assert float(nothing.loss.sum()) == 0.0
        z = leaf(torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, -1e4], [0.0, -1e4, 0.0]])[:, :width])
        assert holds(m.step_labels(z, LABELS, **settings), [z])
    far = leaf(torch.tensor([[17.0, 0.0]]))
    (g,) = gradients(m.step_labels(far, doubles(-1), **BINARY).loss, far)
    close(g[0, 1] * 1e8, 4.1399376, 1e-2)


# --- two tokens ----------------------------------------------------------------------------------------


def check_two_token_by_hand(m: Any) -> None:
    # z good - z bad = 2: log(1 + e^-2) = 0.1269280 for right, 2.1269280 for wrong, in between for a share of 0.75.
    z = leaf(doubles(3, 1).repeat(4, 1))
    labels = doubles(1, -1, 0, 0.75)
    judged = m.two_token(z, labels, **TOKENS)
    close(judged.loss, [0.1269280, 2.1269280, 2.1269280, 0.6269280], 1e-7)
    close(judged.rewards, [[sigma(2)]] * 4)
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0
    slope = [sigma(2) - y for y in (1, 0, 0, 0.75)]
    close(gradients(judged.loss, z)[0], [[s, -s] for s in slope])
    assert differentiates(
        lambda x: m.two_token(x, labels, **TOKENS).loss, torch.stack([doubles(0, 2, 1, 3), doubles(1, 1, -1, 0)]).mT
    )


def check_two_token_limits(m: Any) -> None:
    close(m.two_token(torch.full((2, 2), -7.0), torch.tensor([1.0, -1.0]), **TOKENS).loss, [LOG2, LOG2])
    z = leaf(torch.tensor([[1e4, -1e4], [1e4, -1e4], [17.0, 0.0], [0.0, 89.0]]))
    judged = m.two_token(z, torch.tensor([1.0, -1.0, -1.0, 0.5]), **TOKENS)
    assert holds(judged, [z])
    close(judged.loss, [0.0, 2e4, 17.0, 44.5], 1e-6)
    (g,) = gradients(m.two_token(z[2:3], torch.ones(1), **TOKENS).loss, z)
    close(g[2] * 1e8, [-4.1399376, 4.1399376], 1e-4)


# --- outcomes ------------------------------------------------------------------------------------------


def check_outcome_by_hand(m: Any) -> None:
    z, labels = leaf(doubles(2, 2, -1)), doubles(1, 0, 0.5)
    judged = m.outcome(z, labels)
    close(judged.loss, [0.1269280, 2.1269280, (softplus(1) + softplus(-1)) / 2], 1e-7)
    close(judged.rewards, [[sigma(2)], [sigma(2)], [sigma(-1)]])
    assert not judged.rewards.requires_grad
    assert judged.likelihood == 0
    close(gradients(judged.loss, z)[0], [sigma(2) - 1, sigma(2), sigma(-1) - 0.5])
    assert differentiates(lambda x: m.outcome(x, labels).loss, doubles(0.5, -1, 3))


def check_outcome_limits(m: Any) -> None:
    close(m.outcome(torch.zeros(2), torch.tensor([1.0, 0.0])).loss, [LOG2, LOG2])
    z = leaf(torch.tensor([1e4, 1e4, -1e4, -89.0]))
    judged = m.outcome(z, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert holds(judged, [z])
    close(judged.loss, [0.0, 1e4, 0.0, 89.0])


def check_process_half_precision(m: Any) -> None:
    logits, labels = torch.tensor([[0.71875, -2.5, 3.0], [0.2109375, 5.0, -1.0]]), torch.tensor([1.0, -1.0])

    def everything(z: Tensor, y: Tensor) -> list[Any]:
        return [
            m.step_labels(z[:, :2], y, **BINARY),
            m.step_labels(z, y, **THREE),
            m.two_token(z[:, :2], y / 2, **TOKENS),
            m.outcome(z[:, 0], y.clamp(min=0.25)),
        ]

    for half in (torch.bfloat16, torch.float16):
        both = everything(logits.to(half), labels.to(half)), everything(logits.double(), labels.double())
        for low, exact in zip(*both, strict=True):
            assert low.loss.dtype == low.rewards.dtype == torch.float32
            close(low.loss, exact.loss.float(), 1e-6)
            close(low.rewards, exact.rewards.float(), 1e-6)
        p = torch.tensor([0.71875, 0.2109375], dtype=half)
        for how in ("product", "min", "mean", "last"):
            low, exact = (m.aggregate(x, torch.tensor([0, 0]), 1, how) for x in (p, p.double()))
            assert low.dtype == torch.float32
            close(low, exact.float(), 1e-6)


# --- scores of solutions -------------------------------------------------------------------------------


def check_aggregate_by_hand(m: Any) -> None:
    # Completion 0 has 0.5, 0.8, 0.6 in that order, 1 has none, 2 has 0.9, 3 has 0 and 1; steps stand interleaved.
    p, owner = doubles(0.5, 0.9, 0.8, 0.0, 0.6, 1.0), torch.tensor([0, 2, 0, 3, 0, 3])
    wanted = {
        "product": [0.24, NAN, 0.9, 0.0],
        "min": [0.5, NAN, 0.9, 0.0],
        "mean": [1.9 / 3, NAN, 0.9, 0.5],
        "last": [0.6, NAN, 0.9, 1.0],
    }
    for how, scores in wanted.items():
        out = m.aggregate(p, owner, 4, how)
        torch.testing.assert_close(out, doubles(*scores), equal_nan=True)
        # One that nobody owns at the end, and nothing at all.
        torch.testing.assert_close(m.aggregate(p, owner, 5, how), doubles(*scores, NAN), equal_nan=True)
        nothing = m.aggregate(doubles(), torch.zeros(0, dtype=torch.int64), 2, how)
        torch.testing.assert_close(nothing, doubles(NAN, NAN), equal_nan=True)
    # The minimum of steps that are all sure is 1, and order counts for `last` only.
    close(m.aggregate(doubles(1, 1), torch.tensor([0, 0]), 1, "min"), [1.0])
    close(m.aggregate(doubles(0.5, 0.9), torch.tensor([0, 1]), 2, "last"), [0.5, 0.9])
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    torch.testing.assert_close(
        m.aggregate(p[order], owner[order], 4, "last"), doubles(0.5, NAN, 0.9, 0), equal_nan=True
    )


def check_aggregate_long_solutions(m: Any) -> None:
    # 0.5^100 = 7.9e-31 is still a number of float32.
    p = torch.full((100,), 0.5)
    out = m.aggregate(p, torch.zeros(100, dtype=torch.int64), 1, "product")
    close(out * 2.0**100, [1.0], 1e-4)


MODULE = process
CHECKS = checks_of(globals())
CLASSICAL: list[tuple[str, Check, str, str]] = [
    ("steps: classes turned", check_step_labels_by_hand, "torch.where(labels > 0, logits.shape[1] - 1, 0)",
     "torch.where(labels > 0, 0, logits.shape[1] - 1)"),
    ("steps: neutral always right", check_step_labels_by_hand, 'if classes == "three" or neutral == "right" else 0',
     'if classes == "three" or neutral == "right" else 1'),
    ("steps: mean over the steps", check_step_labels_by_hand, 'reduction="none"', 'reduction="mean"'),
    ("steps: ignored only afterwards", check_step_labels_ignored, "F.cross_entropy(safe,", "F.cross_entropy(logits,"),
    ("steps: ignored steps as wrong", check_step_labels_ignored,
     "torch.where(keep, loss, torch.zeros_like(loss))", "loss"),
    ("steps: ignored steps counted", check_step_labels_ignored, "return labels != 0",
     "return torch.ones_like(labels, dtype=torch.bool)"),
    ("steps: neutral left out of the score", check_step_labels_three_classes,
     'logits[:, 1:] if neutral == "right" else logits[:, -1:]', "logits[:, -1:]"),
    ("two tokens: turned", check_two_token_by_hand, "logits[:, 0] - logits[:, 1]", "logits[:, 1] - logits[:, 0]"),
    ("two tokens: -1 as a probability", check_two_token_by_hand, "labels.clamp(min=0)", "labels"),
    ("two tokens: 1 - sigmoid", check_two_token_limits, "(1 - target) * F.logsigmoid(-logit)",
     "(1 - target) * torch.log(1 - torch.sigmoid(logit))"),
    ("two tokens: soft labels cut", check_two_token_by_hand, "_binary(d, labels.clamp(min=0))",
     "_binary(d, (labels > 0.5).double())"),
    ("outcome: labels turned", check_outcome_by_hand, "_binary(logit, label)", "_binary(logit, 1 - label)"),
    ("outcome: mean over the tokens", check_outcome_by_hand, "Judged(_binary(logit, label),",
     "Judged(_binary(logit, label).mean(),"),
    ("aggregate: product by exp of a mean", check_aggregate_by_hand, "zeros.index_add(0, owner, p.log()).exp()",
     "(zeros.index_add(0, owner, p.log()) / steps).exp()"),
    ("aggregate: minimum with a zero to start from", check_aggregate_by_hand, 'p, "amin", include_self=False',
     'p, "amin"'),
    ("aggregate: first for last", check_aggregate_by_hand, 'places, "amax"', 'places, "amin"'),
    ("aggregate: a score for no steps", check_aggregate_by_hand, "torch.where(steps > 0, scores, torch.nan)",
     "scores"),
]  # fmt: skip
SURVIVORS: dict[str, str] = {
    "step_labels: name: torch.zeros_like(logits) -> torch.ones_like(logits)": "what stands in for an ignored step",
    "step_labels: boundary: labels > 0 -> labels >= 0": "a neutral label is taken out before",
}
