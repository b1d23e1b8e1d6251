"""What preference tuning needs before its first step: scores that can be used, and the right reference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_cli.catalog import Need
from rlhf_cli.data.loader import Loader
from rlhf_cli.data.prepare import Prepared
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import DataError, ModelError, RecipeError
from rlhf_cli.models import processes
from rlhf_cli.models.base import Text, check_length, load_text
from rlhf_cli.models.build import frozen_role, load_reference
from rlhf_cli.models.checks import rounds
from rlhf_cli.models.roles import Role
from rlhf_cli.objectives.judged import Pair
from rlhf_cli.stages import remembered
from rlhf_cli.stages.judging import Term
from rlhf_cli.stages.remembered import Memory
from rlhf_cli.stages.strangers import Strangers
from rlhf_cli.train.engine import Engine

COUNTED = {"comparison": "pairs", "verdict": "verdicts", "ranking": "rankings"}
"""Examples of a kind, in words."""


def needs(terms: Sequence[Term]) -> tuple[Need, ...]:
    """What any of the objectives needs."""
    return tuple(dict.fromkeys(need for term in terms for need in term.entry.needs))


def check_step(terms: Sequence[Term], recipe: Any, data: Prepared) -> None:
    """RecipeError when an objective that compares the examples of a step would get one alone."""
    for term in terms:
        compares = {"kl_point", "whole_step"}.intersection(term.entry.needs)
        if compares and min(recipe.training.batch_size, len(data.train)) < 2:
            raise RecipeError(
                f"{term.entry.name} compares the examples of a step, so it needs two", "training.batch_size", "raise it"
            )


def check_scores(terms: Sequence[Term], samples: Sequence[Sample]) -> None:
    """DataError naming the first row whose scores an objective refuses: it is tried on all before a model loads."""
    for term in (term for term in terms if "scores" in term.entry.needs):
        pairs = [(s.numbers["chosen_score"], s.numbers["rejected_score"]) for s in samples]
        scores = torch.tensor(pairs, dtype=torch.float64)  # (B, 2)
        if _refusal(term, scores) is None:
            continue
        for sample, one in zip(samples, scores, strict=True):
            if (error := _refusal(term, one[None])) is not None:
                raise DataError(f"{error} ({one[0]:g}, {one[1]:g})", sample.where) from error


def check_scale(terms: Sequence[Term], samples: Sequence[Sample]) -> None:
    """RecipeError when ratings lie further apart than the scale that an objective was told."""
    for scale in (t.settings["rating_scale"] for t in terms if "rating_scale" in t.settings):
        for sample in samples:
            gold = [c.gold for c in sample.completions]
            if max(gold) - min(gold) > scale:
                raise RecipeError(
                    f"ratings lie up to {max(gold) - min(gold):g} apart ({sample.where}), on a scale of {scale:g}",
                    "objective.rating_scale", "give the largest possible gap of two ratings",
                )  # fmt: skip


def _refusal(term: Term, scores: torch.Tensor) -> ValueError | None:
    """What the objective says against scores (B, 2), if anything."""
    one = torch.ones(len(scores))
    pair = Pair(-one, -one, one, one)
    try:
        term.judge(pair, pair, scores)
    except ValueError as error:
        return error
    return None


def named_reference(recipe: Any, text: Text) -> Text | None:
    """What is known of a reference the recipe names. ModelError when it speaks another language than the policy."""
    name = getattr(recipe, "reference", None)
    if name is None:
        return None
    other = load_text(recipe.model.model_copy(update={"name_or_path": name, "revision": None}))
    if other.template.digest != text.template.digest:
        raise ModelError("the reference has another tokenizer or chat template than the policy", name)
    check_length(other, recipe.data.max_length, f"data.max_length (reference {name})")
    return other


def open_reference(
    terms: Sequence[Term],
    recipe: Any,
    policy: Role,
    text: Text,
    named: Text | None,
    engine: Engine,
    samples: Sequence[Sample],
    memory: dict[str, Memory],
) -> Role | None:
    """The reference an objective needs, said aloud and checked against the untrained policy; None as well when the
    cache knows all that will be asked of it. Raises ModelError."""
    if "reference" not in needs(terms) or _from_cache(terms, policy, named, engine, samples, memory):
        return None
    if named is not None:
        reference = frozen_role("reference", recipe.model, named, policy.base)
        engine.packed &= reference.base.packed
        engine.display.note(f"reference: {named.path.name}")
        return reference
    reference, words = load_reference(policy, text)
    few = samples[:4]
    own = engine.infer(policy, few, lambda b: policy.logp(b, statistics="none").logp)
    other = engine.infer(reference, few, lambda b: reference.logp(b, statistics="none").logp)
    gap = max(float((a - b).abs().max()) for a, b in zip(own, other, strict=True))
    if not gap <= _tolerance(policy):
        raise ModelError(
            f"policy and reference differ before the first step (by {gap:.3g} nats a token)", text.path.name
        )
    engine.display.note(f"reference: {words}; equal to the policy at step 0 (largest gap {gap:.1e} nats a token)")
    return reference


def _tolerance(policy: Role) -> float:
    """How far policy and reference may lie apart at step 0, in nats a token."""
    return 0.25 if rounds(policy.base) else 1e-4


def open_strangers(terms: Sequence[Term], recipe: Any, data: Prepared) -> dict[str, Strangers]:
    """Those of each split; empty when no objective compares with them."""
    splits = {"train": data.train, "eval": data.eval} if "kl_point" in needs(terms) else {}
    return {name: Strangers(samples, recipe.data.max_length) for name, samples in splits.items() if samples}


def open_memory(
    terms: Sequence[Term],
    recipe: Any,
    engine: Engine,
    policy: Role,
    text: Text,
    named: Text | None,
    data: Prepared,
    loader: Loader,
    strangers: Mapping[str, Strangers],
) -> dict[str, Memory]:
    """What is known of the reference, by split; empty when no objective needs one."""
    wanted = needs(terms)
    if "reference" not in wanted:
        return {}
    kind = terms[0].entry.data
    return remembered.open_memory(
        recipe, engine, policy, text, named, data, loader, kind, "common" in wanted, strangers
    )


def _from_cache(
    terms: Sequence[Term],
    policy: Role,
    named: Text | None,
    engine: Engine,
    samples: Sequence[Sample],
    memory: dict[str, Memory],
) -> bool:
    """Whether the cache makes the reference superfluous, said aloud. Numbers that are not the untrained policy's are
    put aside."""
    examples = [memory[split] for split in ("train", "eval") if split in memory]
    rows = torch.cat([m.wanted for m in examples])
    known = torch.cat([m.in_cache() & m.wanted for m in examples])
    if not bool(known.any()) and processes.count() == 1:
        return False
    if len(set(processes.gather(hashlib.sha256(known.numpy().tobytes()).hexdigest(), "looking into the cache"))) > 1:
        memory |= {split: replace(m, found=None) for split, m in memory.items()}  # machines with caches of their own
        return False
    if not bool(known.any()):
        return False
    gap = 0.0 if named is not None else _gap(policy, engine, samples, memory["train"])
    if not gap <= _tolerance(policy):
        engine.display.warn(f"the cache's numbers of the reference are {gap:.3g} nats a token off: made anew")
        memory |= {split: replace(m, found=None) for split, m in memory.items()}
        return False
    notes = next(m.found.notes for m in examples if m.found is not None)
    words = f"{int(known.sum())} of {int(rows.sum())} {COUNTED[terms[0].entry.data]} known from an earlier run"
    superfluous = all(bool(m.in_cache()[m.wanted].all()) for m in memory.values())
    engine.display.note(
        f"reference: {words} ({notes['run']})"
        + ("; it is not loaded" if superfluous else "")
        + (f"; equal to the policy at step 0 (largest gap {gap:.1e} nats a token)" if named is None else "")
    )
    if superfluous:
        engine.packed &= notes["packed"] == "True"
    return superfluous


def _gap(policy: Role, engine: Engine, samples: Sequence[Sample], memory: Memory) -> float:
    """Largest difference of the cache's numbers from the untrained policy's over a few samples, in nats a token."""
    few = memory.in_cache().nonzero().flatten()[:4].tolist()
    own = engine.infer(policy, [samples[i] for i in few], lambda b: policy.logp(b, statistics="none").logp)
    gap = 0.0
    for i, logp in zip(few, own, strict=True):
        lengths = [int(c.scored.sum()) for c in samples[i].completions]
        sums = torch.stack([part.sum().float().cpu() for part in logp.split(lengths)])
        gap = max(gap, float(((sums - memory.cached(i)).abs() / torch.tensor(lengths)).max()))
    return gap
