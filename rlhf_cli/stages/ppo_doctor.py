"""What the doctor's verdicts set off in a PPO run: lines, a pause, a rollback, the post-mortem page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from rlhf_cli.errors import DivergedError, RlhfError
from rlhf_cli.models import processes
from rlhf_cli.recipe.schema import PPORecipe
from rlhf_cli.report.postmortem import EVENTS, FOLDER, PAGE, write_postmortem
from rlhf_cli.rollouts.doctor import Doctor, Verdict, unharmed
from rlhf_cli.runs.files import disk_error, remove_quietly, write_atomic
from rlhf_cli.runs.metrics import HINT, plain
from rlhf_cli.train.checkpoint import Checkpoint
from rlhf_cli.train.engine import Engine
from rlhf_cli.train.rollback import newest_where, roll_back

Step = Callable[[], dict[str, float]]
Texts = Callable[[], Sequence[Mapping[str, Any]]]


class Care:
    """A run under the doctor's eyes. Made before the run begins, so that checkpoints keep what the doctor knows."""

    def __init__(self, engine: Engine, recipe: PPORecipe, texts: Texts) -> None:
        """texts: a few completions of the last rollout, as `said` gives them."""
        self.engine, self.texts, self.enabled = engine, texts, recipe.doctor.enabled
        target = getattr(recipe.ppo.kl, "target_kl_per_sequence", None)
        self.doctor = Doctor(recipe.doctor, target, recipe.logging.every)
        engine.kept["doctor"] = self.doctor
        self._over = False

    def fit(self, step: Step) -> None:
        """`Engine.fit` with an examination after every step. Raises DivergedError as the wires say."""
        if not self.enabled:
            self.engine.fit(step)
            return
        self._publish()
        if self.doctor.armed and self._target() is None:
            self.engine.save()
        self.engine.spare = self._spare()
        try:
            self.engine.fit(lambda: self._watched(step))
        except DivergedError as error:
            if self._over:
                raise
            self.doctor.note(self.engine.step + 1, "diverged", [str(error)], [], self.texts(), action="stop")
            raise DivergedError([replace(p, hint=f"{p.hint}{self._page()}") for p in error.problems]) from error
        if self._intervened():
            self._page()

    def _watched(self, step: Step) -> dict[str, float]:
        """One step that stands: a step that sets off a rollback is made again from the checkpoint on."""
        engine, doctor = self.engine, self.doctor
        while True:
            metrics = step()
            number, texts = engine.step + 1, self.texts()
            verdict = doctor.examine(number, metrics, texts)
            for line in verdict.lines:
                (engine.display.note if verdict.action == "go" else engine.display.warn)(line)
            target = self._target() if verdict.action == "rollback" else None
            if target is not None:
                self._roll_back(verdict, target, {"step": number, **metrics}, texts)
                continue
            if verdict.action in ("rollback", "stop"):
                engine.run.log({"step": number, **metrics})
                self._stop(verdict, number, texts)
            if verdict.action == "pause":
                doctor.note(number, "pause", *_words(verdict), texts, action="pause")
                engine.halt = partial(self._pause, verdict, number)
            if verdict.action != "go":
                self._publish()
            engine.spare = self._spare()
            return metrics

    def _target(self) -> Checkpoint | None:
        """Where a rollback goes: to the newest whole checkpoint the doctor trusts; to the newest one written in good
        health where the run has none that is."""
        folder = self.engine.run.checkpoints
        return newest_where(folder, self.doctor.trusts) or newest_where(folder, _in_health)

    def _spare(self) -> int | None:
        """The step of the checkpoint that a rollback would go to, so that it is not deleted."""
        if not self.doctor.armed:
            return None
        found = newest_where(self.engine.run.checkpoints, self.doctor.trusts, content=False)
        return None if found is None else int(found.state["step"])

    def _roll_back(
        self, verdict: Verdict, saved: Checkpoint, row: dict[str, Any], texts: Sequence[Mapping[str, Any]]
    ) -> None:
        engine, doctor = self.engine, self.doctor
        number, to = doctor.rollbacks + 1, int(saved.state["step"])
        scale = doctor.scale * doctor.settings.rollback_lr_factor
        doctor.note(
            row["step"], "rollback", *_words(verdict), texts, action="rollback", to=to, number=number, lr_scale=scale
        )
        before = doctor.state_dict()
        engine.display.warn(
            f"rollback {number} of {doctor.settings.max_rollbacks}: from step {row['step']} to {saved.path}; "
            f"learning rates x {scale:g} from here on"
        )
        roll_back(engine, saved, row, engine.run.path / FOLDER / f"{number:02d}", lambda: doctor.undone(before))
        self._page()

    def _pause(self, verdict: Verdict, step: int) -> NoReturn:
        self._over = True
        path = self.engine.run.checkpoints / f"step-{step:06d}"
        raise DivergedError(
            f"paused by the doctor after step {step}: {'; '.join(_words(verdict)[0])}", str(self.engine.run.path),
            f"checkpoint: {path}; the same command goes on from there{self._page()}",
        )  # fmt: skip

    def _stop(self, verdict: Verdict, step: int, texts: Sequence[Mapping[str, Any]]) -> NoReturn:
        self._over = True
        self.doctor.note(step, "stop", *_words(verdict), texts, action="stop")
        saved = self._target()
        raise DivergedError(
            f"stopped by the doctor at step {step} after {self.doctor.rollbacks} rollbacks: "
            f"{'; '.join(_words(verdict)[0])}", str(self.engine.run.path),
            f"last checkpoint in good health: {saved.path if saved else 'none'}; change the recipe{self._page()}",
        )  # fmt: skip

    def _intervened(self) -> bool:
        """Whether more happened than findings."""
        return any(event["kind"] != "finding" for event in self.doctor.events)

    def _page(self) -> str:
        """Bring doctor.jsonl up to date and write the post-mortem page; words that name it. A page that cannot be
        written does not take the place of the trouble it is about."""
        self._publish()
        if processes.rank() != 0:
            return ""
        try:
            return f"; post-mortem: {write_postmortem(self.engine.run.path)}"
        except RlhfError as error:
            self.engine.display.warn(f"no post-mortem page: {error}")
            return ""

    def _publish(self) -> None:
        """doctor.jsonl: all events so far. What an earlier attempt left and this one has no word for is removed."""
        folder = self.engine.run.path
        if processes.rank() != 0:
            return
        if not self._intervened():
            remove_quietly(folder / PAGE)
        if not self.doctor.events:
            remove_quietly(folder / EVENTS)
            return
        lines = (json.dumps(plain(event), ensure_ascii=False, allow_nan=False) + "\n" for event in self.doctor.events)
        try:
            write_atomic(folder / EVENTS, "".join(lines).encode("utf-8", errors="surrogatepass"))
        except OSError as error:
            raise disk_error(error, "cannot be written", folder / EVENTS, HINT) from error


def _in_health(state: dict[str, Any]) -> bool:
    return unharmed(state["kept"]["doctor"])


def _words(verdict: Verdict) -> tuple[list[str], list[str]]:
    """Sentences and wires of what is new."""
    return [finding.sentence for finding in verdict.findings], [finding.wire for finding in verdict.findings]
