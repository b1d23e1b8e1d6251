"""The training atom: neither the micro-batch nor the layout changes a step; what is not finite is never applied."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.data.batch import Batch, collate
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DivergedError, ModelError
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.likelihood import cross_entropy
from rlhf_cli.recipe.schema import SFTRecipe
from rlhf_cli.recipe.settings.training import TrainingSettings
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Plain
from rlhf_cli.train.engine import Engine, Losses
from rlhf_cli.train.optim import make_optimizer, make_scheduler
from tests.models.worlds import full_role, kinds, lora_role, make_base, make_sample
from tests.runs.helpers import make_recipe

Make = Callable[..., Engine]


@pytest.fixture
def engine(tmp_path: Path) -> Make:
    """An engine on a run directory of its own."""

    def make(role: Role, *, packed: bool | None = None, steps: int = 10, rate: float = 1e-2, **training: Any) -> Engine:
        root = tmp_path / f"root-{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        recipe = make_recipe(root, **training)
        run = Run.open(recipe, "rlhf sft", "auto")
        run.begin({})
        made = Engine(recipe, run, Plain(quiet=True), steps, role.base.packed if packed is None else packed)
        made.add(role, rate)
        return made

    return make


def likelihood(role: Role) -> Callable[[Batch, list[int]], Losses]:
    """The loss of supervised fine-tuning."""

    def loss(batch: Batch, group: list[int]) -> Losses:
        of = role.logp(batch)
        total = cross_entropy(of.logp, of.mean, label_smoothing=0.1).sum()
        return Losses({"token": total}, {"entropy": (of.entropy.detach().sum(), float(len(of.logp)))})

    return loss


def preference(role: Role) -> Callable[[Batch, list[int]], Losses]:
    """A pair loss per example and the likelihood of the chosen per token: two units at once."""

    def loss(batch: Batch, group: list[int]) -> Losses:
        logp = role.logp(batch).logp
        sums = torch.zeros(batch.sequences).index_add(0, batch.owners, logp)
        chosen, rejected = sums.view(-1, 2).unbind(1)
        pair = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected) - batch.numbers["margin"].float())
        return Losses({"example": pair.sum(), "token": -logp[batch.owners % 2 == 0].sum()},
                      {"margin": ((chosen - rejected).detach().sum(), float(len(chosen)))})  # fmt: skip

    return loss


def steps_of(engine: Engine, role: Role, batches: list[list[Sample]], loss: Any, counts: Any) -> list[dict[str, float]]:
    """Several updates."""
    out = []
    for samples in batches:
        out.append(engine.update(role, samples, loss, counts(samples)))
        engine.learners[role.name].scheduler.step()
    return out


def scored(samples: list[Sample]) -> dict[str, float]:
    return {"token": float(sum(c.scored.sum() for s in samples for c in s.completions))}


def pair_counts(samples: list[Sample]) -> dict[str, float]:
    return {"example": float(len(samples)), "token": float(sum(s.completions[0].scored.sum() for s in samples))}


def pairs(seed: int, n: int = 6) -> list[Sample]:
    random = np.random.default_rng(seed)
    shapes = random.integers(1, 14, (n, 3))
    return [make_sample(random, int(p), int(a), int(b), margin=float(i) / 3) for i, (p, a, b) in enumerate(shapes)]


@pytest.mark.parametrize("work", ["sft", "pairs"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_budget_and_layout_do_not_change_a_step(engine: Make, work: str, kind: str) -> None:
    results = []
    for budget in (16, 64, 10**6):
        for packed in (True, False):
            base = make_base("llama")
            role = full_role(base) if kind == "full" else lora_role(base, "policy")
            own = engine(role, packed=packed, micro_batch_tokens=budget, optimizer="sgd", max_grad_norm=0.5)
            loss, counts = (likelihood, scored) if work == "sft" else (preference, pair_counts)
            samples = kinds(7)["demonstrations"] + kinds(8)["demonstrations"] if work == "sft" else pairs(3)
            metrics = steps_of(own, role, [samples, samples[::-1]], loss(role), counts)
            results.append((metrics, role.tensors()))
    first_metrics, first_tensors = results[0]
    for metrics, tensors in results[1:]:
        for a, b in zip(first_metrics, metrics, strict=True):
            assert set(a) == set(b)
            for key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-5, abs=1e-5), key
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, first_tensors[name], rtol=0, atol=1e-6, msg=name)
    before = (full_role(make_base("llama")) if kind == "full" else lora_role(make_base("llama"), "policy")).tensors()
    assert max(float((before[k] - first_tensors[k]).abs().max()) for k in before) > 1e-4


def test_two_units_are_divided_separately(engine: Make) -> None:
    """Against one forward of everything: sum / examples + sum / tokens."""
    role = full_role(make_base("llama"))
    samples = pairs(5)
    counts = pair_counts(samples)
    with role.active(train=True):
        losses = preference(role)(collate(samples, packed=True), list(range(len(samples))))
        whole = losses.sums["example"] / len(samples) + losses.sums["token"] / counts["token"]
        role.backward(whole)
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in role.parameters}
    for _, p in role.parameters:
        p.grad = None
    own = engine(role, micro_batch_tokens=20, optimizer="sgd", max_grad_norm=None, rate=1.0)
    before = {k: v.clone() for k, v in role.tensors().items()}
    metrics = own.update(role, samples, preference(role), counts)
    assert metrics["loss"] == pytest.approx(float(whole.detach()), rel=1e-5)
    for name, tensor in role.tensors().items():
        torch.testing.assert_close(before[name] - tensor, wanted[name], rtol=1e-4, atol=2e-6, msg=name)
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_measure_is_update_without_a_step(engine: Make) -> None:
    role = full_role(make_base("llama"))
    own = engine(role, micro_batch_tokens=30)
    samples = pairs(1)
    before = {k: v.clone() for k, v in role.tensors().items()}
    measured = own.measure(role, samples, preference(role), pair_counts(samples))
    assert all(torch.equal(v, before[k]) for k, v in role.tensors().items())
    assert own.tokens == 0
    updated = own.update(role, samples, preference(role), pair_counts(samples))
    norm = updated.pop("grad_norm")
    assert measured == pytest.approx(updated, rel=1e-6)
    assert norm > 0


def test_infer_gives_back_sample_by_sample(engine: Make) -> None:
    role = full_role(make_base("llama"), head=True)
    samples = kinds(2)["rankings"] + kinds(2)["demonstrations"] + kinds(2)["pairs"]
    results = []
    for budget, packed in ((16, True), (16, False), (10**6, True)):
        own = engine(role, packed=packed, micro_batch_tokens=budget)
        token = own.infer(role, samples, lambda b: role.logp(b).logp)
        sequence = own.infer(role, samples, role.score, "sequence")
        assert [len(t) for t in token] == [sum(int(c.scored.sum()) for c in s.completions) for s in samples]
        assert [len(s) for s in sequence] == [len(s.completions) for s in samples]
        results.append(torch.cat(token + sequence))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


# --- numbers that are not finite ---------------------------------------------------------------------------


def poisoned(role: Role, where: str, value: float, how: str) -> Callable[[Batch, list[int]], Losses]:
    """The likelihood, spoilt in the micro-batch that holds one row: the loss itself, or only its gradient."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * value

    def loss(batch: Batch, group: list[int]) -> Losses:
        total = -role.logp(batch).logp.sum()
        if where in batch.where:
            total = total * value if how == "loss" else Spoil.apply(total)
        return Losses({"token": total}, {})

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_number_that_is_not_finite_is_not_applied(engine: Make, value: float, how: str) -> None:
    role = lora_role(make_base("llama"), "policy")
    own = engine(role, micro_batch_tokens=16)
    samples = [dataclasses.replace(s, where=f"data.jsonl:{i + 1}") for i, s in enumerate(pairs(2))]
    own.update(role, samples, likelihood(role), scored(samples))
    before = {k: v.clone() for k, v in role.tensors().items()}
    moments = {k: {n: t.clone() for n, t in v.items()} for k, v in own.learners["policy"].optimizer.state.items()}
    with pytest.raises(DivergedError) as caught:
        own.update(role, samples, poisoned(role, "data.jsonl:4", value, how), scored(samples))
    assert caught.value.exit_code == 5
    text = str(caught.value)
    assert "data.jsonl:4" in text
    assert "step 1" in text
    assert "\n" not in text
    assert all(torch.equal(v, before[k]) for k, v in role.tensors().items()), "the weights moved"
    for k, state in own.learners["policy"].optimizer.state.items():
        assert all(torch.equal(t, moments[k][n]) for n, t in state.items()), "the moments moved"
    (line,) = [json.loads(t) for t in (own.run.path / "metrics.jsonl").read_text().splitlines()]
    key = "loss" if how == "loss" else "grad_norm"
    assert line["step"] == 1
    assert not math.isfinite(float(line[key]))
    own.update(role, samples, likelihood(role), scored(samples))  # the role is not left with an open graph


