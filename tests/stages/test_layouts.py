"""What is in memory at once never changes the numbers: micro-batches, packing, padding, checkpointed activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stages import world as w
from tests.stages.conftest import train

CASES = {
    "sft": ("sft", "chat", {"objective": {"label_smoothing": 0.1}}),
    "dpo": ("dpo", "pairs", {"objective": {"name": "dpo"}}),
    "kto": ("dpo", "verdicts", {"objective": {"name": "kto"}}),
    "orpo": ("orpo", "pairs", {}),
    "simpo": ("simpo", "pairs", {"objective": {"sft_weight": 0.2}, "lora": None}),
    "rm": ("train-rm", "pairs", {"objective": {"centring": 0.01}}),
    "aot": ("dpo", "pairs", {"objective": {"name": "aot_unpaired"}}),
    "ld_dpo": ("dpo", "pairs", {"objective": {"name": "ld_dpo"}}),
    "bco": ("dpo", "verdicts", {"objective": {"name": "bco"}}),
    "mix": ("dpo", "pairs", {"objective": {"terms": [{"name": "wpo"}, {"name": "aot"}, {"name": "sft"}]}}),
    "rrhf": ("dpo", "rankings", {"objective": {"name": "rrhf"}}),
    "orpo-on-prompt": ("orpo", "pairs", {"objective": {"sft_scope": "all"}}),
    "k_wise": ("train-rm", "rankings", {"objective": {"name": "k_wise", "centring": 0.01}}),
    "step_labels": ("train-rm", "steps", {"objective": {"name": "step_labels"}}),
    "two_token": ("train-rm", "steps", {"objective": {"name": "two_token", "good": "good", "bad": "bad"}}),
    "outcome": ("train-rm", "verdicts", {"objective": {"name": "outcome"}, "lora": None}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "packed-40": {"training": {"layout": "packed", "micro_batch_tokens": 40}},
    "padded-60-recomputed": {
        "training": {"layout": "padded", "micro_batch_tokens": 60}, "model": {"gradient_checkpointing": True},
    },
    "sdpa-one-by-one": {"training": {"micro_batch_tokens": 8}, "model": {"attn_implementation": "sdpa"}},
}  # fmt: skip
LOOSE = {"grad_norm"}
"""A norm: compared relative to its size."""


@pytest.mark.parametrize("name", CASES)
def test_first_steps_are_equal(toy: Callable[..., dict[str, Any]], name: str) -> None:
    stage, kind, settings = CASES[name]
    calm = {"training": {"max_steps": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-6, "batch_size": 12}}
    common = w.merged(settings, calm, {"data": {"eval": None}})
    known = w.metrics(train(toy(stage, kind, "plain", **common)))
    assert known[-1]["step"] == 2
    for variant, change in VARIANTS.items():
        found = w.metrics(train(toy(stage, kind, variant, **w.merged(common, change))))
        for old, new in zip(known, found, strict=True):
            assert old.keys() == new.keys()
            for key in old.keys() - {"num_tokens"}:
                size = abs(float(old[key])) if key in LOOSE else 1.0
                assert new[key] == pytest.approx(old[key], abs=1e-5 * max(1.0, size)), (variant, key, old["step"])


@pytest.mark.parametrize("full", [False, True])
def test_first_rollouts_are_equal(toy: Callable[..., dict[str, Any]], rm: Path, full: bool) -> None:
    """PPO: the completions that are drawn, what the four roles say of them, and both losses."""
    calm = {
        "rewards": [{"run": str(rm)}], "rollout": {"max_new_tokens": 6, "completions_per_prompt": 2},
        "ppo": {"mini_batches": 2, "epochs": 1}, "data": {"eval": None}, "lora": None if full else w.LORA,
        "training": {"max_steps": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-6, "batch_size": 8},
    }  # fmt: skip
    known = w.metrics(train(toy("ppo", "prompts", "plain", **calm)))
    assert known[-1]["step"] == 2
    changes = VARIANTS | {"sdpa-one-by-one": {"rollout": {"max_batch": 2}, **VARIANTS["sdpa-one-by-one"]}}
    for variant, change in changes.items():
        found = w.metrics(train(toy("ppo", "prompts", variant, **w.merged(calm, change))))
        for old, new in zip(known, found, strict=True):
            assert old.keys() == new.keys()
            for key in old.keys() - {"num_tokens", "rollout/logprob_gap_max"}:
                assert new[key] == pytest.approx(old[key], rel=1e-4, abs=2e-5), (variant, key, old["step"])
