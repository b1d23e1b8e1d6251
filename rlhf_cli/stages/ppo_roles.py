"""The roles of PPO beside the policy: reference, rewards, critics; and what each of them takes of the memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rlhf_cli.catalog import ESTIMATORS
from rlhf_cli.errors import RecipeError
from rlhf_cli.models import adapters, checkpointing, sharding
from rlhf_cli.models.base import Base, Text
from rlhf_cli.models.build import load_policy, load_reference, scalar_head, with_values
from rlhf_cli.models.roles import Role, disable_dropout
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.rollouts.loading import Checked, open_rewards
from rlhf_cli.rollouts.rewards import Reward
from rlhf_cli.rollouts.scorers import ModelReward, ProcessReward
from rlhf_cli.runs.display import Display


@dataclass(frozen=True)
class Roles:
    """Everyone who takes part."""

    policy: Role
    reference: Role
    rewards: list[Reward]
    critic: Role | None
    """None: no values are read, or the policy has them on its own trunk."""
    cost_critic: Role | None

    def learners(self, recipe: PPORecipe) -> list[tuple[Role, float]]:
        """Who is trained, and at which learning rate."""
        rate = recipe.training.learning_rate
        critics = [critic for critic in (self.critic, self.cost_critic) if critic is not None]
        return [(self.policy, rate)] + [(critic, recipe.critic.learning_rate or rate) for critic in critics]

    def everyone(self) -> list[Role]:
        """All roles in memory."""
        scoring = [reward.model for reward in self.rewards if isinstance(reward, ModelReward | ProcessReward)]
        return [r for r in (self.policy, self.reference, self.critic, self.cost_critic, *scoring) if r is not None]


def load_roles(recipe: PPORecipe, checked: Sequence[Checked], text: Text, display: Display) -> Roles:
    """All of them, on one base where they belong to it. Raises RecipeError and ModelError."""
    policy = load_policy(recipe, text, display)
    moving = recipe.ppo.reference_update
    reference, words = load_reference(policy, text, moves=moving is not None)
    if moving is not None:
        words += f", moved towards the policy by {moving.alpha:g} every {moving.every} rollouts"
        words += "" if recipe.lora is None else " (the factors of the adapters are mixed, not their products)"
    display.note(f"reference: {words}")
    rewards = open_rewards(checked, recipe.model, policy.base, text)
    has_critic, costs = ESTIMATORS[recipe.ppo.advantage.name].critic, recipe.ppo.lagrange is not None
    if not has_critic:
        display.note(f"critic: none, {recipe.ppo.advantage.name} reads no values")
    elif recipe.critic.shared:
        policy = with_values(policy, 2 if costs else 1)
        display.note("critic: a zero head on the policy's own trunk")
    own = has_critic and not recipe.critic.shared
    critic = load_critic(recipe, "critic", policy, rewards, display) if own else None
    cost_critic = load_critic(recipe, "cost-critic", policy, rewards, display) if own and costs else None
    return Roles(policy, reference, rewards, critic, cost_critic)


def load_critic(recipe: PPORecipe, name: str, policy: Role, rewards: Sequence[Reward], display: Display) -> Role:
    """A value model of its own, for the reward or for the cost. Raises RecipeError.

    From a reward model: a trainable copy of its weights, its head scaled as the score is, so that values start on the
    scale of the scores. From the policy, or from nothing (zero): a zero head.
    """
    wanted = "cost" if name == "cost-critic" else "reward"
    models = [r for r in rewards if isinstance(r, ModelReward) and r.role == wanted]
    usable = [r for r in models if _copies(policy, r.model) and r.scaling.running is None]
    if recipe.critic.start == "reward" and not usable:
        why = f"the {wanted} model is no adapter on the policy's base, or its scale moves (normalize: running)"
        why = why if models else f"there is no {wanted} model"
        raise RecipeError(f"the {name} cannot start from a {wanted} model: {why}", "critic.start", "use policy")
    start = recipe.critic.start if recipe.critic.start != "auto" else ("reward" if usable else "policy")
    if start == "reward":
        reward, head = usable[0], usable[0].model.head
        assert head is not None
        scale = reward.weight / reward.scaling.std
        weight, bias = head.weight * scale, -reward.scaling.mean * scale
        display.note(f"{name}: starts from {reward.name}")
        return _copy(recipe, name, reward.model.base, reward.model.adapter, weight, bias)
    display.note(f"{name}: starts from {'the policy' if start == 'policy' else 'a fresh adapter'}, zero head")
    zeros = torch.zeros(1, _width(policy))
    if start == "policy" or recipe.lora is None:
        return _copy(recipe, name, policy.base, policy.adapter, zeros, 0.0)
    adapters.add_adapter(policy.base, name, adapters.lora_config(recipe.lora))
    disable_dropout(policy.base)
    return Role(name, policy.base, name, scalar_head(policy.base, zeros, 0.0), trained=True)


def _copies(policy: Role, reward: Role) -> bool:
    """Whether a reward model can become a critic trained as the policy is: both adapters on one base, or both whole."""
    return reward.base is policy.base if policy.adapter is not None else reward.adapter is None


def _width(role: Role) -> int:
    return int(role.base.model.config.get_text_config().hidden_size)


def _copy(recipe: PPORecipe, name: str, base: Base, adapter: str | None, weight: torch.Tensor, bias: float) -> Role:
    """A trainable scalar role with a copy of an adapter, or of a whole model."""
    if adapter is None:
        if base.again is not None:
            own = replace(base.again(True), packed=base.packed)
            sharding.round_as(own, base)
            disable_dropout(own)
        else:
            own = replace(base, model=copy.deepcopy(base.model).float(), open_graph=None)  # type: ignore[operator]
        checkpointing.enable(own.model, recipe.model.gradient_checkpointing)
        return Role(name, own, None, scalar_head(own, weight, bias), trained=True)
    config = copy.deepcopy(adapters.adapter_config(base, adapter))
    tensors = {k: v.detach().clone() for k, v in adapters.adapter_tensors(base, adapter).items()}
    adapters.add_adapter(base, name, config, tensors)
    disable_dropout(base)
    return Role(name, base, name, scalar_head(base, weight, bias), trained=True)
