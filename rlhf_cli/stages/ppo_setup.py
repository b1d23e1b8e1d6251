"""What PPO needs before its first rollout: prompts, rewards, critic, and the checks of the first rollout."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_cli.catalog import ESTIMATORS
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.examples import Task
from rlhf_cli.data.loader import Loader
from rlhf_cli.data.prepare import Prepared, prepare
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models import adapters
from rlhf_cli.models.base import Base, Text, load_text
from rlhf_cli.models.build import frozen_role, scalar_head
from rlhf_cli.models.checks import rounds
from rlhf_cli.models.roles import Role, disable_dropout
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.rollouts.experience import Experience
from rlhf_cli.rollouts.rewards import (
    FunctionReward,
    ModelReward,
    Reward,
    load_function,
    model_reward,
    retokenise,
    statistics,
)
from rlhf_cli.runs.display import Display
from rlhf_cli.stages import common
from rlhf_cli.train.engine import Losses, Part


@dataclass
class Progress:
    """Completions seen so far."""

    episodes: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.episodes = state["episodes"]


def read_tasks(recipe: PPORecipe, text: Text, display: Display) -> Prepared:
    """The prompts, none longer than leaves room for the completion."""
    room = recipe.data.max_length - recipe.rollout.max_new_tokens
    return common.read_data(recipe, "task", text, display, max_length=room)


@dataclass(frozen=True)
class Ptx:
    """Other text whose likelihood is part of each update of the policy (PPO-ptx, Ouyang et al. 2022 eq. 2)."""

    samples: list[Sample]
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
        recipe.data.model_copy(update={"train": settings.data, "eval": None}), "demonstration", text.template
    )
    report = replace(
        found.report,
        sources=tuple(replace(s, split="ptx") for s in found.report.sources),
        tokens=tuple(replace(t, split="ptx") for t in found.report.tokens),
    )
    for line in report.lines():
        display.note(line)
    both = replace(
        tasks.report, sources=tasks.report.sources + report.sources, tokens=tasks.report.tokens + report.tokens
    )
    loader = common.make_loader(recipe, found, settings.batch_size or recipe.training.batch_size)
    return replace(tasks, report=both), Ptx(found.train, loader, settings.coef)


def load_functions(recipe: PPORecipe, tasks: Sequence[Task]) -> dict[int, FunctionReward]:
    """Reward functions, imported, checked and called once, by their place in the recipe."""
    return {i: load_function(r, tasks) for i, r in enumerate(recipe.rewards) if r.function is not None}


def load_reward_texts(recipe: PPORecipe, policy: Text, tasks: Sequence[Task]) -> dict[int, Text]:
    """Tokenizers, configurations and statistics of the reward models: wrong ones are refused before any weights are
    read, and so is a prompt that a reward model's own template cannot render."""
    texts: dict[int, Text] = {}
    for i, settings in enumerate(recipe.rewards):
        if settings.run is None:
            continue
        own = recipe.model.model_copy(update={"name_or_path": settings.run, "revision": None})
        texts[i] = load_text(own, role="reward")
        statistics(settings, texts[i])
        if texts[i].template.digest != policy.template.digest:
            for task in tasks:
                retokenise(texts[i].template, task, "Yes.", finished=True)
    return texts


def load_rewards(
    recipe: PPORecipe, functions: dict[int, FunctionReward], texts: dict[int, Text], text: Text, policy: Role
) -> list[Reward]:
    """All rewards in the order of the recipe; reward models as roles, on the policy's base where they belong to it."""
    rewards: list[Reward] = []
    for i, settings in enumerate(recipe.rewards):
        if i in functions:
            rewards.append(functions[i])
            continue
        own = recipe.model.model_copy(update={"revision": None})
        role = frozen_role(f"reward-{i}", own, texts[i], policy.base)
        rewards.append(model_reward(settings, texts[i], role, text))
    return rewards


