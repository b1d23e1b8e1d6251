"""Scores by rule: pure functions of a rollout of N completions. Settings and their defaults stand in catalog/rules.py.

Numbers are read by data/right_numbers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_cli.catalog import REWARDS
from rlhf_cli.catalog.rules import WORD
from rlhf_cli.data.examples import Task
from rlhf_cli.data.right_numbers import answer, check_rule, gold
from rlhf_cli.errors import ModelError, Problem
from rlhf_cli.recipe.settings.rewards import RewardSettings
from rlhf_cli.rollouts.limits import OutOfTime, limited
from rlhf_cli.rollouts.normalise import Running, Scaling, scaling_of
from rlhf_cli.rollouts.rewards import Infer, Rollout, Scores, at_the_end


def length(rollout: Rollout, *, unit: str, aim: str, limit: int, margin: int) -> np.ndarray:
    """at_most: s = -clip((L - (limit - margin)) / margin, 0, 1); near: s = -min(|L - limit| / margin, 1).

    Symbols: L: length of the completion, in tokens with its end token or in characters.
    Source: Yu et al. 2025 (arXiv:2503.14476) section 3.4, soft overlong punishment, for at_most.
    Step 0: 0 for a completion of at most limit - margin; -1 at limit and beyond
    Traps: the sign; tokens of another tokenizer than the policy's; a limit above rollout.max_new_tokens, which nothing
    reaches.
    """
    if unit == "token":
        long = np.array([len(sample.completions[0].ids) for sample in rollout.samples], dtype=np.float64)
    else:
        long = np.array([len(text) for text in rollout.completions], dtype=np.float64)
    over = long - (limit - margin) if aim == "at_most" else np.abs(long - limit)
    return -np.clip(over / margin, 0.0, 1.0)


def stop(rollout: Rollout, *, stopped: float, cut: float) -> np.ndarray:
    """s = stopped when a stop token ended the completion; s = cut when the length limit did.

    Source: Huang et al. 2024 (arXiv:2403.17031), the EOS trick, as a reward of its own.
    Step 0: stopped times the share of completions that end, plus cut times the rest
    Traps: the end token looked for in the text, where special tokens are left out; counted twice with
    ppo.missing_eos_penalty.
    """
    return np.where(np.array(rollout.finished, dtype=bool), stopped, cut).astype(np.float64)


def regex(rollout: Rollout, *, pattern: str, match: str, matched: float, missed: float) -> np.ndarray:
    """s = matched when the pattern is found (search) or is all of the completion (full); else s = missed.

    Source: Guo et al. 2025 (arXiv:2501.12948) section 2.2.2, format rewards.
    Step 0: missed, unless the model knows the format already
    Traps: a full match that forgets a line end at the end of the text; a dot that stops at line ends without (?s);
    patterns that take for ever, such as (a+)+b: the time limit stops those.
    """
    compiled = re.compile(pattern)
    found = compiled.search if match == "search" else compiled.fullmatch
    return np.array([matched if found(text) else missed for text in rollout.completions], dtype=np.float64)


def numeric_answer(
    rollout: Rollout, *, column: str, marker: str, without_marker: str, right: float, wrong: float
) -> np.ndarray:
    """s = right when answer(completion) = answer(column), both exact fractions; else s = wrong.

    answer(text) is the first number after the last marker; without a marker its last number. Thousands are grouped by
    commas; currency and percent signs do not count; a/b is a fraction.

    Source: Cobbe et al. 2021 (arXiv:2110.14168), whose solutions end in `#### number`.
    Step 0: the share of right answers, near 0 for a model that cannot do sums; groups without contrast teach nothing
    Traps: numbers compared as text, so that 18.0 is not 18; 1,000 read as 1; the last number of a completion that goes
    on after its answer; floats, in which 0.1 + 0.2 is not 0.3.
    """
    said = [answer(text, marker, without_marker) for text in rollout.completions]
    known = [gold(task, column, marker) for task in rollout.tasks]
    return np.array([right if a == b else wrong for a, b in zip(said, known, strict=True)], dtype=np.float64)


def words(rollout: Rollout, *, plus: Sequence[str], minus: Sequence[str], per: str) -> np.ndarray:
    """s = (words in plus) - (words in minus), with `per: word` divided by all words.

    Source: Hu and Liu 2004, opinion words counted; a sentiment score without a model.
    Step 0: whatever the policy says by itself, often near 0
    Traps: parts of words counted (`bad` in `badge`); capital letters; a sum that grows with the length, which `per:
    word` mends.
    """
    good, bad = ({word.casefold() for word in some} for some in (plus, minus))
    scores = []
    for text in rollout.completions:
        said = [word.casefold() for word in WORD.findall(text)]
        count = sum((word in good) - (word in bad) for word in said)
        scores.append(count / max(len(said), 1) if per == "word" else float(count))
    return np.array(scores, dtype=np.float64)


# --- as a reward -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleReward:
    """A rule of the catalogue with its settings."""

    name: str
    weight: float
    role: Literal["reward", "cost"]
    scaling: Scaling
    rule: Callable[..., np.ndarray]
    settings: dict[str, Any]
    timeout: float

    @property
    def state(self) -> Running | None:
        """Running statistics, when it is normalised by them."""
        return self.scaling.running

    def __call__(self, rollout: Rollout, infer: Infer | None = None) -> Scores:
        """The rule's scores. Raises ModelError when it takes too long, as some regular expressions do."""
        late = Problem(f"took longer than {self.timeout:g} s on {len(rollout.completions)} completions",
                       f"reward {self.name}", "write a simpler pattern")  # fmt: skip
        try:
            found = limited(self.timeout, lambda: self.rule(rollout, **self.settings), lambda: f"error: {late}")
        except OutOfTime as error:
            raise ModelError(late) from error
        return at_the_end(found)


def load_rule(settings: RewardSettings, tasks: Sequence[Task], key: str) -> RuleReward:
    """A rule as a reward; key: its place in the recipe. Raises DataError for a row without the column that it reads."""
    block: Any = settings.rule
    values = block.model_dump(exclude={"name"})
    check_rule(settings, tasks, key)
    return RuleReward(settings.title(), settings.weight, settings.role, scaling_of(settings),
                      REWARDS[block.name].load(), values, settings.timeout)  # fmt: skip
