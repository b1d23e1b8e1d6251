"""What the figures of the last PPO steps say is wrong, in plain words, and what to do about it.

Rules are pure functions of recent figures; each belongs to a wire of the recipe's `doctor.wires`. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.recipe.settings.doctor import Action, ThresholdSettings

WATCHED = (
    "objective/kl", "objective/scores", "objective/scores_std", "objective/entropy", "completions/eos_rate",
    "completions/truncated", "completions/mean_length", "rollout/repetition", "val/explained_variance",
    "rollout/reward_length_correlation", "policy/clipfrac", "val/ratio", "policy/ratio_max", "frac_reward_zero_std",
    "rollout/unscorable", "completions/learned_from",
)  # fmt: skip
"""What the rules read."""

Row = Mapping[str, float]


@dataclass(frozen=True)
class Evidence:
    """What a rule looks at."""

    rows: Sequence[Row]
    """Of the last steps, the newest last."""
    start: Row
    """Means over the first steps; empty before there are enough of them."""
    limits: ThresholdSettings
    kl_limit: float

    def now(self, name: str) -> float:
        """The newest value; NaN, which no comparison holds for, where there is none."""
        return self.rows[-1].get(name, math.nan)

    def last(self, name: str, count: int) -> list[float]:
        """The last `count` values; none when a step lacks one."""
        found = [row[name] for row in self.rows[-count:] if name in row]
        return found if len(found) == count else []

    def stays(self, name: str, bad: Callable[[float], bool], times: int = 1) -> bool:
        """Whether the value has been bad for times x patience steps."""
        found = self.last(name, times * self.limits.patience)
        return bool(found) and all(map(bad, found))

    def since_start(self, name: str) -> float:
        """The newest value over that of the start."""
        first = self.start.get(name, 0.0)
        return self.now(name) / first if first > 0 else math.nan


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong. `says` gives a sentence with the numbers, empty when all is well."""

    wire: str
    severity: int
    """1: less is learned than could be; 2: look at the texts; 3: the policy is being spoilt."""
    says: Callable[[Evidence], str]
    remedies: tuple[str, ...]
    """Recipe keys to try, and which way."""


@dataclass(frozen=True)
class Finding:
    """What a rule found."""

    wire: str
    severity: int
    sentence: str


def _kl(e: Evidence) -> str:
    kl = e.now("objective/kl")
    return "" if not kl > e.kl_limit else (
        f"the KL to the reference is {kl:.3g} nats per completion, over its limit of {e.kl_limit:.3g}: lower "
        f"training.learning_rate or raise the coefficient of ppo.kl"
    )  # fmt: skip


def _negative_kl(e: Evidence) -> str:
    n = e.limits.patience
    kls = e.last("objective/kl", n)
    if not kls or max(kls) >= 0 or sum(kls) / n >= -e.limits.negative_kl:
        return ""
    return (
        f"the KL has been negative for {n} steps ({sum(kls) / n:.3g} nats on average): completions are not sampled "
        f"from the distribution that is scored; look at the temperature, top-k and top-p of rollout"
    )


def _hacking(e: Evidence) -> str:
    kl, score, first = e.now("objective/kl"), e.now("objective/scores"), e.start.get("objective/scores", math.nan)
    if not (kl > e.kl_limit and score > first + e.start.get("objective/scores_std", math.nan)):
        return ""
    return (
        f"the score rose from {first:.3g} to {score:.3g} while the KL reached {kl:.3g} nats (limit {e.kl_limit:.3g}): "
        f"the reward is probably being gamed; read the samples, raise the coefficient of ppo.kl, stop earlier"
    )


def _eos_rate(e: Evidence) -> str:
    if e.stays("completions/learned_from", lambda x: x == 0.0):
        return (
            f"every completion of the last {e.limits.patience} rollouts was cut, and ppo.truncation: drop learns from "
            f"none that was: nothing is learned; raise rollout.max_new_tokens, or take another truncation"
        )
    if e.stays("completions/truncated", lambda x: x > e.limits.truncated):
        return (
            f"{e.now('completions/truncated'):.0%} of the completions were cut by the length limit: raise "
            f"rollout.max_new_tokens or (truncation: penalty) ppo.missing_eos_penalty, or name the right end token"
        )
    if e.since_start("completions/eos_rate") < e.limits.eos_drop:
        return (
            f"only {e.now('completions/eos_rate'):.0%} of the completions end by themselves, "
            f"{e.start['completions/eos_rate']:.0%} did at the start: lower training.learning_rate or, "
            f"with truncation: penalty, raise ppo.missing_eos_penalty"
        )
    return ""


def _length(e: Evidence) -> str:
    times, name = e.since_start("completions/mean_length"), "completions/mean_length"
    if times > e.limits.length_growth:
        what = "run away: a reward that likes length needs a price for it, or raise the coefficient of ppo.kl"
    elif times < e.limits.length_shrink:
        what = "collapsed: look whether the reward pays for short answers, or lower training.learning_rate"
    else:
        return ""
    return (
        f"completions have {e.now(name):.3g} tokens on average, {e.start[name]:.3g} at the start: lengths have {what}"
    )


def _repetition(e: Evidence) -> str:
    return "" if not e.stays("rollout/repetition", lambda x: x > e.limits.repetition) else (
        f"{e.now('rollout/repetition'):.0%} of the 4-grams of tokens repeat earlier ones of their completion: the "
        f"texts degenerate; raise the coefficient of ppo.kl or lower training.learning_rate"
    )  # fmt: skip


