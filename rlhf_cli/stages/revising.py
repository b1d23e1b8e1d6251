"""Critique and revision: a model judges its own completions by a principle and writes them anew.

Source: Bai et al. 2022 (arXiv:2212.08073) section 3.1, the data of the supervised stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_cli.data.completions import messages_of
from rlhf_cli.data.examples import Message, Prompt, Task
from rlhf_cli.models.base import Text
from rlhf_cli.models.roles import Role
from rlhf_cli.recipe.principles import read_principles
from rlhf_cli.recipe.settings.revise import ReviseSettings
from rlhf_cli.rollouts.experience import draw
from rlhf_cli.rollouts.generate import mixed
from rlhf_cli.rollouts.referee import fill, principle_of
from rlhf_cli.rollouts.rewards import Rollout
from rlhf_cli.rollouts.sampling import Sampling


@dataclass
class Draft:
    """A completion on its way."""

    prompt: Prompt
    where: str
    number: int
    """Of the completion in the run: what is drawn depends on it."""
    text: str
    finished: bool
    critiques: list[str] = field(default_factory=list)
    principles: list[str] = field(default_factory=list)

    def conversation(self, *more: str) -> Task:
        """The prompt, the completion as it stands, and what is said after it, the user first."""
        roles = ("assistant", *("user", "assistant") * len(more))
        said = (Message(role, text) for role, text in zip(roles, (self.text, *more), strict=False))
        return Task((*messages_of(self.prompt), *said), self.where)


class Reviser:
    """Criticises and revises completions."""

    def __init__(self, settings: ReviseSettings, policy: Role, text: Text, sampling: Sampling, seed: int) -> None:
        """Raises RecipeError when there are no principles."""
        self.settings, self.policy, self.template, self.sampling, self.seed = (
            settings, policy, text.template, sampling, seed,
        )  # fmt: skip
        self.principles = read_principles(settings.principles, "revise.principles")
        context = getattr(text.config.get_text_config(), "max_position_embeddings", None) or 10**9
        self.room = context - sampling.max_new_tokens

    def __call__(self, rollout: Rollout, first: int) -> list[Draft]:
        """Every completion after its revisions; one whose conversation outgrows the context stays as it was. first: the
        number of the first completion. Raises DataError when the template refuses the conversation."""
        texts = zip(rollout.tasks, rollout.completions, rollout.finished, strict=True)
        drafts = [Draft(t.prompt, t.where, first + n, text, done) for n, (t, text, done) in enumerate(texts)]
        for number in range(self.settings.rounds):
            self._round([draft for draft in drafts if len(draft.critiques) == number], number)
        return drafts

    def _round(self, drafts: Sequence[Draft], number: int) -> None:
        """One critique and one revision of each."""
        by = [principle_of(self.principles, mixed(self.seed, 1 + number), draft.number) for draft in drafts]
        asked = [fill(self.settings.critique, {"{principle}": principle}) for principle in by]
        critiques = self._say(drafts, [d.conversation(a) for d, a in zip(drafts, asked, strict=True)], 2 * number)
        going = [i for i, critique in enumerate(critiques) if critique is not None]
        again = []
        for i in going:
            words = fill(self.settings.revision, {"{principle}": by[i]})
            again.append(drafts[i].conversation(asked[i], critiques[i][0], words))  # type: ignore[index]
        for i, revised in zip(going, self._say([drafts[i] for i in going], again, 2 * number + 1), strict=True):
            if revised is not None:
                drafts[i].text, drafts[i].finished = revised
                drafts[i].critiques.append(critiques[i][0])  # type: ignore[index]
                drafts[i].principles.append(by[i])

    def _say(self, drafts: Sequence[Draft], conversations: Sequence[Task], turn: int) -> list[tuple[str, bool] | None]:
        """What the model says next in each conversation and whether it ended; None where it is too long."""
        ids = [np.array(self.template.prompt_ids(c.prompt, c.where), dtype=np.int32) for c in conversations]
        fits = [i for i, prompt in enumerate(ids) if len(prompt) <= self.room]
        out: list[tuple[str, bool] | None] = [None] * len(drafts)
        if fits:
            numbers = [drafts[i].number for i in fits]
            said = draw(
                self.policy, [conversations[i] for i in fits], [ids[i] for i in fits], self.template,
                self.template.stop_ids, 1, self.sampling, mixed(self.seed, 1000 + turn), numbers,
            ).rollout  # fmt: skip
            for i, text, finished in zip(fits, said.completions, said.finished, strict=True):
                out[i] = text, finished
        return out
