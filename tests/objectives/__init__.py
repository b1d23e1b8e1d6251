import pytest

SHARED = (
    "support", "masked_checks", "logprob_checks", "likelihood_checks", "preference_support", "preference_checks",
    "reference_checks", "policy_checks", "advantage_checks", "kl_checks", "experience_checks",
)  # fmt: skip
pytest.register_assert_rewrite(*(f"tests.objectives.{name}" for name in SHARED))
