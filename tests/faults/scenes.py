"""Three small runs that carry as much state as a run can, with short distances between checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.conftest import write_model
from tests.stages import world as w

REWARDS = '''
import random

import numpy as np


def taste(completions):
    """A number for every text, and some noise of the generators that a user may take."""
    return [sum(map(ord, c)) % 17 / 8 + random.random() / 4 + np.random.random() / 4 for c in completions]


def cost(completions):
    """Now and then."""
    return [float(sum(map(ord, c)) % 3 == 0) for c in completions]
'''
EVERY = 2
"""Steps between two checkpoints."""
COMMANDS = {"sft": "sft", "dpo": "dpo", "ppo": "ppo", "rollback": "ppo"}
"""Of each scene."""
ROLLS_BACK = "rollback"
"""The scene in which checkpoints are given up and replaced."""
_LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}
_COMMON: dict[str, Any] = {
    "checkpoint": {"every": EVERY, "keep": 2},
    "evaluation": {"every": 3, "samples": 2, "max_new_tokens": 4},
    "logging": {"every": 1},
}


def build(folder: Path) -> Path:
    """The model and the data of all scenes."""
    write_model(folder / "model")
    w.write_world(folder)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def content(name: str, world: Path, out: Path) -> dict[str, Any]:
    """The recipe of a scene as a dict."""
    kind, more = {"sft": _sft, "dpo": _dpo, "ppo": _ppo, "rollback": _rollback}[name](world)
    made = w.recipe(COMMANDS[name], world / "model", world, kind, out, **w.merged(_COMMON, more))
    rows = {"train": 40, "eval": 4}
    made["data"] |= {part: {"path": made["data"][part], "limit": count} for part, count in rows.items()}
    return copy.deepcopy(made)


def _sft(world: Path) -> tuple[str, dict[str, Any]]:
    """Dropout and LoRA, into the second epoch."""
    return "chat", _LORA | {"training": {"max_steps": 12, "batch_size": 4, "lr_scheduler": "cosine"}}


def _dpo(world: Path) -> tuple[str, dict[str, Any]]:
    """Dropout, LoRA, and a memory of the reference that is used again in the second epoch."""
    training = {"max_steps": 12, "batch_size": 4, "lr_scheduler": "linear"}
    return "pairs", _LORA | {"objective": {"name": "dpo"}, "training": training}


def _ppo(world: Path) -> tuple[str, dict[str, Any]]:
    """Two critics, KL and penalty controllers, running statistics of the reward, and a Lagrange multiplier."""
    reward = {"function": f"{world / 'rewards.py'}:taste", "normalize": "running", "shift": True}
    return "prompts", _LORA | {
        "rewards": [reward, {"function": f"{world / 'rewards.py'}:cost", "role": "cost"}],
        "rollout": {"max_new_tokens": 4, "completions_per_prompt": 2},
        "ppo": {
            "mini_batches": 2, "epochs": 1, "penalty": {}, "advantage": {"name": "gae"},
            "kl": {"name": "doubling", "target_kl_per_sequence": 0.5},
            "lagrange": {"threshold": 0.2, "learning_rate": 0.5, "window": 16},
        },
        "training": {"max_steps": 6, "batch_size": 4, "learning_rate": 5e-3, "lr_scheduler": "linear"},
    }  # fmt: skip


def _rollback(world: Path) -> tuple[str, dict[str, Any]]:
    """Learning rates so high that the doctor goes back to earlier checkpoints."""
    return "prompts", _LORA | {
        "rewards": [{"function": f"{world / 'rewards.py'}:taste"}],
        "rollout": {"max_new_tokens": 4, "completions_per_prompt": 2},
        "ppo": {
            "mini_batches": 2, "epochs": 1, "kl": {"name": "fixed", "coef": 0.0}, "advantage": {"name": "rloo"},
            "whiten_advantages": True,
        },
        "training": {"max_steps": 8, "batch_size": 4, "learning_rate": 3e-3, "lr_scheduler": "linear"},
        "checkpoint": {"every": 1, "keep": 3},
        "doctor": {
            "wires": {"kl": "rollback", "ratio": "ignore"}, "thresholds": {"kl": 1.0}, "rollback_lr_factor": 0.3,
        },
    }  # fmt: skip
