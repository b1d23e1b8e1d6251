"""One reward of a PPO recipe: a reward run, a function or a rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rlhf_cli.catalog import REWARDS, Finite, Positive
from rlhf_cli.recipe.settings.blocks import Checked, Name, block


class RewardSettings(Checked):
    run: Name | None = None
    """A `train-rm` run (or a folder with a sequence-classification model of one label)."""
    function: Name | None = None
    """`file.py:function`, called as function(prompts=..., completions=..., **columns) -> list of numbers."""
    rule: block(REWARDS.values()) | None = None  # type: ignore[valid-type]
    """A built-in rule, `{name: ..., settings...}`."""
    name: str | None = None
    """Name in the metrics; default: the run's folder, the function's name or the rule's."""
    weight: Finite = 1.0
    """Factor in the sum of all rewards of its role."""
    role: Literal["reward", "cost"] = "reward"
    """A cost is not maximised but held below a threshold (ppo.lagrange)."""
    normalize: bool | Literal["running"] | None = None
    """true: shift and scale by the mean and standard deviation that a reward model stored on held-out data. running:
    divide by the standard deviation of all scores of the run so far. false: neither. null: true for reward models,
    false for costs, functions, rules and `place: steps`."""
    shift: bool = False
    """Also subtract the running mean; only read with `normalize: running`."""
    clip: Positive | None = None
    """Clip the score, and each reward inside a completion, to +-clip, after normalising."""
    place: Literal["end", "steps"] = "end"
    """Of a process reward model: the score of the whole completion at its last token, or a reward at the last token of
    each step."""
    step_value: Literal["probability", "sign"] = "probability"
    """What a step earns: the probability that it is right, less `baseline`; or 1 when that is over one half, else -1.
    Only read with `place: steps`."""
    baseline: Finite = 0.5
    """Subtracted from the probability of each step, so that more steps are not better by themselves."""
    timeout: Positive = 60.0
    """Seconds one call of a function, or a regex rule over one rollout, may take."""

    def contradictions(self) -> Iterator[str]:
        if sum(source is not None for source in (self.run, self.function, self.rule)) != 1:
            yield "give exactly one of run, function and rule"
            return
        if self.normalize is True and (self.run is None or self.place == "steps"):
            what = "place: steps has rewards of steps" if self.run else "only a run has stored statistics"
            yield f"normalize: true does not fit here, {what}: use running or false"
        if self.normalize and self.role == "cost":
            yield "normalize would move a cost against its threshold: leave it out for role: cost"
        for key, read, words in (
            ("timeout", self.run is None, "function or rule"),
            ("shift", self.normalize == "running", "normalize: running"), ("place", self.run is not None, "run"),
            ("step_value", self.place == "steps", "place: steps"), ("baseline", self.place == "steps", "place: steps"),
        ):  # fmt: skip
            if not read and any(self.changed(key)):
                yield f"{key} is only read with {words}"

    def title(self) -> str:
        """Its name in the metrics."""
        own = "" if self.rule is None else self.rule.name
        return (
            self.name
            or (self.run or "").rstrip("/").rpartition("/")[2]
            or (self.function or "").rpartition(":")[2]
            or own
        )

    @property
    def by_statistics(self) -> bool:
        """Whether scores are shifted and scaled by what a reward model stored."""
        if self.normalize is None:
            return self.run is not None and self.role == "reward" and self.place == "end"
        return self.normalize is True
