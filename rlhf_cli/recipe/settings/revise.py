"""A model that criticises its own completions by principles, and writes them anew."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.recipe.settings.blocks import Checked, Count, Name

CRITIQUE = "Say in what ways your last answer goes against this principle: {principle}"
REVISION = "Now write your answer anew, so that it follows the principle: {principle}"


class ReviseSettings(Checked):
    principles: Name
    """A text file with a principle a line (a constitution); each round of each completion goes by one, drawn by the
    seed."""
    critique: str = CRITIQUE
    """What the model is asked after its answer; {principle} stands for the principle."""
    revision: str = REVISION
    """What it is asked after its critique."""
    rounds: Count = 1
    """Critiques and revisions, one after the other."""

    def contradictions(self) -> Iterator[str]:
        if "{principle}" not in self.critique + self.revision:
            yield "critique and revision both do not hold {principle}: the model would not know by what"
