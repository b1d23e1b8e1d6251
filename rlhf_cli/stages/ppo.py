"""Policy gradient: PPO and the estimators that need no critic, the roles as adapters on one base.

1. Sample completions of a batch of prompts; where the estimator asks for it, also the greedy completion of each prompt.
2. Score them: reward models and functions, weighted; a completion that was cut by the length limit pays a penalty.
3. Reward each token: the score at the last one and, unless the KL stands in the loss, -kl_coef x (log-ratio to the
   reference) at all of them.
4. Advantages by the estimator, from the critic's values or from the other completions; whiten them over the rollout.
5. A few passes over the rollout in mini-batches: clipped policy loss, clipped value loss, one role at a time; with ptx
   also the likelihood of other text, in the policy's step.
6. Adapt the KL coefficients.
7. Held-out: the score of completions of the evaluation prompts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rlhf_cli.catalog import CONTROLLERS, ESTIMATORS
from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Sample
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.build import lineage, load_policy, load_reference
from rlhf_cli.models.roles import Role
from rlhf_cli.models.save import save_policy
from rlhf_cli.objectives.kl import PolicyPenalty, k3
from rlhf_cli.objectives.masked import masked_mean, whiten
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.rollouts.experience import Experience, draw, measure, pad, token_rewards
from rlhf_cli.rollouts.figures import figures
from rlhf_cli.rollouts.generate import Sampling, mixed
from rlhf_cli.rollouts.rewards import Reward, total
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common, ppo_setup
from rlhf_cli.stages.ppo_losses import Coefficients, Lesson, counts, policy_loss, value_loss
from rlhf_cli.train.engine import Engine


def run(recipe: PPORecipe, run: Run, display: Display, options: Options) -> None:
    """Train a policy by PPO. Raises RlhfError."""
    text = load_text(recipe.model)
    data = ppo_setup.read_tasks(recipe, text, display)
    data, ptx = ppo_setup.read_ptx(recipe, data, text, display)
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
    ppo = PPO(engine, recipe, policy, reference, critic, rewards, text, stop_ids, ptx)

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
        ptx: ppo_setup.Ptx | None,
    ) -> None:
        self.engine, self.settings, self.seed = engine, recipe.ppo, recipe.seed
        self.policy, self.reference, self.critic, self.rewards = policy, reference, critic, rewards
        self.text, self.stop_ids, self.each = text, stop_ids, recipe.rollout.completions_per_prompt
        sampling = recipe.rollout
        self.sampling = Sampling(sampling.max_new_tokens, sampling.temperature, max_batch=sampling.max_batch)
        controller = CONTROLLERS[self.settings.kl.name].load()
        self.kl = controller(**common.settings_of(self.settings.kl))
        self.entry = ESTIMATORS[self.settings.advantage.name]
        self.estimator = self.entry.load()
        self.progress = ppo_setup.Progress()
        engine.kept |= {"kl": self.kl, "progress": self.progress}
        self.ptx = ptx
        if ptx is not None:
            engine.kept["ptx"] = ptx.loader
        self.penalty: PolicyPenalty | None = None
        if self.settings.penalty is not None:
            self.penalty = PolicyPenalty(**self.settings.penalty.model_dump())
            engine.kept["penalty"] = self.penalty

    # --- steps 1 to 4 ------------------------------------------------------------------------------------------------

    def roll_out(
        self, tasks: list[Task], samples: list[Sample], each: int, seed: int, critic: Role | None
    ) -> tuple[Experience, Tensor, dict[str, float]]:
        """Completions of the prompts, their scores (N,), and the figures of the rewards."""
        drawn = draw(
            self.policy,
            tasks,
            [s.prompt for s in samples],
            self.text.template,
            self.stop_ids,
            each,
            self.sampling,
            seed,
        )
        infer, temperature = self.engine.infer, self.sampling.temperature
        experience = measure(infer, self.policy, self.reference, critic, drawn, temperature)
        scores, metrics = total(self.rewards, experience.rollout, infer)
        return experience, torch.from_numpy(scores).float(), metrics

    def greedy(self, tasks: list[Task], samples: list[Sample]) -> tuple[Tensor, dict[str, float]]:
        """Scores, penalties included, of the greedy completion of each prompt (P,), and its figures."""
        sampling = replace(self.sampling, greedy=True)
        prompts = [s.prompt for s in samples]
        rollout, _, _ = draw(self.policy, tasks, prompts, self.text.template, self.stop_ids, 1, sampling, 0)
        finished = torch.tensor(list(rollout.finished))
        scores = self.penalised(torch.from_numpy(total(self.rewards, rollout, self.engine.infer)[0]).float(), finished)
        return scores, {
            "greedy/scores": float(scores.mean()), "greedy/eos_rate": float(finished.float().mean()),
            "greedy/completions": float(len(scores)),
        }  # fmt: skip

    def penalised(self, scores: Tensor, finished: Tensor) -> Tensor:
        """Scores (N,) less the penalty of a missing end token."""
        return scores - self.settings.missing_eos_penalty * (~finished).float()

    def iterate(self, tasks: list[Task], samples: list[Sample]) -> dict[str, float]:
        """One rollout and its updates."""
        seed = mixed(self.seed, self.engine.step + 1)
        experience, raw, metrics = self.roll_out(tasks, samples, self.each, seed, self.critic)
        if self.engine.step == 0:
            ppo_setup.check_first_rollout(experience, self.policy, self.engine.display)
        greedy = None
        if self.entry.greedy:
            of_prompt, more = self.greedy(tasks, samples)
            greedy, metrics = of_prompt[experience.group], metrics | more
        scores = self.penalised(raw, experience.finished)
        rewards = token_rewards(experience, scores, self.kl.coef if self.settings.kl_in == "reward" else 0.0)
        if self.settings.whiten_rewards:
            rewards = whiten(rewards, experience.mask, shift_mean=False)
        settings = common.settings_of(self.settings.advantage)
        advantages, returns = self.estimator(
            rewards, experience.values, experience.mask, experience.group, greedy, **settings
        )
        if self.settings.whiten_advantages:
            advantages = whiten(advantages, experience.mask)
        self.progress.episodes += len(scores)
        metrics |= figures(experience, raw, scores, returns, self.kl.coef)
        metrics |= self.learn(Lesson(experience, advantages, returns, self.sampling.temperature), seed)
        self.kl.update(metrics["objective/kl"], len(scores))
        return metrics | {"episode": float(self.progress.episodes)}

    # --- step 5 ------------------------------------------------------------------------------------------------------

    def learn(self, lesson: Lesson, seed: int) -> dict[str, float]:
        """The passes over a rollout; means of the figures over its updates."""
        random = np.random.Generator(np.random.Philox(key=[seed, 2**32]))
        rows, history = len(lesson.advantages), []
        parts = min(self.settings.mini_batches, rows)
        chunks = [c for _ in range(self.settings.epochs) for c in np.array_split(random.permutation(rows), parts)]
        for chunk in chunks:
            history.append(self.update(lesson, chunk))
            if history[-1]["policy/approxkl"] > 1.5 * (self.settings.target_kl or np.inf):
                break
        means = {key: float(np.mean([h[key] for h in history])) for key in history[0]}
        means["policy/updates"] = float(len(history))
        means["policy/ratio_first"] = history[0]["val/ratio"]
        if self.penalty is not None:
            means["policy/penalty_coef"] = self.penalty.coef
            means["policy/kl_after"] = self.moved(lesson.experience)
            self.penalty.follow(means["policy/kl_after"])
        return means

    def moved(self, experience: Experience) -> float:
        """KL per token from the policy of the rollout to the policy after its updates, on all of the rollout."""
        temperature, samples = self.sampling.temperature, experience.rollout.samples
        now = pad(
            self.engine.infer(self.policy, samples, lambda b: self.policy.logp(b, temperature, statistics="none").logp)
        )[0]
        return float(masked_mean(k3(experience.logp, now), experience.mask))

    def update(self, lesson: Lesson, chunk: np.ndarray) -> dict[str, float]:
        """One optimiser step of the policy and one of the critic on the completions `chunk` (n,)."""
        samples = [lesson.experience.rollout.samples[i] for i in chunk]
        divisors = counts(lesson, chunk, self.sampling.max_new_tokens)
        coefficients = Coefficients(self.kl.coef, self.penalty.coef if self.penalty else None)
        loss = policy_loss(self.policy, self.settings, lesson, chunk, coefficients)
        also = self.ptx.next(self.policy) if self.ptx else None
        out = self.engine.update(self.policy, samples, loss, divisors, also=also)
        metrics = out | {"loss/policy": out["loss"]}
        if self.ptx is not None:
            metrics["loss/policy"] -= self.ptx.coef * out["loss/ptx"]
        old_values = lesson.experience.values
        if self.critic is None or old_values is None:
            return metrics
        loss = value_loss(self.critic, old_values, self.settings, lesson, chunk)
        out = self.engine.update(self.critic, samples, loss, divisors)
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