def _entropy(e: Evidence) -> str:
    first = e.start.get("objective/entropy", 0.0)
    if not (first > 0 and e.stays("objective/entropy", lambda x: x < e.limits.entropy * first)):
        return ""
    return (
        f"the entropy fell to {e.now('objective/entropy'):.3g} nats a token from {first:.3g}: the policy hardly "
        f"explores any more; raise ppo.entropy_coef or the coefficient of ppo.kl, or lower training.learning_rate"
    )


def _explained_variance(e: Evidence) -> str:
    name, n = "val/explained_variance", 2 * e.limits.patience
    return "" if not e.stays(name, lambda x: x < e.limits.explained_variance, 2) else (
        f"the explained variance has been below {e.limits.explained_variance:g} for {n} steps (now {e.now(name):.3g}): "
        f"the critic is worse than a constant; raise critic.learning_rate or critic.pretrain_steps"
    )  # fmt: skip


def _length_correlation(e: Evidence) -> str:
    lengths = e.last("completions/mean_length", 2 * e.limits.patience)
    if not (
        lengths
        and sum(lengths[e.limits.patience :]) > 1.05 * sum(lengths[: e.limits.patience])
        and e.stays("rollout/reward_length_correlation", lambda x: x > e.limits.length_correlation)
    ):
        return ""
    return (
        f"the score follows the length (correlation {e.now('rollout/reward_length_correlation'):.2f}) and the length "
        f"grows (now {lengths[-1]:.3g} tokens): the policy learns to be long; give length a price among the rewards"
    )


def _clip_fraction(e: Evidence) -> str:
    return "" if not e.stays("policy/clipfrac", lambda x: x > e.limits.clip_fraction) else (
        f"{e.now('policy/clipfrac'):.0%} of the tokens are clipped: updates are too large; lower "
        f"training.learning_rate or ppo.epochs, or set ppo.target_kl"
    )  # fmt: skip


def _ratio(e: Evidence) -> str:
    limit, mean, most = e.limits.ratio, e.now("val/ratio"), e.now("policy/ratio_max")
    if not (most > limit or abs(mean - 1.0) > limit / 10):
        return ""
    largest = f" (largest {most:.3g})" if not math.isnan(most) else ""
    return (
        f"the ratio of new to old probability is {mean:.3g} on average{largest}: updates are far too large; lower "
        f"training.learning_rate or ppo.epochs, or set ppo.target_kl"
    )


def _contrast(e: Evidence) -> str:
    return "" if not e.stays("frac_reward_zero_std", lambda x: x >= e.limits.contrast) else (
        f"{e.now('frac_reward_zero_std'):.0%} of the prompts have completions of equal score: there is nothing to "
        f"learn from; raise rollout.completions_per_prompt or rollout.temperature, or take other prompts"
    )  # fmt: skip


def _unscorable(e: Evidence) -> str:
    share = e.now("rollout/unscorable")
    return "" if not share > e.limits.unscorable else (
        f"{share:.0%} of the completions of this rollout could not be scored and were left out: look at what the "
        f"reward returns for them"
    )  # fmt: skip


_SLOWER = ("training.learning_rate: lower", "ppo.kl.coef: higher", "ppo.target_kl: 0.02, so that updates stop early")
RULES: tuple[Rule, ...] = (
    Rule("hacking", 3, _hacking, ("ppo.kl.coef: higher", "training.max_steps: fewer", "rewards: another, or a sum")),
    Rule("kl", 3, _kl, _SLOWER),
    Rule("ratio", 3, _ratio, ("training.learning_rate: lower", "ppo.epochs: fewer", "ppo.target_kl: 0.02")),
    Rule("repetition", 3, _repetition, ("ppo.kl.coef: higher", "training.learning_rate: lower")),
    Rule("entropy", 3, _entropy, ("ppo.entropy_coef: 0.01", *_SLOWER)),
    Rule("eos_rate", 3, _eos_rate, ("rollout.max_new_tokens: more", "ppo.missing_eos_penalty: higher")),
    Rule("length", 2, _length, ("ppo.kl.coef: higher", "training.learning_rate: lower")),
    Rule("length_correlation", 2, _length_correlation, ("rewards: also one that counts length", "ppo.kl.coef: higher")),
    Rule("negative_kl", 2, _negative_kl, ("rollout.temperature: 1.0", "model.attn_implementation: sdpa")),
    Rule("clip_fraction", 2, _clip_fraction, ("training.learning_rate: lower", "ppo.epochs: fewer")),
    Rule("explained_variance", 1, _explained_variance, ("critic.learning_rate: higher", "critic.pretrain_steps: 10")),
    Rule("contrast", 1, _contrast, ("rollout.completions_per_prompt: more", "rollout.temperature: higher")),
    Rule("unscorable", 1, _unscorable, ("rewards: a number for every completion",)),
)
"""The gravest first: the order in which one stands for all in the health line."""


def examine(evidence: Evidence, wires: Mapping[str, Action]) -> list[Finding]:
    """What is wrong, the gravest first."""
    watched = [rule for rule in RULES if wires[rule.wire] != "ignore"]
    return [Finding(r.wire, r.severity, sentence) for r in watched if (sentence := r.says(evidence))]