def stop_ids(recipe: PPORecipe, text: Text) -> tuple[int, ...]:
    """The model's end tokens and those the recipe adds. Raises RecipeError when one is not a single token."""
    ids = list(text.template.stop_ids)
    for stop in recipe.rollout.stop:
        tokens = text.tokenizer.encode(stop, add_special_tokens=False)
        if len(tokens) != 1:
            raise RecipeError(f"'{stop}' is {len(tokens)} tokens of this vocabulary, not one", "rollout.stop")
        ids.append(tokens[0])
    return tuple(dict.fromkeys(ids))


def load_critic(recipe: PPORecipe, policy: Role, rewards: Sequence[Reward], display: Display) -> Role | None:
    """The value model, or None when the estimator reads no values. Raises RecipeError.

    From a reward model: a trainable copy of its weights, its head scaled as the score is, so that values start on the
    scale of the scores. From the policy: a copy of its weights with a zero head.
    """
    if not ESTIMATORS[recipe.ppo.advantage.name].critic:
        display.note(f"critic: none, {recipe.ppo.advantage.name} reads no values")
        return None
    models = [r for r in rewards if isinstance(r, ModelReward)]
    usable = [r for r in models if _copies(policy, r.role)]
    if recipe.critic.start == "reward" and not usable:
        why = "there is no reward model" if not models else "the reward model is not an adapter on the policy's base"
        raise RecipeError(f"the critic cannot start from a reward model: {why}", "critic.start", "use policy")
    start = recipe.critic.start if recipe.critic.start != "auto" else ("reward" if usable else "policy")
    if start == "policy":
        critic = _copy(recipe, policy.base, policy.adapter, torch.zeros(1, _width(policy)), 0.0)
    else:
        model = usable[0]
        assert model.role.head is not None
        scale = model.weight / model.std
        critic = _copy(recipe, model.role.base, model.role.adapter, model.role.head.weight * scale, -model.mean * scale)
    display.note(f"critic: starts from {'the policy, zero head' if start == 'policy' else usable[0].name}")
    return critic


def _copies(policy: Role, reward: Role) -> bool:
    """Whether a reward model can become a critic trained as the policy is: both adapters on one base, or both whole."""
    return reward.base is policy.base if policy.adapter is not None else reward.adapter is None


def _width(role: Role) -> int:
    return int(role.base.model.config.get_text_config().hidden_size)


def _copy(recipe: PPORecipe, base: Base, adapter: str | None, weight: torch.Tensor, bias: float) -> Role:
    """A trainable scalar role with a copy of an adapter, or of a whole model."""
    if adapter is None:
        model = copy.deepcopy(base.model).float()  # type: ignore[operator]
        if recipe.model.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        own = replace(base, model=model, open_graph=None)
        return Role("critic", own, None, scalar_head(own, weight, bias), trained=True)
    config = copy.deepcopy(adapters.adapter_config(base, adapter))
    tensors = {k: v.detach().clone() for k, v in adapters.adapter_tensors(base, adapter).items()}
    adapters.add_adapter(base, "critic", config, tensors)
    disable_dropout(base)
    return Role("critic", base, "critic", scalar_head(base, weight, bias), trained=True)


def check_first_rollout(experience: Experience, policy: Role, display: Display) -> None:
    """Before the first update: policy = reference, recomputed log-probabilities = sampled ones. Raises ModelError."""
    tolerance = 0.5 if rounds(policy.base) else 1e-3
    kl = float((experience.logp - experience.reference_logp).abs().max())
    if not kl <= tolerance:
        raise ModelError(
            f"policy and reference differ before the first update (by {kl:.3g} nats at one token)", "model",
            "is the reference the model the policy started from?",
        )  # fmt: skip
    gaps = (experience.sampled_logp - experience.logp).abs()[experience.mask]
    gap, mean = float(gaps.max()), float(gaps.mean())
    if not mean <= tolerance / 10:
        raise ModelError(
            f"log-probabilities recomputed differ from those sampled (by {mean:.3g} nats a token)", "rollout",
            "try model.attn_implementation: sdpa",
        )  # fmt: skip
    display.note(f"step 0: KL to the reference {kl:.1e}, recomputed against sampled {gap:.1e} (largest, nats a token)")
