"""A setting that was changed although nothing reads it is refused in one line that names it and what would read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.reader import read_recipe

HEAD: dict[str, Any] = {"model": "m", "data": {"train": "d"}, "training": {"learning_rate": 0.1}, "output_dir": "o"}
PPO: dict[str, Any] = HEAD | {"stage": "ppo", "rewards": [{"function": "f.py:g"}]}
DPO: dict[str, Any] = HEAD | {"stage": "dpo"}
RM: dict[str, Any] = HEAD | {"stage": "train-rm"}
RLOO: dict[str, Any] = {"advantage": {"name": "rloo"}}
PAIRS = {"rollout": {"completions_per_prompt": 2}}


def rated(**ratings: Any) -> dict[str, Any]:
    """A reward model from games."""
    return RM | {"objective": {"name": "regression"}, "data": {"train": "d", "ratings": ratings}}


UNREAD: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "alpha of another divergence": (
        DPO | {"objective": {"name": "f_dpo", "alpha": 0.3}},
        ("alpha", "divergence: alpha"),
    ),
    "alpha in a mix": (
        DPO | {"objective": {"terms": [{"name": "dpo"}, {"name": "f_dpo", "divergence": "forward_kl", "alpha": 0.3}]}},
        ("alpha", "divergence: alpha"),
    ),
    "delta of a square": (RM | {"objective": {"name": "regression", "delta": 2.0}}, ("delta", "loss: huber")),
    "points without elo": (rated(k=16.0), ("k", "method: elo")),
    "a start without elo": (rated(start=0.0), ("start", "method: elo")),
    "orders without elo": (rated(shuffles=5), ("shuffles", "method: elo")),
    "a pull with elo": (rated(method="elo", l2=0.5), ("l2", "method: bradley_terry")),
    "gamma of whole completions": (
        PPO | {"ppo": {"advantage": {"name": "reinforce", "credit": "full", "gamma": 0.9}}},
        ("gamma", "credit: to_go"),
    ),
    "a clip of no values": (PPO | PAIRS | {"ppo": RLOO | {"value_clip": 0.5}}, ("value_clip", "advantage rloo")),
    "no clip of no values": (PPO | PAIRS | {"ppo": RLOO | {"value_clip": None}}, ("value_clip", "critic")),
    "a rate of no critic": (
        PPO | PAIRS | {"ppo": RLOO, "critic": {"learning_rate": 1e-4}},
        ("critic.learning_rate", "ppo.advantage rloo"),
    ),
    "a start of no critic": (
        PPO | PAIRS | {"ppo": RLOO, "critic": {"start": "zero"}},
        ("critic.start", "ppo.advantage rloo"),
    ),
    "a penalty for what is replaced": (
        PPO | {"ppo": {"truncation": "replace", "missing_eos_penalty": 2.0}},
        ("missing_eos_penalty", "truncation: penalty"),
    ),
    "a length of samples": (
        PPO | {"evaluation": {"max_new_tokens": 64}},
        ("evaluation.max_new_tokens", "rollout.max_new_tokens"),
    ),
    "wires of no doctor": (
        PPO | {"doctor": {"enabled": False, "wires": {"kl": "pause"}}},
        ("doctor.wires", "doctor.enabled"),
    ),
    "thresholds of no doctor": (
        PPO | {"doctor": {"enabled": False, "thresholds": {"kl": 3.0}}},
        ("doctor.thresholds", "doctor.enabled"),
    ),
    "a factor of no rollback": (
        PPO | {"doctor": {"wires": {"kl": "pause"}, "rollback_lr_factor": 0.1}},
        ("doctor.rollback_lr_factor", "doctor.wires", "rollback"),
    ),
    "a count of no rollbacks": (PPO | {"doctor": {"max_rollbacks": 1}}, ("doctor.max_rollbacks", "doctor.wires")),
    "a coefficient that cannot move": (
        PPO | {"ppo": {"kl": {"name": "proportional", "coef": 0.0}}},
        ("kl.coef 0", "kl.name proportional"),
    ),
    "a reward of nothing": (PPO | {"rewards": [{"function": "f.py:g", "weight": 0}]}, ("weight", "role: reward")),
    "a reward of nothing beside a cost": (
        PPO
        | {"rewards": [{"function": "f.py:g", "weight": 0}, {"function": "f.py:h", "role": "cost"}]}
        | {"ppo": {"lagrange": {}}},
        ("weight", "role: reward"),
    ),
}
READ = {
    "alpha": DPO | {"objective": {"name": "f_dpo", "divergence": "alpha", "alpha": 0.3}},
    "delta": RM | {"objective": {"name": "regression", "loss": "huber", "delta": 2.0}},
    "elo": rated(method="elo", k=16.0, start=0.0, shuffles=5),
    "l2": rated(l2=0.5),
    "gamma": PPO | {"ppo": {"advantage": {"name": "reinforce", "gamma": 0.9}}},
    "a critic": PPO | {"ppo": {"value_clip": None}, "critic": {"start": "zero", "learning_rate": 1e-4}},
    "defaults that are written": PPO
    | PAIRS
    | {"ppo": RLOO | {"value_clip": 0.2, "truncated_score": -1.0}, "critic": {"start": "auto", "coef": 0.1}},
    "a doctor's settings": PPO
    | {"doctor": {"wires": {"kl": "rollback"}, "rollback_lr_factor": 0.1, "max_rollbacks": 1}},
    "no doctor": PPO | {"doctor": {"enabled": False, "max_rollbacks": 3}},
    "no KL": PPO | {"ppo": {"kl": {"name": "fixed", "coef": 0.0}}},
    "a reward to look at": PPO | {"rewards": [{"function": "f.py:g", "weight": 0}, {"function": "f.py:h"}]},
    "the default length of samples": PPO | {"evaluation": {"max_new_tokens": 128}},
    "a length of samples elsewhere": DPO | {"objective": {"name": "dpo"}, "evaluation": {"max_new_tokens": 64}},
    "more defaults": DPO | {"objective": {"name": "f_dpo", "alpha": 0.5}},
}


def read(content: dict[str, Any], folder: Path) -> Any:
    """The recipe of a file with this content."""
    (folder / "r.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_recipe(str(folder / "r.yaml"), [], None)


@pytest.mark.parametrize("name", UNREAD)
def test_a_setting_that_nothing_reads(name: str, tmp_path: Path) -> None:
    content, words = UNREAD[name]
    with pytest.raises(RecipeError) as caught:
        read(content, tmp_path)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem)
    assert [word for word in words if word not in str(problem)] == []


@pytest.mark.parametrize("name", READ)
def test_settings_that_are_read(name: str, tmp_path: Path) -> None:
    read(READ[name], tmp_path)
