"""The doctor of a PPO run: examines each step and remembers what a checkpoint must, so that a run that is killed and
started again finds, says and does the same. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_cli.recipe.settings.doctor import Action, TripwireSettings
from rlhf_cli.rollouts.health import RULES, WATCHED, Evidence, Finding, Row, examine

KL_WITHOUT_TARGET = 10.0
"""Nats of a completion that stand for a target where the controller has none."""
KL_FACTOR = 3.0
"""So many times the target is too much."""
START = 5
"""Steps whose mean is what later ones are compared with."""
GRAVE = 2
"""Severity from which a step was not one of good health."""
EVENTS = 200
"""How many events are remembered, the newest ones."""
TEXT = 2000
"""Characters kept of a text."""
ORDER: tuple[Action, ...] = ("ignore", "warn", "rollback", "pause")


@dataclass(frozen=True)
class Verdict:
    """What an examination came to. Lines are for the user: warnings unless the action is to go."""

    lines: list[str]
    action: Literal["go", "warn", "pause", "rollback", "stop"]
    """stop: a rollback is due and none is left."""
    findings: list[Finding] = field(default_factory=list)
    """The new ones."""


class Doctor:
    """Examines each step, and remembers."""

    def __init__(self, settings: TripwireSettings, target_kl: float | None, every: int) -> None:
        self.settings, self.every = settings, every
        self.wires: dict[str, Action] = settings.wires.model_dump()
        self.kl_limit = settings.thresholds.kl or KL_FACTOR * (target_kl or KL_WITHOUT_TARGET)
        self.rows: list[dict[str, float]] = []
        self.start: list[dict[str, float]] = []
        self.active: dict[str, list[Any]] = {}
        """By wire: the last step it was found in, its severity and sentence."""
        self.said = ""
        """The wire the last health line was about, `ok`, or empty before the first."""
        self.texts: dict[str, Any] = {}
        """Of the newest step in good health: {step, texts}."""
        self.events: list[dict[str, Any]] = []
        self.seen = 0
        """The last step that was examined."""
        self.ill: list[int] = []
        """Steps at which something grave was found, the newest ones."""
        self.rollbacks = 0
        self.scale = 1.0
        """Of the learning rates, by all rollbacks so far."""

    @property
    def armed(self) -> bool:
        """Whether a wire does more than warn."""
        return any(ORDER.index(action) > 1 for action in self.wires.values())

    @property
    def healthy(self) -> bool:
        """Whether nothing grave is going on."""
        return unharmed({"active": self.active})

    def trusts(self, state: Mapping[str, Any]) -> bool:
        """Whether the state of a checkpoint is one to go back to: written in good health, and the step after it, which
        is the first to show what the updates before it did, was examined and found no worse."""
        after = state["step"] + 1
        return unharmed(state["kept"]["doctor"]) and after <= self.seen and after not in self.ill

    def examine(self, step: int, metrics: Row, texts: Sequence[Mapping[str, Any]] = ()) -> Verdict:
        """The verdict on a step from its figures and a few of its texts ({prompt, completion, score, kl, length})."""
        row = {name: _finite(metrics[name]) for name in WATCHED if name in metrics and not math.isnan(metrics[name])}
        patience = self.settings.thresholds.patience
        self.rows = [*self.rows, row][-2 * patience :]
        if len(self.start) < START:
            self.start = [*self.start, row]
        enough = len(self.start) == START
        means = {n: sum(r[n] for r in self.start) / START for n in row if enough and all(n in r for r in self.start)}
        found = examine(Evidence(self.rows, means, self.settings.thresholds, self.kl_limit), self.wires)
        self.active = {wire: known for wire, known in self.active.items() if step - known[0] < patience}
        new = [finding for finding in found if finding.wire not in self.active]
        self.active |= {f.wire: [step, f.severity, f.sentence] for f in found}
        self.seen = step
        if any(finding.severity >= GRAVE for finding in found):
            self.ill = [*self.ill, step][-EVENTS:]
        action = self._action(new)
        lines = self._lines(step, new)
        for finding in new:
            self.note(step, "finding", [finding.sentence], [finding.wire], action=self.wires[finding.wire])
        if self.healthy:
            self.texts = {"step": step, "texts": [_short(text) for text in texts]}
        return Verdict(lines, action, new)

    def _action(self, new: Sequence[Finding]) -> Literal["go", "warn", "pause", "rollback", "stop"]:
        if not new:
            return "go"
        worst = max((self.wires[finding.wire] for finding in new), key=ORDER.index)
        if worst == "rollback" and self.rollbacks >= self.settings.max_rollbacks:
            return "stop"
        return "warn" if worst == "ignore" else worst

    def _lines(self, step: int, new: Sequence[Finding]) -> list[str]:
        """New findings at once; every so many steps the state of health, when it is another than was said last."""
        order = [rule.wire for rule in RULES]
        worst = min(self.active, key=order.index) if self.active else "ok"
        if new:
            self.said = worst
            return [f"health: {finding.sentence}" for finding in new]
        if step % self.every or worst == self.said:
            return []
        self.said = worst
        return ["health: ok" if worst == "ok" else f"health: still, {self.active[worst][2]}"]

    def note(
        self,
        step: int,
        kind: str,
        sentences: Sequence[str],
        wires: Sequence[str],
        texts: Sequence[Mapping[str, Any]] = (),
        **more: Any,
    ) -> None:
        """Remember an event; with texts also those of the newest step in good health."""
        event = {"step": step, "kind": kind, "wires": list(wires), "sentences": list(sentences), **more}
        if texts:
            event |= {"texts": [_short(text) for text in texts], "before": self.texts}
        self.events = [*self.events, event][-EVENTS:]

    def undone(self, before: Mapping[str, Any]) -> float:
        """After a rollback put the state of the checkpoint in place: keep what must not be forgotten of the state
        `before` it, and count it. The factor by which the checkpoint's learning rates change."""
        saved = self.scale
        self.rollbacks, self.events = before["rollbacks"] + 1, before["events"]
        self.scale = before["scale"] * self.settings.rollback_lr_factor
        return self.scale / saved

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        names = ("rows", "start", "active", "said", "texts", "events", "seen", "ill", "rollbacks", "scale")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        for name in self.state_dict():
            setattr(self, name, state[name])


def unharmed(state: Mapping[str, Any]) -> bool:
    """Whether a doctor's state is one of good health."""
    return all(severity < GRAVE for _, severity, _ in state["active"].values())


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.copysign(1e300, value)


def _short(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text with its numbers, cut where it is very long."""
    return {k: v if not isinstance(v, str) or len(v) <= TEXT else v[:TEXT] + " [...]" for k, v in text.items()}
