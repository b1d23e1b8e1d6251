"""What the checks of preference objectives share. B examples, u = policy - reference, D = u chosen - u rejected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.catalog import OBJECTIVES, Objective
from rlhf_cli.objectives.judged import Pair
from tests.objectives.support import close, differentiates, finite, gradients, leaf, untouched

LOG2 = math.log(2)
PREFERENCE = [
    entry
    for entry in OBJECTIVES.values()
    if entry.stage in ("dpo", "orpo", "simpo") and entry.data in ("comparison", "verdict")
]
_SHIFTS: list[dict[str, Any]] = [{"shift": s} for s in ("none", "mean", "midpoint")]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dpo": [{}, {"label_smoothing": 0.2}],
    "ipo": [{"average": True}, {"average": False}],
    "odpo": [{"offset": o} for o in ("log", "identity", "log1p", "ratio")],
    "spin": [{"shape": s} for s in ("logistic", "hinge")],
    "ld_dpo": [{"alpha": a, "on_reference": r} for a in (0.0, 0.3, 1.0) for r in (True, False)],
    "wpo": [{"clamp": True}, {"clamp": False, "label_smoothing": 0.2}],
    "f_dpo": [{"divergence": d} for d in ("reverse_kl", "forward_kl", "js", "alpha")],
    "bco_pair": _SHIFTS,
    "bco": _SHIFTS,
    "discopop": [{"temperature": t} for t in (0.05, 1.0, 5.0)],
    "simpo": [{}, {"label_smoothing": 0.2}, {"gamma": 0.0}],
    "alphapo": [{"alpha": a} for a in (-0.5, 0.0, 0.25)],
}
"""Settings, besides the defaults, under which an objective is another function."""


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    """log(1 + e^x) = -log sigma(-x)."""
    return math.log1p(math.exp(x))


def pair(chosen: Tensor, rejected: Tensor, lengths: tuple[list[int], list[int]] | None = None) -> Pair:
    """Sums (B,) with lengths 1 unless given."""
    first, second = lengths or ([1] * len(chosen), [1] * len(chosen))
    return Pair(chosen, rejected, torch.tensor(first), torch.tensor(second))


def two(dtype: torch.dtype = torch.float64) -> tuple[Pair, Pair, list[Tensor]]:
    """policy, reference with u = (1, -1) and (0, 2), so D = 2 and -2; and the four tensors, all taking gradients."""
    numbers = ([-10.0, -20.0], [-14.0, -17.0], [-11.0, -20.0], [-13.0, -19.0])
    leaves = [leaf(torch.tensor(n, dtype=dtype)) for n in numbers]
    lengths = [3, 2], [2, 5]
    return pair(*leaves[:2], lengths), pair(*leaves[2:], lengths), leaves


def at(chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)) -> tuple[Pair, Pair, list[Tensor]]:
    """policy, reference of one pair with these log-ratios u, and the policy's two tensors, taking gradients."""
    leaves = [leaf(torch.tensor([u], dtype=torch.float64)) for u in (chosen, rejected)]
    zero = torch.zeros(1, dtype=torch.float64)
    own = ([lengths[0]], [lengths[1]])
    return pair(*leaves, own), pair(zero, zero, own), leaves


def equal(size: int = 3) -> tuple[Pair, Pair]:
    """A policy that is its reference."""
    chosen, rejected = torch.linspace(-9, -3, size), torch.linspace(-1, -30, size)
    lengths = (list(range(1, size + 1)), list(range(size + 1, 1, -1)))
    return pair(leaf(chosen), leaf(rejected), lengths), pair(chosen, rejected, lengths)


def extreme() -> tuple[Pair, Pair, list[Tensor]]:
    """float32: +-1e4 nats apart, equal, and empty completions."""
    chosen = leaf(torch.tensor([-1e4, 0.0, -1e4, -3.0, 0.0]))
    rejected = leaf(torch.tensor([0.0, -1e4, -1e4, -3.0, 0.0]))
    lengths = ([1, 7, 10, 2, 0], [5, 1, 10, 2, 0])
    zero = torch.zeros(5)
    return pair(chosen, rejected, lengths), pair(zero, zero, lengths), [chosen, rejected]


def holds(judged: Any, inputs: list[Tensor]) -> bool:
    """Loss, rewards and gradients are finite."""
    return finite(judged.loss, judged.rewards, *gradients(judged.loss, *inputs))


@dataclass(frozen=True)
class Case:
    """Everything that some preference objective reads of a step, B rows."""

    policy: Pair  # common and certainty set; a verdict objective sees the chosen completions alone
    reference: Pair
    scores: Tensor  # (B, 2)
    desirable: Tensor  # (B,) bool
    running: Tensor  # (4,)
    kl_point: Tensor  # ()

    def rows(self, order: Tensor) -> Case:
        """Some rows, in that order."""

        def picked(of: Pair) -> Pair:
            return Pair(*(None if x is None else x[order] for x in of))  # type: ignore[arg-type]

        return replace(
            self, policy=picked(self.policy), reference=picked(self.reference), scores=self.scores[order],
            desirable=self.desirable[order],
        )  # fmt: skip

    def half(self, dtype: torch.dtype) -> Case:
        """The same numbers in another precision; lengths stay."""

        def cast(of: Pair) -> Pair:
            return Pair(
                of.chosen.to(dtype), of.rejected.to(dtype), of.chosen_length, of.rejected_length,
                None if of.common is None else of.common.to(dtype),
                None if of.certainty is None else of.certainty.to(dtype),
            )  # fmt: skip

        return Case(
            cast(self.policy), cast(self.reference), self.scores.to(dtype), self.desirable, self.running.to(dtype),
            self.kl_point.to(dtype),
        )  # fmt: skip


