"""Proximal policy optimisation, the roles as adapters on one base.

1. Sample completions of a batch of prompts.
2. Score them: reward models and functions, weighted; a completion that was cut by the length limit pays a penalty.
3. Reward each token: -kl_coef x (log-ratio to the reference), plus the score at the last token.
4. Advantages and returns from the critic's values; whiten the advantages over the rollout.
5. A few passes over the rollout in mini-batches: clipped policy loss, clipped value loss, one role at a time.
6. Adapt the KL coefficients.
7. Held-out: the score of completions of the evaluation prompts.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.catalog import CONTROLLERS, ESTIMATORS
from rlhf_cli.data.batch import Batch
from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Sample
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.build import lineage, load_policy, load_reference
from rlhf_cli.models.roles import Role
from rlhf_cli.models.save import save_policy
from rlhf_cli.objectives.kl import PolicyPenalty, k3
from rlhf_cli.objectives.masked import masked_mean, whiten
from rlhf_cli.objectives.policy import clipped_policy, clipped_value, ratio
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.rollouts.experience import Experience, collect, pad, token_rewards
from rlhf_cli.rollouts.figures import figures
from rlhf_cli.rollouts.generate import Sampling, mixed
from rlhf_cli.rollouts.rewards import Reward, total
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common, ppo_setup
from rlhf_cli.train.engine import Engine, Losses


def run(recipe: PPORecipe, run: Run, display: Display, options: Options) -> None:
    """Train a policy by PPO. Raises RlhfError."""
    text = load_text(recipe.model)
    data = ppo_setup.read_tasks(recipe, text, display)
    tasks = cast("list[Task]", data.examples_train)
    functions = ppo_setup.load_functions(recipe, tasks)
    reward_texts = ppo_setup.load_reward_texts(recipe, text, tasks)
    stop_ids = ppo_setup.stop_ids(recipe, text)
    rollout = recipe.training.batch_size * recipe.ppo.mini_batches
    loader = common.make_loader(recipe, data, rollout // recipe.rollout.completions_per_prompt)
    if options.dry_run:
        display.note(f"dry run: {len(data.train)} prompts, {common.total_steps(recipe, loader)} rollouts of {rollout}")
        return
    policy = load_policy(recipe, text, display)
    reference, words = load_reference(policy, text)
    display.note(f"reference: {words}")
    rewards = ppo_setup.load_rewards(recipe, functions, reward_texts, text, policy)
    critic = ppo_setup.load_critic(recipe, policy, rewards, display)
    rate = recipe.training.learning_rate
    learners = [(policy, rate)] + ([(critic, recipe.critic.learning_rate or rate)] if critic else [])
    engine = common.open_engine(recipe, run, display, loader, learners)
    ppo = PPO(engine, recipe, policy, reference, critic, rewards, text, stop_ids)

    def step() -> dict[str, float]:
        indices = loader.next()
        metrics = ppo.iterate([tasks[i] for i in indices], common.select(data.train, indices))
        return metrics | {"epoch": loader.position}

    def evaluate() -> dict[str, float]:
        if data.eval:
            return ppo.evaluate(cast("list[Task]", data.examples_eval), data.eval)
        few = recipe.evaluation.samples
        if few:
            ppo.evaluate(tasks[:few], data.train[:few])
        return {}

    engine.evaluate = evaluate
    common.begin(engine, data, lineage(policy, text, role="policy"))
    engine.fit(step)
    common.finish(engine, lambda folder: save_policy(policy, text, folder))


class PPO:
    """One iteration of the algorithm, and what it carries from one to the next."""

    def __init__(
        self,
        engine: Engine,
        recipe: PPORecipe,
        policy: Role,
        reference: Role,
        critic: Role | None,
        rewards: list[Reward],
        text: Text,
        stop_ids: tuple[int, ...],
    ) -> None:
        self.engine, self.settings, self.seed = engine, recipe.ppo, recipe.seed
        self.policy, self.reference, self.critic, self.rewards = policy, reference, critic, rewards
        self.text, self.stop_ids, self.each = text, stop_ids, recipe.rollout.completions_per_prompt
        sampling = recipe.rollout
        self.sampling = Sampling(sampling.max_new_tokens, sampling.temperature, max_batch=sampling.max_batch)
        controller = CONTROLLERS[self.settings.kl.name].load()
        self.kl = controller(**common.settings_of(self.settings.kl))
        self.estimator = ESTIMATORS[self.settings.advantage.name].load()
        self.progress = ppo_setup.Progress()
        engine.kept |= {"kl": self.kl, "progress": self.progress}
        self.penalty: PolicyPenalty | None = None
        if self.settings.penalty is not None:
            self.penalty = PolicyPenalty(**self.settings.penalty.model_dump())
            engine.kept["penalty"] = self.penalty

    # --- steps 1 to 3 ------------------------------------------------------------------------------------------------

    def roll_out(
        self, tasks: list[Task], samples: list[Sample], each: int, seed: int, critic: Role | None
    ) -> tuple[Experience, Tensor, dict[str, float]]:
        """Completions of the prompts, their scores (N,), and the figures of the rewards."""
        experience = collect(
            self.engine.infer, self.policy, self.reference, critic, tasks, [s.prompt for s in samples],
            self.text.template, self.stop_ids, each, self.sampling, seed,
        )  # fmt: skip
        scores, metrics = total(self.rewards, experience.rollout, self.engine.infer)
        return experience, torch.from_numpy(scores).float(), metrics

    def iterate(self, tasks: list[Task], samples: list[Sample]) -> dict[str, float]:
        """One rollout and its updates."""
        seed = mixed(self.seed, self.engine.step + 1)
        experience, raw, metrics = self.roll_out(tasks, samples, self.each, seed, self.critic)
        if self.engine.step == 0:
            ppo_setup.check_first_rollout(experience, self.policy, self.engine.display)
        scores = raw - self.settings.missing_eos_penalty * (~experience.finished).float()
        rewards = token_rewards(experience, scores, self.kl.coef)
        if self.settings.whiten_rewards:
            rewards = whiten(rewards, experience.mask, shift_mean=False)
        settings = common.settings_of(self.settings.advantage)
        estimate = self.estimator(rewards, experience.values, experience.mask, experience.group, **settings)
        advantages = estimate.advantages
        if self.settings.whiten_advantages:
            advantages = whiten(advantages, experience.mask)
        self.progress.episodes += len(scores)
        metrics |= figures(experience, raw, scores, estimate.returns, self.kl.coef)
        metrics |= self.learn(experience, advantages, estimate.returns, seed)
        self.kl.update(metrics["objective/kl"], len(scores))
        return metrics | {"episode": float(self.progress.episodes)}

    # --- step 5 ------------------------------------------------------------------------------------------------------

    def learn(self, experience: Experience, advantages: Tensor, returns: Tensor, seed: int) -> dict[str, float]:
        """The passes over a rollout; means of the figures over its updates."""
        random = np.random.Generator(np.random.Philox(key=[seed, 2**32]))
        rows, history = len(advantages), []
        parts = min(self.settings.mini_batches, rows)
        chunks = [c for _ in range(self.settings.epochs) for c in np.array_split(random.permutation(rows), parts)]
        for chunk in chunks:
            history.append(self.update(experience, advantages, returns, chunk))
            if history[-1]["policy/approxkl"] > 1.5 * (self.settings.target_kl or np.inf):
                break
        means = {key: float(np.mean([h[key] for h in history])) for key in history[0]}
        means["policy/updates"] = float(len(history))
        means["policy/ratio_first"] = history[0]["val/ratio"]
        if self.penalty is not None:
            means["policy/penalty_coef"] = self.penalty.coef
            means["policy/kl_after"] = self.moved(experience)
            self.penalty.follow(means["policy/kl_after"])
        return means

    def moved(self, experience: Experience) -> float:
        """KL per token from the policy of the rollout to the policy after its updates, on all of the rollout."""
        temperature, samples = self.sampling.temperature, experience.rollout.samples
        now = pad(
            self.engine.infer(self.policy, samples, lambda b: self.policy.logp(b, temperature, statistics=False).logp)
        )[0]
        return float(masked_mean(k3(experience.logp, now), experience.mask))

    def update(
        self, experience: Experience, advantages: Tensor, returns: Tensor, chunk: np.ndarray
    ) -> dict[str, float]:
        """One optimiser step of the policy and one of the critic on the completions `chunk`."""
        samples = [experience.rollout.samples[i] for i in chunk]
        settings, device = self.settings, self.policy.base.device
        counts = {"token": float(experience.mask[chunk].sum())}

        def flat(x: Tensor, group: list[int]) -> Tensor:
            """(N, T) -> the tokens of the micro-batch's completions, in the order of its scored tokens."""
            rows = chunk[group]
            return x[rows][experience.mask[rows]].to(device)

        def policy_loss(batch: Batch, group: list[int]) -> Losses:
            of, old = self.policy.logp(batch, self.sampling.temperature), flat(experience.logp, group)
            loss, clipped = clipped_policy(
                of.logp, old, flat(advantages, group),
                clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip,
            )  # fmt: skip
            moved = k3(old, of.logp)  # KL(rollout policy || policy)
            whole = loss.sum()
            if settings.entropy_coef:
                whole = whole - settings.entropy_coef * of.entropy.sum()
            if self.penalty is not None:
                whole = whole + self.penalty.coef * moved.sum()
            n = float(len(old))
            return Losses({"token": whole}, {
                "policy/approxkl": (moved.detach().sum(), n),
                "policy/clipfrac": (clipped.sum(), n),
                "policy/entropy": (of.entropy.detach().sum(), n),
                "val/ratio": (ratio(of.logp.detach(), old).sum(), n),
            })  # fmt: skip

        out = self.engine.update(self.policy, samples, policy_loss, counts)
        metrics = out | {"loss/policy": out["loss"]}
        if self.critic is None or experience.values is None:
            return metrics
        critic, old_values = self.critic, experience.values

        def value_loss(batch: Batch, group: list[int]) -> Losses:
            values = critic.values(batch)
            loss, clipped = clipped_value(
                values, flat(old_values, group), flat(returns, group), value_clip=settings.value_clip
            )
            return Losses({"token": loss.sum()}, {"val/clipfrac": (clipped.sum(), float(len(values)))})

        out = self.engine.update(critic, samples, value_loss, counts)
        return metrics | {
            "loss/value": out["loss"], "val/clipfrac": out["val/clipfrac"], "val/grad_norm": out["grad_norm"]
        }  # fmt: skip

    # --- step 7 ------------------------------------------------------------------------------------------------------

    def evaluate(self, tasks: list[Task], samples: list[Sample]) -> dict[str, float]:
        """Scores of one completion of each held-out prompt, always drawn from the same uniforms."""
        experience, scores, metrics = self.roll_out(tasks, samples, 1, mixed(self.seed, 0), None)
        rollout = experience.rollout
        for i in range(min(self.engine.recipe.evaluation.samples, len(tasks))):
            self.engine.run.sample({
                "step": self.engine.step, "prompt": self.text.template.decode(rollout.samples[i].prompt),
                "completion": rollout.completions[i], "score": float(scores[i]),
                "finished": bool(experience.finished[i]),
            })  # fmt: skip
        keep = ("objective/scores", "objective/kl", "completions/mean_length", "completions/eos_rate")
        values = figures(experience, scores, scores, None, self.kl.coef)
        return {f"eval/{k}": v for k, v in (metrics | {k: values[k] for k in keep}).items()}