# --- out of memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 45])
@pytest.mark.parametrize("place", ["forward", "after"])
def test_out_of_memory_gives_the_same_result(engine: Make, limit: int, place: str) -> None:
    """Micro-batches above `limit` tokens run out of memory, in the forward or when some gradient is already there."""
    results = []
    for simulated in (False, True):
        role = lora_role(make_base("llama"), "policy", head=True)
        own = engine(role, micro_batch_tokens=240, optimizer="adamw")
        plain = preference(role)

        def loss(batch: Batch, group: list[int], plain: Any = plain, simulated: bool = simulated) -> Losses:
            if place == "after":
                out = plain(batch, group)
            if simulated and batch.ids.numel() > limit:
                raise torch.OutOfMemoryError("simulated")
            return plain(batch, group) if place == "forward" else out

        samples = pairs(4, 12)
        metrics = own.update(role, samples, loss, pair_counts(samples))
        inferred = own.infer(role, samples, lambda b, role=role: role.logp(b).logp)
        results.append((metrics, role.tensors(), torch.cat(inferred), own.budget, own.tokens))
    (plain_metrics, plain_tensors, plain_logp, budget, used), (metrics, tensors, logp, smaller, tokens) = results
    assert budget == 240
    assert smaller <= limit
    assert tokens == used, "a repeated step counts once"
    assert metrics == pytest.approx(plain_metrics, rel=1e-5, abs=1e-6)
    for name in tensors:
        torch.testing.assert_close(tensors[name], plain_tensors[name], rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(logp, plain_logp, rtol=1e-5, atol=1e-5)


def test_out_of_memory_with_one_example(engine: Make) -> None:
    role = lora_role(make_base("llama"), "policy")
    own = engine(role, micro_batch_tokens=240)

    def loss(batch: Batch, group: list[int]) -> Losses:
        raise torch.OutOfMemoryError("simulated")

    before = {k: v.clone() for k, v in role.tensors().items()}
    with pytest.raises(ModelError, match="out of memory with a single example of") as caught:
        own.update(role, pairs(4), loss, {"token": 1.0})
    assert caught.value.problems[0].where == "data.max_length"
    assert all(torch.equal(v, before[k]) for k, v in role.tensors().items())


# --- dtypes and optimisers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_half_precision_learns(engine: Make, dtype: torch.dtype, kind: str) -> None:
    base = make_base("llama", dtype=dtype)
    if kind == "full":
        base.model.float()  # trained weights are float32, the computation is not
    role = full_role(base) if kind == "full" else lora_role(base, "policy")
    assert {p.dtype for _, p in role.parameters} == {torch.float32}
    own = engine(role, packed=True, rate=1e-2, lr_scheduler="constant")
    samples = kinds(1)["demonstrations"]
    losses = [m["loss"] for m in steps_of(own, role, [samples] * 8, likelihood(role), scored)]
    assert all(math.isfinite(x) for x in losses)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd"])
def test_every_optimizer_learns(engine: Make, optimizer: str) -> None:
    if optimizer.startswith("paged") and not torch.cuda.is_available():
        pytest.skip("paged memory needs CUDA")
    role = lora_role(make_base("llama"), "policy")
    own = engine(role, rate=0.2 if optimizer == "sgd" else 2e-2, optimizer=optimizer, lr_scheduler="constant",
                 **({"adam_epsilon": 1e-6} if "adam" in optimizer else {}))  # fmt: skip
    samples = kinds(1)["demonstrations"]
    losses = [m["loss"] for m in steps_of(own, role, [samples] * 10, likelihood(role), scored)]
    assert losses[-1] < losses[0] - 0.2


def test_weight_decay_only_on_matrices() -> None:
    parameters = [("w", torch.nn.Parameter(torch.ones(2, 2))), ("b", torch.nn.Parameter(torch.ones(2)))]
    settings = TrainingSettings(learning_rate=0.1, weight_decay=0.5, optimizer="sgd")
    settings = settings.model_copy(update={"optimizer": "adamw"})
    optimizer = make_optimizer(parameters, settings, 0.1)
    for _, p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert parameters[0][1].tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert parameters[1][1].tolist() == [1.0, 1.0]


def rates(name: str, steps: int = 10, **settings: Any) -> list[float]:
    """The learning rate of each step."""
    parameter = torch.nn.Parameter(torch.ones(1))
    made = TrainingSettings(learning_rate=1.0, lr_scheduler=name, optimizer="sgd", **settings)
    optimizer = make_optimizer([("p", parameter)], made, 1.0)
    scheduler = make_scheduler(optimizer, made, steps)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_schedules() -> None:
    assert rates("constant", 4) == [1.0] * 4
    assert rates("constant_with_warmup", 6, warmup_steps=2) == pytest.approx([0, 0.5, 1, 1, 1, 1])
    assert rates("linear", 10) == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates("linear", 10, warmup_ratio=0.2) == pytest.approx([0, 0.5] + [1 - i / 8 for i in range(8)])
    assert rates("cosine", 8) == pytest.approx([(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)])
    low = rates("cosine_with_min_lr", 50)
    assert low[0] == 1.0
    assert 0.1 <= low[-1] < 0.11
    for name in ("polynomial", "inverse_sqrt"):
        falling = rates(name, 10, warmup_steps=1)[1:]
        assert falling[0] == 1.0
        assert all(a > b for a, b in pairwise(falling))


def test_the_recipe_is_what_the_engine_reads(engine: Make) -> None:
    """Clipping: with SGD at rate 1 the step is as long as max_grad_norm."""
    role = full_role(make_base("llama"))
    own = engine(role, rate=1.0, optimizer="sgd", max_grad_norm=0.01, lr_scheduler="constant")
    assert isinstance(own.recipe, SFTRecipe)
    before = {k: v.clone() for k, v in role.tensors().items()}
    samples = pairs(6)
    norm = own.update(role, samples, preference(role), pair_counts(samples))["grad_norm"]
    assert norm > 0.1, "reported before clipping"
    moved = math.sqrt(sum(float((v - before[k]).square().sum()) for k, v in role.tensors().items()))
    assert moved == pytest.approx(0.01, rel=1e-3)
