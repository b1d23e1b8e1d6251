"""What a rollout tells."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Completion, Sample
from rlhf_cli.rollouts.experience import Experience
from rlhf_cli.rollouts.figures import Clock, advantage_figures, correlation, figures, said
from rlhf_cli.rollouts.rewards import Rollout
from tests.rollouts.test_experience import experience

SCORES = torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0, 5.0])


def of_tokens(*completions: Sequence[int]) -> Experience:
    """Made-up log-probabilities of these token ids."""
    made = experience([len(ids) for ids in completions])
    samples = [Sample(np.array([7]), (Completion(np.array(c), np.ones(len(c), bool)),), {}, "") for c in completions]
    texts = [" ".join(map(str, c)) for c in completions]
    task = Task("?", "")
    return replace(made, rollout=Rollout([task] * len(samples), texts, samples, [True] * len(samples)))


def of_lengths(*lengths: int) -> Experience:
    return of_tokens(*(range(n) for n in lengths))


@pytest.mark.parametrize(
    ("group", "wanted", "spread"),
    [
        ([0, 1, 0, 1, 2, 2], 2 / 3, 2.5 / 3),  # the third prompt's completions differ
        ([0, 1, 0, 1, 2, 3], 1.0, 0.0),  # prompts with one completion are not compared
        ([0, 0, 0, 0, 1, 1], 0.0, (0.5 + 2.5) / 2),
    ],
)
def test_contrast_within_prompts(group: list[int], wanted: float, spread: float) -> None:
    made = replace(of_lengths(2, 1, 3, 1, 1, 2), group=torch.tensor(group))
    found = figures(made, SCORES + 1, SCORES, None, 0.1)
    assert found["frac_reward_zero_std"] == pytest.approx(wanted)
    assert found["reward/group_std"] == pytest.approx(spread)


def test_one_completion_a_prompt_is_not_compared() -> None:
    found = figures(of_lengths(2, 1, 3, 1, 1, 2), SCORES, SCORES, None, 0.1)
    assert not {"frac_reward_zero_std", "reward/group_std"} & found.keys()


def test_sums_and_means() -> None:
    made = replace(
        of_lengths(2, 1), values=torch.tensor([[1.0, 2.0], [4.0, 9.0]]),
        logp=torch.tensor([[-1.0, -2.0], [-0.5, 7.0]]), reference_logp=torch.tensor([[-1.5, -1.0], [-1.5, 9.0]]),
        sampled_logp=torch.tensor([[-1.0, -2.5], [-0.4, 90.0]]), finished=torch.tensor([False, True]),
    )  # fmt: skip
    returns = torch.tensor([[2.0, 2.0], [5.0, 9.0]])
    found = figures(made, torch.tensor([3.0, 1.0]), torch.tensor([3.0, 0.0]), returns, 0.5)
    wanted = {
        "objective/kl": (-0.5 + 1.0) / 2, "objective/scores": 2.0, "objective/scores_std": 1.0,
        "objective/rlhf_reward": 1.5 - 0.125, "objective/non_score_reward": -0.125, "objective/truncation_reward": -0.5,
        "completions/mean_length": 1.5, "completions/min_length": 1.0, "completions/max_length": 2.0,
        "completions/eos_rate": 0.5, "completions/truncated": 0.5, "completions/finished_length_mean": 1.0,
        "rollout/logprob_gap_mean": 0.6 / 3, "rollout/logprob_gap_max": 0.5, "rollout/reward_length_correlation": 1.0,
        # errors 1, 0, 1 of targets 2, 2, 5: variances 2/9 and 2
        "val/explained_variance": 1 - 1 / 9, "val/mean": 7 / 3, "val/returns_mean": 3.0,
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    nothing = figures(made, SCORES[:2], SCORES[:2], None, 0.0)
    zeros = [nothing[f"objective/{name}"] for name in ("truncation_reward", "non_score_reward")]
    assert [(x, math.copysign(1.0, x)) for x in zeros] == [(0.0, 1.0), (0.0, 1.0)]
    cut = figures(replace(made, finished=torch.tensor([False, False])), SCORES[:2], SCORES[:2], None, 0.5)
    assert cut["completions/truncated"] == 1.0
    assert "completions/finished_length_mean" not in cut  # there are none


def test_what_is_masked_counts_nowhere() -> None:
    alone = of_tokens([1, 2, 3, 4, 5], [1, 2])
    three = of_tokens([1, 2, 3, 4, 5], [1, 2], [9] * 8)
    mask = three.mask.clone()
    mask[2] = False
    fields = ("logp", "reference_logp", "sampled_logp", "entropy")
    wild = {name: torch.full_like(three.logp, torch.nan) for name in fields}
    for name in fields:
        wild[name][:2, :5] = getattr(alone, name)
    three = replace(
        three, mask=mask, logp=wild["logp"], reference_logp=wild["reference_logp"],
        sampled_logp=wild["sampled_logp"], entropy=wild["entropy"],
    )  # fmt: skip
    scores = torch.tensor([1.0, 4.0, torch.nan])
    found = figures(three, scores, scores, None, 0.2)
    assert found == pytest.approx(figures(alone, scores[:2], scores[:2], None, 0.2))


@pytest.mark.parametrize(
    ("completions", "repetition", "unique"),
    [
        ([[1, 2, 3], [4]], 0.0, 1.0),  # no 4-grams at all
        ([[1, 2, 3, 4, 5]], 0.0, 1.0),
        ([[8] * 8], 4 / 5, 1.0),
        ([[1, 2, 3, 4, 1, 2, 3, 4]], 1 / 5, 1.0),
        ([[8] * 8, [1, 2, 3, 4, 5]], 4 / 7, 1.0),
        ([[1, 2, 3, 4], [1, 2, 3, 4], [5], [5]], 0.0, 0.5),  # equal completions repeat nothing within themselves
    ],
)
def test_repetition(completions: list[list[int]], repetition: float, unique: float) -> None:
    scores = torch.zeros(len(completions))
    found = figures(of_tokens(*completions), scores, scores, None, 0.1)
    assert found["rollout/repetition"] == pytest.approx(repetition)
    assert found["rollout/unique_share"] == pytest.approx(unique)


def test_repetition_equals_a_count_by_hand() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = random.integers(0, 3, size=random.integers(4, 60)) * 100_000
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        found = figures(of_tokens(ids.tolist()), torch.zeros(1), torch.zeros(1), None, 0.1)
        assert found["rollout/repetition"] == pytest.approx(1 - len(set(grams)) / len(grams))


def test_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 3.0])
    y = torch.tensor([2.0, 1.0, 5.0, 7.0])
    assert correlation(x, y) == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1])
    assert correlation(x, -3 * x) == pytest.approx(-1.0)
    assert correlation(x, torch.ones(4)) == 0.0


def test_advantages_are_masked() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    found = advantage_figures(torch.tensor([[1.0, -4.0], [3.0, torch.inf]]), mask)
    assert found == pytest.approx({"advantages/mean": 0.0, "advantages/std": (26 / 3) ** 0.5, "advantages/abs_max": 4})


def test_texts_are_of_different_prompts() -> None:
    made = replace(of_lengths(1, 2, 3, 4, 5), group=torch.tensor([0, 0, 1, 1, 2]))
    found = said(made, torch.arange(5.0), list("aabbc"), count=4)
    assert [(f["prompt"], f["length"], f["score"]) for f in found] == [
        ("a", 1, 0.0), ("b", 3, 2.0), ("c", 5, 4.0), ("a", 2, 1.0),
    ]  # fmt: skip
    kl = (made.logp - made.reference_logp)[2].sum()
    assert found[1]["kl"] == pytest.approx(float(kl), abs=1e-6)
    assert found[1]["completion"] == "0 1 2"


def test_the_clock_adds_up_and_starts_anew() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("rollout"):
            time.sleep(0.01)
    with pytest.raises(ValueError, match="stop"), clock("update"):
        raise ValueError("stop")
    found = clock.figures()
    assert 0.02 <= found["time/rollout_s"] < 1.0
    assert found["time/update_s"] < 0.01
    assert found["mem/peak_gib"] > 0.01
    assert clock.figures().keys() == {"mem/peak_gib"}