def case(
    numbers: tuple[Tensor, Tensor, Tensor, Tensor], lengths: tuple[list[int], list[int]], gap: Tensor | None = None
) -> Case:
    """A step from sums (B,) of policy chosen, rejected, reference chosen, rejected; half of each sum is common."""
    pc, pr, rc, rr = numbers
    size, dtype = len(pc), pc.dtype
    certainty = torch.tensor([-0.25, -0.5], dtype=dtype).repeat(size, 1)
    policy = pair(pc, pr, lengths)._replace(common=0.5 * torch.stack([pc, pr], dim=1), certainty=certainty)
    reference = pair(rc, rr, lengths)._replace(common=0.5 * torch.stack([rc, rr], dim=1))
    one = torch.ones(size, dtype=dtype)
    return Case(
        policy, reference, torch.stack([one + (2 * one if gap is None else gap), one], dim=1),
        torch.arange(size) % 2 == 0, torch.tensor([0.5, -0.25, 3.0, 1.0], dtype=dtype), torch.tensor(0.5, dtype=dtype),
    )  # fmt: skip


def judge(m: Any, entry: Objective, data: Case, **changed: Any) -> Any:
    """What an objective of a module says of a step, with its default settings but for those given."""
    single = entry.data == "verdict"
    arguments: list[Any] = [data.policy.chosen if single else data.policy]
    if "reference" in entry.needs:
        arguments.append(data.reference.chosen if single else data.reference)
    arguments += [data.desirable] if single else []
    arguments += [data.scores] if "scores" in entry.needs else []
    arguments += [data.kl_point] if "kl_point" in entry.needs else []
    arguments += [data.running] if "running" in entry.needs else []
    return getattr(m, entry.path.split(":")[1])(*arguments, **{**entry.settings().model_dump(), **changed})


def of_module(m: Any) -> Iterator[tuple[Objective, dict[str, Any]]]:
    """(entry, settings) of the objectives that live in a module, or in a copy of it."""
    for entry in PREFERENCE:
        if m.__name__.endswith(entry.path.split(":")[0]):
            yield from ((entry, settings) for settings in VARIANTS.get(entry.name, [{}]))


def upcasts(m: Any) -> None:
    """In half precision every objective of the module says what it says in float64, in float32."""
    numbers = ([-1040.0, -5.0], [-1064.0, -7.0], [-1000.0, -4.0], [-996.0, -2.0])  # exact in bfloat16
    tensors = tuple(torch.tensor(n, dtype=torch.float64) for n in numbers)
    whole = case(tensors, ([3, 7], [11, 3]))  # type: ignore[arg-type]
    whole = replace(whole, scores=torch.tensor([[0.71875, 0.2109375], [3.0, 0.6640625]], dtype=torch.float64))
    for entry, settings in of_module(m):
        exact = judge(m, entry, whole, **settings)
        for half in (torch.bfloat16, torch.float16):
            low = judge(m, entry, whole.half(half), **settings)
            assert low.loss.dtype == low.rewards.dtype == torch.float32
            close(low.loss, exact.loss.float(), 2e-5)
            close(low.rewards, exact.rewards.float(), 2e-5)


def moves_only_the_policy(m: Any) -> None:
    """Gradients agree with finite differences, none reaches anything but the policy, rewards carry none."""
    points = [torch.tensor(v, dtype=torch.float64) for v in ([-1.0, -7.0], [-2.25, -3.5], [-1.5, -6.5], [-2.75, -3.0])]
    for entry, settings in of_module(m):

        def loss(*tensors: Tensor, entry: Objective = entry, settings: dict[str, Any] = settings) -> Tensor:
            return judge(m, entry, case(tensors, ([2, 5], [3, 1])), **settings).loss  # type: ignore[arg-type]

        leaves = [leaf(p) for p in points]
        data = case(tuple(leaves), ([2, 5], [3, 1]))  # type: ignore[arg-type]
        frozen = [leaf(x) for x in (data.scores, data.running, data.kl_point, data.policy.certainty)]
        data = replace(data, scores=frozen[0], running=frozen[1], kl_point=frozen[2])
        data = replace(data, policy=data.policy._replace(certainty=frozen[3]))
        judged = judge(m, entry, data, **settings)
        assert untouched(judged.loss, *leaves[2:], *frozen[1:])
        assert not judged.rewards.requires_grad
        if judged.loss.requires_grad:
            assert differentiates(lambda c, r, f=loss: f(c, r, *points[2:]), *points[:2])


def survives(m: Any) -> None:
    """float32 extremes: loss, rewards and gradients of every objective of the module are finite."""
    values = [-1e4, 0.0, -1e4, -3.0, 0.0], [0.0, -1e4, -1e4, -3.0, 0.0]
    lengths = ([1, 7, 10, 2, 0], [5, 1, 10, 2, 0])
    for entry, settings in of_module(m):
        for reference in (torch.zeros(5), torch.full((5,), -1e4)):
            leaves = [leaf(torch.tensor(v)) for v in values]
            data = case((*leaves, reference, reference), lengths)  # type: ignore[arg-type]
            judged = judge(m, entry, data, **settings)
            assert finite(judged.loss, judged.rewards), entry.name
            if judged.loss.requires_grad:
                assert finite(*gradients(judged.loss, *leaves)), entry.name
