"""Policy gradient: PPO and the estimators that need no critic, the roles as adapters on one base.

1. Sample completions of a batch of prompts; where the estimator asks for it, also the greedy completion of each prompt.
2. Score them: rewards and costs, weighted; a completion that was cut by the length limit follows `ppo.truncation`.
3. Reward each token: the score at the last one, scores of single tokens at theirs and, unless the KL stands in the
   loss, -kl_coef x (log-ratio to the reference) at all of them.
4. Advantages by the estimator, from the critic's values or from the other completions; with a cost, those of reward and
   cost mixed by the Lagrange multiplier; whiten them over the rollout.
5. A few passes over the rollout in mini-batches: clipped policy loss, clipped value loss, one role at a time or one
   trunk for both; with ptx also the likelihood of other text. In the first `critic.pretrain_steps` the values alone.
6. Adapt the KL coefficients, move the reference.
7. Held-out: the score of completions of the evaluation prompts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_cli.catalog import CONTROLLERS, ESTIMATORS
from rlhf_cli.data.examples import Task
from rlhf_cli.data.tokens import Sample
from rlhf_cli.errors import RecipeError, counted
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.build import lineage, move, weights_of
from rlhf_cli.models.save import save_policy
from rlhf_cli.objectives.advantage import Estimate, bootstrapped
from rlhf_cli.objectives.lagrange import Lagrange, mixed
from rlhf_cli.objectives.masked import whiten
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.rollouts import generate
from rlhf_cli.rollouts.experience import Experience, token_rewards
from rlhf_cli.rollouts.figures import advantage_figures, figures, importance, said
from rlhf_cli.rollouts.loading import check_rewards
from rlhf_cli.rollouts.sampling import Sampling
from rlhf_cli.rollouts.vllm import served, serving
from rlhf_cli.runs.directory import Run
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.options import Options
from rlhf_cli.stages import common, ppo_setup
from rlhf_cli.stages.ppo_doctor import Care
from rlhf_cli.stages.ppo_losses import Lesson, Target
from rlhf_cli.stages.ppo_memory import memory_lines
from rlhf_cli.stages.ppo_roles import Roles, load_roles
from rlhf_cli.stages.ppo_rollout import Rolled, Roller, Stream
from rlhf_cli.stages.ppo_update import Updates
from rlhf_cli.train.engine import Engine


def run(recipe: PPORecipe, run: Run, display: Display, options: Options) -> None:
    """Train a policy by PPO. Raises RlhfError."""
    text = load_text(recipe.model)
    server = None if options.dry_run else serving(recipe.rollout, text.source, recipe.data.max_length, run.path)
    data = ppo_setup.read_tasks(recipe, text, display)
    data, ptx = ppo_setup.read_ptx(recipe, data, text, display)
    tasks = data.tasks_train
    everything = [*tasks, *data.tasks_eval]
    checked = check_rewards(recipe.rewards, recipe.model, text, everything, recipe.data.max_length)
    sampling = Sampling.of(recipe.rollout, text.template)
    if sampling.warning is not None:
        display.warn(sampling.warning)
    rollout = recipe.training.batch_size * recipe.ppo.mini_batches
    loader = common.make_loader(recipe, data, rollout // recipe.rollout.completions_per_prompt)
    common.tell_length(recipe, loader, display, "prompts")
    steps = common.total_steps(recipe, loader)
    if steps <= recipe.critic.pretrain_steps:
        raise RecipeError(f"all {steps} steps of the run would pre-train the critic", "critic.pretrain_steps",
                          "lower it, or train longer")  # fmt: skip
    ppo_setup.warn_of_long_limits(recipe, display)
    if options.dry_run:
        display.note(f"dry run: {len(data.train)} prompts, {counted(steps, 'rollout')} of {rollout}")
        return
    sampling = served(sampling, server)
    roles = load_roles(recipe, checked, text, display)
    learners = roles.learners(recipe)
    engine = common.open_engine(recipe, run, display, loader, learners, idle=recipe.critic.pretrain_steps)
    for line in memory_lines(roles.everyone(), [role for role, _ in learners], recipe.training):
        display.note(line)
    ppo = PPO(engine, recipe, roles, text, sampling, ptx)
    care = Care(engine, recipe, ppo.texts)

    def step() -> dict[str, float]:
        indices = loader.next()
        metrics = ppo.iterate([tasks[i] for i in indices], common.select(data.train, indices))
        return metrics | {"epoch": loader.position}

    def evaluate() -> dict[str, float]:
        if data.eval:
            return ppo.evaluate(data.tasks_eval, list(data.eval))
        few = recipe.evaluation.samples
        if few:
            ppo.evaluate(tasks[:few], list(data.train[:few]))
        return {}

    engine.evaluate = evaluate
    common.begin(engine, data, lineage(roles.policy, text, role="policy"))
    care.fit(step)
    if not ppo.progress.learned:
        display.warn("every completion of this run was cut, and ppo.truncation: drop learns from none that was: the "
                     "policy is as it was; raise rollout.max_new_tokens, or take another truncation")  # fmt: skip
    common.finish(engine, text, lambda folder: save_policy(roles.policy, text, folder))
    if server is not None:
        server.close(display.warn)


class PPO:
    """One iteration of the algorithm, and what it carries from one to the next."""

    def __init__(
        self,
        engine: Engine,
        recipe: PPORecipe,
        roles: Roles,
        text: Text,
        sampling: Sampling,
        ptx: ppo_setup.Ptx | None,
    ) -> None:
        self.engine, self.recipe, self.settings, self.seed = engine, recipe, recipe.ppo, recipe.seed
        self.roles, self.text, self.each = roles, text, recipe.rollout.completions_per_prompt
        self.entry = ESTIMATORS[self.settings.advantage.name]
        self.estimator = self.entry.load()
        self.roller = Roller(engine, recipe, roles, text, sampling, greedy=self.entry.greedy)
        self.kl = CONTROLLERS[self.settings.kl.name].load()(**common.settings_of(self.settings.kl))
        self.progress = ppo_setup.Progress()
        engine.kept |= {"kl": self.kl, "progress": self.progress}
        engine.kept |= {f"reward-{r.name}": r.state for r in roles.rewards if r.state is not None}
        self.updates = Updates(engine, recipe, roles, self.kl, ptx)
        self.lagrange: Lagrange | None = None
        if self.settings.lagrange is not None:
            self.lagrange = Lagrange(**self.settings.lagrange.model_dump())
            engine.kept["lagrange"] = self.lagrange
        if self.settings.reference_update is not None:
            engine.kept_tensors["reference"] = weights_of(roles.reference)
        self.newest: Rolled | None = None
        self.told = False
        """Whether it was said that all completions are cut; the doctor goes on watching that."""

    def iterate(self, tasks: list[Task], samples: list[Sample]) -> dict[str, float]:
        """One rollout and its updates."""
        seed = generate.mixed(self.seed, self.engine.step + 1)
        warming = self.engine.step < self.recipe.critic.pretrain_steps
        rolled = self.roller.roll_out(tasks, samples, self.each, seed, train=True)  # 1, 2
        self.newest = rolled
        if self.engine.step == 0:
            biased = bool(self.roller.sampling.truncated)
            corrected = None
            if self.roller.sampling.server is not None:
                corrected = self.settings.importance_correction is not None
            ppo_setup.check_first_rollout(
                rolled.experience, self.roles.policy, self.engine.display, biased=biased, corrected=corrected
            )
            if not bool(rolled.experience.finished.any()):
                self.engine.display.warn(ppo_setup.all_cut(self.settings))
                self.told = True
        self.progress.episodes += len(rolled.reward.raw)
        if self.lagrange is not None and rolled.cost is not None and not warming:
            self.lagrange.follow(rolled.cost.raw.tolist())
        metrics = rolled.metrics | {"episode": float(self.progress.episodes)}
        kept = rolled.only(rolled.experience.finished) if self.settings.truncation == "drop" else rolled
        metrics["completions/learned_from"] = len(kept.reward.raw) / len(rolled.reward.raw)
        if len(kept.reward.raw):
            lesson, more = self.lesson(kept, warming)  # 3, 4
            metrics |= self.figures(rolled, kept, lesson) | more
            with self.roller.phase("update", self.updates.examples(len(kept.reward.raw), warming=warming)):
                metrics |= self.updates.pretrain(lesson, seed) if warming else self.updates.learn(lesson, seed)  # 5
            self.progress.learned += 0 if warming else len(kept.reward.raw)
        else:
            if not self.told:
                self.engine.display.warn("every completion of this rollout was cut: there is nothing to learn from")
                self.told = True
            metrics |= self.figures(rolled, None, None)
        if not warming:
            self.kl.update(metrics["objective/kl"], len(rolled.reward.raw))  # 6
        moving = self.settings.reference_update
        if moving is not None and not warming and (self.engine.step + 1) % moving.every == 0:
            move(self.roles.reference, self.roles.policy, moving.alpha)
        return {name: value + 0.0 for name, value in (metrics | self.roller.clock.figures()).items()}  # no -0.0

    # --- steps 3 and 4 -----------------------------------------------------------------------------------------------

    def lesson(self, rolled: Rolled, warming: bool) -> tuple[Lesson, dict[str, float]]:
        """Advantages and the critics' targets, and the figures of the cost."""
        experience, coef = rolled.experience, self.kl.coef if self.settings.kl_in == "reward" else 0.0
        advantages, returns = self.estimate(experience, rolled.reward, coef, warming)
        targets, metrics = [(rolled.reward.values, returns)], {}
        if rolled.cost is not None and self.lagrange is not None:
            costs, cost_returns = self.estimate(experience, rolled.cost, -coef, warming)
            advantages = mixed(advantages, costs, self.lagrange.multiplier)
            targets.append((rolled.cost.values, cost_returns))
        metrics = advantage_figures(advantages, experience.mask)
        wanted = self.settings.whiten_advantages
        if self.entry.whitened if wanted is None else wanted:
            advantages = whiten(advantages, experience.mask)
        known = tuple(Target(values, goal) for values, goal in targets if values is not None)
        weights = None
        if self.settings.importance_correction is not None:
            weights, more = importance(experience, self.settings.importance_correction.cap)
            metrics |= more
        return Lesson(experience, advantages, self.roller.sampling.temperature, known, weights), metrics

    def estimate(self, experience: Experience, stream: Stream, kl_coef: float, warming: bool) -> Estimate:
        """Advantages and returns of the reward or, the sign of the KL turned, of the cost."""
        rewards = token_rewards(experience, stream.last, kl_coef) + stream.tokens
        if self.settings.whiten_rewards:
            rewards = whiten(rewards, experience.mask, shift_mean=False)
        settings = common.settings_of(self.settings.advantage)
        if warming:
            settings["lam_critic"] = 1.0
        if stream.last_values is not None:
            cut, gamma = ~experience.finished, settings["gamma"]
            rewards = bootstrapped(rewards, experience.mask, stream.last_values, cut, gamma)
        found: Estimate = self.estimator(
            rewards, stream.values, experience.mask, experience.group, stream.greedy, **settings
        )
        return found

    def figures(self, rolled: Rolled, kept: Rolled | None, lesson: Lesson | None) -> dict[str, float]:
        """Of all completions with a score; of the critics, on those that are learned from."""
        reward, cost = rolled.reward, rolled.cost
        coef = self.kl.coef
        metrics = figures(rolled.experience, reward.raw, reward.scores, None, coef)
        if kept is not None and lesson is not None:
            for target, prefix in zip(lesson.targets, ("", "cost/"), strict=False):
                judged = replace(kept.experience, values=target.old)
                found = figures(judged, kept.reward.raw, kept.reward.scores, target.returns, coef)
                metrics |= {f"{prefix}{name}": v for name, v in found.items() if name.startswith("val/")}
        if cost is not None and self.lagrange is not None:
            metrics |= {
                "cost/mean": float(cost.raw.mean()), "cost/std": float(cost.raw.std(correction=0)),
                "cost/above_threshold": float((cost.raw > self.lagrange.threshold).float().mean()),
                "lagrange/lambda": self.lagrange.multiplier,
            }  # fmt: skip
            weighed = mixed(reward.scores.mean(), cost.scores.mean(), self.lagrange.multiplier)
            metrics["objective/lagrangian"] = float(weighed) + metrics["objective/non_score_reward"]
            metrics |= {"cost/window_mean": self.lagrange.mean} if self.lagrange.costs else {}
        return metrics

    def texts(self) -> list[dict[str, Any]]:
        """A few completions of the newest rollout."""
        if self.newest is None:
            return []
        experience = self.newest.experience
        prompts = [self.roller.template.decode(s.prompt) for s in experience.rollout.samples]
        return said(experience, self.newest.reward.raw, prompts)

    # --- step 7 ------------------------------------------------------------------------------------------------------

    def evaluate(self, tasks: list[Task], samples: list[Sample]) -> dict[str, float]:
        """Scores of one completion of each held-out prompt, always drawn from the same uniforms."""
        rolled = self.roller.roll_out(tasks, samples, 1, generate.mixed(self.seed, 0), train=False)
        self.roller.clock.figures()
        experience, scores = rolled.experience, rolled.reward.raw
        rollout = experience.rollout
        for i in range(min(self.engine.recipe.evaluation.samples, len(scores))):
            self.engine.run.sample({
                "step": self.engine.step, "prompt": self.text.template.decode(rollout.samples[i].prompt),
                "completion": rollout.completions[i], "score": float(scores[i]),
                "finished": bool(experience.finished[i]),
            })  # fmt: skip
        keep = ("objective/scores", "objective/kl", "completions/mean_length", "completions/eos_rate")
        values = figures(experience, scores, scores, None, self.kl.coef)
        values = rolled.metrics | {k: values[k] for k in keep}
        if rolled.cost is not None:
            values["cost/mean"] = float(rolled.cost.raw.mean())
        return {f"eval/{k}": v for k, v in values.items()}
