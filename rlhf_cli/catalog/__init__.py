"""Every name a recipe may use: the code behind it, what it needs, its settings.

This package never imports torch; only `Entry.load()` crosses that line. Settings classes hold the only defaults: the
functions behind them take the same names as keyword-only parameters without defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from rlhf_cli.catalog import policy, preference, reward, rules, selections
from rlhf_cli.catalog.entries import (
    NEEDS,
    AboveOne,
    Controller,
    Data,
    Entry,
    Estimator,
    Finite,
    Head,
    Need,
    NonNegative,
    Objective,
    Positive,
    Settings,
    Share,
    Stage,
)
from rlhf_cli.catalog.rules import Rule
from rlhf_cli.catalog.selections import Selection
from rlhf_cli.errors import RecipeError, did_you_mean

__all__ = [
    "CONTROLLERS", "ESTIMATORS", "NEEDS", "OBJECTIVES", "REWARDS", "SELECTIONS", "STAGES", "AboveOne", "Controller",
    "Data", "Entry", "Estimator", "Finite", "Head", "Need", "NonNegative", "Objective", "Positive", "Rule", "Selection",
    "Settings", "Share", "Stage", "look_up", "objectives_of",
]  # fmt: skip

E = TypeVar("E", bound=Entry)

OBJECTIVES = {o.name: o for o in (*reward.ENTRIES, *preference.ENTRIES)}
ESTIMATORS = {e.name: e for e in policy.ESTIMATORS}
CONTROLLERS = {c.name: c for c in policy.CONTROLLERS}
REWARDS = {r.name: r for r in rules.RULES}
SELECTIONS = {s.name: s for s in selections.SELECTIONS}
STAGES = {
    s.name: s
    for s in (
        Stage("sft", "stages.sft:run", "Supervised fine-tuning on demonstrations or plain text", "SFTRecipe"),
        Stage("train-rm", "stages.reward:run", "Reward, cost and process models", "RewardRecipe"),
        Stage("ppo", "stages.ppo:run", "PPO and its relatives against reward models and functions", "PPORecipe"),
        Stage("dpo", "stages.preference:run", "Preference tuning, mostly with a reference: dpo, ipo, kto and more",
              "DPORecipe"),
        Stage("orpo", "stages.preference:run", "Odds-ratio preference optimisation", "ORPORecipe"),
        Stage("simpo", "stages.preference:run", "Preference tuning without a reference: simpo, alphapo, cpo, slic",
              "SimPORecipe"),
        Stage("sample", "stages.sample:run", "Completions of prompts, as data", "SampleRecipe", trains=False),
        Stage("score", "stages.score:run", "Scores of completions by reward models, functions and rules", "ScoreRecipe",
              trains=False),
        Stage("select", "stages.select:run", "Training data of scored completions", "SelectRecipe", trains=False),
        Stage("eval", "stages.evaluate:run", "Figures about a reward model, or about language models on prompts",
              "EvalRecipe", trains=False),
    )
}  # fmt: skip


def look_up(kind: str, table: Mapping[str, E], name: str) -> E:
    """The entry of that name, or a RecipeError with the closest known name."""
    if name not in table:
        raise RecipeError(
            f"no {kind} is called '{name}'", hint=did_you_mean(name, table) or f"known: {', '.join(table)}"
        )
    return table[name]


def objectives_of(stage: str) -> Iterable[Objective]:
    """The objectives that a command runs."""
    return (o for o in OBJECTIVES.values() if o.stage == stage)
