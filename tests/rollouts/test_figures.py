"""What a rollout tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_cli.rollouts.figures import figures
from tests.rollouts.test_experience import experience

SCORES = torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0, 5.0])


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ([0, 1, 0, 1, 2, 2], 2 / 3),  # the third prompt's completions differ
        ([0, 1, 0, 1, 2, 3], 1.0),  # prompts with one completion are not compared
        ([0, 0, 0, 0, 1, 1], 0.0),
    ],
)
def test_share_of_prompts_without_contrast(group: list[int], wanted: float) -> None:
    made = replace(experience([2, 1, 3, 1, 1, 2]), group=torch.tensor(group))
    found = figures(made, SCORES + 1, SCORES, None, 0.1)
    assert found["frac_reward_zero_std"] == pytest.approx(wanted)


def test_one_completion_a_prompt_is_not_compared() -> None:
    assert "frac_reward_zero_std" not in figures(experience([2, 1, 3, 1, 1, 2]), SCORES, SCORES, None, 0.1)


def test_sums_and_means() -> None:
    made = replace(
        experience([2, 1]), values=torch.tensor([[1.0, 2.0], [4.0, 9.0]]),
        logp=torch.tensor([[-1.0, -2.0], [-0.5, 7.0]]), reference_logp=torch.tensor([[-1.5, -1.0], [-1.5, 9.0]]),
    )  # fmt: skip
    returns = torch.tensor([[2.0, 2.0], [5.0, 9.0]])
    found = figures(made, torch.tensor([3.0, 1.0]), torch.tensor([3.0, 0.0]), returns, 0.5)
    assert found["objective/kl"] == pytest.approx((-0.5 + 1.0) / 2)
    assert found["objective/scores"] == 2.0
    assert found["objective/rlhf_reward"] == pytest.approx(1.5 - 0.125)
    assert found["objective/non_score_reward"] == pytest.approx(-0.125)
    assert found["completions/mean_length"] == 1.5
    # errors 1, 0, 1 of targets 2, 2, 5: variances 2/9 and 2
    assert found["val/explained_variance"] == pytest.approx(1 - 1 / 9)
    assert found["val/mean"] == pytest.approx(7 / 3)
