"""Every check, on the real code."""

from __future__ import annotations

from types import ModuleType

import pytest

from rlhf_cli.objectives import advantage, kl, likelihood, logprob, masked, policy, preference
from rlhf_cli.rollouts import experience
from tests.objectives import (
    advantage_checks,
    experience_checks,
    kl_checks,
    likelihood_checks,
    logprob_checks,
    masked_checks,
    policy_checks,
    preference_checks,
    reference_checks,
)
from tests.objectives.support import Check

CHECKED = [
    (masked, masked_checks.CHECKS),
    (logprob, logprob_checks.CHECKS),
    (likelihood, likelihood_checks.CHECKS),
    (preference, preference_checks.CHECKS + reference_checks.CHECKS),
    (policy, policy_checks.CHECKS),
    (advantage, advantage_checks.CHECKS),
    (kl, kl_checks.CHECKS),
    (experience, experience_checks.CHECKS),
]


@pytest.mark.parametrize(
    ("module", "check"),
    [(module, check) for module, checks in CHECKED for check in checks],
    ids=[check.__name__.removeprefix("check_") for _, checks in CHECKED for check in checks],
)
def test_objective(module: ModuleType, check: Check) -> None:
    check(module)
