"""PPO-Lag: as much reward as possible while the mean cost stays below a threshold. B completions, T token slots.

The cost is a second stream of token rewards with advantages of its own. Its KL term has the opposite sign, so that the
mixture of both pays exactly kl_coef for a nat of KL, whatever the multiplier is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def mixed(rewards: Tensor, costs: Tensor, multiplier: float) -> Tensor:
    """(A_r - multiplier A_c) / (1 + multiplier), advantages of the reward and of the cost, both (B, T).

    Dai et al. 2023 (arXiv:2310.12773) eq. 9-11.
    """
    return (rewards - multiplier * costs) / (1.0 + multiplier)


class Lagrange:
    """The multiplier lambda: ln lambda <- ln lambda + learning_rate lambda (mean cost - threshold), at most ln max.

    The mean is over the newest `window` completions, their costs as they were scored: no KL, no penalty. Dai et al.
    2023 (arXiv:2310.12773), their code.
    """

    def __init__(
        self, *, threshold: float, init: float, learning_rate: float, max: float, window: int, delay_steps: int
    ) -> None:
        self.threshold, self.learning_rate = threshold, learning_rate
        self.window, self.delay_steps = window, delay_steps
        self.log, self.limit = math.log(init), math.log(max)
        self.costs: list[float] = []
        self.steps = 0

    @property
    def multiplier(self) -> float:
        """lambda."""
        return math.exp(self.log)

    @property
    def mean(self) -> float:
        """Mean cost of the window."""
        return sum(self.costs) / len(self.costs)

    def follow(self, costs: Sequence[float]) -> None:
        """After a rollout whose completions cost that much."""
        self.costs = [*self.costs, *costs][-self.window :]
        self.steps += 1
        if self.steps > self.delay_steps and self.costs:
            moved = self.log + self.learning_rate * self.multiplier * (self.mean - self.threshold)
            self.log = min(moved, self.limit)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"log": self.log, "costs": list(self.costs), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.log, self.costs, self.steps = state["log"], list(state["costs"]), state["steps"]
