"""What PPO needs before its first rollout: prompts, rewards, critic, and the checks of the first rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_cli.data.batch import Batch
from rlhf_cli.data.loader import Loader
from rlhf_cli.data.prepare import Prepared, prepare
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError
from rlhf_cli.models.base import Text
from rlhf_cli.models.checks import rounds
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.recipe.settings.ppo import PPOSettings
from rlhf_cli.rollouts.experience import Experience
from rlhf_cli.runs.display import Display
from rlhf_cli.stages import common
from rlhf_cli.stages.shelf import open_shelf
from rlhf_cli.train.engine import Losses, Part

ANOTHER_MODEL = 0.5
"""Nats a token, on average, that no rounding and no quantisation explains."""


@dataclass
class Progress:
    """Completions seen so far, and those of them that the policy learned from."""

    episodes: int = 0
    learned: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"episodes": self.episodes, "learned": self.learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint; those of older versions did not count what was learned from."""
        self.episodes = state["episodes"]
        self.learned = state.get("learned", self.episodes)


def read_tasks(recipe: PPORecipe, text: Text, display: Display) -> Prepared:
    """The prompts, none longer than leaves room for the completion."""
    room = recipe.data.max_length - recipe.rollout.max_new_tokens
    return common.read_data(recipe, "task", text, display, max_length=room)


@dataclass(frozen=True)
class Ptx:
    """Other text whose likelihood is part of each update of the policy (PPO-ptx, Ouyang et al. 2022 eq. 2)."""

    samples: Sequence[Sample]
    loader: Loader
    coef: float

    def next(self, policy: Role) -> Part:
        """The examples of the next update: coef times the mean negative log-likelihood of their scored tokens."""
        samples = common.select(self.samples, self.loader.next())

        def loss(batch: Batch, group: list[int]) -> Losses:
            logp = policy.logp(batch, statistics="none").logp
            nll = -logp.sum()
            return Losses({"token": self.coef * nll}, {"loss/ptx": (nll.detach(), float(len(logp)))})

        return Part(samples, loss, {"token": float(sum(c.scored.sum() for s in samples for c in s.completions))})


def read_ptx(recipe: PPORecipe, tasks: Prepared, text: Text, display: Display) -> tuple[Prepared, Ptx | None]:
    """The text of `ppo.ptx`, None without; and the prompts with its sources in their report."""
    settings = recipe.ppo.ptx
    if settings is None:
        return tasks, None
    found = prepare(
        recipe.data.model_copy(update={"train": settings.data, "eval": None}), "demonstration", text.template,
        shelf=open_shelf(recipe, display),
    )  # fmt: skip
    report = replace(
        found.report,
        sources=tuple(replace(s, split="ptx") for s in found.report.sources),
        tokens=tuple(replace(t, split="ptx") for t in found.report.tokens),
    )
    for line in report.lines():
        display.note(line)
    both = replace(
        tasks.report,
        sources=tasks.report.sources + report.sources,
        tokens=tasks.report.tokens + report.tokens,
        lints=tasks.report.lints + report.lints,
        bad_rows=tasks.report.bad_rows + report.bad_rows,
    )
    loader = common.make_loader(recipe, found, settings.batch_size or recipe.training.batch_size)
    return replace(tasks, report=both, shelved=tasks.shelved + found.shelved, bad=tasks.bad + found.bad), Ptx(
        found.train, loader, settings.coef
    )


def warn_of_long_limits(recipe: PPORecipe, display: Display) -> None:
    """A length in tokens that completions cannot pass holds nothing down. At rollout.max_new_tokens itself a margin
    still does."""
    room = recipe.rollout.max_new_tokens
    for reward in recipe.rewards:
        rule = reward.rule
        if rule is None or rule.name != "length" or rule.unit != "token" or rule.limit < room:
            continue
        if rule.limit > room or rule.aim == "near" or rule.margin == 1:
            display.warn(
                f"reward {reward.title()}: its limit of {rule.limit} tokens is not below rollout.max_new_tokens = "
                f"{room}, which cuts completions first: lower the limit, or raise rollout.max_new_tokens"
            )


def all_cut(settings: PPOSettings) -> str:
    """What to say when the length limit cut every completion of the first rollout."""
    what = {
        "penalty": f"ppo.missing_eos_penalty = {settings.missing_eos_penalty:g} is taken from each score",
        "replace": f"each gets ppo.truncated_score = {settings.truncated_score:g}",
        "bootstrap": "none is scored (ppo.truncation: bootstrap)",
        "drop": "there is nothing to learn from (ppo.truncation: drop)",
        "score": "each is scored as it stands (ppo.truncation: score)",
    }[settings.truncation]
    return (
        f"100% of the completions of the first rollout were cut by the length limit, and {what}: raise "
        f"rollout.max_new_tokens, or look whether the model knows its end token"
    )


def check_first_rollout(
    experience: Experience, policy: Role, display: Display, *, biased: bool, corrected: bool | None = None
) -> None:
    """Before the first update: policy = reference, recomputed log-probabilities = sampled ones. Raises ModelError.

    biased: completions were sampled from another distribution, so that the latter do not hold. corrected: None unless a
    server sampled them, whose numbers may differ by more; whether what is learned allows for that.
    """
    served = corrected is not None
    tolerance = 0.5 if rounds(policy.base) else 1e-3
    kl = float((experience.logp - experience.reference_logp).abs().max())
    if not kl <= tolerance:
        raise ModelError(
            f"policy and reference differ before the first update (by {kl:.3g} nats at one token)", "model",
            "is the reference the model the policy started from?",
        )  # fmt: skip
    gaps = (experience.sampled_logp - experience.logp).abs()[experience.mask]
    gap, mean = float(gaps.max()), float(gaps.mean())
    if not biased and not mean <= (ANOTHER_MODEL if served else tolerance / 10):
        raise ModelError(
            f"log-probabilities recomputed differ from those sampled (by {mean:.3g} nats a token)", "rollout",
            "does the server hold the weights of the recipe's base?" if served
            else "try model.attn_implementation: sdpa",
        )  # fmt: skip
    display.note(f"step 0: KL to the reference {kl:.1e}, recomputed against sampled {gap:.1e} (largest, nats a token)")
    if served and not corrected:
        display.warn(
            f"rollout.engine: vllm sampled with log-probabilities {mean:.1e} nats a token from those that are trained: "
            "ppo.importance_correction: {} weighs what is learned by that"
        )
